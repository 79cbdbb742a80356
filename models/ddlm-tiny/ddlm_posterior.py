# Cut out of ddlm.diffusion.posterior of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

from typing import Any
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from .ddlm_head import (
    Head,
    accumulate,
    chunks,
    default_chunk,
    drawn,
    exponential,
    fused_rows,
    largest,
    log_sum,
    product_rows,
    project,
    restrict,
    rows_of,
)
from .ddlm_types import Posterior


class _Summary(torch.autograd.Function):
    """(x0_hat, tokens, entropy, cross_entropy, log_z) of N positions; logits are recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        embeddings: Tensor,
        targets: Tensor | None,
        temperature: Tensor | None,
        top_k: Tensor | None,
        draw_at: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        given = (hidden, head_weight, head_bias, embeddings, targets, temperature)
        kernels = fused_rows(hidden, top_k)
        if kernels is None:
            values = _summary(*given, top_k, draw_at, chunk)
        else:
            values = kernels.summary(*given, draw_at, chunk)
        x0_hat, tokens, entropy, _, log_z = values
        ctx.save_for_backward(
            hidden, head_weight, head_bias, embeddings, targets, temperature, top_k,
            x0_hat, entropy, log_z,
        )  # fmt: skip
        ctx.chunk = chunk
        ctx.mark_non_differentiable(tokens)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_x0, _, g_entropy, g_cross_entropy, g_log_z = grads
        (
            hidden, head_weight, head_bias, embeddings, targets, temperature, top_k,
            x0_hat, entropy, log_z,
        ) = ctx.saved_tensors  # fmt: skip
        head = Head.make(hidden, head_weight, head_bias, ctx.chunk)
        wide = head.logits.dtype
        table = embeddings.to(wide)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head_weight, dtype=wide)
        grad_bias = None if head_bias is None else torch.zeros_like(head_bias, dtype=wide)
        grad_table = torch.zeros_like(table)
        if targets is None:
            g_cross_entropy = torch.zeros_like(g_entropy)
        # With z the logits and p their softmax, d/dz of
        #   g . x0_hat = p (E g - g . x0_hat),   H = -p (log p + H),   CE = p - onehot(target),   log Z = p
        constant = g_cross_entropy + g_log_z - g_entropy * entropy - (g_x0 * x0_hat).sum(-1)  # (N,)
        for rows in chunks(hidden.shape[0], ctx.chunk):
            log_p = head.project(hidden[rows], head.logits)  # (C, V)
            restrict(log_p, rows_of(temperature, rows), rows_of(top_k, rows))
            log_p -= log_z[rows, None]
            p = exponential(log_p, head.other[: log_p.shape[0]])
            if top_k is not None:
                log_p.masked_fill_(p == 0, 0.0)
            grad_table.addmm_(p.mT, g_x0[rows])
            grad = log_p.mul_(-g_entropy[rows, None]).addmm_(g_x0[rows], table.mT)
            grad.add_(constant[rows, None]).mul_(p)
            if targets is not None:
                grad.scatter_add_(-1, targets[rows, None], -g_cross_entropy[rows, None])
            if temperature is not None:
                grad /= temperature[rows, None]
            accumulate(
                head.weight, hidden[rows], grad, grad_hidden[rows], grad_weight, grad_bias, head.low
            )
        if head_bias is not None and grad_bias is not None:
            grad_bias = grad_bias.to(head_bias.dtype)
        of_weight, of_table = grad_weight.to(head_weight.dtype), grad_table.to(embeddings.dtype)
        return grad_hidden, of_weight, grad_bias, of_table, *(None,) * 5


def _summary(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    embeddings: Tensor,
    targets: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    draw_at: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x0_hat ``(N, D)``, tokens, entropy, cross-entropy and log normaliser ``(N,)`` in plain expressions."""
    head = Head.make(hidden, head_weight, head_bias, chunk)
    n, wide = hidden.shape[0], head.logits.dtype
    table = embeddings.to(wide)  # (V, D)
    x0_hat = hidden.new_empty(n, table.shape[1], dtype=wide)
    entropy, cross_entropy, log_z = (hidden.new_empty(n, dtype=wide) for _ in range(3))
    tokens = torch.empty(n, dtype=torch.int64, device=hidden.device)
    for rows in chunks(n, chunk):
        logits = head.project(hidden[rows], head.logits)  # (C, V)
        restrict(logits, rows_of(temperature, rows), rows_of(top_k, rows))
        top, tokens[rows] = largest(logits)
        logits -= top[:, None]
        p = exponential(logits, head.other[: logits.shape[0]])  # (C, V), times its sum
        total = p.sum(-1)  # (C,)
        log_total = total.log()
        log_z[rows] = top + log_total
        if draw_at is not None:
            tokens[rows] = drawn(p, total, draw_at[rows], tokens[rows])
        if targets is not None:
            picked = logits.gather(-1, targets[rows, None]).squeeze(-1)
            cross_entropy[rows] = log_total - picked
        # out=: a plain product would be narrowed by an autocast around this function
        torch.mm(p, table, out=x0_hat[rows]).div_(total[:, None])
        # H(p) = log Z - E_p[logit]; 0 * -inf of dropped tokens counts as 0
        if top_k is not None:
            logits.masked_fill_(p == 0, 0.0)
        entropy[rows] = log_total - logits.mul_(p).sum(-1) / total
    entropy.clamp_min_(0.0)
    return x0_hat, tokens, entropy, cross_entropy, log_z


def summarize(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    embeddings: Tensor,
    targets: Tensor | None = None,
    chunk: int | None = None,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    draw_at: Tensor | None = None,
    keep_hidden: bool = False,
) -> Posterior:
    """Read the posterior off hidden states, ``chunk`` positions at a time (score interpolation, docs/math.md).

    Every field but the tokens is differentiable (once) in hidden, head and embeddings; each chunk's logits are
    recomputed in the backward pass instead of stored, so memory stays at ``chunk * V`` in both directions. The
    logits are a product in the precision of ``hidden``; softmax, expectation and sums are at least float32 (on a GPU
    the expectation's product is TF32 beside logits of 16 bits).

    Args:
        hidden: ``(..., H)``.
        head_weight: ``(V, H)``.
        head_bias: ``(V,)`` or None.
        embeddings: Normalised table ``(V, D)``.
        targets: True tokens ``(...)`` int64, or None.
        chunk: Positions whose logits may exist at once.
        temperature: ``(...)`` positive, divides the logits, or None.
        top_k: ``(...)`` int64, 0 keeps all tokens, or None.
        draw_at: ``(...)``, as :attr:`ddlm.types.ReadOut.draw_at`, or None.
        keep_hidden: Put ``hidden`` into the result (KL halting).

    Returns:
        Posterior with leading axes of ``hidden``; entropy and cross-entropy in nats.

    Raises:
        ValueError: when ``chunk`` is not positive or shapes disagree.
    """
    chunk = default_chunk(hidden.device) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if hidden.shape[-1] != head_weight.shape[-1] or head_weight.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)} and embeddings "
            f"{tuple(embeddings.shape)} do not agree: need (..., H), (V, H), (V, D)"
        )
    lead = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])  # (N, H)
    y, tau, k, at = (
        None if x is None else x.expand(lead).reshape(-1)
        for x in (targets, temperature, top_k, draw_at)
    )
    x0_hat, tokens, entropy, cross_entropy, log_z = _Summary.apply(
        flat, head_weight, head_bias, embeddings, y, tau, k, at, chunk
    )
    return Posterior(
        x0_hat=x0_hat.reshape(*lead, embeddings.shape[-1]),
        tokens=tokens.reshape(lead),
        entropy=entropy.reshape(lead),
        cross_entropy=None if targets is None else cross_entropy.reshape(lead),
        log_normalizer=log_z.reshape(lead),
        hidden=hidden if keep_hidden else None,
    )


class _FusedCrossEntropy(torch.autograd.Function):
    """sum_i weight_i * CE_i with the gradients formed in the forward pass, chunk by chunk.

    The weights are known before the backward pass, so (p - onehot) * weight is final as soon as a chunk's logits
    exist: three matrix products a chunk instead of the four that recomputation needs, and nothing of size V saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        kernels = fused_rows(hidden)
        compute = _cross_entropy if kernels is None else kernels.cross_entropy
        cross_entropy, *grads = compute(
            hidden, head_weight, head_bias, targets, weights, chunk, with_grad
        )
        if with_grad:
            ctx.save_for_backward(*grads)
            ctx.dtypes = [None if x is None else x.dtype for x in (hidden, head_weight, head_bias)]
        ctx.mark_non_differentiable(cross_entropy)
        return (cross_entropy * weights).sum(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if g is None else (g * grad_loss.to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Cross-entropy ``(N,)`` and the gradients of its weighted sum in hidden, weight and bias, in plain expressions."""
    head = Head.make(hidden, head_weight, head_bias, chunk, product_rows(hidden, chunk))
    wide = head.logits.dtype
    cross_entropy = hidden.new_empty(hidden.shape[0], dtype=wide)
    grad_hidden = torch.empty_like(hidden) if with_grad else None
    grad_weight = torch.zeros_like(head_weight, dtype=wide) if with_grad else None
    grad_bias = None
    if with_grad and head_bias is not None:
        grad_bias = torch.zeros_like(head_bias, dtype=wide)
    for block in chunks(hidden.shape[0], max(1, head.products.shape[0])):
        # (P, V): the logits first, then their gradient
        products = head.products[: block.stop - block.start]
        project(hidden[block], head.weight, head.bias, products)
        of_block = zip(targets[block].split(chunk), weights[block].split(chunk), strict=True)
        losses = cross_entropy[block].split(chunk)
        for part, loss, (y, w) in zip(products.split(chunk), losses, of_block, strict=True):
            logits = part if head.low is None else head.logits[: len(part)].copy_(part)  # (C, V)
            logits -= logits.amax(-1, keepdim=True)
            picked = logits.gather(-1, y[:, None])  # (C, 1)
            p = exponential(logits, logits)
            total = p.sum(-1, keepdim=True)  # (C, 1)
            loss.copy_((total.log() - picked).squeeze(-1))
            if not with_grad:
                continue
            w = w[:, None].to(wide)
            grad = p.mul_(w / total).scatter_add_(-1, y[:, None], -w)  # w (p - onehot)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            if head.low is not None:
                part.copy_(grad)
        if grad_hidden is not None and grad_weight is not None:
            accumulate(head.weight, hidden[block], products, grad_hidden[block], grad_weight, None)
    return cross_entropy, grad_hidden, grad_weight, grad_bias


def weighted_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Training loss sum_i weight_i * CE_i, holding at most ``chunk`` x V logits (score interpolation).

    In 16 bits on a CPU a few chunks are one product (:func:`ddlm.diffusion.head.product_rows`), their softmax is not.

    Args:
        hidden: Hidden states of the noised positions ``(N, H)``.
        head_weight: ``(V, H)``.
        head_bias: ``(V,)`` or None.
        targets: ``(N,)`` int64.
        weights: ``(N,)`` float32; they carry the mean (e.g. 1/N each), zero for padding.
        chunk: Positions whose logits may exist at once.

    Returns:
        ``(loss, cross_entropy)``: the weighted sum (differentiable in hidden, weight, bias) and the per-position
        cross-entropy in nats ``(N,)``, detached.
    """
    with_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, head_weight, head_bias)
    )
    chunk = default_chunk(hidden.device) if chunk is None else chunk
    loss, cross_entropy = _FusedCrossEntropy.apply(
        hidden, head_weight, head_bias, targets, weights, chunk, with_grad
    )
    return loss, cross_entropy


@torch.no_grad()
def kl_divergence(
    new: Posterior,
    old: Posterior,
    head_weight: Tensor,
    head_bias: Tensor | None,
    chunk: int | None = None,
    *,
    temperature: Tensor | None = None,
) -> Tensor:
    """KL(new || old) in nats at every position, from the two posteriors' hidden states, chunk by chunk.

    Over the whole vocabulary: between posteriors cut to their top_k it would be infinite wherever a token has left.

    Args:
        new: Posterior of this step, with ``hidden (..., H)``.
        old: Posterior of the previous step, with ``hidden``.
        head_weight: ``(V, H)``.
        head_bias: ``(V,)`` or None.
        chunk: Positions whose two sets of logits may exist at once.
        temperature: ``(...)`` positive, divides the logits of both, or None.

    Returns:
        ``(...)`` at least float32, non-negative, without gradient.

    Raises:
        ValueError: when either posterior was made without ``keep_hidden``.
    """
    if new.hidden is None or old.hidden is None:
        raise ValueError("both posteriors need hidden states: read them out with keep_hidden=True")
    lead = new.hidden.shape[:-1]
    p, q = (x.reshape(-1, x.shape[-1]) for x in (new.hidden, old.hidden))
    chunk = default_chunk(p.device) if chunk is None else chunk
    head = Head.make(p, head_weight, head_bias, chunk)
    tau = None if temperature is None else temperature.expand(lead).reshape(-1)
    out = p.new_empty(p.shape[0], dtype=head.logits.dtype)
    for rows in chunks(p.shape[0], chunk):
        # sum_w p_w (log p_w - log q_w) = E_p[z - y] - log Z(z) + log Z(y) with the logits z of new, y of old
        y = restrict(head.project(q[rows], head.logits), rows_of(tau, rows), None)  # (C, V)
        log_y = log_sum(y, head.other[: len(y)])
        z = restrict(head.project(p[rows], head.other), rows_of(tau, rows), None)  # (C, V)
        ratio = torch.sub(z, y, out=y)
        top = z.amax(-1, keepdim=True)
        weights = exponential(z.sub_(top), z)
        total = weights.sum(-1)
        out[rows] = ratio.mul_(weights).sum(-1) / total - total.log() - top[:, 0] + log_y
    return out.clamp_min_(0.0).reshape(lead)
