"""The kernels of ddlm.diffusion.rows on a CPU: run by test_kernels.py, with Triton's interpreter in their place."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import torch
from torch import Tensor

from ddlm.diffusion import posterior, rows

H, D, N = 8, 4, 5


def equal(
    vocabulary: int, dtype: torch.dtype, *, strided: bool = False, plain: bool = False
) -> None:
    """Both entry points against the plain expressions; ``plain``: no bias, temperature, target or draw."""
    torch.manual_seed(vocabulary)
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(vocabulary, H) * 0.3
    bias = None if plain else torch.randn(vocabulary)
    targets = torch.randint(vocabulary, (N, 2))[:, 0]  # every second number of what lies in memory
    targets = targets if strided else targets.contiguous()
    given = (hidden, weight, bias, targets, torch.rand(N), 3)  # a chunk of 3, one of 2
    for with_grad in (True, False):
        got, wanted = (
            rows.cross_entropy(*given, with_grad),
            posterior._cross_entropy(*given, with_grad),
        )
        close(got, wanted, dtype)
    tau = None if plain else torch.rand(N) + 0.5
    at = None if plain else torch.where(torch.rand(N) < 0.5, torch.rand(N), -1.0)
    head = (hidden, weight, bias, torch.randn(vocabulary, D), None if plain else targets, tau)
    got, wanted = rows.summary(*head, at, 3), posterior._summary(*head, None, at, 3)
    assert torch.equal(got[1], wanted[1])
    if plain:  # what is in place of a cross-entropy without targets is not read
        got, wanted = (*got[:3], got[4]), (*wanted[:3], wanted[4])
    close(got, wanted, dtype)


def close(
    got: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...], dtype: torch.dtype
) -> None:
    for a, b in zip(got, wanted, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        # gradients of 16 bits are rounded once in both, but not from equal float32 numbers
        close = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, b, rtol=close, atol=close)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # below, at and above a block of 16 and one of 4096
    for size in (1, 16, 17, 4096, 5000):
        equal(size, torch.float32)
        equal(size, torch.float32, plain=True)
    equal(5000, torch.bfloat16)
    equal(50, torch.float32, strided=True)
