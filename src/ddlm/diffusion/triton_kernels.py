"""The kernels of rows.py: imported only where a CUDA device and Triton are, never on a CPU.

V vocabulary. Each program takes a row of V logits in blocks of BLOCK columns; a lane of the block keeps its own
maximum and sums over all blocks, and lanes are put together once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # minus infinity whose differences are numbers


@triton.jit
def cross_entropy_rows(  # type: ignore[no-untyped-def]
    logits_ptr,  # (C, V); becomes weight * (p - onehot(target)) with WITH_GRAD
    targets_ptr,  # (C,) int64
    weights_ptr,  # (C,) float32
    losses_ptr,  # (C,) float32, nats
    vocabulary,
    stride,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log sum exp of a row minus its target's logit, and in place the gradient of ``weight`` times that."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32) + LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    # picked from what passes by: a load of its own might come after another warp has overwritten the place
    picked = tl.zeros([BLOCK], tl.float32)
    target = tl.load(targets_ptr + row)
    for start in range(0, vocabulary, BLOCK):
        column = start + lane
        inside = column < vocabulary
        x = tl.load(base + column, mask=inside, other=LOWEST).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.where(inside, tl.exp(x - new), 0.0)
        picked = tl.where(column == target, x, picked)
        largest = new
    top = tl.max(largest, axis=0)
    total_of_row = tl.sum(total * tl.exp(largest - top), axis=0)
    of_target = tl.sum(picked, axis=0)
    tl.store(losses_ptr + row, tl.log(total_of_row) + top - of_target)
    if WITH_GRAD:
        weight = tl.load(weights_ptr + row)
        scale = weight / total_of_row
        for start in range(0, vocabulary, BLOCK):
            column = start + lane
            inside = column < vocabulary
            x = tl.load(base + column, mask=inside, other=LOWEST).to(tl.float32)
            grad = tl.exp(x - top) * scale - tl.where(column == target, weight, 0.0)
            tl.store(base + column, grad.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def summary_rows(  # type: ignore[no-untyped-def]
    logits_ptr,  # (C, V)
    p_ptr,  # (C, V) float32: exp(logit - largest), may be logits_ptr
    targets_ptr,  # (C,) int64
    scale_ptr,  # (C,) float32: 1 / temperature
    total_ptr,  # (C,) float32 sum of p
    entropy_ptr,  # (C,) float32, nats
    losses_ptr,  # (C,) float32, nats
    log_z_ptr,  # (C,) float32
    tokens_ptr,  # (C,) int64: the first of the largest
    vocabulary,
    stride,
    WITH_TARGETS: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Argmax, log normaliser, entropy and cross-entropy of a row in one pass, its softmax in a second."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    lane = tl.arange(0, BLOCK)
    scale = 1.0
    if WITH_SCALE:
        scale = tl.load(scale_ptr + row)
    largest = tl.zeros([BLOCK], tl.float32) + LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)  # sum of e^(x - m) (x - m)
    best = tl.zeros([BLOCK], tl.int32)
    picked = tl.zeros([BLOCK], tl.float32)
    target = -1
    if WITH_TARGETS:
        target = tl.load(targets_ptr + row).to(tl.int32)
    for start in range(0, vocabulary, BLOCK):
        column = start + lane
        inside = column < vocabulary
        x = tl.load(base + column, mask=inside, other=0.0).to(tl.float32) * scale
        x = tl.where(inside, x, LOWEST)
        best = tl.where(x > largest, column, best)
        picked = tl.where(column == target, x, picked)
        new = tl.maximum(largest, x)
        decay = tl.exp(largest - new)
        term = tl.where(inside, tl.exp(x - new), 0.0)
        # sum e^(x - new) (x - new) = e^(m - new) (sum e^(x - m) (x - m) + (m - new) sum e^(x - m))
        weighted = decay * (weighted + (largest - new) * total) + term * tl.where(
            inside, x - new, 0.0
        )
        total = decay * total + term
        largest = new
    top = tl.max(largest, axis=0)
    decay = tl.exp(largest - top)
    total_of_row = tl.sum(decay * total, axis=0)
    # lanes that saw no column have total 0 and a difference of -1e30: their product is 0, not a number that is none
    weighted_of_row = tl.sum(decay * (weighted + (largest - top) * total), axis=0)
    first = tl.min(tl.where(largest == top, best, vocabulary), axis=0)
    log_total = tl.log(total_of_row)
    tl.store(tokens_ptr + row, first.to(tl.int64))
    tl.store(total_ptr + row, total_of_row)
    tl.store(log_z_ptr + row, log_total + top)
    tl.store(entropy_ptr + row, tl.maximum(log_total - weighted_of_row / total_of_row, 0.0))
    if WITH_TARGETS:
        tl.store(losses_ptr + row, log_total + top - tl.sum(picked, axis=0))
    for start in range(0, vocabulary, BLOCK):
        column = start + lane
        inside = column < vocabulary
        x = tl.load(base + column, mask=inside, other=0.0).to(tl.float32) * scale
        tl.store(p_ptr + row * stride + column, tl.exp(x - top), mask=inside)
