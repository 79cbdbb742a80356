"""Measure a sample file of any model, beside real text and sanity rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ddlm.data.sources import document_hash
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.measure import Encoder, Progress, Row, choose_units, measure_row
from ddlm.evaluation.protocol import REAL
from ddlm.evaluation.samples import Sample
from ddlm.types import DataError

_LONGER = 1.5  # between median lengths; words of one text in different styles differ by some 20%
_SAME = "this is the reference: compared with itself it is 1"

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
    return [
        measure_row(
            label,
            "conditional" if any(s.conditional for s in one) else "unconditional",
            one,
            units=units,
            judge=judge,
            features=features,
            references=human,
            no_mauve=_SAME if label == REAL else None,
            progress=progress,
        )
        for label, one in sets
    ]


def _check_length(
    samples: Sequence[Sample], references: Sequence[Sample], tokenizer: Encoder | None
) -> None:
    """Refuse texts of unlike length: distinct-n, entropies, AR-NLL and MAUVE all depend on it."""
    both = (samples, references)
    if tokenizer is not None:
        unit = "tokens"
        counts = [[len(row) for row in tokenizer.encode_batch([s.text for s in x])] for x in both]
    elif all(s.tokens is not None for one in both for s in one):
        unit = "tokens"
        counts = [[len(s.tokens or ()) for s in one] for one in both]
    else:
        unit = "words"
        counts = [[len(s.text.split()) for s in one] for one in both]
    ours, real = (max(1.0, float(np.median(c))) for c in counts)
    if max(ours, real) > _LONGER * min(ours, real):
        advice = "" if unit == "tokens" else ", or count in tokens with --tokenizer"
        raise DataError(
            f"the references have {real:g} {unit} (median), the samples {ours:g}, and no measure compares texts of "
            f"unlike length: cut both to one length{advice}"
        )


def sanity_sets(base: Sequence[Sample], seed: int) -> list[tuple[str, list[Sample]]]:
    """Text whose scores are known to be bad, made of ``base``: shuffled, drawn word by word, one line repeated.

    Words are shuffled for the judge; where the samples have tokens, these are shuffled alike for diversity. Seeds are
    kept, so that a set is measured in parts of the size that ``base`` is measured in.
    """
    rng = np.random.default_rng(seed)
    texts = [s.text.split() for s in base]
    tokens = [None if s.tokens is None else list(s.tokens) for s in base]
    all_words = [w for words in texts for w in words]
    all_tokens = [t for row in tokens if row is not None for t in row]
    shuffled, drawn = [], []
    for words, row, like in zip(texts, tokens, base, strict=True):
        shuffled.append(
            _sample(_permute(words, rng), None if row is None else _permute(row, rng), like)
        )
        drawn.append(
            _sample(
                _choose(all_words, len(words), rng),
                None if row is None else _choose(all_tokens, len(row), rng),
                like,
            )
        )
    one = replace(base[0], prompt=None, is_noised=None, generated=None, reference=None)
    return [
        ("shuffled text", shuffled),
        ("unigram draws", drawn),
        ("one line repeated", [replace(one, seed=s.seed) for s in base]),
    ]


def _sample(words: list[str], tokens: list[int] | None, like: Sample) -> Sample:
    # a text of nothing but white space has no words to move
    return Sample(" ".join(words) or like.text, tokens=tokens, seed=like.seed)


def _permute(items: list[T], rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(len(items))]


def _choose(items: list[T], count: int, rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.integers(len(items), size=count)]
