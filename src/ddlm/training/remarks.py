"""What a run tells its user before the first step: settings that do something else than they seem to."""

from __future__ import annotations

import torch

from ddlm.config import Config
from ddlm.device import missing_compiler, slow_precision
from ddlm.training.state import TrainState


def remarks(config: Config, state: TrainState, has_held_out: bool, samples: bool) -> list[str]:
    """Lines to say.

    Args:
        config: Resolved configuration.
        state: What the run starts from.
        has_held_out: Whether there is held-out text.
        samples: Whether samples were asked for.
    """
    train, device = config.train, state.model.embedding.device
    lines = []
    slow = slow_precision(train.precision, device)
    if slow is not None:
        lines.append(slow)
    elif train.precision == "auto" and state.model.compute_dtype == torch.float32:
        lines.append("no bfloat16 instructions were found: training in float32")
    if train.compile and (compiler := missing_compiler(device)):
        lines.append(f"no {compiler} was found: training without compiling")
    if train.eval_every and not has_held_out:
        lines.append("there is no held-out text: no evaluations")
    if samples and train.strategy == "fsdp":
        lines.append("train.sample_every: samples are not written with train.strategy fsdp")
    if train.budget is None and train.steps <= train.warmup:
        lines.append(
            f"train.warmup of {train.warmup:,} steps is not over when the run ends at {train.steps:,}: "
            f"the learning rate gets to {train.steps / train.warmup:.2g} of its peak"
        )
    return lines
