"""Time grids: the n times t_max = t_1 > ... > t_n = t_min at which the posterior is looked at.

A generation of n steps looks at n posteriors; the last one, at ``t_min``, is the one the text is read off, so no
evaluation of the network is spent on a move that nobody looks at. Times are float64: they are made once a request.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import TimeSampler
from ddlm.types import ConfigError

NAMES = ("uniform", "karras", "warp")


def uniform(process: NoiseProcess, steps: int) -> Tensor:
    """``steps`` times evenly spaced from t_max to t_min (DDLM's grid), ``(steps,)`` float64."""
    _check_steps(steps)
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
    _check_steps(steps)
    if not rho >= 1:
        raise ConfigError(f"rho={rho:g} was given, the Karras grid needs at least 1 (EDM uses 7)")
    u = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    high, low = process.t_max ** (1 / rho), process.t_min ** (1 / rho)
    times = (high + u * (low - high)) ** rho
    return _exact_ends(times, process)


def warp(process: NoiseProcess, steps: int, time_warp: TimeSampler) -> Tensor:
    """Quantiles of a distribution of t: with a learned warp every step decides equally much (CDCD, section 3.4)."""
    _check_steps(steps)
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
    """Times from a tensor, an array or a list; :func:`check` looks at them.

    Raises:
        ConfigError: for what holds no numbers.
    """
    if isinstance(times, Tensor):
        return times
    try:
        return torch.tensor([float(t) for t in times], dtype=torch.float64)
    except (TypeError, ValueError):
        shown = " ".join(reprlib.repr(times).split())
        raise ConfigError(
            f"grid={shown} was given: choose one of {', '.join(NAMES)}, or give times"
        ) from None


def check(times: Tensor) -> Tensor:
    """Return ``times (n,)`` as float64 after checking that they are positive, finite and strictly descending.

    Raises:
        ConfigError: naming the first pair that does not descend.
    """
    if times.dim() != 1 or times.numel() == 0:
        raise ConfigError(
            f"a time grid of shape {tuple(times.shape)} was given, (n,) with n >= 1 is needed"
        )
    times = times.detach().double().cpu()
    if not bool(torch.isfinite(times).all()) or not bool((times > 0).all()):
        raise ConfigError("every time of a grid must be positive and finite")
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


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(
            f"{steps} steps were asked for, generation needs at least 1: change steps"
        )
