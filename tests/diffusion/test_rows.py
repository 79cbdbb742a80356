"""The Triton kernels for rows of logits against the plain expressions, on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddlm.diffusion import head, posterior
from ddlm.types import Posterior

pytestmark = pytest.mark.gpu
CHUNK = 48  # does not divide N: the last chunk is a short one
N, H, D = 100, 64, 16


def problem(vocabulary: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Tensor]:
    """A head, hidden states and what is read off them, on the GPU."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "hidden": normal(N, H).to(dtype),
        "head_weight": normal(vocabulary, H) * 0.5,
        "head_bias": normal(vocabulary),
        "embeddings": normal(vocabulary, D),
        "targets": torch.randint(vocabulary, (N,), generator=generator).to(device),
        "weights": torch.rand(N, generator=generator).to(device),
        "temperature": torch.rand(N, generator=generator).to(device) + 0.5,
        "draw_at": torch.rand(N, generator=generator).to(device) - 0.2,
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


def summarized(x: dict[str, Tensor]) -> Posterior:
    names = ("hidden", "head_weight", "head_bias", "embeddings", "targets")
    return posterior.summarize(*(x[name] for name in names))


def test_targets_that_lie_apart() -> None:
    """A column of a table: its numbers are not neighbours in memory."""
    x = problem(1000, torch.float32)
    column = x["targets"].repeat(3, 1).mT.contiguous()[:, 0]
    assert not column.is_contiguous()
    kernels = head.fused_rows(x["hidden"])
    given = (x["hidden"], x["head_weight"], x["head_bias"])
    for targets in (x["targets"], column):
        loss = kernels.cross_entropy(*given, targets, x["weights"], CHUNK, False)[0]
        same = kernels.summary(*given, x["embeddings"], targets, None, None, CHUNK)[3]
        wanted = posterior._cross_entropy(*given, targets, x["weights"], CHUNK, False)[0]
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(same, wanted, rtol=1e-5, atol=2e-5)


def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("a second CUDA device is needed")
    assert torch.cuda.current_device() == 0
    first, second = (problem(1000, torch.bfloat16, f"cuda:{i}") for i in (0, 1))
    assert head.fused_rows(second["hidden"]) is not None
    a, b = summarized(first), summarized(second)
    assert a.cross_entropy is not None
    assert b.cross_entropy is not None
    torch.testing.assert_close(a.cross_entropy.cpu(), b.cross_entropy.cpu())
    torch.testing.assert_close(a.x0_hat.cpu(), b.x0_hat.cpu())
    leaf = second["hidden"].requires_grad_()
    loss, _ = posterior.weighted_cross_entropy(
        leaf, second["head_weight"], second["head_bias"], second["targets"], second["weights"]
    )
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_a_gpu_without_a_compiler_takes_the_plain_expressions(tmp_path: Path) -> None:
    script = """
import sys, warnings
sys.path[:0] = [sys.argv[1]]
import torch
from diffusion.test_rows import problem, summarized
from ddlm.diffusion import head
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = summarized(problem(1000, torch.float32))
assert any("the Triton kernels do not run on cuda" in str(w.message) for w in said), said
assert head.fused_rows(torch.zeros(1, 16, device="cuda")) is None
assert found.x0_hat.isfinite().all()
"""
    bare = {"PATH": "/nonexistent", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])],
        env=kept | bare,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_tried_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial compiles and loads; a recording that comes before it takes the plain expressions."""
    x = problem(1000, torch.float32)
    monkeypatch.setattr(head, "_KERNELS", {})
    given = (x["hidden"], x["head_weight"], x["head_bias"], x["embeddings"], x["targets"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up outside of the recording
        wanted = posterior._summary(*given, None, None, None, CHUNK)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        recorded = summarized(x)
    assert head._KERNELS == {}
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(recorded.x0_hat, wanted[0])
    assert head.fused_rows(x["hidden"]) is not None
    assert list(head._KERNELS) == [x["hidden"].device]
