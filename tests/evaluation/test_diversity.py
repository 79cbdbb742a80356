"""Every diversity metric against an independent reference."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import sacrebleu
import scipy.stats

from ddlm.evaluation import diversity
from ddlm.types import DataError


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(0)
    out = [[rng.randint(0, 30) for _ in range(rng.randint(5, 24))] for _ in range(40)]
    out[7] = out[3][:]  # an exact copy
    out[8] = [4] * 20  # one repeated token
    out[9] = [900 + i for i in range(9)]  # nothing in common with the others
    return out


def ngrams(sample, n):
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


def test_self_bleu_equals_sacrebleu(samples):
    texts = [" ".join(map(str, s)) for s in samples]
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="floor", effective_order=False, force=True)
    ours = diversity.self_bleu(diversity.table(samples))
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        assert ours[i] == pytest.approx(bleu.sentence_score(text, others).score / 100, abs=1e-9), i


def test_self_bleu_takes_the_closest_length_and_scores_too_short_samples_zero():
    samples = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    texts = [" ".join(map(str, s)) for s in samples]
    bleu = sacrebleu.BLEU(tokenize="none", smooth_method="floor", effective_order=False, force=True)
    expected = [
        bleu.sentence_score(t, texts[:i] + texts[i + 1 :]).score / 100 for i, t in enumerate(texts)
    ]
    ours = diversity.self_bleu(diversity.table(samples))
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    assert ours[2] == 0


def test_distinct_counts_the_ngrams_of_a_group_together(samples):
    groups = [i // 5 for i in range(len(samples))]
    measured = diversity.measure(samples, groups)
    for n in (1, 2, 3):
        shares = []
        for g in range(8):
            grams = [
                x
                for s, name in zip(samples, groups, strict=True)
                if name == g
                for x in ngrams(s, n)
            ]
            shares.append(len(set(grams)) / len(grams))
        assert measured.dist[n - 1] == pytest.approx(np.mean(shares), abs=1e-12)
        own = [len(set(ngrams(s, n))) / len(ngrams(s, n)) for s in samples]
        assert measured.dist_per_sample[n - 1] == pytest.approx(np.mean(own), abs=1e-12)


def test_groups_need_not_be_neighbours(samples):
    names = [f"prompt {i % 8}" for i in range(len(samples))]
    order = sorted(range(len(samples)), key=lambda i: names[i])
    together = diversity.measure([samples[i] for i in order], [names[i] for i in order])
    assert diversity.measure(samples, names).dist == pytest.approx(together.dist, abs=1e-12)


def test_entropies_equal_scipy(samples):
    measured = diversity.measure(samples)
    pooled = Counter(x for s in samples for x in s)
    assert measured.token_entropy == pytest.approx(
        scipy.stats.entropy(list(pooled.values())), abs=1e-12
    )
    within = [scipy.stats.entropy(list(Counter(s).values())) for s in samples]
    assert measured.sample_entropy == pytest.approx(np.mean(within), abs=1e-12)
    columns = [[s[t] for s in samples if len(s) > t] for t in range(max(map(len, samples)))]
    across = [scipy.stats.entropy(list(Counter(c).values())) for c in columns if len(c) > 1]
    assert measured.across_entropy == pytest.approx(np.mean(across), abs=1e-12)


def test_zipf_coefficient_equals_linregress(samples):
    frequency = sorted(Counter(x for s in samples for x in s).values(), reverse=True)
    ranks = np.log(np.arange(1, len(frequency) + 1))
    slope = scipy.stats.linregress(ranks, np.log(frequency)).slope
    assert diversity.measure(samples).zipf == pytest.approx(-slope, abs=1e-10)


def test_zipf_coefficient_of_a_zipfian_text_is_its_exponent():
    sample = [rank for rank in range(1, 200) for _ in range(round(1e5 / rank**1.3))]
    assert diversity.zipf_coefficient(diversity.table([sample])) == pytest.approx(1.3, abs=0.01)
    assert math.isnan(diversity.zipf_coefficient(diversity.table([[3, 3, 3]])))


def test_repetition_counts_repeated_four_grams(samples):
    expected = [1 - len(set(ngrams(s, 4))) / len(ngrams(s, 4)) for s in samples]
    np.testing.assert_allclose(
        diversity.repetition_rate(diversity.table(samples)), expected, atol=1e-12
    )
    assert diversity.repetition_rate(diversity.table([[5] * 23]))[0] == pytest.approx(19 / 20)


def test_no_ngram_crosses_a_gap():
    gap = diversity.GAP
    ids = diversity.table([[1, 2, gap, 3, 4], [1, 2, gap, 3, 9]])
    row, gram = diversity._ngrams(ids, 2)
    assert row.tolist() == [0, 0, 1, 1]
    assert len(set(gram.tolist())) == 3
    assert len(diversity._ngrams(ids, 3)[0]) == 0


def test_one_repeated_text_has_no_diversity_across_samples():
    measured = diversity.measure([[1, 2, 3, 4, 5, 6, 7, 8]] * 10)
    assert measured.self_bleu == pytest.approx(1)
    assert measured.across_entropy == 0
    assert measured.dist_per_sample == (1, 1, 1)
    assert measured.dist[0] == pytest.approx(1 / 5)


def test_nothing_is_minus_zero():
    alike = diversity.measure([[5, 5, 5, 5]] * 2)
    even = diversity.zipf_coefficient(diversity.table([[1, 2, 3]]))
    for zero in (alike.token_entropy, alike.sample_entropy, alike.across_entropy, even):
        assert str(zero) == "0.0"


def test_self_bleu_is_taken_on_a_stated_seeded_subsample(samples):
    part = diversity.measure(samples, self_bleu_size=10, seed=1)
    assert part.self_bleu_size == 10
    assert part.self_bleu == diversity.measure(samples, self_bleu_size=10, seed=1).self_bleu
    assert part.self_bleu != diversity.measure(samples, self_bleu_size=None).self_bleu
    assert diversity.measure(samples).self_bleu_size == len(samples)


@pytest.mark.parametrize(
    ("samples", "groups", "message"),
    [
        ([], None, "no samples"),
        ([[1, 2, 3]], None, "at least 2"),
        ([[1, 2, 3], []], None, "sample 2 has no generated token"),
        ([[1, 2, 3], [1, 2, 3]], [0], "1 group names for 2 samples"),
        ([[1, 2], [3, 4]], None, "sample 1 is too short: it has no 3 units in a row"),
        ([[1, 2, 3], [1, 2, 3], [4, 5]], None, r"sample 3 is too short: .*such samples \(1 of 3\)"),
        ([[1, 2, 3], [4, 5], [6, 7]], [0, 1, 1], "sample 2 is too short"),
    ],
)
def test_bad_input_is_named(samples, groups, message):
    with pytest.raises(DataError, match=message):
        diversity.measure(samples, groups)
