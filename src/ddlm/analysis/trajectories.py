"""Numbers of recorded trajectories: switches, settling, what a halting criterion would have done.

S sequences, n steps, T positions. Steps count from 1: step k is the k-th look at the posterior.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ddlm.analysis.record import Array, Record, read
from ddlm.types import DataError

EVERY_KL = "every position"
"""``settings.kl`` of a record that holds the KL of every position at every step."""


@dataclass(frozen=True)
class Trajectories:
    """Recorded trajectories of one model under one setting.

    Args:
        record: Of kind ``trajectories``.

    Raises:
        DataError: when the record holds no sequence.
    """

    record: Record

    def __post_init__(self) -> None:
        if self.tokens.size == 0 or not self.generated.any():
            raise DataError("the record holds no generated token: record at least one sequence")

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read a file; see :func:`ddlm.analysis.record.read` for the errors."""
        return cls(read(path, "trajectories"))

    @property
    def header(self) -> dict[str, Any]:
        """Settings and provenance."""
        return self.record.header

    @property
    def label(self) -> str:
        """Short name, such as ``step 500``."""
        return str(self.header["label"])

    @property
    def tokens(self) -> Array:
        """Argmax of every look, ``(S, n, T)``."""
        return self.record.arrays["tokens"]

    @property
    def generated(self) -> Array:
        """Positions that were generated, ``(S, T)`` bool."""
        return self.record.arrays["generated"]

    @property
    def times(self) -> Array:
        """t of each look, ``(n,)``."""
        return self.record.arrays["times"]

    @property
    def steps(self) -> Array:
        """1..n."""
        return np.arange(1, self.tokens.shape[1] + 1)

    @property
    def has_kl(self) -> bool:
        """Whether the KL of every position was recorded at every step; older records hold a rotating eighth."""
        return bool(self.header.get("settings", {}).get("kl") == EVERY_KL)

    @property
    def radius(self) -> float:
        """sqrt(D): the norm of every token's embedding."""
        return float(np.sqrt(self.header["embedding_width"]))

    def values(self, name: str) -> Array:
        """A quantity of each sequence at each step, mean over its generated positions, ``(S, n)``."""
        return self.record.arrays[name if name.startswith("sequence_") else f"mean_{name}"]

    @cached_property
    def switches(self) -> Array:
        """Share of the generated tokens whose argmax switched at each step, ``(S, n)``; 0 at the first."""
        changed = self.tokens[:, 1:] != self.tokens[:, :-1]
        count = (changed & self.generated[:, None]).sum(2)
        return np.pad(count, ((0, 0), (1, 0))) / self.generated.sum(1, keepdims=True)

    @cached_property
    def settled_step(self) -> Array:
        """Step from which each position's argmax never switched again, ``(S, T)``; 0 where it was given."""
        same = self.tokens == self.tokens[:, -1:]
        lasting = np.cumprod(same[:, ::-1], axis=1).sum(
            1
        )  # looks at the end that show the final token
        return np.where(self.generated, self.tokens.shape[1] - lasting + 1, 0)

    @cached_property
    def last_switch(self) -> Array:
        """Last step of each sequence at which a token switched, ``(S,)``; 1 where none did."""
        return self.settled_step.max(1)

    def exit_steps(self, criterion: str, threshold: float) -> Array:
        """Step at which a halting criterion would have ended each sequence, ``(S,)``; n where it never fires.

        All four are what the engine evaluates: entropy and KL are means over the generated positions of one step.

        Args:
            criterion: ``fixed`` (step), ``patience`` (steps), ``entropy`` (nats) or ``kl`` (nats).
            threshold: Its threshold.

        Raises:
            DataError: for an unknown criterion, or ``kl`` where only an eighth of the positions was measured.
        """
        count, n = self.switches.shape
        if criterion == "fixed":
            return np.full(count, min(int(threshold), n))
        if criterion == "patience":
            calm = np.zeros((count, n), dtype=np.int64)
            for k in range(1, n):
                calm[:, k] = np.where(self.switches[:, k] == 0, calm[:, k - 1] + 1, 0)
            fired = calm >= threshold
        elif criterion == "entropy":
            fired = self.values("entropy") < threshold
        elif criterion == "kl":
            if not self.has_kl:
                raise DataError(
                    "the record holds the KL of an eighth of the positions at a step, too few for an exit: "
                    "record again with --overwrite"
                )
            fired = self.values("kl") < threshold  # NaN at the first look: never below
        else:
            raise DataError(f"there is no halting criterion '{criterion}'")
        return np.where(fired.any(1), fired.argmax(1) + 1, n)

    def tokens_at(self, steps: Array) -> Array:
        """Tokens of each sequence had it ended at ``steps (S,)``: ``(S, T)``."""
        return self.tokens[np.arange(len(steps)), steps - 1]

    def agreement(self, steps: Array) -> Array:
        """Share of each sequence's generated tokens that were final at ``steps (S,)``, ``(S,)``."""
        same = (self.tokens_at(steps) == self.tokens[:, -1]) & self.generated
        return same.sum(1) / self.generated.sum(1)

    def settled_share(self, chosen: Array | None = None) -> Array:
        """Share of the positions that have settled by each step, ``(n,)``.

        Args:
            chosen: Positions that count, ``(S, T)`` bool; None: all that were generated.
        """
        mask = self.generated if chosen is None else chosen & self.generated
        settled = self.settled_step[mask]
        if settled.size == 0:
            return np.full(len(self.steps), np.nan)
        return (settled[None] <= self.steps[:, None]).mean(1)


def first_lasting(values: Array, holds: Array) -> int | None:
    """First step (from 1) from which ``holds (n,)`` is true to the end; None when the last is not."""
    if not bool(holds[-1]):
        return None
    return int(len(values) - np.cumprod(holds[::-1]).sum() + 1)


def frequency_bands(counts: Array, bands: int = 4) -> tuple[Array, list[str]]:
    """Band of every token by its frequency in the training text: each band holds an equal share of that text.

    Args:
        counts: Occurrences of each token, ``(V,)``.
        bands: How many.

    Returns:
        Band of each token ``(V,)``, 0 the most frequent, and a label for each band that says which ranks it holds.
    """
    order = np.argsort(-counts, kind="stable")
    mass = np.cumsum(counts[order]) / max(counts.sum(), 1)
    band_of_rank = np.minimum((mass - counts[order] / max(counts.sum(), 1)) * bands, bands - 1)
    band_of_rank = np.maximum.accumulate(band_of_rank.astype(np.int64))
    band = np.empty(len(counts), dtype=np.int64)
    band[order] = band_of_rank
    labels = []
    for b in range(bands):
        ranks = np.flatnonzero(band_of_rank == b) + 1
        labels.append(f"ranks {ranks[0]:,}–{ranks[-1]:,}" if len(ranks) else "none")
    return band, labels


def repeated(tokens: Sequence[int] | Array, common: Collection[int] = ()) -> list[int]:
    """How each token of a text repeats (DDLM, Table 4): 2 inside a pair that occurred before, 1 alone, else 0.

    Args:
        tokens: Ids, ``(T,)``.
        common: Tokens so frequent that their return alone means nothing.
    """
    marks = [0] * len(tokens)
    seen: set[int] = set()
    pairs: set[tuple[int, int]] = set()
    for i, token in enumerate(int(t) for t in tokens):
        if token in seen and token not in common:
            marks[i] = max(marks[i], 1)
        seen.add(token)
        if i and (pair := (int(tokens[i - 1]), token)) in pairs:
            marks[i - 1] = marks[i] = 2
        elif i:
            pairs.add(pair)
    return marks


def nll_half_width(row: Mapping[str, Any]) -> float | None:
    """Half of the 95% interval of a row's AR-NLL; a study from before it was recorded has the standard error alone."""
    if "nll_half_width" in row or not row["nll_error"]:
        return row.get("nll_half_width")
    return 1.96 * float(row["nll_error"])
