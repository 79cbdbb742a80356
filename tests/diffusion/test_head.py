"""The head's own loops against the plain operations they replace.

C rows, V vocabulary, N positions, H hidden width.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddlm.diffusion import head
from ddlm.diffusion.posterior import weighted_cross_entropy

PIECES = [100, head.PIECE, 3 * head.PIECE, 3 * head.PIECE + 1]  # with pieces and without


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", PIECES)
def test_the_largest_is_the_first_of_equal_ones(vocabulary: int) -> None:
    logits = draws(16, vocabulary).mul(2).round()  # many are equal
    logits[0] = -math.inf
    logits[0, vocabulary - 1] = 0.0
    logits[1] = 0.0
    values, places = head.largest(logits)
    assert values.tolist() == logits.amax(-1).tolist()
    assert places.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_a_logit_that_is_no_number_is_not_lost() -> None:
    logits = draws(2, 2 * head.PIECE)
    logits[1, 200] = math.nan
    values, places = head.largest(logits)
    assert values.isnan().tolist() == [False, True]
    assert places[1] == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_is_torchs(dtype: torch.dtype) -> None:
    x = torch.linspace(-80, 0, 4001, dtype=dtype)
    want, kept = x.double().exp(), x.clone()
    out = head.exponential(x, torch.empty_like(x))
    assert x.equal(kept)
    tolerance = (10 + 80) * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=0)
    assert head.exponential(x, x) is x
    assert x.equal(out)
    assert head.exponential(torch.tensor([-math.inf]), torch.empty(1)).item() == 0.0


def test_the_sum_of_exponentials_is_torchs() -> None:
    logits = 30 * draws(5, 300)
    got = head.log_sum(logits, torch.empty_like(logits))
    torch.testing.assert_close(got, logits.logsumexp(-1))


@pytest.mark.parametrize("vocabulary", PIECES)
def test_a_draw_is_where_the_cumulated_sum_passes(vocabulary: int) -> None:
    p = (2 * draws(200, vocabulary)).exp()
    p[:, :7] = 0.0
    p[3, 7:-1] = 0.0  # one token has everything
    total, largest = p.sum(-1), p.argmax(-1)
    at = torch.rand(200, generator=torch.Generator().manual_seed(1)).clamp(max=0.999)
    at[0], at[1] = 0.0, -1.0
    got = head.drawn(p, total, at, largest)
    passed = p.double().cumsum(-1) > (at.double() * total.double())[:, None]
    want = passed.to(torch.int8).argmax(-1)
    want[1] = largest[1]
    assert got.tolist() == want.tolist()
    assert got[0] == 7
    assert got[3] == vocabulary - 1


def test_a_share_that_no_sum_passes_takes_the_largest() -> None:
    p = torch.ones(1, 2 * head.PIECE)
    p[0, 5] = 2.0
    got = head.drawn(p, p.sum(-1), torch.ones(1), torch.tensor([5]))
    assert got.tolist() == [5]


def test_draws_have_the_frequencies_of_p() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).repeat_interleave(head.PIECE // 2) / (head.PIECE // 2)
    at = (torch.arange(20_000) + 0.5) / 20_000
    tokens = head.drawn(
        p.expand(20_000, -1), p.sum().expand(20_000), at, torch.zeros(20_000).long()
    )
    counts = torch.bincount(tokens, minlength=p.numel()) / 20_000
    torch.testing.assert_close(counts, p, rtol=0, atol=1e-4)


def test_a_narrow_part_is_added_without_rounding_the_total() -> None:
    total = draws(2 * head.ADDED + 3, 4)
    part = draws(2 * head.ADDED + 3, 4, seed=1).bfloat16()
    want = total + part.float()
    head.add_wide(total, part)
    assert total.equal(want)


@pytest.mark.parametrize("count", [1, 7, 8, 29, 64])  # with a short chunk, a short product, neither
def test_losses_in_16_bits_do_not_depend_on_the_rows_of_a_product(count: int) -> None:
    """Chunks of 2 in products of 8 rows: the loss and gradients of the plain expression."""
    vocabulary, width = 50, 32
    hidden = draws(count, width).bfloat16().requires_grad_()
    weight = draws(vocabulary, width, seed=1).mul(0.2).requires_grad_()
    bias = draws(vocabulary, seed=2).requires_grad_()
    targets = torch.arange(count) % vocabulary
    weights = torch.linspace(0, 1, count)
    loss, each = weighted_cross_entropy(hidden, weight, bias, targets, weights, chunk=2)
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    logits = F.linear(hidden.float(), weight.bfloat16().float(), bias.bfloat16().float())
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(each, plain.detach(), rtol=0.02, atol=0.02)
    want = torch.autograd.grad((plain * weights).sum(), (hidden, weight, bias))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_positions_have_no_loss(dtype: torch.dtype) -> None:
    hidden = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    weight = draws(50, 8).requires_grad_()
    loss, each = weighted_cross_entropy(hidden, weight, None, torch.zeros(0).long(), torch.zeros(0))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert each.shape == (0,)
    assert grads[1].abs().sum() == 0


def test_a_product_holds_more_rows_only_where_it_pays() -> None:
    low = torch.empty(5000, 8, dtype=torch.bfloat16)
    assert head.product_rows(low, 256) == 256 * head.PRODUCT_CHUNKS
    assert head.product_rows(low[:300], 256) == 300
    assert head.product_rows(low.float(), 256) == 256
    assert head.product_rows(low.to("meta"), 256) == 256
