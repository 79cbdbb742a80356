"""Everything random about a step, as a pure function of (seed, step): the same on any number of processes.

B sequences of the global batch, T positions, D embedding width.

Masks and time quantiles are drawn for the whole global batch by every process (they are small), so low-discrepancy
times span all of it and the number of noised positions is known without communication. Noise is large: it is drawn in
blocks of rows, each from its own generator, and a process draws only the blocks that it needs.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlm.config import Config, MaskConfig
from ddlm.diffusion.masking import STRATEGIES, TAKES_SPANS
from ddlm.diffusion.objective import NoisedBatch
from ddlm.diffusion.time_warp import TimeSampler, low_discrepancy
from ddlm.types import ConfigError

NOISE_ROWS = 16  # rows of one noise block; part of the definition of the draws


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; the same on every machine."""
    # NumPy's integers show their type in repr, Python's do not
    plain = tuple(int(p) if isinstance(p, numbers.Integral) else p for p in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by :func:`derive_seed`."""
    generator = torch.Generator(device)
    generator.manual_seed(derive_seed(*parts))
    return generator


@dataclass(frozen=True)
class Draw:
    """Masks and times of the global batch of one step.

    Attributes:
        is_noised: ``(B, T)`` bool.
        u: Quantiles of the times, ``(B,)`` float64, one in each of B strata.
        total_noised: Noised positions of the global batch.
    """

    is_noised: Tensor
    u: Tensor
    total_noised: int


def draw_step(seed: int, step: int, batch: int, length: int, mask: MaskConfig) -> Draw:
    """Masks and time quantiles of the global batch of ``step``."""
    generator = generator_for(seed, step, "masks and times")
    options = {"k_max": mask.k_max} if mask.strategy in TAKES_SPANS else {}
    is_noised = STRATEGIES[mask.strategy](batch, length, generator, **options)
    return Draw(is_noised, low_discrepancy(batch, generator), int(is_noised.sum()))


def draw_noise(
    seed: int, step: int, rows: range, length: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal draws of the rows of the global batch in ``rows``, ``(len(rows), T, D)``."""
    first = rows.start // NOISE_ROWS
    last = -(-rows.stop // NOISE_ROWS)
    noise = torch.empty((last - first) * NOISE_ROWS, length, width, device=device)
    generator = torch.Generator(device)
    for i, block in enumerate(range(first, last)):
        generator.manual_seed(derive_seed(seed, step, "noise", block))
        noise[i * NOISE_ROWS : (i + 1) * NOISE_ROWS].normal_(generator=generator)
    offset = rows.start - first * NOISE_ROWS
    return noise[offset : offset + len(rows)]


def is_self_conditioned(rows: range, fraction: float) -> Tensor:
    """Which rows of the global batch get a first estimate: evenly spread, decided by the row alone, ``(rows,)``.

    Times are in random order over the batch, so a fixed pattern is as good as a coin per sequence, no process has more
    to do than another, and the result does not depend on how the batch is cut.
    """
    i = torch.arange(rows.start, rows.stop, dtype=torch.float64)
    return ((i + 1) * fraction).floor() > (i * fraction).floor()


@dataclass(frozen=True)
class MicroBatch:
    """A part of the batch that goes through the network at once.

    Attributes:
        batch: Tokens, mask, times and noise, self-conditioned rows first.
        self_condition: How many rows are self-conditioned.
        rows: Row of the global batch of each sequence, ``(b,)`` int64 on the CPU.
    """

    batch: NoisedBatch
    self_condition: int
    rows: Tensor


CPU_PIECE = 8192
"""Tokens that go through the network at once on a CPU: with more, activations leave the caches."""


def piece(share: int, length: int, device: torch.device | str) -> int:
    """Sequences of a micro-batch where ``train.micro_batch`` is null.

    Args:
        share: Sequences of one process.
        length: Tokens of a sequence.
        device: Of the network.

    Returns:
        On a CPU the largest divisor of ``share`` with at most ``CPU_PIECE`` tokens, if that is at least half of what
        would be allowed (a share of 509 sequences is not trained one by one); otherwise the whole share.
    """
    largest = max(1, CPU_PIECE // length)
    if torch.device(device).type != "cpu" or share <= largest:
        return share
    fits = (n for n in range(largest, (largest - 1) // 2, -1) if share % n == 0)
    return next(fits, share)


def micro_batches(
    config: Config,
    tokens: Tensor,
    draw: Draw,
    noise: Tensor,
    times: TimeSampler,
    first_row: int,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """Cut one process's share of a step's batch into micro-batches.

    Args:
        config: ``train.micro_batch`` (null: :func:`piece`), ``train.self_condition`` and ``model.self_conditioning``
            are used.
        tokens: The process's rows ``(b, T)``.
        draw: Masks and time quantiles of the global batch.
        noise: The process's noise ``(b, T, D)``, on ``device``.
        times: Distribution of t.
        first_row: Row of the global batch at which the process's rows begin.
        device: Where the micro-batches go.
    """
    t = times.quantile(draw.u).float()  # (B,)
    fraction = config.train.self_condition if config.model.self_conditioning else 0.0
    size = config.train.micro_batch or piece(tokens.shape[0], tokens.shape[1], device)
    for start in range(0, tokens.shape[0], size):
        stop = min(start + size, tokens.shape[0])
        rows = torch.arange(first_row + start, first_row + stop)
        first = is_self_conditioned(range(first_row + start, first_row + stop), fraction)
        rows = torch.cat([rows[first], rows[~first]])
        local = rows - first_row
        batch = NoisedBatch.make(
            tokens[local],
            draw.is_noised[rows],
            t[rows],
            noise[local.to(noise.device, non_blocking=True)],
            multiple=HEAD_MULTIPLE,
            total_noised=draw.total_noised,
        )
        yield MicroBatch(batch.to(device), int(first.sum()), rows)


HEAD_MULTIPLE = 256  # the list of noised positions is padded to this, so that few shapes occur


def check_spans(config: Config) -> None:
    """Refuse more spans than a sequence has tokens before anything is touched; the mask itself would do so later.

    Raises:
        ConfigError: naming both numbers.
    """
    k_max, length = config.mask.k_max, config.model.length
    if config.mask.strategy in TAKES_SPANS and k_max > length:
        raise ConfigError(
            f"mask.k_max={k_max} was given, 1..{length} (model.length, the sequence length) is needed"
        )
