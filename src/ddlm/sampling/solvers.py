"""Solvers of the probability-flow ODE dx/dt = (x - x0_hat) / t and its SDE, one step each.

Every solver here is linear in what it has seen: a step is one or two *stages*, each of which is one evaluation of
the network followed by

    x <- a x + b x0_hat + c m + s eps

with coefficients that depend on the times alone, and m the one tensor a solver may remember. They are formed in
float64 when a request is made, so sequences at different times, even with different solvers, advance in one batch
by one fused expression, and the engine's loop knows no solver by name.

n steps of a grid; x, x0_hat, m, eps: (B, T, D); times and coefficients: (n,) or (B,).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ddlm.sampling.values import number
from ddlm.types import ConfigError, expand_time


class Remember(enum.IntEnum):
    """What a stage leaves in the solver's memory m for the next one."""

    KEEP = 0
    STATE = 1
    """x before the stage."""
    ESTIMATE = 2
    """x0_hat of the stage."""


@dataclass(frozen=True)
class Stage:
    """Coefficients of one stage for every step of a grid, ``(n,)`` float64 each.

    Attributes:
        time: Time of the evaluation.
        a: Of x.
        b: Of x0_hat.
        c: Of the memory.
        s: Of fresh standard normal noise.
        remember: What the memory becomes.
    """

    time: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    s: Tensor
    remember: Remember = Remember.KEEP

    def apply(
        self, x: Tensor, x0_hat: Tensor, memory: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One stage for a batch whose sequences stand at the steps this was made for: ``(x, memory)``."""
        a, b, c, s = (expand_time(k.to(x.dtype), x) for k in (self.a, self.b, self.c, self.s))
        moved = a * x + b * x0_hat + c * memory
        if noise is not None:
            moved = moved + s * noise
        kept = {Remember.KEEP: memory, Remember.STATE: x, Remember.ESTIMATE: x0_hat}
        return moved, kept[self.remember]


class Solver(Protocol):
    """One step from ``t`` to ``t_next`` for any number of sequences at once.

    Attributes:
        name: As on the command line.
        order: Order of the global error in the step size (weak order for a stochastic solver).
        evaluations: Network evaluations of a step.
        stochastic: Draws fresh noise in every step.
    """

    @property
    def name(self) -> str:
        """See above; so the next three."""
        ...

    @property
    def order(self) -> int: ...  # noqa: D102

    @property
    def evaluations(self) -> int: ...  # noqa: D102

    @property
    def stochastic(self) -> bool: ...  # noqa: D102

    def stages(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> list[Stage]:
        """Stages of the steps ``t -> t_next``, all ``(n,)``; ``t_previous`` is NaN where there is none."""
        ...


@dataclass(frozen=True)
class Euler:
    """x + (t' - t) (x - x0_hat) / t, the paper's sampler (DDLM, section 3.2; CDCD, section 3.1)."""

    name: str = "euler"
    order: int = 1
    evaluations: int = 1
    stochastic: bool = False

    def stages(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> list[Stage]:
        """Gives x' = r x + (1 - r) x0_hat with r = t' / t."""
        r = t_next / t
        return [Stage(t, r, 1 - r, torch.zeros_like(t), torch.zeros_like(t))]


@dataclass(frozen=True)
class Heun:
    """EDM, algorithm 1 without churn: an Euler step, then the mean of the slopes at both ends."""

    name: str = "heun"
    order: int = 2
    evaluations: int = 2
    stochastic: bool = False

    def stages(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> list[Stage]:
        """Predict x_p = x + h d and remember x; then x' = x + h/2 (d + d_p) = (x + x_p)/2 + h/2 d_p."""
        r = t_next / t
        zero = torch.zeros_like(t)
        predict = Stage(t, r, 1 - r, zero, zero, Remember.STATE)
        half = (t_next - t) / (2 * t_next)  # h / (2 t'), of d_p = (x_p - x0_hat_p) / t'
        correct = Stage(t_next, 0.5 + half, -half, torch.full_like(t, 0.5), zero)
        return [predict, correct]


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, algorithm 2, for alpha = 1 and sigma = t.

    Exponential integrator in lambda = -log t; x0_hat is extrapolated linearly from the last two steps.
    """

    name: str = "dpmpp_2m"
    order: int = 2
    evaluations: int = 1
    stochastic: bool = False

    def stages(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> list[Stage]:
        """Gives x' = r x + (1 - r) ((1 + w) x0_hat - w x0_hat_previous), w = h / (2 h_previous); first step w = 0."""
        r = t_next / t
        h, h_previous = (t / t_next).log(), (t_previous / t).log()
        w = torch.where(t_previous.isnan(), torch.zeros_like(t), h / (2 * h_previous))
        zero = torch.zeros_like(t)
        return [Stage(t, r, (1 - r) * (1 + w), -(1 - r) * w, zero, Remember.ESTIMATE)]


@dataclass(frozen=True)
class Ancestral:
    """The reverse SDE by ancestral sampling (DDPM's posterior, arXiv 2006.11239, for alpha = 1 and sigma = t).

    x' ~ N(x0_hat + (t_down / t) (x - x0_hat), t_up^2) with t_up = eta t' sqrt(1 - t'^2 / t^2) and
    t_down^2 + t_up^2 = t'^2: for eta = 1 exactly q(x' | x, x_0 = x0_hat), for eta = 0 Euler.

    Args:
        eta: Share of noise put back, 0..1.

    Raises:
        ConfigError: when eta is outside 0..1.
    """

    eta: float = 1.0
    name: str = "sde"
    order: int = 1
    evaluations: int = 1
    stochastic: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", number("eta", self.eta))
        if not 0.0 <= self.eta <= 1.0:
            raise ConfigError(f"eta={self.eta:g} was given, the sde solver needs 0 <= eta <= 1")

    def stages(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> list[Stage]:
        """Gives x' = r x + (1 - r) x0_hat + t_up eps with r = t_down / t."""
        up = self.eta * t_next * (1 - (t_next / t).square()).sqrt()
        r = (t_next.square() - up.square()).sqrt() / t
        return [Stage(t, r, 1 - r, torch.zeros_like(t), up)]


NAMES = ("euler", "heun", "dpmpp_2m", "sde")


def make(solver: str | Solver) -> Solver:
    """Solver of a request: itself, or by name.

    Raises:
        ConfigError: for an unknown name, and for what is no solver, such as a class of solvers.
    """
    if not isinstance(solver, str):
        if isinstance(solver, type) or not hasattr(solver, "stages"):
            raise ConfigError(
                f"solver={solver!r} was given, it must be one of {', '.join(NAMES)}, or a solver such as Euler()"
            )
        return solver
    solvers: tuple[Solver, ...] = (Euler(), Heun(), DPMpp2M(), Ancestral())
    known = {s.name: s for s in solvers}
    if solver not in known:
        raise ConfigError(f"solver '{solver}' is unknown: choose one of {', '.join(NAMES)}")
    return known[solver]


@dataclass(frozen=True)
class Plan:
    """Everything one request will do, evaluation by evaluation, made before it starts.

    Attributes:
        coefficients: ``(n, 8)`` float64, one row an evaluation: :data:`COLUMNS`.
        looks: Number of steps, i.e. of posteriors that are looked at.
        stochastic: Whether noise is drawn.
    """

    coefficients: Tensor
    looks: int
    stochastic: bool


COLUMNS = ("time", "a", "b", "c", "s", "remember", "step", "last")
"""Columns of a plan; ``step`` is 1..looks where the posterior is looked at and 0 at a solver's inner stage."""


def plan(solver: Solver, times: Tensor) -> Plan:
    """Lay out ``times (n,)`` for a solver: n looks, n - 1 moves, and the last look where the text is read off.

    Requests of one grid share their plan, which nobody changes: laying it out costs the host more than all else about
    a request.
    """
    own: Any = solver
    # one of somebody else's may be anything
    if type(own) in (Euler, Heun, DPMpp2M, Ancestral) and len(times) <= _LONGEST_SHARED:
        return _shared_plan(own, tuple(times.tolist()), times.dtype)
    return _lay_out(solver, times)


_LONGEST_SHARED = 2000  # looks; longer plans are laid out anew rather than kept, megabytes each


@lru_cache(maxsize=64)
def _shared_plan(solver: Any, times: tuple[float, ...], dtype: torch.dtype) -> Plan:
    return _lay_out(solver, torch.tensor(times, dtype=dtype))


def _lay_out(solver: Solver, times: Tensor) -> Plan:
    n = len(times)
    rows = []
    if n > 1:
        nan = times.new_full((1,), float("nan"))
        stages = solver.stages(times[:-1], times[1:], torch.cat([nan, times[:-2]]))
        step = torch.arange(1, n, dtype=torch.float64)
        for index, stage in enumerate(stages):
            remember = torch.full_like(step, float(stage.remember))
            look = step if index == 0 else torch.zeros_like(step)
            columns = (stage.time, stage.a, stage.b, stage.c, stage.s, remember, look)
            rows.append(torch.stack([*columns, torch.zeros_like(step)], dim=-1))  # (n - 1, 8)
    final = times.new_tensor([[float(times[-1]), 1.0, 0.0, 0.0, 0.0, 0.0, float(n), 1.0]])
    moves = torch.stack(rows, dim=1).flatten(0, 1) if rows else times.new_zeros(0, len(COLUMNS))
    return Plan(torch.cat([moves, final]), looks=n, stochastic=solver.stochastic)
