"""Batches as a pure function of (seed, step, rank): a resumed or reshaped run sees the same data, with no state kept.

Axes: B sequences of a batch, T positions of a sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddlm.data.shards import Split, TokenShards
from ddlm.settings import convert
from ddlm.types import ConfigError

_ROUNDS = 8
_U64 = np.uint64


class Batches:
    """Training batches of fixed-length windows of the packed stream of a prepared data set.

    The stream is taken as a ring and cut into windows of ``length`` tokens from an offset that changes with each
    epoch, so that window boundaries vary; within an epoch every window comes once, in an order that is a pseudo-random
    permutation computed window by window (nothing of the size of the corpus is held). The global batch of a step is
    the same, in the same order, for every ``world_size``; a rank takes its contiguous slice of it.

    Args:
        data: A prepared data set or its folder.
        split: "train" or "val".
        length: Tokens T of a sequence.
        batch_size: Sequences of the global batch of a step.
        seed: Chooses the order and the offsets.
        rank: Which slice of the global batch.
        world_size: Into how many slices it is cut; must divide ``batch_size``.

    Raises:
        ConfigError: if the split is shorter than one sequence or ``world_size`` does not divide ``batch_size``.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | TokenShards,
        *,
        split: Split = "train",
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data = data if isinstance(data, TokenShards) else TokenShards(data)
        self.split = split
        self.length = convert(length, int, "length")
        self.batch_size = convert(batch_size, int, "batch_size")
        self.seed = convert(seed, int, "seed")
        self.rank = convert(rank, int, "rank")
        self.world_size = convert(world_size, int, "world_size")
        _check_sizes(self.data, split, self.length, self.batch_size, self.rank, self.world_size)
        self._tokens = self.data.tokens(split)
        self.windows = self._tokens // self.length
        self._row = np.arange(self.length, dtype=np.int64)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens seen in one pass: whole windows only."""
        return self.windows * self.length

    def epoch(self, step: int) -> float:
        """Passes over the data completed before ``step``."""
        return step * self.batch_size / self.windows

    def batch(self, step: int) -> Tensor:
        """Token ids of this rank's slice of the batch of ``step`` (from 0), ``(B / world_size, T)`` int64."""
        local = self.batch_size // self.world_size
        first = int(step) * self.batch_size + self.rank * local
        starts = self.starts(np.arange(first, first + local, dtype=np.int64))
        positions = (starts[:, None] + self._row) % self._tokens  # (B, T)
        return torch.from_numpy(self.data.gather(self.split, positions))

    def starts(self, sequence: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Position in the stream at which the n-th sequence of the run starts, for each n of ``sequence``."""
        epoch, index = np.divmod(sequence, self.windows)
        starts = np.empty_like(sequence)
        for e in range(int(epoch.min()), int(epoch.max()) + 1):
            here = epoch == e
            key = _mix(_words(self.seed), _words(e))
            offset = int(_mix(key, _words(-1))[0]) % self._tokens
            starts[here] = offset + permute(index[here], self.windows, key) * self.length
        return starts % self._tokens

    def __iter__(self) -> Iterator[Tensor]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1


def validation_batches(
    data: str | os.PathLike[str] | TokenShards,
    *,
    length: int,
    batch_size: int,
    split: Split = "val",
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Tensor]:
    """The windows of a split, each once, in a fixed order: the same at every call.

    Args:
        data: A prepared data set or its folder.
        length: Tokens T of a sequence.
        batch_size: Sequences of a global batch.
        split: "train" or "val".
        limit: Windows to take at most, evenly spaced over the split; None takes all.
        rank: Which slice of each global batch.
        world_size: Into how many slices it is cut.

    Yields:
        Token ids ``(batch_size / world_size, T)`` int64. Windows that do not fill a last batch are left out, unless
        there is only that one: then it holds the largest multiple of ``world_size`` windows there is.

    Raises:
        ConfigError: as :class:`Batches`.
    """
    shards = data if isinstance(data, TokenShards) else TokenShards(data)
    _check_sizes(shards, split, length, batch_size, rank, world_size)
    windows = shards.tokens(split) // length
    count = windows if limit is None else min(limit, windows)
    if count < world_size:
        raise ConfigError(
            f"{count} validation windows cannot be shared by {world_size} processes: hold out more documents"
        )
    chosen = np.arange(count, dtype=np.int64) * windows // count
    batch = min(batch_size, count - count % world_size)
    local = batch // world_size
    for first in range(0, count - batch + 1, batch):
        mine = chosen[first + rank * local : first + (rank + 1) * local]
        positions = mine[:, None] * length + np.arange(length, dtype=np.int64)
        yield torch.from_numpy(shards.gather(split, positions))


def permute(
    index: npt.NDArray[np.int64], size: int, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Image of each index under a pseudo-random permutation of ``range(size)`` chosen by ``key (1,)``.

    A Feistel network over the next power of two is a bijection whatever its round function; applying it again to
    what falls outside the range ("cycle walking", Black & Rogaway 2002) restricts the bijection to the range.
    """
    bits = max(size - 1, 1).bit_length()
    low_bits = _U64(bits // 2)
    low_mask = _U64((1 << (bits // 2)) - 1)
    high_mask = _U64((1 << (bits - bits // 2)) - 1)
    keys = _mix(key, np.arange(_ROUNDS, dtype=_U64))
    out = index.astype(_U64)
    todo = np.arange(len(out))
    while todo.size:
        value = out[todo]
        high, low = value >> low_bits, value & low_mask
        for r in range(0, _ROUNDS, 2):
            high ^= _mix(keys[r : r + 1], low) & high_mask
            low ^= _mix(keys[r + 1 : r + 2], high) & low_mask
        value = (high << low_bits) | low
        out[todo] = value
        todo = todo[value >= _U64(size)]
    return out.astype(np.int64)


def _words(value: int) -> npt.NDArray[np.uint64]:
    """An integer modulo 2^64 as an array (1,): arrays wrap around silently where scalars warn."""
    return np.asarray([value % (1 << 64)], _U64)


def _mix(key: npt.NDArray[np.uint64], value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A well-mixed 64-bit hash of (key, value): the finaliser of splitmix64 (Steele et al. 2014)."""
    z = value * _U64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


def _check_sizes(
    data: TokenShards, split: Split, length: int, batch_size: int, rank: int, world_size: int
) -> None:
    if length < 1 or batch_size < 1:
        raise ConfigError(f"length {length} and batch size {batch_size} must be at least 1")
    if batch_size % world_size:
        raise ConfigError(
            f"batch size {batch_size} cannot be shared by {world_size} processes: make it a multiple of {world_size}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} must be at least 0 and below world_size {world_size}")
    tokens = data.tokens(split)
    if tokens < length:
        more = "give more text" if split == "train" else "hold out more documents (val_fraction)"
        raise ConfigError(
            f"the {split} split of {data.folder} has {tokens} tokens, fewer than one sequence of {length}: {more}"
        )
