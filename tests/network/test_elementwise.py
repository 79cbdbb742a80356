"""Written-out passes against the plain expressions that compiled code keeps, and against numerical derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddlm.config import ModelConfig
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.network.elementwise import add_neighbours, rotate

_VALID = torch.tensor([[True] * 6, [True, True, True, False, False, False], [True] * 5 + [False]])


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def _sum_over_neighbours(x: Tensor, weight: Tensor, valid: Tensor | None) -> Tensor:
    """By the definition, position by position."""
    reach, (batch, length, _) = weight.shape[0] // 2, x.shape
    out = x.detach().clone()
    for b in range(batch):
        for t in range(length):
            for i in range(weight.shape[0]):
                s = t + i - reach
                if 0 <= s < length and (valid is None or valid[b, s]):
                    out[b, t] += (weight[i] * x[b, s]).detach()
    return out


@pytest.mark.parametrize("reach", [1, 2, 7])
@pytest.mark.parametrize("valid", [None, _VALID])
def test_neighbours_are_added_and_gradients_are_those_of_the_sum(
    valid: Tensor | None, reach: int
) -> None:
    x, weight = _random(3, 6, 4), _random(2 * reach + 1, 4)
    torch.testing.assert_close(
        add_neighbours(x, weight, valid), _sum_over_neighbours(x, weight, valid)
    )
    assert torch.autograd.gradcheck(lambda a, b: add_neighbours(a, b, valid), (x, weight))


def test_rotations_keep_lengths_turn_by_the_angle_and_have_the_gradient_of_a_rotation() -> None:
    angle = torch.linspace(0, 3, 6, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1])
    x = _random(3, 2, 6, 4)
    turned = rotate(x, angle.cos(), angle.sin())
    first, second = x[..., :2], x[..., 2:]
    turn = torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(torch.complex(first, second) * turn)
    torch.testing.assert_close(turned, torch.cat([expected[..., 0], expected[..., 1]], dim=-1))
    assert torch.autograd.gradcheck(lambda a: rotate(a, angle.cos(), angle.sin()), (x,))


@pytest.mark.parametrize("valid", [None, _VALID])
def test_compiled_code_computes_the_same(valid: Tensor | None) -> None:
    x, weight = _random(3, 6, 4, dtype=torch.float32), _random(5, 4, dtype=torch.float32)
    table = torch.rand(6, 2)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return rotate(add_neighbours(x, weight, valid), table, table)

    results = []
    for call in (both, torch.compile(both, backend="eager", fullgraph=True)):
        out = call(x, weight)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_one_time_for_all_is_that_time_for_each_and_clean_text_needs_one_input(
    training: bool,
) -> None:
    sizes = ModelConfig(
        vocab_size=30, length=8, layers=2, heads=2, width=16, feed_forward=32, embedding_width=8,
        time_width=8, neighbours=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DDLM(sizes, NoiseProcess(1.0, 10.0)).train(training)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x0 = model.embed(torch.randint(30, (3, 8)))
    noised = torch.zeros(3, 8, dtype=torch.bool)
    each, one = (model.encode(x0, torch.full((n,), 4.0), noised) for n in (3, 1))
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)
    clean = model.encode_clean(x0, torch.full((1,), 4.0))
    torch.testing.assert_close(clean, each, rtol=1e-4, atol=1e-5)
    other = model.encode(x0, torch.full((1,), 8.0), noised)
    assert (other - one).abs().max() > 1e-2
