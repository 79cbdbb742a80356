"""Elementwise work of the layers in few passes over memory, where no compiler fuses it.

Written as plain expressions, each product and sum is a pass of its own over ``(B, T, W)`` forwards and several
backwards, on a CPU a quarter of the time of a fine-tuning step of a small network. Here results are added to in
place, and the backward passes are written out. Compiled code keeps the plain expressions: inductor fuses them.

B sequences, T positions, W hidden width, A attention heads, K width of a head, R reach of the neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_neighbours(x: Tensor, weight: Tensor, valid: Tensor | None) -> Tensor:
    """x_t + sum_i weight_i x_{t + i - R} in each channel; zeros stand beyond the ends and where ``valid`` is False.

    Args:
        x: ``(B, T, W)``.
        weight: ``(2 R + 1, W)``, of the dtype of ``x``.
        valid: ``(B, T)``, or None where all are.

    Returns:
        ``(B, T, W)``.
    """
    if not torch.compiler.is_compiling():
        out: Tensor = _AddNeighbours.apply(x, weight, valid)
        return out
    reach, length = weight.shape[0] // 2, x.shape[1]
    inside = x if valid is None else torch.where(valid[..., None], x, 0.0)
    padded = F.pad(inside, (0, 0, reach, reach))  # (B, T + 2 R, W)
    for i, w in enumerate(weight):
        x = x + padded[:, i : i + length] * w
    return x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+K/2}) of ``x (..., T, K)`` by angles whose cosines and sines are ``(T, K/2)``."""
    if not torch.compiler.is_compiling():
        out: Tensor = _Rotate.apply(x, cos, sin)
        return out
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _AddNeighbours(torch.autograd.Function):
    """With y = x + sum_i w_i x_{t+i-R}: dL/dx_t = g_t + sum_i w_i g_{t-i+R}, dL/dw_i = sum_t g_t x_{t+i-R}."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, valid: Tensor | None) -> Tensor:
        inside = None if valid is None else valid[..., None].to(x.dtype)  # (B, T, 1)
        padded = _padded(x, weight.shape[0] // 2, inside)
        ctx.save_for_backward(padded, weight, inside)
        return _add_shifted(x, padded, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        padded, weight, inside = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            around = _padded(grad, weight.shape[0] // 2)
            if inside is None:
                grad_x = _add_shifted(grad, around, weight.flip(0))
            else:
                passed = _add_shifted(torch.zeros_like(grad), around, weight.flip(0))
                grad_x = torch.addcmul(grad, passed, inside)
        if ctx.needs_input_grad[1]:
            length, product = grad.shape[1], torch.empty_like(grad)
            shifts = [padded[:, i : i + length] for i in range(weight.shape[0])]
            # One buffer for all products: fresh memory for each costs more than the product (page faults).
            grad_weight = torch.stack([torch.mul(x, grad, out=product).sum((0, 1)) for x in shifts])
        return grad_x, grad_weight, None


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _padded(x: Tensor, reach: int, inside: Tensor | None = None) -> Tensor:
    """``(B, T + 2 R, W)``: x between zeros, times ``inside (B, T, 1)``, 1 or 0."""
    batch, length, width = x.shape
    padded = x.new_empty(batch, length + 2 * reach, width)
    padded[:, :reach] = 0.0
    padded[:, reach + length :] = 0.0
    between = padded[:, reach : reach + length]
    if inside is None:
        between.copy_(x)
    else:
        torch.mul(x, inside, out=between)
    return padded


def _add_shifted(x: Tensor, padded: Tensor, weight: Tensor) -> Tensor:
    """x + sum_i weight_i padded_{t+i}, ``(B, T, W)``."""
    length = x.shape[1]
    out = torch.addcmul(x, padded[:, :length], weight[0])
    for i, w in enumerate(weight[1:], 1):
        out.addcmul_(padded[:, i : i + length], w)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out
