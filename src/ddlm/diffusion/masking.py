"""Which positions are noised in training: prefix, random, mixed, span (DDLM, section 3.4; CDCD, section 4), blend.

B sequences, T positions. Every function returns ``is_noised (B, T)`` bool, True where noise is applied and the loss
counts. A row with nothing noised teaches nothing and is redrawn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddlm.types import ConfigError

Mask = Callable[..., Tensor]


def prefix_mask(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Keep a prefix of uniformly drawn length 0..T-1, noise the rest."""
    _check(batch, length)
    kept = torch.randint(0, length, (batch, 1), generator=generator, device=generator.device)
    return torch.arange(length, device=generator.device) >= kept


def random_mask(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Noise every position with a rate drawn per sequence, uniform in (0, 1] (as in masked language models)."""
    _check(batch, length)

    def draw(rows: int) -> Tensor:
        rate = 1.0 - _uniform((rows, 1), generator)  # rand is in [0, 1): this is in (0, 1]
        return _uniform((rows, length), generator) < rate

    return _redraw_empty(draw, batch)


def mixed_mask(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random positions inside the continuation of a random prefix (CDCD)."""
    _check(batch, length)

    def draw(rows: int) -> Tensor:
        kept = torch.randint(0, length, (rows, 1), generator=generator, device=generator.device)
        rate = 1.0 - _uniform((rows, 1), generator)
        chosen = _uniform((rows, length), generator) < rate
        return chosen & (torch.arange(length, device=generator.device) >= kept)

    return _redraw_empty(draw, batch)


def span_mask(
    batch: int, length: int, generator: torch.Generator, k_max: int | None = None
) -> Tensor:
    """Cut into k spans, k uniform in 1..k_max, and noise each entirely with probability 1/2 (DDLM).

    The k - 1 distinct cut points are uniform in 1..T-1. Without k_max it is the paper's 9, or T if that is less.

    Raises:
        ConfigError: when k_max is not in 1..T.
    """
    _check(batch, length)
    if k_max is None:
        k_max = min(9, length)
    if not 1 <= k_max <= length:
        raise ConfigError(
            f"mask.k_max={k_max} was given, 1..{length} (the sequence length) is needed"
        )

    def draw(rows: int) -> Tensor:
        k = torch.randint(1, k_max + 1, (rows, 1), generator=generator, device=generator.device)
        order = (
            _uniform((rows, length - 1), generator).argsort(-1).argsort(-1)
        )  # ranks: distinct points
        is_cut = torch.nn.functional.pad(order < k - 1, (1, 0))  # (B, T); a span starts at each cut
        coin = _uniform((rows, k_max), generator) < 0.5
        return coin.gather(1, is_cut.long().cumsum(-1))

    return _redraw_empty(draw, batch)


def blend_mask(
    batch: int, length: int, generator: torch.Generator, k_max: int | None = None
) -> Tensor:
    """Each row by one of four rules with equal probability: everything noised, prefix, random, span.

    Not in the papers. Rows that are noised throughout, the only ones that unconditional generation meets, are rare
    under each rule alone; kept neighbours, from which a short run learns to use context, are frequent under all others.
    """
    _check(batch, length)
    everything = torch.ones(batch, length, dtype=torch.bool, device=generator.device)
    rules = torch.stack(
        [
            everything,
            prefix_mask(batch, length, generator),
            random_mask(batch, length, generator),
            span_mask(batch, length, generator, k_max),
        ]
    )  # (4, B, T)
    which = torch.randint(0, len(rules), (batch,), generator=generator, device=generator.device)
    return rules[which, torch.arange(batch, device=generator.device)]


STRATEGIES: dict[str, Mask] = {
    "prefix": prefix_mask,
    "random": random_mask,
    "mixed": mixed_mask,
    "span": span_mask,
    "blend": blend_mask,
}
TAKES_SPANS = ("span", "blend")  # strategies with a parameter k_max


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _check(batch: int, length: int) -> None:
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")


def _redraw_empty(draw: Callable[[int], Tensor], batch: int) -> Tensor:
    """Draw rows, then draw again those with nothing noised until none is left."""
    mask = draw(batch)
    while (empty := ~mask.any(-1)).any():
        mask[empty] = draw(int(empty.sum()))
    return mask
