"""The Triton kernels for rows of logits against the plain expressions, on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddlm.diffusion import head, posterior

pytestmark = pytest.mark.gpu
CHUNK = 48  # does not divide N: the last chunk is a short one
N, H, D = 100, 64, 16


def problem(vocabulary: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A head, hidden states and what is read off them, on the GPU."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    return {
        "hidden": normal(N, H).to(dtype),
        "head_weight": normal(vocabulary, H) * 0.5,
        "head_bias": normal(vocabulary),
        "embeddings": normal(vocabulary, D),
        "targets": torch.randint(vocabulary, (N,), generator=generator).cuda(),
        "weights": torch.rand(N, generator=generator).cuda(),
        "temperature": torch.rand(N, generator=generator).cuda() + 0.5,
        "draw_at": torch.rand(N, generator=generator).cuda() - 0.2,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [23, 1000, 10_240, 32_003])
@pytest.mark.parametrize("with_bias", [True, False])
def test_cross_entropy_and_its_gradients(
    vocabulary: int, dtype: torch.dtype, with_bias: bool
) -> None:
    x = problem(vocabulary, dtype)
    kernels = head.fused_rows(x["hidden"])
    assert kernels is not None, "Triton is part of PyTorch's CUDA builds"
    bias = x["head_bias"] if with_bias else None
    given = (x["hidden"], x["head_weight"], bias, x["targets"], x["weights"], CHUNK, True)
    got, wanted = kernels.cross_entropy(*given), posterior._cross_entropy(*given)
    for name, a, b in zip(("loss", "hidden", "weight", "bias"), got, wanted, strict=True):
        if b is None:
            assert a is None
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        largest = b.float().abs().max()
        # gradients of the logits are rounded to dtype once in both, but not from equal float32 numbers
        tolerance = 1e-5 if dtype == torch.float32 or name == "loss" else 2e-2
        assert (a.float() - b.float()).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [23, 10_240, 32_003])
@pytest.mark.parametrize("tempered", [True, False])
@pytest.mark.parametrize("drawing", [True, False])
def test_summary(vocabulary: int, dtype: torch.dtype, tempered: bool, drawing: bool) -> None:
    x = problem(vocabulary, dtype)
    kernels = head.fused_rows(x["hidden"])
    tau = x["temperature"] if tempered else None
    at = x["draw_at"] if drawing else None
    given = (x["hidden"], x["head_weight"], x["head_bias"], x["embeddings"], x["targets"], tau)
    x0_hat, tokens, *scalars = kernels.summary(*given, at, CHUNK)
    plain_x0_hat, plain_tokens, *plain = posterior._summary(*given, None, at, CHUNK)
    torch.testing.assert_close(x0_hat, plain_x0_hat, rtol=1e-4, atol=1e-5)
    for a, b in zip(scalars, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    if drawing:  # a sum in another order passes a share one token earlier or later, seldom
        assert (tokens == plain_tokens).float().mean() >= 0.98
    else:  # in bfloat16 logits tie, and the kernel takes the first of the largest
        logits = torch.addmm(
            x["head_bias"].to(dtype), x["hidden"], x["head_weight"].to(dtype).mT
        ).float()
        best = logits.gather(-1, tokens[:, None]).squeeze(-1)
        assert torch.equal(best, logits.amax(-1))


def test_infinitely_unlikely_tokens() -> None:
    x = problem(1000, torch.float32)
    x["head_bias"][5:] = float("-inf")
    kernels = head.fused_rows(x["hidden"])
    targets = x["targets"] % 5
    given = (x["hidden"], x["head_weight"], x["head_bias"], targets, x["weights"], CHUNK, True)
    for a, b in zip(kernels.cross_entropy(*given), posterior._cross_entropy(*given), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autograd_through_the_loss() -> None:
    """The loss as training calls it gives the gradients of torch's own cross-entropy."""
    x = problem(1000, torch.float32)
    leaves = [x[k].clone().requires_grad_() for k in ("hidden", "head_weight", "head_bias")]
    hidden, weight, bias = leaves
    loss, _ = posterior.weighted_cross_entropy(hidden, weight, bias, x["targets"], x["weights"])
    grads = torch.autograd.grad(loss, leaves)
    logits = hidden @ weight.mT + bias
    plain = torch.nn.functional.cross_entropy(logits, x["targets"], reduction="none")
    wanted = torch.autograd.grad((plain * x["weights"]).sum(), leaves)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
