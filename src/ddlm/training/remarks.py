"""What a run tells its user before the first step: settings that do something else than they seem to."""

from __future__ import annotations

import torch

from ddlm.config import Config
from ddlm.device import missing_compiler, slow_precision
from ddlm.training.draws import is_self_conditioned
from ddlm.training.flops import run_flops
from ddlm.training.metrics import duration
from ddlm.training.state import TrainState

_SPARE = 1.1
"""Times the tokenizer's entries that a model may have unremarked: sizes are rounded up to suit the hardware."""
_SILENT = 120.0
"""Seconds without a line after which a user wonders whether anything happens."""


def remarks(
    config: Config,
    state: TrainState,
    has_held_out: bool,
    samples: bool,
    entries: int | None = None,
) -> list[str]:
    """Lines to say.

    Args:
        config: Resolved configuration.
        state: What the run starts from.
        has_held_out: Whether there is held-out text.
        samples: Whether samples were asked for.
        entries: Entries of the data's tokenizer, where there is one.
    """
    train, device = config.train, state.model.embedding.device
    lines = []
    slow = slow_precision(train.precision, device)
    if slow is not None:
        lines.append(slow)
    elif train.precision == "auto" and state.model.compute_dtype == torch.float32:
        lines.append("no bfloat16 instructions were found: training in float32")
    if config.model.self_conditioning:
        rows = int(is_self_conditioned(range(train.batch), train.self_condition).sum())
        if rows in (0, train.batch):
            lines.append(
                f"{'all' if rows else 'none'} of the {train.batch} sequences of a batch are self-conditioned"
                " (train.self_condition), but generation has no estimate at its first step and one at all others;"
                " model.self_conditioning false leaves it out of both"
            )
    if train.compile and (compiler := missing_compiler(device)):
        lines.append(f"no {compiler} was found: training without compiling")
    if train.eval_every and not has_held_out:
        lines.append("there is no held-out text: no evaluations")
    size = config.model.vocab_size
    if entries is not None and size > _SPARE * entries and state.step == 0:
        lines.append(
            f"the tokenizer has {entries:,} entries and the model {size:,}: the others are never used and "
            f"slow every step down, --model.vocab_size {entries} is enough"
        )
    if samples and train.strategy == "fsdp":
        lines.append("train.sample_every: samples are not written with train.strategy fsdp")
    if train.budget is not None and state.seconds >= train.budget:
        lines.append(
            f"nothing to train: the train.budget of {train.budget:g} s is used up, a larger one goes on"
        )
    elif state.step >= train.steps:
        lines.append(
            f"nothing to train: {state.step:,} steps are made and train.steps is {train.steps:,}, a larger number "
            "goes on"
        )
    elif train.budget is None and train.steps <= train.warmup:
        lines.append(
            f"train.warmup of {train.warmup:,} steps is not over when the run ends at {train.steps:,}: "
            f"the learning rate gets to {train.steps / train.warmup:.2g} of its peak"
        )
    return lines


def slow_updates(config: Config, matrix_rate: float) -> str | None:
    """A line where the first sign of progress is minutes away, as with a large model on a CPU; None elsewhere.

    Args:
        config: Resolved configuration.
        matrix_rate: Matrix products of all processes together, FLOP/s: no update is faster than its products.
    """
    seconds = run_flops(config, 1, draws=1) / matrix_rate
    if seconds * config.train.log_every < _SILENT:
        return None
    tokens = config.train.batch * config.model.length
    return (
        f"an update of {tokens:,} tokens takes {duration(seconds)} or more here, the first line of progress comes "
        f"after train.log_every {config.train.log_every}; a smaller train.batch or model (--config tiny) is faster"
    )
