# Cut out of ddlm.diffusion.head of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
import torch
from torch import Tensor

CHUNK = (
    256  # positions per block: large enough for a CPU's matrix-product speed, small against N * V
)

DEVICE_CHUNK = (
    4096  # on an accelerator, whose products want more rows and whose launches cost as much as many
)


def default_chunk(device: torch.device) -> int:
    """Positions whose logits may exist at once where the caller does not say it."""
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK


def fused_rows(hidden: Tensor, top_k: Tensor | None = None) -> Any:
    """The kernels that take the place of the plain expressions between products, or None: on CUDA, with Triton.

    Compiled code keeps the plain expressions, and so does ``top_k``, which has to sort. On each device the kernels are
    tried once; what is recorded as a CUDA graph before that keeps the plain expressions too.
    """
    if (
        not hidden.is_cuda
        or top_k is not None
        or hidden.dtype == torch.float64
        or torch.compiler.is_compiling()
    ):
        return None
    if hidden.device not in _KERNELS:
        if torch.cuda.is_current_stream_capturing():
            return None  # the trial compiles and loads, which a graph must not record
        _KERNELS[hidden.device] = working_rows(hidden.device)
    return _KERNELS[hidden.device]


_KERNELS: dict[torch.device, Any] = {}  # by device, None where they do not work


def working_rows(device: torch.device) -> Any:
    """:mod:`ddlm.diffusion.rows` if its kernels run on ``device``, else None, with a warning where Triton is there.

    That Triton is installed does not say that it works: it needs a C compiler, a folder to keep what it has compiled,
    and a GPU that it knows.
    """
    # A copy beside an exported model keeps to itself: the ddlm that is installed there may be another one.
    if __name__ != "ddlm.diffusion.head" or importlib.util.find_spec("triton") is None:
        return None
    try:
        rows = importlib.import_module("ddlm.diffusion.rows")
        one = torch.ones(1, 16, dtype=torch.float32, device=device)
        target = torch.zeros(1, dtype=torch.int64, device=device)
        rows.cross_entropy(one, one, None, target, one[0], 1, False)
    except Exception as error:  # whatever it stumbles over, the plain expressions do without it
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"the Triton kernels do not run on {device} ({why[:200]}): plain expressions are used, which is slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return rows


@dataclass(frozen=True)
class Head:
    """Output head in the precision of its matrix products, with room for one chunk of logits.

    Logits are products in the precision of the hidden states; everything after them is at least float32.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logits: Tensor  # (C, V), at least float32
    other: Tensor  # (C, V), the same
    low: Tensor | None  # (C, V) in weight.dtype, where that is narrower than float32

    @classmethod
    def make(
        cls, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, chunk: int
    ) -> Head:
        """For chunks of ``hidden (N, H)``, ``head_weight (V, H)`` and ``head_bias (V,)``."""
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        shape = (min(chunk, hidden.shape[0]), head_weight.shape[0])
        return cls(
            weight=head_weight.to(dtype),
            bias=None if head_bias is None else head_bias.to(dtype),
            logits=hidden.new_empty(shape, dtype=wide),
            other=hidden.new_empty(shape, dtype=wide),
            low=None if wide == dtype else hidden.new_empty(shape, dtype=dtype),
        )

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """W h + b of ``hidden (C, H)`` into a buffer; returns the buffer's rows in use, ``(C, V)``."""
        rows = out[: hidden.shape[0]]
        target = rows if self.low is None else self.low[: hidden.shape[0]]
        project(hidden, self.weight, self.bias, target)
        return rows if self.low is None else rows.copy_(target)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """W h + b of ``hidden (C, H)`` into ``out (C, V)``, all of one dtype."""
    if bias is None:
        torch.mm(hidden, weight.mT, out=out)
    else:
        torch.addmm(bias, hidden, weight.mT, out=out)


def chunks(n: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` positions that cover ``n``."""
    return (slice(start, min(start + chunk, n)) for start in range(0, n, chunk))


def rows_of(x: Tensor | None, rows: slice) -> Tensor | None:
    """``x[rows]``, or None."""
    return None if x is None else x[rows]


def restrict(logits: Tensor, temperature: Tensor | None, top_k: Tensor | None) -> Tensor:
    """Divide by the temperature (C,) and drop all but the top_k (C,) tokens (0 keeps all), in place."""
    if temperature is not None:
        logits /= temperature[:, None]
    if top_k is not None:
        vocabulary = logits.shape[-1]
        k = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)  # (C,)
        ordered = logits.sort(dim=-1, descending=True).values  # (C, V)
        threshold = ordered.gather(-1, (k - 1)[:, None])  # (C, 1)
        logits.masked_fill_(logits < threshold, float("-inf"))
    return logits


def drawn(p: Tensor, total: Tensor, at: Tensor, largest: Tensor) -> Tensor:
    """Where the cumulated ``p (C, V)`` passes the share ``at (C,)`` of its ``total (C,)``; ``largest`` where at < 0."""
    passed = p.cumsum(-1) > (at * total)[:, None]  # (C, V); rounded, the last sum may not pass
    return torch.where((at >= 0) & passed.any(-1), passed.to(torch.int8).argmax(-1), largest)


def accumulate(
    weight: Tensor,
    hidden: Tensor,
    grad_logits: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    low: Tensor | None = None,
) -> None:
    """Write a chunk's gradient (C, V) through the head: set ``grad_hidden (C, H)``, add to the parameters'.

    ``low`` is :attr:`Head.low`: room for the gradient where it is wider than the matrix products.
    """
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)
    grad = grad_logits if low is None else low[: grad_logits.shape[0]].copy_(grad_logits)
    torch.mm(grad, weight, out=grad_hidden)
    if grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.mT, hidden)  # (V, H)
    else:
        grad_weight += grad.mT @ hidden  # sums over chunks stay in float32
