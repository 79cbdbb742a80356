"""Sampling: time grids, solvers, halting, templates and the one loop that uses them. Knows no network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import TimeSampler
from ddlm.sampling import grid, halting, solvers
from ddlm.sampling.engine import Engine
from ddlm.sampling.grid import once
from ddlm.sampling.request import Progress, Request, Result, SampleResult, make_request
from ddlm.sampling.trace import Trace
from ddlm.sampling.values import shown, whole
from ddlm.types import ConfigError, Denoiser, check_shape

__all__ = [
    "Engine",
    "Progress",
    "Request",
    "Result",
    "SampleResult",
    "Trace",
    "grid",
    "halting",
    "make_request",
    "sample",
    "solvers",
]


def sample(
    denoiser: Denoiser,
    tokens: Tensor,
    is_noised: Tensor,
    process: NoiseProcess,
    steps: int = 50,
    solver: str | solvers.Solver = "euler",
    halt: halting.Criterion | str | None = None,
    noise_scale: float = 1.0,
    generator: torch.Generator | None = None,
    trace: bool = False,
    *,
    grid: str | Tensor | Iterable[float] = "uniform",
    time_warp: TimeSampler | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    refine: int = 0,
    slots: int = 64,
) -> SampleResult:
    """Generate a batch: a thin call of :class:`Engine`, the only loop.

    Args:
        denoiser: The network (or any :class:`ddlm.types.Denoiser`).
        tokens: ``(B, T)`` int64; given where ``is_noised`` is False.
        is_noised: ``(B, T)`` bool, True where a token is to be generated.
        process: Noise process of the denoiser.
        steps: Posteriors to look at, from t_max to t_min (DDLM: 50).
        solver: ``euler``, ``heun``, ``dpmpp_2m``, ``sde`` or a :class:`ddlm.sampling.solvers.Solver`.
        halt: Early exit of each sequence: a criterion of :mod:`ddlm.sampling.halting`, or text (``"patience:25"``).
        noise_scale: Standard deviation of the initial noise relative to t_max (DDLM, Table 8).
        generator: Source of one seed a sequence (CPU); None takes the seeds 0..B-1. A sequence depends on its
            seed alone, never on the batch it is in.
        trace: Record each trajectory.
        grid: ``uniform``, ``karras``, ``warp`` or times ``(n,)``, which replace ``steps``.
        time_warp: Learned warp, for the grid ``warp``.
        temperature: Divides the posterior's logits.
        top_k: Only the k most probable tokens enter the expectation; 0 for all.
        guidance: Weight of classifier-free guidance, 1 for none.
        refine: Rounds after the last step that draw a part of the tokens anew, see :mod:`ddlm.sampling.refine`.
        slots: Sequences advanced together.

    Raises:
        ValueError: for tokens or is_noised of another shape.
        ConfigError: for anything out of range.
    """
    tokens, is_noised = torch.as_tensor(tokens), torch.as_tensor(is_noised)
    check_shape("tokens", tokens, None, None)
    check_shape("is_noised", is_noised, *tokens.shape)
    batch, length = tokens.shape
    times = once(grid)
    seeds = list(range(batch))
    if not isinstance(generator, torch.Generator | None):
        raise ConfigError(
            f"{shown('generator', generator)} was given, write torch.Generator().manual_seed(0)"
        )
    if generator is not None:
        high = 2**63 - 1
        seeds = torch.randint(high, (batch,), generator=generator, device=generator.device).tolist()
    requests = [
        make_request(
            tokens[i],
            is_noised[i],
            process,
            steps=steps,
            solver=solver,
            grid_name=times,
            time_warp=time_warp,
            halt=halt,
            noise_scale=noise_scale,
            temperature=temperature,
            top_k=top_k,
            guidance=guidance,
            refine=refine,
            seed=seeds[i],
            trace=trace,
        )
        for i in range(batch)
    ]
    slots = min(whole("slots", slots), max(1, batch))
    engine = Engine(denoiser, process, slots=slots, length=max(1, length))
    if batch == 0:
        x = torch.empty(0, length, denoiser.embeddings().shape[1], dtype=engine.dtype)
        steps_made = torch.empty(0, dtype=torch.int64)
        return SampleResult(
            tokens.clone(), steps_made, [], x.to(tokens.device), [] if trace else None
        )
    results = list(engine.run(requests))
    return SampleResult(
        tokens=torch.stack([r.tokens for r in results]).to(tokens.device),
        steps=torch.tensor([r.steps for r in results]),
        reasons=[r.reason for r in results],
        x=torch.stack([r.x for r in results]).to(tokens.device),
        trace=[r.trace for r in results] if trace else None,
    )
