"""Masks against their exact distributions, at 20,000 draws; sigma is the standard error of the estimate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddlm.diffusion.masking import STRATEGIES, TAKES_SPANS, prefix_mask, span_mask
from ddlm.types import ConfigError

N, T, K_MAX = 20_000, 64, 9
SIGMAS = (
    4.5  # a right implementation fails once in 150,000 comparisons; the seeds are fixed besides
)


def draw(name: str, length: int = T) -> Tensor:
    return STRATEGIES[name](N, length, torch.Generator().manual_seed(7))


def assert_frequency(hits: Tensor, probability: float) -> None:
    """``hits`` are N independent indicators; compare with a binomial."""
    sigma = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(hits.double().mean().item() - probability) < SIGMAS * sigma + 1e-12


def assert_mean(values: Tensor, mean: float) -> None:
    sigma = values.double().std().item() / math.sqrt(len(values))
    assert abs(values.double().mean().item() - mean) < SIGMAS * sigma


def runs(mask: Tensor) -> Tensor:
    """Number of maximal blocks of equal values in each row."""
    return 1 + (mask[:, 1:] != mask[:, :-1]).sum(-1)


def span_runs(j: int) -> float:
    """P(a span row shows j blocks): k uniform in 1..9, k - 1 fair changes, rows with nothing noised redrawn.

    Given k, neighbouring spans differ independently with probability 1/2, so the blocks are 1 + Binomial(k-1, 1/2);
    half of the single-block rows are empty. P(empty) = mean_k 2^-k.
    """
    raw = sum(math.comb(k - 1, j - 1) / 2 ** (k - 1) for k in range(j, K_MAX + 1)) / K_MAX
    empty = sum(2.0**-k for k in range(1, K_MAX + 1)) / K_MAX
    return (raw - (empty if j == 1 else 0)) / (1 - empty)


def test_span_rows_have_the_exact_distribution_of_blocks() -> None:
    blocks = runs(draw("span"))
    assert blocks.min() == 1
    assert blocks.max() == K_MAX  # 8 cut points make 9 spans
    assert math.isclose(sum(span_runs(j) for j in range(1, K_MAX + 1)), 1.0)
    for j in range(1, K_MAX + 1):
        assert_frequency(blocks == j, span_runs(j))


def test_half_of_the_positions_is_noised_by_spans_before_the_redraw() -> None:
    mask = draw("span")
    empty = sum(2.0**-k for k in range(1, K_MAX + 1)) / K_MAX
    assert_mean(mask.double().mean(-1), 0.5 / (1 - empty))
    assert_frequency(mask.all(-1), empty / (1 - empty))  # as many full rows as empty ones were


def test_span_boundaries_are_uniform() -> None:
    """A change falls between any two neighbours with the same probability: E[k - 1] / (T - 1) / 2."""
    mask = draw("span")
    empty = sum(2.0**-k for k in range(1, K_MAX + 1)) / K_MAX
    expected = (K_MAX - 1) / 2 / (T - 1) / 2 / (1 - empty)  # a row with a change is never empty
    changes = mask[:, 1:] != mask[:, :-1]  # (N, T - 1)
    for i in range(T - 1):
        assert_frequency(changes[:, i], expected)


@pytest.mark.parametrize(("k_max", "most"), [(1, 1), (2, 2), (T, T)])
def test_span_takes_every_k_max(k_max: int, most: int) -> None:
    blocks = runs(span_mask(2000, T, torch.Generator().manual_seed(0), k_max=k_max))
    assert blocks.max() <= most
    assert k_max > 2 or blocks.max() == most


def test_prefix_is_one_boundary_uniform_over_its_places() -> None:
    mask = draw("prefix")
    kept = (~mask).sum(-1)
    assert torch.equal(mask, torch.arange(T) >= kept[:, None])  # kept positions come first
    for length in range(T):  # 0..T-1: length 0 is unconditional generation
        assert_frequency(kept == length, 1 / T)


def test_random_has_a_uniform_rate() -> None:
    """Given a uniform rate the count is uniform on 0..T (Beta-binomial); without 0 it is uniform on 1..T."""
    count = draw("random").sum(-1)
    for c in range(1, T + 1):
        assert_frequency(count == c, 1 / T)
    mask = draw("random")
    for i in range(T):
        assert_frequency(mask[:, i], (T + 1) / 2 / T)


def test_mixed_is_random_inside_the_continuation() -> None:
    """Given a prefix of j, the count is uniform on 0..T-j; P(empty) = mean_j 1 / (T - j + 1)."""
    mask = draw("mixed")
    empty = sum(1 / (T - j + 1) for j in range(T)) / T
    assert_mean(mask.sum(-1), sum((T - j) / 2 for j in range(T)) / T / (1 - empty))
    for i in range(
        T
    ):  # position i is in the continuation for i + 1 of the T prefixes, then noised half the time
        assert_frequency(mask[:, i], (i + 1) / T / 2 / (1 - empty))


def test_blend_is_each_of_its_rules_a_quarter_of_the_time() -> None:
    mask = draw("blend")
    empty = sum(2.0**-k for k in range(1, K_MAX + 1)) / K_MAX
    full = (1 + 1 / T + 1 / T + empty / (1 - empty)) / 4
    assert_frequency(mask.all(-1), full)
    # the last position: always, always, at a uniform rate given a count of 1..T, in a span
    last = (1 + 1 + (T + 1) / 2 / T + 0.5 / (1 - empty)) / 4
    assert_frequency(mask[:, -1], last)
    halves = mask[:, : T // 2].double().mean(-1) - mask[:, T // 2 :].double().mean(-1)
    assert_mean(halves, -1 / 8)  # prefixes alone lean to one side: by 1/2 of the row


@pytest.mark.parametrize("name", list(STRATEGIES))
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 40), length=st.integers(1, 20), seed=st.integers(0, 2**31), data=st.data()
)
def test_no_row_is_ever_empty_and_the_seed_decides_everything(
    name: str, batch: int, length: int, seed: int, data: st.DataObject
) -> None:
    k_max = min(9, length)
    extra = {"k_max": data.draw(st.integers(1, k_max))} if name in TAKES_SPANS else {}
    first, second = (
        STRATEGIES[name](batch, length, torch.Generator().manual_seed(seed), **extra)
        for _ in range(2)
    )
    assert first.shape == (batch, length)
    assert first.dtype == torch.bool
    assert first.any(-1).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_twenty_thousand_rows_have_none_empty(name: str) -> None:
    assert draw(name).any(-1).all()


@pytest.mark.parametrize("k_max", [0, 65])
def test_impossible_span_counts_are_refused(k_max: int) -> None:
    with pytest.raises(ConfigError, match=r"mask\.k_max"):
        span_mask(2, 64, torch.Generator(), k_max=k_max)


@pytest.mark.parametrize("name", TAKES_SPANS)
@pytest.mark.parametrize("length", [1, 8])
def test_texts_shorter_than_the_papers_nine_spans_have_fewer(name: str, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    assert STRATEGIES[name](50, length, generator).any(-1).all()


def test_empty_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        prefix_mask(0, 4, torch.Generator())
