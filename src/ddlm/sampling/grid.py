"""Time grids: the n times t_max = t_1 > ... > t_n = t_min at which the posterior is looked at.

A generation of n steps looks at n posteriors; the last one, at ``t_min``, is the one the text is read off, so no
evaluation of the network is spent on a move that nobody looks at. Times are float64: they are made once a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from ddlm.config import MOST_STEPS
from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import TimeSampler
from ddlm.sampling.values import number, shown, whole
from ddlm.types import ConfigError

NAMES = ("uniform", "karras", "warp")
_RANGE = (1e-10, 1e10)  # of times whose squares, times those of a state, float32 holds


def uniform(process: NoiseProcess, steps: int) -> Tensor:
    """``steps`` times evenly spaced from t_max to t_min (DDLM's grid), ``(steps,)`` float64."""
    steps = _check_steps(steps)
    return torch.linspace(process.t_max, process.t_min, steps, dtype=torch.float64)


def karras(process: NoiseProcess, steps: int, rho: float = 7.0) -> Tensor:
    """Evenly spaced in t^(1/rho) (EDM, equation 5): rho = 1 is uniform, larger spends more steps near t_min.

    Args:
        process: Gives the range of t.
        steps: Number of times.
        rho: Exponent, at least 1.

    Raises:
        ConfigError: for fewer than one step or rho < 1.
    """
    steps = _check_steps(steps)
    rho = number("rho", rho)
    if not rho >= 1:
        raise ConfigError(f"rho={rho:g} was given, the Karras grid needs at least 1 (EDM uses 7)")
    u = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    high, low = process.t_max ** (1 / rho), process.t_min ** (1 / rho)
    times = (high + u * (low - high)) ** rho
    return _exact_ends(times, process)


def warp(process: NoiseProcess, steps: int, time_warp: TimeSampler) -> Tensor:
    """Quantiles of a distribution of t: with a learned warp every step decides equally much (CDCD, section 3.4)."""
    steps = _check_steps(steps)
    u = torch.linspace(1.0, 0.0, steps, dtype=torch.float64)
    with torch.no_grad():
        times = time_warp.quantile(u).double().cpu()
    return check(_exact_ends(times, process))


def make(
    name: str,
    process: NoiseProcess,
    steps: int,
    *,
    rho: float = 7.0,
    time_warp: TimeSampler | None = None,
) -> Tensor:
    """Grid by name: ``uniform``, ``karras`` or ``warp``.

    Raises:
        ConfigError: for an unknown name, no steps, or ``warp`` with a model that has no learned time warp.
    """
    if name == "uniform":
        return uniform(process, steps)
    if name == "karras":
        return karras(process, steps, rho)
    if name == "warp":
        if time_warp is None:
            raise ConfigError(
                "grid 'warp' needs a learned time warp, this model has none: choose uniform or karras"
            )
        return warp(process, steps, time_warp)
    raise ConfigError(f"grid '{name}' is unknown: choose one of {', '.join(NAMES)}")


def given(times: Tensor | Iterable[float]) -> Tensor:
    """Times from a tensor, an array or any iterable, in a tensor of their own; :func:`check` looks at them.

    Raises:
        ConfigError: for what holds no numbers.
    """
    try:
        if isinstance(times, Tensor) and not times.is_complex():
            return times.detach().to("cpu", torch.float64, copy=True)
        if not isinstance(times, str | bytes | Tensor):
            # one more than there may be: it need not end
            numbers = [float(t) for t in islice(times, MOST_STEPS + 1)]
            return torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ConfigError(
        f"{shown('grid', times)} was given: choose one of {', '.join(NAMES)}, or give times"
    )


def once(grid: str | Tensor | Iterable[float]) -> str | Tensor:
    """A grid that serves any number of sequences: a name, or times, which an iterator gives only once."""
    return grid if isinstance(grid, str) else given(grid)


def check(times: Tensor) -> Tensor:
    """Return ``times (n,)`` as float64 after checking that they are positive, finite and strictly descending.

    Raises:
        ConfigError: naming the first pair that does not descend, for more than :data:`MOST_STEPS` times, and for
            times whose squares float32 does not hold.
    """
    if times.dim() != 1 or times.numel() == 0:
        raise ConfigError(
            f"a time grid of shape {tuple(times.shape)} was given, (n,) with n >= 1 is needed"
        )
    if len(times) > MOST_STEPS:
        raise ConfigError(f"a time grid has more than {MOST_STEPS} times: give fewer")
    times = times.detach().double().cpu()
    low, high = (float(t) for t in times.aminmax())
    if not 0 < low <= high < float("inf"):  # whatever is not a number compares as neither
        raise ConfigError("every time of a grid must be positive and finite")
    if low < _RANGE[0] or high > _RANGE[1]:
        raise ConfigError(
            f"a time grid between {low:g} and {high:g} was given, its times must be between "
            f"{_RANGE[0]:g} and {_RANGE[1]:g}"
        )
    rises = (times[1:] >= times[:-1]).nonzero().flatten()
    if rises.numel():
        i = int(rises[0])
        raise ConfigError(
            f"a time grid must descend from t_max to t_min: entry {i + 2} is {times[i + 1]:g} after {times[i]:g}"
        )
    return times


def _exact_ends(times: Tensor, process: NoiseProcess) -> Tensor:
    """Put t_max and t_min exactly at the ends (powers and interpolation round)."""
    times = times.clone()
    times[0] = process.t_max
    if len(times) > 1:
        times[-1] = process.t_min
    return times


def _check_steps(steps: int) -> int:
    steps = whole("steps", steps)
    if steps > MOST_STEPS:
        raise ConfigError(f"{steps} steps were asked for, at most {MOST_STEPS} can be: lower steps")
    if steps < 1:
        raise ConfigError(
            f"{steps} steps were asked for, generation needs at least 1: change steps"
        )
    return steps
