"""What is asked of the engine and what it gives back.

T positions of the request, n steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ddlm.config import LEAST_TEMPERATURE, MOST_STEPS
from ddlm.sampling import grid, halting, solvers
from ddlm.sampling.values import number, sequence, whole
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from ddlm.diffusion.process import NoiseProcess
    from ddlm.diffusion.time_warp import TimeSampler
    from ddlm.sampling.trace import Trace

_MOST = 1e38  # what a number of the engine, in float32, can hold
_FARTHEST = 1e6  # how far a state may be stretched, whose square float32 has to hold as well


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to generate; everything random in it comes from ``seed``.

    Attributes:
        tokens: ``(T,)`` int64; whatever is given at noised positions is taken as 0.
        is_noised: ``(T,)`` bool, True where a token is to be generated.
        times: Grid from t_max to t_min, ``(n,)``: n steps.
        solver: How to move along it.
        halt: When to stop early, or None for the whole grid.
        noise_scale: Standard deviation of the initial noise relative to t_max (DDLM, Table 8).
        temperature: Divides the logits before the expectation (CDCD's score temperature); 0.001 or more.
        top_k: Only the k most probable tokens enter the expectation; 0 for all.
        guidance: Weight w of classifier-free guidance x0_u + w (x0_c - x0_u); 1 for none (see ``engine``).
        seed: Seed of the request's own generator (0..2^63 - 1).
        trace: Record the trajectory (:class:`ddlm.sampling.trace.Trace`); rounds of refinement are not in it.
        refine: Rounds after the last step, each of which draws a part of the tokens anew given all the others
            (:mod:`ddlm.sampling.refine`).
    """

    tokens: Tensor
    is_noised: Tensor
    times: Tensor
    solver: solvers.Solver
    halt: halting.Criterion | None = None
    noise_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    guidance: float = 1.0
    seed: int = 0
    trace: bool = False
    refine: int = 0

    def __post_init__(self) -> None:
        made: dict[str, object] = dict(
            zip(("tokens", "is_noised"), sequence(self.tokens, self.is_noised), strict=True)
        )
        times = self.times if isinstance(self.times, Tensor) else grid.given(self.times)
        made["times"] = grid.check(times)
        made["solver"], made["halt"] = solvers.make(self.solver), halting.make(self.halt)
        made |= {k: number(k, getattr(self, k)) for k in ("noise_scale", "temperature", "guidance")}
        made |= {k: whole(k, getattr(self, k)) for k in ("top_k", "seed", "refine")}
        for name, value in made.items():
            object.__setattr__(self, name, value)
        for name, ok, need in (
            ("noise_scale", 0 <= self.noise_scale <= _FARTHEST, f"between 0 and {_FARTHEST:.1g}"),
            (
                "temperature",
                LEAST_TEMPERATURE <= self.temperature <= _MOST,
                f"between {LEAST_TEMPERATURE:g} and {_MOST:.1g}",
            ),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or more, and below 2^31"),
            (
                "guidance",
                abs(self.guidance) <= _FARTHEST,
                f"between -{_FARTHEST:.1g} and {_FARTHEST:.1g}",
            ),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("refine", 0 <= self.refine <= MOST_STEPS, f"between 0 and {MOST_STEPS} rounds"),
        ):
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)} was given, it must be {need}")

    @property
    def steps(self) -> int:
        """Steps allowed, rounds of refinement not among them."""
        return len(self.times)


def make_request(
    tokens: Tensor,
    is_noised: Tensor,
    process: NoiseProcess,
    *,
    steps: int = 50,
    solver: str | solvers.Solver = "euler",
    grid_name: str | Tensor | Iterable[float] = "uniform",
    time_warp: TimeSampler | None = None,
    rho: float = 7.0,
    halt: halting.Criterion | str | None = None,
    noise_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    seed: int = 0,
    trace: bool = False,
    refine: int = 0,
) -> Request:
    """A request from names and numbers; see :class:`Request`, :func:`ddlm.sampling.grid.make`.

    Raises:
        ConfigError: for anything out of range.
    """
    times = (
        grid.make(grid_name, process, steps, rho=rho, time_warp=time_warp)
        if isinstance(grid_name, str)
        else grid.given(grid_name)
    )
    return Request(
        tokens=tokens,
        is_noised=is_noised,
        times=times,
        solver=solvers.make(solver),
        halt=halting.make(halt),
        noise_scale=noise_scale,
        temperature=temperature,
        top_k=top_k,
        guidance=guidance,
        seed=seed,
        trace=trace,
        refine=refine,
    )


@dataclass(frozen=True, eq=False)
class Result:
    """A generated sequence, on the CPU.

    Attributes:
        id: What :meth:`ddlm.sampling.engine.Engine.submit` returned.
        tokens: ``(T,)`` int64; given tokens where nothing was to be generated.
        steps: Steps made, i.e. posteriors looked at, rounds of refinement among them.
        evaluations: Network evaluations made (two a step for Heun, twice that with guidance).
        reason: One of :data:`ddlm.sampling.halting.REASONS`, or ``"cancelled"``.
        x: State at the last look before any refinement, ``(T, D)``.
        entropy: Entropy of the last posterior at every position in nats, ``(T,)``; 0 where given.
        trace: The trajectory, when it was asked for.
        last: Its state as of the last look, with the tokens it ended with; None if it was never looked at.
    """

    id: int
    tokens: Tensor
    steps: int
    evaluations: int
    reason: str
    x: Tensor
    entropy: Tensor
    trace: Trace | None = None
    last: Progress | None = None


@dataclass(frozen=True, eq=False)
class Progress:
    """A sequence on its way, on the CPU.

    Attributes:
        id: What ``submit`` returned.
        step: Steps made so far.
        steps: Steps allowed, rounds of refinement among them.
        tokens: Argmax of the posterior, ``(T,)``.
        entropy: Nats, ``(T,)``; 0 where given.
        stable: Steps since the last switch of each position, ``(T,)`` int64.
        is_noised: False where the token is given, or frozen with no round to come, ``(T,)``.
    """

    id: int
    step: int
    steps: int
    tokens: Tensor
    entropy: Tensor
    stable: Tensor
    is_noised: Tensor


@dataclass(frozen=True, eq=False)
class SampleResult:
    """What :func:`ddlm.sampling.sample` returns.

    Attributes:
        tokens: ``(B, T)`` int64.
        steps: Steps made by each sequence, ``(B,)`` int64.
        reasons: Why each ended, B strings.
        x: Last state, ``(B, T, D)``.
        trace: One :class:`ddlm.sampling.trace.Trace` a sequence (None for one with nothing to generate), or None.
    """

    tokens: Tensor
    steps: Tensor
    reasons: list[str]
    x: Tensor
    trace: list[Trace | None] | None = None
