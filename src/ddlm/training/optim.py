"""AdamW, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddlm.config import TrainConfig
from ddlm.muon import Muon

ORTHOGONAL = (
    "qkv.weight",
    "out.weight",
    "up.weight",
    "down.weight",
)  # the maps from hidden to hidden


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW, or Muon for the matrices inside the blocks and AdamW for everything else.

    Only matrices decay (embeddings are used by direction alone, so theirs would change nothing).
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [n for n, p in named if p.dim() >= 2 and not n.endswith("embedding")]
    orthogonal = [n for n in matrices if config.optimizer == "muon" and n.endswith(ORTHOGONAL)]

    merged = [n for n in orthogonal if n.endswith("qkv.weight")]  # three matrices in one

    def group(names: Iterable[str], weight_decay: float, **options: int) -> dict[str, Any]:
        chosen = set(names)
        return {
            "params": [p for n, p in named if n in chosen],
            "weight_decay": weight_decay,
            **options,
        }

    decays = [n for n in matrices if n not in orthogonal]
    others = [n for n, _ in named if n not in matrices]
    if config.optimizer == "adamw":
        groups = [group(decays, config.weight_decay), group(others, 0.0)]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=True)
    groups = [
        group(decays, config.weight_decay, orthogonal=False),
        group(others, 0.0, orthogonal=False),
        group(merged, config.weight_decay, orthogonal=True, parts=3),
        group([n for n in orthogonal if n not in merged], config.weight_decay, orthogonal=True),
    ]
    return Muon(groups, lr=config.lr, betas=config.betas)


def learning_rate(config: TrainConfig, step: int, seconds: float) -> float:
    """Linear warm-up by step, then cosine decay by step, or by the time spent when there is a budget.

    Args:
        config: Peak rate, warm-up, length of the run.
        step: Updates made so far.
        seconds: Wall-clock time spent so far, earlier parts of a resumed run included.
    """
    ramp = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.budget is not None:
        progress = seconds / config.budget
    else:
        progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    progress = min(max(progress, 0.0), 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * ramp * (config.final_lr + (1.0 - config.final_lr) * cosine)


def clipped_step(optimizer: torch.optim.AdamW, largest_norm: float) -> Tensor:
    """Update the weights with gradients scaled down to ``largest_norm``; skip the update when they are not finite.

    The fused kernel divides by ``grad_scale`` and skips on ``found_inf`` by itself: no extra pass over the gradients
    and no wait for the device.

    Returns:
        The global gradient norm before clipping, a scalar.
    """
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(grads)
    if hasattr(norm, "full_tensor"):  # sharded gradients (FSDP2)
        norm = norm.full_tensor()
    optimizer.grad_scale = (norm / largest_norm).clamp_min(1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).to(norm.dtype)  # type: ignore[attr-defined]
    optimizer.step()
    return norm.detach()


class Ema:
    """Exponential moving average of weights, with the usual warm-up of the decay: min(decay, (1 + n) / (10 + n)).

    Args:
        parameters: Weights to follow, copied.
        decay: Decay per step.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        """Move towards ``parameters`` after update number ``step`` (0 for the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, list(parameters), 1.0 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[Tensor]) -> None:
        """Exchange the average and the weights in place; twice is as nothing."""
        for mine, theirs in zip(self.shadow, parameters, strict=True):
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)
