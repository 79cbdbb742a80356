"""The output head a chunk of positions at a time: what :mod:`ddlm.diffusion.posterior` is made of.

N positions, H hidden width, V vocabulary, C chunk, P positions of a product.

The two C x V buffers are allocated once and written in place for every chunk. This is not only thrift: aligned
blocks that are freed and asked for again fragment the C heap, and a loop over fresh ones can grow past the size of
the whole N x V logits.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
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
PRODUCT_CHUNKS = 4  # that are one product in 16 bits on a CPU: its weights are packed once
PIECE = 128  # logits of a row whose maximum is taken at once, see largest
LOG2_E = math.log2(math.e)
ADDED = 2048  # rows of a gradient added at once, see add_wide


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
    low: Tensor | None  # (C, V), or (P, V), in weight.dtype, where that is narrower than float32

    @classmethod
    def make(
        cls,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        chunk: int,
        product: int | None = None,
    ) -> Head:
        """For chunks of ``hidden (N, H)``, ``head_weight (V, H)`` and ``head_bias (V,)``.

        ``product``: positions P of one product, :func:`product_rows`; None: a chunk's.
        """
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        shape = (min(chunk, hidden.shape[0]), head_weight.shape[0])
        return cls(
            weight=head_weight.to(dtype),
            bias=None if head_bias is None else head_bias.to(dtype),
            logits=hidden.new_empty(shape, dtype=wide),
            other=hidden.new_empty(shape, dtype=wide),
            low=None if wide == dtype else hidden.new_empty(product or shape[0], shape[1]),
        )

    @property
    def products(self) -> Tensor:
        """Where products are written, ``(P, V)`` in their own precision."""
        return self.logits if self.low is None else self.low

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


def product_rows(hidden: Tensor, chunk: int) -> int:
    """Positions of one product of the training loss, whose float32 work goes through ``chunk`` of them at a time.

    More than a chunk only in 16 bits on a CPU: what a product packs and what its sums of gradients write does not
    depend on the rows, but the float32 work wants to stay within the cache.
    """
    few = hidden.device.type != "cpu" or hidden.dtype in (torch.float32, torch.float64)
    return max(1, min(chunk if few else PRODUCT_CHUNKS * chunk, hidden.shape[0]))


def chunks(n: int, chunk: int) -> Iterator[slice]:
    """Slices of at most ``chunk`` positions that cover ``n``."""
    return (slice(start, min(start + chunk, n)) for start in range(0, n, chunk))


def rows_of(x: Tensor | None, rows: slice) -> Tensor | None:
    """``x[rows]``, or None."""
    return None if x is None else x[rows]


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and its first place in each row of ``logits (C, V)``, ``(C,)`` each.

    torch looks for a place value by value, for a maximum alone sixteen at once: on a CPU maxima of pieces come first,
    and the place is looked for in the piece that has the largest.
    """
    rows, vocabulary = logits.shape
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or vocabulary % PIECE:
        return logits.max(-1)
    pieces = logits.view(rows, vocabulary // PIECE, PIECE)
    values, piece = pieces.amax(-1).max(-1)  # (C,) each
    inside = pieces[torch.arange(rows), piece].argmax(-1)
    return values, piece * PIECE + inside


def exponential(x: Tensor, out: Tensor) -> Tensor:
    """e^x into ``out``, which may be ``x``.

    On a CPU as a power of two: ``torch.exp`` asks the vendor's library, which takes three times as long as torch's own
    loop on processors of another vendor. Rounding x / log 2 costs a relative 6e-8 |x|.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2_E, out=out).exp2_()


def log_sum(logits: Tensor, spare: Tensor) -> Tensor:
    """log of the sum of e^logit in each row, ``(C,)``; ``spare (C, V)`` is overwritten."""
    top = logits.amax(-1, keepdim=True)
    return exponential(torch.sub(logits, top, out=spare), spare).sum(-1).log() + top[:, 0]


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
    """Where the cumulated ``p (C, V)`` passes the share ``at (C,)`` of its ``total (C,)``; ``largest`` where at < 0.

    The piece of the row comes first, then the place within it: one sum over all of p instead of its cumulated sums.
    """
    rows, vocabulary = p.shape
    wide = vocabulary if vocabulary % PIECE else PIECE
    pieces = p.view(rows, vocabulary // wide, wide)
    wanted = (at * total)[:, None]
    sums = pieces.sum(-1).cumsum(-1)  # (C, V / wide)
    piece = (
        (sums > wanted).to(torch.int8).argmax(-1)
    )  # the first; rounded, the last sum may not pass
    chosen = torch.arange(rows, device=p.device), piece
    before = torch.where(piece > 0, sums[chosen[0], piece - 1], 0.0)
    passed = before[:, None] + pieces[chosen].cumsum(-1) > wanted  # (C, wide)
    place = piece * wide + passed.to(torch.int8).argmax(-1)
    return torch.where((at >= 0) & passed.any(-1), place, largest)


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
        add_wide(grad_weight, grad.mT @ hidden)  # sums over chunks stay in float32


def add_wide(total: Tensor, part: Tensor) -> None:
    """``total += part``, of a wider and a narrower dtype.

    On a CPU torch first writes ``part`` anew in the dtype of ``total``: in pieces that copy stays within the cache.
    """
    if total.device.type != "cpu":
        total += part
        return
    for rows in chunks(total.shape[0], ADDED):
        total[rows] += part[rows]
