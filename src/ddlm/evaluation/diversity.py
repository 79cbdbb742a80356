"""Diversity of samples: distinct-n, self-BLEU, entropies, Zipf coefficient, repetition (DDLM, section 3.2).

Axes: S samples, T units of the longest sample. Units are tokens of the model or words: the caller says which.
All metrics read one table of integer ids in which :data:`GAP` marks padding and kept positions, so an n-gram never
crosses a part that was given. Everything is exact and vectorised: 5,000 samples of 64 tokens take about a second.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddlm.types import DataError

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

GAP = -1
"""Marks what belongs to no sample: padding, and positions that were given."""

SELF_BLEU_SIZE = 1000
"""Samples of the self-BLEU: it grows with the number of references, so only equal sizes compare."""

_SMOOTH = 0.1  # Zhu et al. 2018 (Texygen): a precision without a match counts 0.1 matches; sacrebleu's "floor"


class TooShortError(DataError):
    """A sample of so few units that it has no n-gram."""


@dataclass(frozen=True)
class Diversity:
    """All diversity metrics of one set of samples. Entropies in nats; the rest are numbers without a unit.

    Attributes:
        dist: Distinct-1, -2, -3: distinct n-grams over all n-grams of a group together, mean over groups.
        dist_per_sample: The same with every sample its own group.
        self_bleu: Mean BLEU-4 of a sample against the other samples, 0 to 1 (lower is more diverse).
        self_bleu_size: Samples it was computed on.
        token_entropy: Entropy of the unigram distribution of all samples together.
        sample_entropy: Mean entropy of the unigram distribution within a sample.
        across_entropy: Mean over positions of the entropy of the tokens found there in different samples.
        zipf: Zipf coefficient: minus the slope of log frequency on log rank; NaN with fewer than two ranks.
        repetition: Mean share of a sample's 4-grams that repeat an earlier one of the same sample.
        samples: Number of samples S.
        units: Total number of tokens or words.
        group_size: Samples of a group of ``dist``.
    """

    dist: tuple[float, float, float]
    dist_per_sample: tuple[float, float, float]
    self_bleu: float
    self_bleu_size: int
    token_entropy: float
    sample_entropy: float
    across_entropy: float
    zipf: float
    repetition: float
    samples: int
    units: int
    group_size: int


def table(samples: Sequence[Sequence[int]]) -> Ids:
    """Put samples of unequal length into one array ``(S, T)``, padded with :data:`GAP`.

    Raises:
        DataError: if there is no sample, or one without a unit (named by its number, counted from 1).
    """
    if len(samples) == 0:  # a matrix is neither true nor false
        raise DataError("no samples to measure")
    width = max(len(s) for s in samples)
    out = np.full((len(samples), width), GAP, dtype=np.int64)
    for i, sample in enumerate(samples):
        out[i, : len(sample)] = sample
    empty = np.flatnonzero((out != GAP).sum(axis=1) == 0)
    if empty.size:
        raise DataError(
            f"sample {empty[0] + 1} has no generated token ({empty.size} of {len(samples)} samples have none)"
        )
    return out


def word_ids(texts: Iterable[str]) -> list[list[int]]:
    """Number the words (separated by white space) of ``texts`` in order of their first appearance."""
    known: dict[str, int] = {}
    return [[known.setdefault(word, len(known)) for word in text.split()] for text in texts]


def fives(count: int) -> list[int]:
    """Groups of five consecutive samples; what is left over joins the last one: fewer would repeat themselves less."""
    return consecutive(count, 5)


def consecutive(count: int, size: int) -> list[int]:
    """Groups of ``size`` consecutive samples; what is left over joins the last one."""
    last = max(count // size - 1, 0)
    return [min(i // size, last) for i in range(count)]


def measure(
    samples: Sequence[Sequence[int]],
    groups: Sequence[Hashable] | None = None,
    *,
    self_bleu_size: int | None = SELF_BLEU_SIZE,
    seed: int = 0,
) -> Diversity:
    """Compute every diversity metric.

    Args:
        samples: Ids of each sample's generated units.
        groups: Which samples belong together for ``dist`` (the continuations of one prompt); None takes
            :func:`fives`, as for unconditional samples.
        self_bleu_size: Samples drawn for self-BLEU (all of them when there are fewer); None means all.
        seed: Seed of that draw.

    Raises:
        DataError: if there are fewer than two samples, a sample is empty or shorter than three units, or the groups
            do not match the samples.
    """
    ids = table(samples)
    group = group_numbers(ids, groups)
    alone = each(ids, group)
    part = subset(ids, self_bleu_size, seed)
    return Diversity(
        dist=_triple(alone.dist),
        dist_per_sample=_triple(alone.dist_per_sample),
        self_bleu=float(self_bleu(part).mean()),
        self_bleu_size=len(part),
        token_entropy=token_entropy(ids),
        sample_entropy=float(alone.sample_entropy.mean()),
        across_entropy=across_entropy(ids),
        zipf=zipf_coefficient(ids),
        repetition=float(alone.repetition.mean()),
        samples=len(ids),
        units=int((ids != GAP).sum()),
        group_size=int(np.bincount(group).max()),
    )


def group_numbers(ids: Ids, groups: Sequence[Hashable] | None) -> npt.NDArray[np.int64]:
    """Number of each sample's group, ``(S,)``; None: :func:`fives`.

    Raises:
        DataError: if there are fewer than two samples, or the groups do not match them.
    """
    if len(ids) < 2:
        raise DataError("1 sample given: diversity needs at least 2")
    if groups is None:
        groups = fives(len(ids))
    if len(groups) != len(ids):
        raise DataError(f"{len(groups)} group names for {len(ids)} samples")
    return number(groups)


@dataclass(frozen=True)
class Each:
    """What each group ``(G,)`` or sample ``(S,)`` has by itself: means over any of them need no second count.

    Attributes:
        dist: Distinct-1, -2, -3 of each group.
        dist_per_sample: The same of each sample.
        sample_entropy: Entropy within each sample, nats.
        repetition: Share of each sample's 4-grams that repeat.
    """

    dist: tuple[Values, ...]
    dist_per_sample: tuple[Values, ...]
    sample_entropy: Values
    repetition: Values


def each(ids: Ids, group: npt.NDArray[np.int64]) -> Each:
    """Count once what every group and every sample has by itself; raises what :func:`distinct` does."""
    alone = np.arange(len(ids))
    return Each(
        dist=tuple(distinct(ids, n, group) for n in (1, 2, 3)),
        dist_per_sample=tuple(distinct(ids, n, alone) for n in (1, 2, 3)),
        sample_entropy=sample_entropy(ids),
        repetition=repetition_rate(ids),
    )


def subset(ids: Ids, size: int | None, seed: int = 0) -> Ids:
    """The samples that self-BLEU is computed on: ``size`` of them in their order, all where there are no more."""
    if size is None or size >= len(ids):
        return ids
    chosen: Ids = ids[np.sort(np.random.default_rng(seed).permutation(len(ids))[:size])]
    return chosen


def distinct(ids: Ids, n: int, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Distinct n-grams over all n-grams of each group's samples together, ``(G,)``.

    Args:
        ids: Units ``(S, T)``.
        n: Length of the n-grams.
        groups: Number of each sample's group, ``(S,)``, from 0 without a hole.

    Raises:
        TooShortError: if a group has no n-gram at all, naming its first sample (counted from 1).
    """
    row, gram = _ngrams(ids, n)
    owner = groups[row]
    total = np.bincount(owner, minlength=int(groups.max()) + 1)
    if (total == 0).any():
        first = int(np.argmax(groups == np.argmin(total)))
        raise TooShortError(
            f"sample {first + 1} is too short: it has no {n} units in a row, distinct-{n} needs them; leave out such "
            f"samples ({len(ids) - len(np.unique(row))} of {len(ids)})"
        )
    kinds = _different(owner * (gram.max() + 1) + gram) // (gram.max() + 1)
    return np.bincount(kinds, minlength=len(total)) / total


def self_bleu(ids: Ids) -> npt.NDArray[np.float64]:
    """BLEU-4 of every sample with all other samples as references, ``(S,)``, from 0 to 1 (Zhu et al. 2018).

    Equal to sacrebleu's sentence BLEU with ``smooth_method="floor"`` (0.1) on the units as they are. A sample's
    n-gram counts are clipped by the largest count in any *other* sample: the largest and the second largest count of
    each n-gram say that without comparing pairs, so the cost is linear in the number of samples.
    """
    return _bleu(ids, _counted(ids), np.ones(len(ids), dtype=bool))


def self_bleu_without(
    ids: Ids, folds: Iterable[npt.NDArray[np.int64]]
) -> list[npt.NDArray[np.float64]]:
    """:func:`self_bleu` of the samples without those of each fold; n-grams are counted once for all folds."""
    counted = _counted(ids)
    out = []
    for fold in folds:
        kept = np.ones(len(ids), dtype=bool)
        kept[fold] = False
        out.append(_bleu(ids, counted, kept))
    return out


@dataclass(frozen=True)
class _Counts:
    """How often each sample has each n-gram of one length, ``(E,)``; an n-gram's largest count stands first."""

    row: npt.NDArray[np.int64]
    gram: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]


def _counted(ids: Ids) -> list[_Counts]:
    out = []
    for n in range(1, 5):
        row, gram = _ngrams(ids, n)
        kinds = int(gram.max(initial=0)) + 1
        pair, count = np.unique(row * kinds + gram, return_counts=True)
        row, gram = pair // kinds, pair % kinds
        order = np.lexsort((-count, gram))
        out.append(_Counts(row[order], gram[order], count[order]))
    return out


def _bleu(
    ids: Ids, counted: Sequence[_Counts], kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """BLEU-4 of each sample that is kept against the others that are."""
    S = len(ids)
    lengths = (ids != GAP).sum(axis=1)[kept]
    log_precision = np.zeros(len(lengths))
    matched = np.zeros(len(lengths))
    too_short = np.zeros(len(lengths), dtype=bool)
    for table in counted:
        here = kept[table.row]
        row, gram, count = table.row[here], table.gram[here], table.count[here]
        total = np.bincount(row, count, S)[kept]
        clipped = np.minimum(count, _largest_elsewhere(gram, count))
        correct = np.bincount(row, clipped, S)[kept].astype(np.float64)
        matched += correct
        too_short |= total == 0
        precision = np.where(correct > 0, correct, _SMOOTH) / np.maximum(total, 1)
        log_precision += np.log(precision)
    closest = _closest_lengths(lengths)
    brevity = np.where(lengths < closest, np.exp(1 - closest / lengths), 1.0)
    score = brevity * np.exp(log_precision / 4)
    # As in sacrebleu: nothing matched at all, or no n-gram of some order to match, is a score of zero.
    return np.where((matched == 0) | too_short, 0.0, score)


def _largest_elsewhere(
    gram: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """For each (sample, n-gram) entry, sorted as in :class:`_Counts`, its n-gram's largest count in another sample."""
    if not len(gram):
        return count
    first = np.r_[True, gram[1:] != gram[:-1]]
    start = np.flatnonzero(first)
    second = np.zeros(len(start), dtype=np.int64)
    has_second = np.diff(np.r_[start, len(gram)]) > 1
    second[has_second] = count[start[has_second] + 1]
    which = np.cumsum(first) - 1
    return np.where(first, second[which], count[start][which])


def _closest_lengths(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each sample the length of another sample that is closest to its own (the shorter one of two)."""
    kinds, inverse, count = np.unique(lengths, return_inverse=True, return_counts=True)
    best = np.empty_like(kinds)
    for i, length in enumerate(kinds):
        others = kinds if count[i] > 1 else np.delete(kinds, i)
        best[i] = min(others, key=lambda other: (abs(other - length), other))
    return best[inverse]


def token_entropy(ids: Ids) -> float:
    """Entropy in nats of the unigram distribution of all samples together (7.71 for C4 in DDLM, Table 5)."""
    return _entropy(np.unique(ids[ids != GAP], return_counts=True)[1])


def sample_entropy(ids: Ids) -> npt.NDArray[np.float64]:
    """Entropy in nats of the unigram distribution within each sample, ``(S,)``; at most log T."""
    row, gram = _ngrams(ids, 1)
    kinds = int(gram.max()) + 1
    pair, count = np.unique(row * kinds + gram, return_counts=True)
    row = pair // kinds
    p = count / np.bincount(row, count, minlength=len(ids))[row]
    return np.bincount(row, -p * np.log(p), len(ids)).astype(np.float64)


def across_entropy(ids: Ids) -> float:
    """Mean over positions of the entropy in nats of the units that different samples have there; at most log S.

    Zero when all samples are one and the same text, which the entropy within a sample does not show.
    """
    columns = [column[column != GAP] for column in ids.T]
    return float(
        np.mean([_entropy(np.unique(c, return_counts=True)[1]) for c in columns if len(c) > 1])
    )


def zipf_coefficient(ids: Ids) -> float:
    """Minus the slope of log frequency on log rank over all ranks (Holtzman et al. 2020); NaN below two ranks."""
    frequency = np.sort(np.unique(ids[ids != GAP], return_counts=True)[1])[::-1]
    if len(frequency) < 2:
        return math.nan
    x, y = np.log(np.arange(1, len(frequency) + 1)), np.log(frequency)
    x = x - x.mean()
    return float(0.0 - (x @ (y - y.mean())) / (x @ x))  # 0.0 -: no minus zero in a table


def repetition_rate(ids: Ids, n: int = 4) -> npt.NDArray[np.float64]:
    """Share of each sample's n-grams that repeat an earlier one of the same sample, ``(S,)``.

    Samples without an n-gram count as 0.
    """
    row, gram = _ngrams(ids, n)
    total = np.bincount(row, minlength=len(ids))
    if not len(gram):
        return np.zeros(len(ids))
    kinds = int(gram.max()) + 1
    unique = np.bincount(_different(row * kinds + gram) // kinds, minlength=len(ids))
    return (total - unique) / np.maximum(1.0, total)


def _ngrams(ids: Ids, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sample number and n-gram number of every n-gram that crosses no gap, two arrays ``(N,)``."""
    present = ids != GAP
    codes = number(ids)  # small numbers, so that a pair of them fits 64 bits
    kinds = int(codes.max()) + 1
    gram, valid = codes, present
    for k in range(1, n):
        if gram.shape[1] < 2:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        gram = number(gram[:, :-1] * kinds + codes[:, k:])
        valid = valid[:, :-1] & present[:, k:]
    row = np.broadcast_to(np.arange(len(ids))[:, None], gram.shape)
    return row[valid], gram[valid]


def number(values: npt.NDArray[np.int64] | Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Replace equal values by equal numbers from 0, keeping the shape."""
    if isinstance(values, np.ndarray):
        return np.unique(values, return_inverse=True)[1].reshape(values.shape).astype(np.int64)
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(v, len(known)) for v in values], dtype=np.int64)


def _different(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What is in ``codes``, sorted; asked for counts, numpy sorts, which beats its hash table tenfold here."""
    return np.unique(codes, return_counts=True)[0]


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    p = counts / counts.sum()
    return float(0.0 - (p * np.log(p)).sum())  # 0.0 -: no minus zero in a table


def _triple(values: Sequence[Values]) -> tuple[float, float, float]:
    first, second, third = (float(shares.mean()) for shares in values)
    return first, second, third
