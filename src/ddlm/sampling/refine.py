"""Rounds after the last step in which a part of the tokens is drawn anew, given all the others.

The posterior of a step is a product over positions: tokens that are decided together at the last levels of noise do not
know of each other, and neighbouring pieces of a word come from two words. A round noises every fourth of the written
positions to t_max, as training does, keeps all other tokens as given, and draws from the posterior of one look: the
neighbours of what is drawn are known now. Noise given tokens, tokens given noise and neighbours: rounds are a Gibbs
sampler whose target at temperature 1 is what the model believes, as far as its conditionals belong to one distribution
(dependency networks, Heckerman et al. 2000; for masked language models Wang & Cho 2019, arXiv 1902.04094). Among
samplers they are the corrector of a predictor-corrector scheme (Song et al. 2021, arXiv 2011.13456, section 4.2).

T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddlm.sampling import solvers

if TYPE_CHECKING:
    from ddlm.sampling.request import Request

EVERY = 4
"""Of the written positions one in so many is drawn anew in a round, so that no two neighbours are."""


def parts(is_noised: Tensor, rounds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of each round, ``(T,)`` bool: all written ones have had their turn before one has a second.

    Args:
        is_noised: Written positions, ``(T,)``.
        rounds: How many.
        generator: Of the order, drawn anew for every turn.
    """
    rank = is_noised.long().cumsum(0) - 1  # (T,), among the written positions
    every = min(EVERY, int(is_noised.sum()))
    order: list[int] = []
    for _ in range(rounds if every else 0):
        order = order or torch.randperm(every, generator=generator).tolist()
        yield is_noised & (rank % every == order.pop())


def round_request(request: Request, tokens: Tensor, part: Tensor) -> Request:
    """One look at t_max that draws ``part (T,)`` of ``tokens (T,)`` anew; ``request`` is the one that is refined."""
    return replace(
        request,
        tokens=tokens,
        is_noised=part,
        times=request.times[:1],
        solver=solvers.Euler(),
        halt=None,
        noise_scale=1.0,
        guidance=1.0,
        trace=False,
        refine=0,
    )
