# Cut out of ddlm.network.layers of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from .ddlm_elementwise import add_neighbours, rotate

SHORT = 256  # positions up to which (T, T) scores are small change


class _ExactTable(nn.Module):
    """A module with a table of ``frequencies`` that stays float32 when the network is cast to fewer bits.

    Rounded to bfloat16 a frequency is off by up to 0.4%: at position 64, or at 8 cycles per unit of log t, that is
    another angle. A cast casts parameters and buffers alike, so the table is put back after it. No file holds it: a
    network that was built on the meta device gets it when it is given memory (``to_empty``).

    Args:
        exact: The table, float32 on the CPU whatever the rest is built in.
    """

    frequencies: Tensor

    def __init__(self, exact: Tensor) -> None:
        super().__init__()
        self.exact = exact  # no buffer: neither casts nor devices change it
        own = exact.to(torch.get_default_device(), copy=True)
        self.register_buffer("frequencies", own, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.frequencies
        super()._apply(fn, recurse)
        now = self.frequencies
        rounded = now.dtype != before.dtype and torch.finfo(now.dtype).bits < 32
        if rounded or (before.is_meta and not now.is_meta):
            self.frequencies = self.exact.to(now.device, copy=True)
        return self


class TimeEmbedding(_ExactTable):
    """Sinusoidal features of log t through a two-layer MLP: ``(B,)`` -> ``(B, C)``.

    Frequencies run geometrically from 1/8 to 8 cycles per unit of log t: the slowest sees the whole range
    [1, 300] as less than one turn, the fastest tells noise levels 5% apart from each other.
    """

    def __init__(self, width: int) -> None:
        if width % 2:
            raise ValueError(f"time embedding width must be even, got {width}")
        turns = torch.logspace(-3, 3, width // 2, base=2.0, dtype=torch.float32, device="cpu")
        super().__init__(2 * math.pi * turns)
        self.lift = nn.Linear(width, width)
        self.project = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``t (B,)``."""
        phase = t.float().log()[:, None] * self.frequencies  # (B, C/2)
        features = torch.cat([phase.cos(), phase.sin()], dim=-1)  # (B, C)
        return F.silu(self.project(F.silu(self.lift(features))))


class ConditionalLayerNorm(nn.Module):
    """Layer norm whose scale and shift depend on the time (FiLM), zero-initialised: a plain layer norm at first."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.width = width
        self.film = nn.Linear(time_width, 2 * width, bias=False)

    def forward(self, x: Tensor, time: Tensor, shared: bool = False) -> Tensor:
        """Normalise ``x (B, T, W)`` and modulate it by the time embedding ``time (B, C)``; further rows are ignored.

        ``shared``: the first row is every sequence's, which makes this a plain layer norm with that scale and shift.
        """
        film = self.film(time)
        if shared:
            scale, shift = film[0].to(x.dtype).chunk(2)  # (W,) each
            return F.layer_norm(x, (self.width,), 1 + scale, shift)
        scale, shift = film[: x.shape[0], None, :].chunk(2, dim=-1)  # (B, 1, W) each
        return torch.addcmul(shift, F.layer_norm(x, (self.width,)), 1 + scale)


class Rotary(_ExactTable):
    """Rotary position embedding (Su et al. 2021): positions enter as rotations of queries and keys."""

    def __init__(self, head_width: int, base: float = 10_000.0) -> None:
        if head_width % 2:
            raise ValueError(
                f"the width of a head must be even for rotary positions, got {head_width}"
            )
        even = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu")
        super().__init__(base ** -(even / head_width))  # (K/2,)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0..length-1, ``(T, K/2)`` each, float32."""
        position = torch.arange(length, device=self.frequencies.device, dtype=torch.float32)
        angle = position[:, None] * self.frequencies  # (T, K/2)
        return angle.cos(), angle.sin()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, short: bool = True) -> Tensor:
    """Scaled dot-product attention of ``(B, A, T, K)``; keys where ``mask (B, 1, 1, T)`` is False are ignored.

    On a CPU in bfloat16 short sequences go through plain batched products: forwards and backwards together they take a
    quarter of the time of the fused kernel, whose backward pass is slow there (measured at T = 64). ``short`` says
    whether the model's own sequences are: which of the two it is must not depend on how far one is padded.
    """
    low = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not (low and short and q.shape[2] <= SHORT):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, A, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Multi-head bidirectional self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, length: int = SHORT) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of the number of heads {heads}")
        self.heads, self.is_short = heads, length <= SHORT
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], valid: Tensor | None = None
    ) -> Tensor:
        """Mix positions of ``x (B, T, W)``; keys where ``valid (B, T)`` is False are ignored."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, A, T, K) each
        mask = None if valid is None else valid[:, None, None, :]  # (B, 1, 1, T)
        cos, sin = (r.to(q.dtype) for r in rotary)  # (T, K/2) each
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, self.is_short)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Neighbours(nn.Module):
    """Adds to each position a weighted sum of its neighbours, channel by channel: a short depthwise convolution.

    Attention has to learn where "next to me" is before a network can use it; here it is given. Zero-initialised: the
    identity at first. Written as shifts, not as a convolution: a sequence's bits then do not depend on its batch.
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.weight = nn.Parameter(torch.zeros(2 * reach + 1, width))  # from -reach to +reach

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(B, T, W)`` -> ``(B, T, W)``; beyond the ends and where ``valid (B, T)`` is False there are zeros."""
        return add_neighbours(x, self.weight.to(x.dtype), valid)


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, W)`` -> ``(B, T, W)``."""
        return self.down(F.gelu(self.up(x)))
