"""Held-out cross-entropy by noise level, with fixed times, masks and noise: comparable between steps and runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ddlm.config import Config
from ddlm.diffusion.objective import NoisedBatch
from ddlm.training.draws import draw_noise, draw_step
from ddlm.training.metrics import LEVELS

LossOf = Callable[[NoisedBatch, int], Tensor]
"""The loss of a batch, its first so many rows self-conditioned."""
_SEED = 20230518  # of the held-out masks and noise, whatever the run's seed: runs stay comparable


class BatchSource(Protocol):
    """Batches of token windows as a function of the step."""

    def batch(self, step: int) -> Tensor:
        """Tokens ``(b, T)`` int64."""
        ...


@torch.no_grad()
def validation_loss(
    loss_of: LossOf,
    config: Config,
    source: BatchSource,
    device: torch.device | str = "cpu",
    batches: int = 4,
    levels: int = LEVELS,
    stopped: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """Cross-entropy on held-out windows at fixed noise levels.

    Every batch is scored at each level; within a level the times lie evenly over its interval of t. Masks follow
    ``mask.strategy``; numbers for different strategies are not comparable.

    Args:
        loss_of: The loss of a batch under the network that is evaluated.
        config: ``mask``, ``model`` and ``process`` are used.
        source: Held-out batches.
        device: Where the network is.
        batches: How many of them to score.
        levels: Equal intervals of t.
        stopped: Asked before each batch at each level, in all processes at once: whether to give it up. None: never.

    Returns:
        None when it was given up, or
        ``cross_entropy`` (nats per noised token, mean over t), ``by_level`` (keys are the intervals) and, for a
        self-conditioned model, ``self_conditioned``: the same mean when a first estimate is fed back.
    """
    process = config.process
    width = (process.t_max - process.t_min) / levels
    sums = torch.zeros(2, levels, dtype=torch.float64)
    counts = torch.zeros(levels, dtype=torch.float64)
    modes = (False, True) if config.model.self_conditioning else (False,)
    for index in range(batches):
        tokens = source.batch(index)
        rows, length = tokens.shape
        draw = draw_step(_SEED, index, rows, length, config.mask)
        for level in range(levels):
            if stopped is not None and stopped():
                return None
            t = process.t_min + width * (level + (torch.arange(rows) + 0.5) / rows)
            noise = draw_noise(
                _SEED, index * levels + level, range(rows), length, config.model.embedding_width
            )
            batch = NoisedBatch.make(tokens, draw.is_noised, t.float(), noise).to(device)
            for mode in modes:
                loss = loss_of(batch, rows if mode else 0)
                sums[int(mode), level] += float(loss) * draw.total_noised
            counts[level] += draw.total_noised
    means = sums / counts
    result: dict[str, Any] = {
        "cross_entropy": float(means[0].mean()),
        "by_level": {
            f"{process.t_min + i * width:.3g}-{process.t_min + (i + 1) * width:.3g}": float(m)
            for i, m in enumerate(means[0])
        },
    }
    if len(modes) == 2:
        result["self_conditioned"] = float(means[1].mean())
    return result
