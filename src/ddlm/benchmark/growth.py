"""What a token costs as the batch grows: the same training step at several batches, taking turns round by round."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ddlm.benchmark.step import Trainee, own_step
from ddlm.benchmark.timing import timed, turns
from ddlm.config import Config
from ddlm.training.distributed import open_world
from ddlm.types import ConfigError

BATCHES = (32, 64, 128, 256, 512, 1024)


def check_growth(config: Config, batches: Sequence[int]) -> None:
    """Refuse batches that cannot be compared, before anything is measured.

    Raises:
        ConfigError: for fewer than two batches, one below 1, a list that does not ascend, or a batch that
            ``train.micro_batch`` does not divide.
    """
    shown = " ".join(map(str, batches))
    if len(batches) < 2 or batches[0] < 1 or any(a >= b for a, b in pairwise(batches)):
        raise ConfigError(
            f"--batches is '{shown}', needed are two or more batches of at least 1 in ascending order, "
            "as in --batches 32 64 128"
        )
    for batch in batches:
        open_world(_at(config, batch))


def measure_growth(
    config: Config,
    batches: Sequence[int] = BATCHES,
    *,
    rounds: int = 5,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Time the training step at every batch.

    Args:
        config: What to train; all but ``train.batch`` is taken as it is.
        batches: Global batches in ascending order, in sequences.
        rounds: Steps measured at each batch; every other round goes in reverse order.
        say: Receives lines of progress.

    Returns:
        One entry for each batch: ``batch``, and as medians ``seconds_per_step``, ``seconds_per_token``,
        ``seconds_per_flop`` (model FLOP), ``relative_to_N`` (seconds a token over those of the first batch N); with
        ``flops_per_token`` and ``spread`` (fastest and slowest step in seconds).

    Raises:
        ConfigError: see :func:`check_growth`.
    """
    check_growth(config, batches)
    world = open_world(_at(config, batches[0]))
    trainee = Trainee.create(config, world, say)
    steps = {batch: own_step(trainee, _at(config, batch), world) for batch in batches}
    for batch, step in steps.items():
        say(f"growth: warming up at batch {batch}")
        for _ in range(2):
            timed(step.run, world.device)
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for i, order in enumerate(turns(batches, rounds)):
        for batch in order:
            seconds[batch].append(timed(steps[batch].run, world.device))
        shown = ", ".join(
            f"{batch}: {1e6 * seconds[batch][-1] / (batch * config.model.length):.1f}"
            for batch in batches
        )
        say(f"growth: round {i + 1} of {rounds}: microseconds a token at batch {shown}")
    median = {batch: statistics.median(values) for batch, values in seconds.items()}
    first = batches[0]
    return [
        {
            "batch": batch,
            "seconds_per_step": median[batch],
            "seconds_per_token": median[batch] / (batch * config.model.length),
            "seconds_per_flop": median[batch] / steps[batch].flops,
            f"relative_to_{first}": median[batch] / batch / (median[first] / first),
            "flops_per_token": steps[batch].flops / (batch * config.model.length),
            "spread": [min(seconds[batch]), max(seconds[batch])],
        }
        for batch in batches
    ]


def _at(config: Config, batch: int) -> Config:
    changed = copy.deepcopy(config)
    changed.train.batch = batch
    return changed
