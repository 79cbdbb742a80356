"""Measures that grow with the number of samples, and intervals where seeds share prompts and references."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.stats

from ddlm.evaluation import diversity
from ddlm.evaluation.compare import compare, sanity_sets
from ddlm.evaluation.intervals import Estimate, jackknife, ratio, spread, wider
from ddlm.evaluation.judges import Judge, mean_nll
from ddlm.evaluation.measure import SET_SIZE, Units, measure_row
from ddlm.evaluation.samples import Sample
from evaluation.small import sentences

GROWING = ("token_entropy", "across_entropy", "zipf", "self_bleu")


def drawn(count, seeds, rng):
    """Samples of one source: ``count`` for each seed, without seeds where there are none."""
    p = 1 / np.arange(1, 2001)
    ids = rng.choice(2000, size=(count * max(seeds, 1), 32), p=p / p.sum())
    return [
        Sample("x", tokens=r.tolist(), seed=i // count if seeds else None)
        for i, r in enumerate(ids)
    ]


def test_a_model_of_five_seeds_is_measured_at_the_size_of_the_real_text():
    rng = np.random.default_rng(0)
    five = measure_row("a", "unconditional", drawn(100, 5, rng), units=Units("own tokens"))
    one = measure_row("b", "unconditional", drawn(100, 0, rng), units=Units("own tokens"))
    assert five.facts[SET_SIZE] == one.facts[SET_SIZE] == 100
    assert five.facts["samples"] == 500
    pooled = diversity.measure([list(s.tokens) for s in drawn(100, 5, np.random.default_rng(0))])
    for metric in GROWING:
        a, b = five.metrics[metric], one.metrics[metric]
        assert abs(a.value - b.value) < 0.02 * abs(b.value) + 4 * a.width, metric
        assert a.over == "seeds"
    # What it would be otherwise: the same source, five times as many samples.
    assert pooled.token_entropy > five.metrics["token_entropy"].value + 0.1
    assert pooled.across_entropy > five.metrics["across_entropy"].value + 0.5
    assert pooled.self_bleu > five.metrics["self_bleu"].value + 0.02


def test_the_mean_over_seeds_has_the_t_interval_of_the_seeds():
    samples = drawn(40, 3, np.random.default_rng(1))
    row = measure_row("a", "unconditional", samples, units=Units("own tokens"))
    parts = [diversity.measure([s.tokens for s in samples if s.seed == k]) for k in range(3)]
    for metric in GROWING:
        values = [getattr(p, metric) for p in parts]
        found = row.metrics[metric]
        assert found.value == pytest.approx(np.mean(values))
        low, high = scipy.stats.t.interval(0.95, 2, loc=found.value, scale=scipy.stats.sem(values))
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert row.facts["self_bleu_size"] == 40


def test_sanity_sets_of_seeded_samples_have_their_size(monkeypatch):
    texts = sentences(60, seed=3)
    made = [Sample(t, seed=i // 20) for i, t in enumerate(texts)]
    assert all([s.seed for s in one] == [s.seed for s in made] for _, one in sanity_sets(made, 0))
    assert {row.facts[SET_SIZE] for row in compare("a", made, [])} == {20}


def test_a_ratio_of_equal_counts_has_the_t_interval_of_the_clusters():
    values = [3.0, 5.0, 4.0, 8.0]
    found = ratio(values, [1] * 4, range(4), "texts")
    low, high = scipy.stats.t.interval(0.95, 3, loc=5.0, scale=scipy.stats.sem(values))
    assert (found.value, found.low, found.high) == (5.0, pytest.approx(low), pytest.approx(high))
    # A text that is there twice as one cluster tells no more than once.
    twice = ratio(values * 2, [1] * 8, [*range(4)] * 2, "prompts")
    assert (twice.value, twice.width) == (5.0, pytest.approx(found.width))
    assert ratio([2.0], [4], ["a"], "texts") == Estimate(0.5)


def test_a_ratio_covers_the_truth_where_lengths_and_prompts_vary():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        level = np.repeat(rng.normal(4, 1, 30), 3)
        counts = rng.integers(5, 15, 90)
        sums = counts * (level + rng.normal(0, 0.3, 90))
        found = ratio(sums.tolist(), counts.tolist(), [i // 3 for i in range(90)], "prompts")
        inside += found.low <= 4 <= found.high
    assert inside >= 0.9 * 200


def test_the_wider_interval_stands():
    narrow, wide = Estimate(1.0, 0.9, 1.1, "seeds"), Estimate(1.5, 1.0, 2.0, "prompts")
    assert wider(narrow, wide) == Estimate(1.0, 1.0, 2.0, "prompts")
    assert wider(wide, narrow) == wide
    assert wider(narrow, Estimate(1.0)) == narrow


@pytest.fixture
def continued():
    """Three continuations of each of ten prompts."""
    real = sentences(10, seed=21)
    cut = [t.index(" ", 25) for t in real]
    return [
        Sample(t[:c] + " " + other, prompt=t[:c], reference=t, seed=k)
        for k in range(3)
        for t, c, other in zip(real, cut, sentences(10, seed=30 + k, words=8), strict=True)
    ]


def test_a_reference_counts_once_and_has_an_interval(continued, judge_folder, tmp_path):
    judge = Judge(str(judge_folder), cache=tmp_path)
    row = measure_row("a", "prefix", continued, units=Units("words"), judge=judge)
    spans = [[(len(s.prompt), len(s.reference))] for s in continued[:10]]
    scores = judge.score([s.reference for s in continued[:10]], spans)
    found = row.metrics["nll_reference"]
    assert found.value == pytest.approx(mean_nll(scores).nll)
    assert (found.over, found.width > 0) == ("texts", True)
    assert row.facts["references_scored"] == 10
    assert row.facts["tokens_scored_reference"] == sum(s.tokens for s in scores)


def test_likelihood_of_continuations_knows_that_prompts_differ(continued, judge_folder, tmp_path):
    judge = Judge(str(judge_folder), cache=tmp_path)
    # Every seed writes the same: the seeds' spread is nothing, the prompts' is what there is.
    same = [Sample(**{**vars(continued[i % 10]), "seed": i // 10}) for i in range(30)]
    row = measure_row("a", "prefix", same, units=Units("words"), judge=judge)
    scores = judge.score([s.text for s in same[:10]], [s.ranges() for s in same[:10]])
    expected = ratio([s.nll for s in scores], [s.tokens for s in scores], range(10), "prompts")
    assert row.metrics["nll"].over == "prompts"
    assert row.metrics["nll"].width == pytest.approx(expected.width)
    assert row.metrics["nll_whole"].over == "prompts"


def test_why_the_real_continuations_were_not_scored(continued, judge_folder, tmp_path):
    judge = Judge(str(judge_folder), cache=tmp_path)
    some = [Sample(**{**vars(s), "reference": s.reference if i else None})
            for i, s in enumerate(continued)]  # fmt: skip
    row = measure_row("a", "prefix", some, units=Units("words"), judge=judge)
    reason = f"{len(some) - 1} of {len(some)} samples have a reference"
    assert row.facts["absent"]["nll_reference"] == reason
    assert "nll_reference" not in row.metrics


def test_references_that_several_samples_share_are_one_text(continued, judge_folder, tmp_path):
    seen = []

    class Counting:
        def __call__(self, texts, progress=None):
            seen.append(list(texts))
            return np.random.default_rng(len(seen)).normal(size=(len(texts), 4)).astype(np.float32)

    many = [
        Sample(**{**vars(s), "reference": f"{s.reference} {i % 20}"})
        for i, s in enumerate(continued)
    ]
    compare("a", many + many, [], features=Counting())
    assert max(Counter(seen[0]).values()) == 1
    assert len(seen[0]) == len({s.reference for s in many})


def test_self_bleu_of_a_drawn_subset_covers_the_truth():
    """Of samples without seeds, four times as many as self-BLEU is computed on: the folds would all count as used."""
    rng = np.random.default_rng(5)
    found = [
        measure_row(
            "a", "unconditional", drawn(120, 0, rng), units=Units("own tokens"), self_bleu_size=30
        ).metrics["self_bleu"]
        for _ in range(30)
    ]
    centre = np.mean([f.value for f in found])
    assert np.mean([f.low <= centre <= f.high for f in found]) >= 0.85
    deviation = np.std([f.value for f in found])
    assert 0.8 < np.mean([f.width for f in found]) / (2 * 1.96 * deviation) < 2


def test_self_bleu_without_a_fold_is_that_of_the_rest():
    ids = np.random.default_rng(6).integers(0, 9, (40, 12))
    ids[::3, 8:] = diversity.GAP
    folds = np.array_split(np.random.default_rng(7).permutation(40), 4)
    left = diversity.self_bleu_without(ids, folds)
    for fold, scores in zip(folds, left, strict=True):
        np.testing.assert_array_equal(scores, diversity.self_bleu(np.delete(ids, fold, axis=0)))


def test_the_jackknife_of_a_mean_is_its_t_interval():
    values = [3.0, 5.0, 4.0, 8.0]
    left = [(20.0 - v) / 3 for v in values]
    found, expected = jackknife(5.0, left, "folds"), spread(5.0, values, "folds")
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert jackknife(5.0, [], "folds") == Estimate(5.0)
