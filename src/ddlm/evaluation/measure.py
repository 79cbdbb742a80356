"""One row of a results table: every metric of one set of samples, each with its 95% interval.

Intervals. Means over groups (distinct-n) use the t-distribution over the groups. Everything else is also computed on
replicates, the samples of each seed alone (or five random fifths where seeds do not tell), and the interval is the
value of all samples together plus and minus t * sd / sqrt(k) of the k replicates. What grows with the number of samples
is the mean over the seeds' own sets instead, so that several samples a prompt compare with one text a prompt. Self-BLEU
without seeds has a jackknife: its samples are references of each other. AR-NLL of continuations has the wider one of
that interval and one over prompts, which the seeds share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ddlm.evaluation import diversity
from ddlm.evaluation.intervals import Estimate as Estimate
from ddlm.evaluation.intervals import jackknife, mean, ratio, spread, wider
from ddlm.evaluation.judges import Judge, Score, mean_nll
from ddlm.evaluation.mauve import FEWEST, Featurizer, mauve
from ddlm.evaluation.samples import Sample
from ddlm.types import DataError

Progress = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""

SET_SIZE = "samples_of_a_set"
"""Fact of a row: samples of each set that entropies, Zipf coefficient and self-BLEU are computed on."""

POOLED = "samples_of_a_seed"
"""Fact of a MAUVE that is of all seeds' samples together: so few has each."""

MOST_SEEDS = 20
"""With more, samples are replicated by folds, not by seeds: each seed may have too few."""
_FOLDS = 5
_LEFT_OUT = 10  # folds of the jackknife
_MEANS = ("sample_entropy", "repetition")
_OF_A_SIZE: dict[str, Callable[[diversity.Ids], float]] = {
    "token_entropy": diversity.token_entropy,
    "across_entropy": diversity.across_entropy,
    "zipf": diversity.zipf_coefficient,
    "self_bleu": lambda ids: float(diversity.self_bleu(ids).mean()),
}
"""They grow with the number of samples: only sets of one size compare."""


@dataclass(frozen=True)
class Row:
    """Everything measured of one set of samples.

    Attributes:
        name: What it is a set of.
        task: ``unconditional``, ``prefix-32``...
        metrics: Name to estimate; what could not be measured is absent, and why stands in ``facts["absent"]``.
        facts: Counts and settings a reader needs beside the numbers.
    """

    name: str
    task: str
    metrics: dict[str, Estimate]
    facts: dict[str, Any] = field(default_factory=dict)


class Encoder(Protocol):
    """What units ask of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        ...


@dataclass(frozen=True)
class Units:
    """What diversity counts: the model's own tokens, another tokenizer's, or words.

    Attributes:
        name: For the record: ``"own tokens"``, ``"words"`` or the tokenizer.
        tokenizer: Cuts the generated text, or None.
    """

    name: str
    tokenizer: Encoder | None = None

    def ids(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Generated units of each sample; separate ranges are joined by :data:`ddlm.evaluation.diversity.GAP`."""
        if self.tokenizer is None and self.name != "words":
            return [s.generated_tokens(diversity.GAP) for s in samples]
        # Each range by itself: a text of several would have units that nobody wrote where they meet.
        pieces = [[s.text[a:b] for a, b in s.ranges()] for s in samples]
        flat = [piece for parts in pieces for piece in parts]
        encode = diversity.word_ids if self.tokenizer is None else self.tokenizer.encode_batch
        encoded = iter(encode(flat))
        return [_joined([next(encoded) for _ in parts]) for parts in pieces]


def _joined(parts: Sequence[list[int]]) -> list[int]:
    """The parts that have units, a gap between them."""
    out: list[int] = []
    for part in parts:
        out += [diversity.GAP, *part] if out and part else part
    return out


def choose_units(
    sets: Sequence[Sequence[Sample]], tokenizer: Encoder | None = None, name: str = ""
) -> Units:
    """The same units for all sets: a given tokenizer, own tokens where every sample tells which it wrote, or words."""
    if tokenizer is not None:
        return Units(name or "tokenizer", tokenizer)
    own = all(s.tells_generated_tokens for one in sets for s in one)
    return Units("own tokens" if own else "words")


def measure_row(
    name: str,
    task: str,
    samples: Sequence[Sample],
    *,
    units: Units,
    judge: Judge | None = None,
    features: Featurizer | None = None,
    references: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
    self_bleu_size: int | None = diversity.SELF_BLEU_SIZE,
    mauve_seeds: Sequence[int] = (25,),
    no_mauve: str | None = None,
    progress: Progress | None = None,
) -> Row:
    """Measure one set of samples.

    Args:
        name: What it is a set of.
        task: ``unconditional``, ``prefix-32``...
        samples: At least two.
        units: What diversity counts.
        judge: For AR-NLL; None leaves it out.
        features: For MAUVE; None leaves it out.
        references: Real texts for MAUVE.
        groups: Which samples count together for distinct-n; None: :func:`group_names`.
        self_bleu_size: See :func:`ddlm.evaluation.diversity.measure`.
        mauve_seeds: k-means seeds of MAUVE.
        no_mauve: Why MAUVE would say nothing here; it is then left out with this reason.
        progress: Called now and then.

    Raises:
        DataError: if the samples cannot be measured; the message names the first that cannot.
    """
    ids = units.ids(samples)
    groups = group_names(samples) if groups is None else groups
    parts, over = replicates(samples)
    metrics: dict[str, Estimate] = {}
    facts: dict[str, Any] = {"samples": len(samples), "units": units.name}
    absent: dict[str, str] = {}
    table = diversity.table(ids)
    numbers = diversity.group_numbers(table, groups)
    each = diversity.each(table, numbers)

    def over_parts(values: diversity.Values) -> Estimate:
        return spread(float(values.mean()), [float(values[p].mean()) for p in parts], over)

    for n, (by_group, alone) in enumerate(zip(each.dist, each.dist_per_sample, strict=True), 1):
        metrics[f"dist_{n}"] = mean(by_group.tolist(), "groups")
        metrics[f"dist_{n}_per_sample"] = over_parts(alone)
    metrics |= {metric: over_parts(getattr(each, metric)) for metric in _MEANS}
    by_seed = over == "seeds"
    bleu = diversity.subset(table[parts[0]] if by_seed else table, self_bleu_size)
    for metric, value in _OF_A_SIZE.items():
        pieces = [table[p] for p in parts]
        if metric == "self_bleu":
            pieces = [diversity.subset(piece, self_bleu_size) for piece in pieces]
        if by_seed:
            metrics[metric] = mean([value(piece) for piece in pieces], over)
        elif metric == "self_bleu":
            left_out = _without_each_fold(bleu) if over == "folds" else []
            metrics[metric] = jackknife(value(bleu), left_out, over)
        else:
            metrics[metric] = spread(value(table), [value(piece) for piece in pieces], over)
    facts |= {
        "generated_units": int((table != diversity.GAP).sum()),
        "group_size": int(np.bincount(numbers).max()),
        "groups": int(numbers.max()) + 1,
        SET_SIZE: len(parts[0]) if by_seed else len(samples),
        "self_bleu_size": len(bleu),
        "intervals_over": over,
        "replicates": len(parts),
    }
    steps = [s.steps for s in samples if s.steps is not None]
    if steps:
        facts |= {
            "mean_steps": float(np.mean(steps)),
            "reasons": dict(Counter(s.reason for s in samples)),
        }
    if judge is None:
        absent["nll"] = "no judge"
    else:
        found, more = _likelihood(samples, judge, parts, over, progress)
        metrics |= found
        facts |= more
        paired = sum(bool(s.reference) for s in samples)
        if paired and "nll_reference" not in metrics and any(s.conditional for s in samples):
            absent["nll_reference"] = (
                f"{paired} of {len(samples)} samples have a reference"
                if paired < len(samples)
                else "some samples are not continuations of one piece"
            )
    reason = no_mauve or _why_no_mauve(features, references, samples)
    if reason is not None or features is None or references is None:
        absent["mauve"] = reason or "no features"
    else:
        metrics["mauve"], facts["mauve"] = _mauve(
            samples, references, features, parts if over == "seeds" else [], mauve_seeds, progress
        )
    if absent:
        facts["absent"] = absent
    return Row(name, task, metrics, facts)


def _without_each_fold(ids: diversity.Ids) -> list[float]:
    """Self-BLEU without one random tenth of the samples each; nothing where there are too few of them."""
    if len(ids) < _LEFT_OUT:
        return []
    order = np.random.default_rng(0).permutation(len(ids))
    left = diversity.self_bleu_without(ids, np.array_split(order, _LEFT_OUT))
    return [float(scores.mean()) for scores in left]


def _likelihood(
    samples: Sequence[Sample],
    judge: Judge,
    parts: Sequence[Sequence[int]],
    over: str,
    progress: Progress | None,
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("judging", done, total)

    def estimate(scores: Sequence[Score], whole: bool) -> Estimate:
        def value(some: Sequence[Score]) -> float:
            found = mean_nll(some)
            return found.whole_nll if whole else found.nll

        found = spread(value(scores), [value([scores[i] for i in p]) for p in parts], over)
        if not all(s.conditional for s in samples):
            return found
        # Seeds write after the same prompts: their spread does not know how prompts differ.
        return wider(found, _over(scores, group_names(samples), "prompts", whole))

    scores = judge.score([s.text for s in samples], [s.ranges() for s in samples], progress=tell)
    total = mean_nll(scores)
    metrics = {"nll": estimate(scores, False), "nll_whole": estimate(scores, True)}
    facts: dict[str, Any] = {
        "tokens_scored": total.tokens,
        "tokens_scored_whole": total.whole_tokens,
    }
    paired = [s for s in samples if s.reference and s.conditional and len(s.ranges()) == 1]
    if paired and len(paired) == len(samples):
        # Every seed has the same references: each counts once, and they are their own replicates.
        distinct = list(dict.fromkeys((str(s.reference), real_range(s)) for s in paired))
        try:
            real = judge.score([t for t, _ in distinct], [[r] for _, r in distinct], progress=tell)
        except DataError as error:
            raise DataError(f"of the different references, {error}") from error
        metrics["nll_reference"] = _over(real, range(len(real)), "texts")
        facts |= {
            "tokens_scored_reference": mean_nll(real).tokens,
            "references_scored": len(real),
        }
    return metrics, facts


def _over(
    scores: Sequence[Score], clusters: Sequence[Hashable], over: str, whole: bool = False
) -> Estimate:
    """Nats per token with an interval over clusters of texts."""
    pairs = [(s.whole_nll, s.whole_tokens) if whole else (s.nll, s.tokens) for s in scores]
    return ratio([n for n, _ in pairs], [c for _, c in pairs], clusters, over)


def real_range(sample: Sample) -> tuple[int, int]:
    """Characters of the reference that stand where the sample's were generated, in one range.

    Raises:
        DataError: if the reference is not the real text of what the sample was given.
    """
    (start, end), text, real = sample.ranges()[0], sample.text, str(sample.reference)
    after = len(text) - end
    if real[:start] != text[:start] or (after and not real.endswith(text[end:])):
        raise DataError(
            f"a reference does not begin and end as its sample's prompt {text[:start][:40]!r}: it belongs to another"
        )
    if start >= len(real) - after:
        raise DataError(
            "a reference is no longer than its prompt: there is no real continuation to score"
        )
    return start, len(real) - after


def _why_no_mauve(
    features: Featurizer | None, references: Sequence[str] | None, samples: Sequence[Sample]
) -> str | None:
    if not references:
        return "no reference texts"
    if features is None:
        return "no feature model"
    fewest = min(len(references), len(samples))
    return f"{fewest} texts, MAUVE needs at least {FEWEST}" if fewest < FEWEST else None


def _mauve(
    samples: Sequence[Sample],
    references: Sequence[str],
    features: Featurizer,
    parts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    progress: Progress | None,
) -> tuple[Estimate, dict[str, Any]]:
    """MAUVE of each seed's samples against the references, averaged; of all where seeds do not tell or have too few.

    The interval is the wider one of seeds and bootstrap: seeds share the reference texts, the bootstrap does not know
    how samplings differ.
    """

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("features", done, total)

    human = features(list(references), progress=tell)
    machine = features([s.text for s in samples], progress=tell)
    chosen = [p for p in parts if len(p) >= FEWEST] or [list(range(len(samples)))]
    too_few = len(parts[0]) if parts and len(chosen[0]) > len(parts[0]) else None
    results = []
    for done, part in enumerate(chosen):
        if progress is not None:
            progress("mauve", done, len(chosen))
        results.append(mauve(human, machine[list(part)], seeds=seeds))
    by_seed = spread(
        float(np.mean([r.mauve for r in results])),
        [r.mauve for r in results] if len(results) > 1 else [],
        "seeds",
    )
    half = float(np.mean([r.half_width for r in results]))  # cut at 0 and 1 once, below
    seed_half = by_seed.width / 2
    over = "seeds" if seed_half > half else "bootstrap"
    half = max(half, seed_half)
    first = results[0]
    facts = {
        "buckets": first.buckets,
        "scaling": first.scaling,
        "kmeans_seeds": list(first.seeds),
        "per_sample_seed": [r.mauve for r in results],
        "star": float(np.mean([r.star for r in results])),
        "samples_each": first.samples,
        "references": first.references,
        **({} if too_few is None else {POOLED: too_few}),
        **first.settings,
    }
    value = by_seed.value
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), over), facts


def group_names(samples: Sequence[Sample]) -> list[Hashable]:
    """Which samples count together for distinct-n: those of one prompt; five consecutive ones without a prompt."""
    alone = iter(diversity.fives(sum(not s.conditional for s in samples)))
    return [
        (s.prompt or _kept(s)) if s.conditional else next(alone)  # a text is equal to no number
        for s in samples
    ]


def _kept(sample: Sample) -> str:
    """The given parts of the text, with a mark that no text holds between them."""
    parts, at = [], 0
    for start, end in sample.ranges():
        parts.append(sample.text[at:start])
        at = end
    return "\0".join([*parts, sample.text[at:]])


def replicates(samples: Sequence[Sample]) -> tuple[list[list[int]], str]:
    """Samples of each seed, or random fifths where the seeds do not make comparable parts; and which it was."""
    by_seed: dict[int | None, list[int]] = {}
    for i, s in enumerate(samples):
        by_seed.setdefault(s.seed, []).append(i)
    sizes = [len(part) for part in by_seed.values()]
    if None not in by_seed and 2 <= len(sizes) <= MOST_SEEDS and 2 <= min(sizes) == max(sizes):
        return list(by_seed.values()), "seeds"
    if len(samples) < 2 * _FOLDS:
        return [], "none"
    order = np.random.default_rng(0).permutation(len(samples))
    return [sorted(part.tolist()) for part in np.array_split(order, _FOLDS)], "folds"
