"""Rows of logits on a CUDA device through Triton kernels, equal to the plain expressions of posterior.py.

N positions, H hidden width, D embedding width, V vocabulary, C chunk. A program takes one row of V logits.

Between its matrix products the plain form passes some ten times over (C, V) numbers in float32. Here a row is read
twice in the precision of the products and written once: a first pass keeps running maxima and sums (online softmax,
Milakov & Gimelshein 2018), a second writes what the next product needs. Sums are float32 throughout.

Targets outside 0..V-1 are not noticed: a kernel cannot raise, and to look at them would make the host wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddlm.diffusion.head import accumulate, chunks, drawn, project, rows_of
from ddlm.diffusion.triton_kernels import cross_entropy_rows, summary_rows

BLOCK = 4096  # logits in flight


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Cross-entropy ``(N,)`` and the gradients of its weighted sum in hidden ``(N, H)``, weight and bias (float32)."""
    dtype, count, vocabulary = hidden.dtype, hidden.shape[0], head_weight.shape[0]
    weight = head_weight.to(dtype)
    bias = None if head_bias is None else head_bias.to(dtype)
    buffer = hidden.new_empty(min(chunk, count), vocabulary)  # (C, V)
    losses = hidden.new_empty(count, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if with_grad else None
    grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if with_grad else None
    grad_bias = None
    if with_grad and head_bias is not None:
        grad_bias = torch.zeros_like(head_bias, dtype=torch.float32)
    targets, weights = targets.contiguous(), weights.float().contiguous()
    for rows in chunks(count, chunk):
        logits = buffer[: rows.stop - rows.start]
        project(hidden[rows], weight, bias, logits)
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            cross_entropy_rows[(len(logits),)](
                logits, targets[rows], weights[rows], losses[rows], vocabulary, logits.stride(0),
                WITH_GRAD=with_grad, **_launch(vocabulary),
            )  # fmt: skip
        if grad_hidden is not None and grad_weight is not None:
            accumulate(weight, hidden[rows], logits, grad_hidden[rows], grad_weight, grad_bias)
    return losses, grad_hidden, grad_weight, grad_bias


def summary(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    embeddings: Tensor,
    targets: Tensor | None,
    temperature: Tensor | None,
    draw_at: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x0_hat ``(N, D)``, tokens, entropy, cross-entropy and log normaliser ``(N,)``, as the plain summary has them."""
    dtype, count, vocabulary = hidden.dtype, hidden.shape[0], head_weight.shape[0]
    weight = head_weight.to(dtype)
    bias = None if head_bias is None else head_bias.to(dtype)
    low = hidden.new_empty(min(chunk, count), vocabulary)  # (C, V)
    probability = low if dtype == torch.float32 else torch.empty_like(low, dtype=torch.float32)
    table = embeddings.float()
    x0_hat = hidden.new_empty(count, table.shape[1], dtype=torch.float32)
    total, entropy, losses, log_z = (hidden.new_empty(count, dtype=torch.float32) for _ in range(4))
    tokens = torch.empty(count, dtype=torch.int64, device=hidden.device)
    targets = None if targets is None else targets.contiguous()
    inverse = None if temperature is None else temperature.float().reciprocal().contiguous()
    for rows in chunks(count, chunk):
        n = rows.stop - rows.start
        logits, p = low[:n], probability[:n]
        project(hidden[rows], weight, bias, logits)
        y, scale = rows_of(targets, rows), rows_of(inverse, rows)
        with torch.cuda.device_of(hidden):
            summary_rows[(n,)](
                logits, p, logits if y is None else y, logits if scale is None else scale,
                total[rows], entropy[rows], losses[rows], log_z[rows], tokens[rows],
                vocabulary, logits.stride(0),
                WITH_TARGETS=y is not None, WITH_SCALE=scale is not None, **_launch(vocabulary),
            )  # fmt: skip
        if draw_at is not None:
            tokens[rows] = drawn(p, total[rows], draw_at[rows], tokens[rows])
        _expect(p, table, x0_hat[rows], exact=dtype == torch.float32)
        x0_hat[rows] /= total[rows, None]
    return x0_hat, tokens, entropy, losses, log_z


def _expect(p: Tensor, table: Tensor, out: Tensor, exact: bool) -> None:
    """``p (C, V)`` times ``table (V, D)`` into ``out (C, D)``, all float32.

    Where the logits were products in 16 bits, inputs of 11 bits (TF32) lose nothing that was there, and the product
    takes a tenth of the time. ``out``: a plain product would be narrowed by an autocast around this function.
    """
    settings: Any = torch.backends.cuda.matmul
    if exact or not hasattr(settings, "fp32_precision"):  # torch before 2.9
        torch.mm(p, table, out=out)
        return
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        torch.mm(p, table, out=out)
    finally:
        settings.fp32_precision = before


def _launch(vocabulary: int) -> dict[str, int]:
    """Logits a program has in flight, and the warps that share them."""
    block = min(BLOCK, 1 << (vocabulary - 1).bit_length())
    return {"BLOCK": max(block, 16), "num_warps": 8 if block >= 2048 else 4}
