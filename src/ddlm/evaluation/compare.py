"""Measure a sample file of any model, beside real text and sanity rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ddlm.data.sources import document_hash
from ddlm.evaluation import diversity
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.measure import (
    Encoder,
    Progress,
    Row,
    choose_units,
    group_names,
    measure_row,
    real_range,
)
from ddlm.evaluation.protocol import REAL, SAME
from ddlm.evaluation.samples import Sample
from ddlm.types import DataError

_LONGER = 1.5  # between median lengths; words of one text in different styles differ by some 20%

T = TypeVar("T")


def compare(
    name: str,
    samples: Sequence[Sample],
    references: Sequence[Sample],
    *,
    tokenizer: Encoder | None = None,
    tokenizer_name: str = "",
    judge: Judge | None = None,
    features: Featurizer | None = None,
    sanity: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows for the samples, for the real text where there is one, and for the sanity sets.

    Args:
        name: Of the samples.
        samples: What is measured.
        references: Real texts; where there are none, the samples' own references where they have them.
        tokenizer: Cuts all texts into the units that diversity counts; None: the tokens in the files where all have
            them, otherwise words.
        tokenizer_name: For the record.
        judge: For AR-NLL, or None.
        features: For MAUVE, or None.
        sanity: Whether to add shuffled text, unigram draws and one line repeated.
        seed: Seed of the sanity sets.
        progress: Called now and then.

    Raises:
        DataError: naming what cannot be measured, when references are much longer or shorter than the samples, or when
            the judge was trained on a reference.
    """
    # Several continuations of one prompt carry the same reference: it is one text, not several.
    own = dict.fromkeys(s.reference for s in samples if s.reference)
    if not references and len(own) > 1:
        references = [Sample(text) for text in own]
    references = _as_continuations(samples, references)
    human = [s.text for s in references] or list(own)
    if references:
        _check_length(samples, references, tokenizer)
    if judge is not None and human:
        judge.check_held_out([document_hash(text) for text in human], "the reference")
    sets = [(name, list(samples))]
    if references:
        sets.append((REAL, list(references)))
    if sanity:
        sets += sanity_sets(references or samples, seed)
    units = choose_units([one for _, one in sets], tokenizer, tokenizer_name)
    ours = group_names(samples)
    base = _groups(references, ours) if references else ours
    rows = []
    for number, (label, one) in enumerate(sets):
        try:
            row = measure_row(
                label,
                _task(one),
                one,
                units=units,
                judge=judge,
                features=features,
                references=human,
                groups=base if number else ours,
                no_mauve=SAME if label == REAL else None,
                progress=progress,
            )
        except DataError as error:
            spaceless = isinstance(error, diversity.TooShortError) and units.name == "words"
            advice = "; text without spaces is one word, --tokenizer counts its tokens"
            raise DataError(f"{label}: {error}{advice if spaceless else ''}") from error
        rows.append(row)
    return rows


def unlike_stretches(rows: Sequence[Row]) -> list[str]:
    """A line where some rows are of what was generated after prompts and others of whole texts."""
    part = [row.name for row in rows if row.task != "unconditional"]
    whole = [row.name for row in rows if row.task == "unconditional"]
    if not part or not whole:
        return []
    return [
        f"Of {', '.join(part)} only what was generated counts, of {', '.join(whole)} the whole texts: only MAUVE"
        " compares. Every sample needs its real text as 'reference', or the references their 'prompt'."
    ]


def partial_samples(samples: Sequence[Sample], references: Sequence[Sample]) -> list[str]:
    """Lines where only some of the samples have what the comparison rests on: a given part, a reference.

    Args:
        samples: What is measured.
        references: Real texts from elsewhere; where there are none, the samples' own are taken.
    """
    lines, count = [], len(samples)
    given = sum(s.conditional for s in samples)
    if 0 < given < count:
        lines.append(
            f"{given} of {count} samples have a given part: of these only what was generated counts, of the others the"
            " whole text, and numbers of both together compare with nothing. Measure each kind in a file of its own."
        )
    own = [s.reference for s in samples if s.reference]
    if len(own) < count and len(set(own)) > 1 and not references:
        lines.append(
            f"{len(own)} of {count} samples have a reference: rows of real text and sanity rows are made of these"
            " references alone, and MAUVE compares all samples with them."
        )
    return lines


def _task(samples: Sequence[Sample]) -> str:
    given = sum(s.conditional for s in samples)
    if 0 < given < len(samples):
        return "partly conditional"
    return "conditional" if given else "unconditional"


def _conditional(samples: Sequence[Sample]) -> bool:
    return any(s.conditional for s in samples)


def _as_continuations(samples: Sequence[Sample], references: Sequence[Sample]) -> list[Sample]:
    """The references, each cut to where its sample was generated; whole where one of them belongs to no sample."""
    if not _conditional(samples) or _conditional(references):
        return list(references)
    of: dict[str, Sample] = {}
    for s in samples:
        of.setdefault(s.reference or "", s)
    out = []
    for real in references:
        like = of.get(real.text)
        if like is None or len(like.ranges()) != 1:
            return list(references)
        try:
            cut = replace(real, generated=[real_range(like)])
        except DataError:  # it does not begin and end as the prompt does
            return list(references)
        if real.tokens is not None:
            mask = like.is_noised
            fits = mask is not None and len(mask) == len(real.tokens)
            cut = replace(cut, is_noised=mask) if fits else replace(cut, tokens=None)
        out.append(cut)
    return out


def _groups(references: Sequence[Sample], ours: Sequence[Hashable]) -> list[Hashable]:
    """Groups of the references for distinct-n, which falls with their size: as large as the samples' own.

    Of a prompt there are several continuations and one real text: as many texts of different prompts count together.
    """
    names = group_names(references)
    if not _conditional(references) or len(set(names)) < len(names):
        return names
    size = max(Counter(ours).values())
    return list(diversity.consecutive(len(names), size))


def _check_length(
    samples: Sequence[Sample], references: Sequence[Sample], tokenizer: Encoder | None
) -> None:
    """Refuse texts of unlike length: distinct-n, entropies, AR-NLL and MAUVE all depend on it.

    Whole texts are compared where the references are whole, otherwise what was generated.
    """
    if not _conditional(references):
        samples = [_whole(s) for s in samples]
    both = (samples, references)
    units = choose_units(both, tokenizer)
    unit = "words" if units.name == "words" else "tokens"
    counts = [[sum(i != diversity.GAP for i in row) for row in units.ids(x)] for x in both]
    ours, real = (max(1.0, float(np.median(c))) for c in counts)
    if max(ours, real) > _LONGER * min(ours, real):
        advice = "" if unit == "tokens" else ", or count in tokens with --tokenizer"
        raise DataError(
            f"the references have {real:g} {unit} (median), the samples {ours:g}, and no measure compares texts of "
            f"unlike length: cut both to one length{advice}"
        )


def _whole(sample: Sample) -> Sample:
    return replace(sample, prompt=None, is_noised=None, generated=None)


def sanity_sets(base: Sequence[Sample], seed: int) -> list[tuple[str, list[Sample]]]:
    """Text whose scores are known to be bad, made of ``base``: shuffled, drawn word by word, one line repeated.

    Words are shuffled for the judge; where the samples have tokens, these are shuffled alike for diversity. Seeds are
    kept, so that a set is measured in parts of the size that ``base`` is measured in, and so is what was given: only
    what was generated is made anew.
    """
    rng = np.random.default_rng(seed)
    words = [[s.text[a:b].split() for a, b in s.ranges()] for s in base]
    tokens = [_generated_ids(s) for s in base]
    all_words = [w for parts in words for part in parts for w in part]
    all_tokens = [t for row in tokens if row is not None for t in row]
    shuffled, drawn = [], []
    for parts, row, like in zip(words, tokens, base, strict=True):
        shuffled.append(
            _rewritten(
                like,
                [_permute(part, rng) for part in parts],
                None if row is None else _permute(row, rng),
            )
        )
        drawn.append(
            _rewritten(
                like,
                [_choose(all_words, len(part), rng) for part in parts],
                None if row is None else _choose(all_tokens, len(row), rng),
            )
        )
    one = replace(base[0] if base[0].conditional else _whole(base[0]), reference=None)
    return [
        ("shuffled text", shuffled),
        ("unigram draws", drawn),
        ("one line repeated", [replace(one, seed=s.seed) for s in base]),
    ]


def _generated_ids(sample: Sample) -> list[int] | None:
    if not sample.tells_generated_tokens:
        return None
    return [i for i in sample.generated_tokens(diversity.GAP) if i != diversity.GAP]


def _rewritten(like: Sample, words: list[list[str]], ids: list[int] | None) -> Sample:
    """``like`` with these words and tokens where its own were generated."""
    if not like.conditional:
        # a text of nothing but white space has no words to move
        return Sample(" ".join(words[0]) or like.text, tokens=ids, seed=like.seed)
    text, ranges, at = "", [], 0
    for (start, end), part in zip(like.ranges(), words, strict=True):
        old = like.text[start:end]
        first = len(old) - len(old.lstrip())
        last = len(old.rstrip())
        text += like.text[at:start]
        begin, at = len(text), end
        text += old[:first] + " ".join(part) + old[last:] if part else old
        ranges.append((begin, len(text)))
    text += like.text[at:]
    tokens = like.tokens
    if tokens is not None and ids is not None:
        new = iter(ids)
        mask = like.is_noised or [True] * len(tokens)
        tokens = [next(new) if noised else t for t, noised in zip(tokens, mask, strict=True)]
    return replace(like, text=text, tokens=tokens, prompt=None, reference=None, generated=ranges)


def _permute(items: list[T], rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))]


def _choose(items: list[T], count: int, rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.integers(len(items), size=count)]
