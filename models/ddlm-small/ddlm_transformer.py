# Cut out of ddlm.network.transformer of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from .ddlm_config import ModelConfig
from .ddlm_layers import (
    ConditionalLayerNorm,
    FeedForward,
    Neighbours,
    Rotary,
    SelfAttention,
    TimeEmbedding,
)


class Block(nn.Module):
    """x + attention(norm(x, t)), then x + feed_forward(norm(x, t)); with ``neighbours`` both see them beside x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = ConditionalLayerNorm(config.width, config.time_width)
        self.attention = SelfAttention(config.width, config.heads, config.length)
        self.feed_forward_norm = ConditionalLayerNorm(config.width, config.time_width)
        self.feed_forward = FeedForward(config.width, config.feed_forward)
        if config.neighbours:
            self.attention_neighbours = Neighbours(config.width, config.neighbours)
            self.feed_forward_neighbours = Neighbours(config.width, config.neighbours)
        self.has_neighbours = config.neighbours > 0

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        valid: Tensor | None,
        shared: bool = False,
    ) -> Tensor:
        """``(B, T, W)`` -> ``(B, T, W)``; ``shared``: the first row of ``time`` is every sequence's."""
        y = self.attention_norm(x, time, shared)
        if self.has_neighbours:
            y = self.attention_neighbours(y, valid)
        x = x + self.attention(y, rotary, valid)
        y = self.feed_forward_norm(x, time, shared)
        if self.has_neighbours:
            y = self.feed_forward_neighbours(y, valid)
        return x + self.feed_forward(y)


class Transformer(nn.Module):
    """Input features and times to hidden states; the norm before the head is the last layer here."""

    def __init__(self, config: ModelConfig, input_width: int) -> None:
        super().__init__()
        self.embed_time = TimeEmbedding(config.time_width)
        self.rotary = Rotary(config.width // config.heads)
        self.input = nn.Linear(input_width, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_norm = ConditionalLayerNorm(config.width, config.time_width)
        self._initialise(config)

    def _initialise(self, config: ModelConfig) -> None:
        """Normal(0, 0.02); residual outputs scaled by 1/sqrt(2 L) (GPT-2); FiLM zero."""
        residual_std = 0.02 / math.sqrt(2 * config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_residual = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(module.weight, std=residual_std if is_residual else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Afterwards: the loop above meets a norm before the linear layer inside it.
        for module in self.modules():
            if isinstance(module, ConditionalLayerNorm):
                nn.init.zeros_(module.film.weight)

    def forward(self, features: Tensor, t: Tensor, valid: Tensor | None = None) -> Tensor:
        """Hidden states ``(B, T, W)`` of ``features (B, T, input_width)`` at ``t (B,)``; ``(1,)``: one time for all."""
        return self.states(self._lift(features), t, valid)

    def _lift(self, features: Tensor) -> Tensor:
        """The input layer. Its width is odd, for the mask stands last; a GPU's products want rows of whole words."""
        if not features.is_cuda:
            return self.input(features)
        weight = self.input.weight
        x = F.linear(features[..., :-1], weight[:, :-1].contiguous(), self.input.bias)  # (B, T, W)
        return x + (features[..., -1:] * weight[:, -1]).to(x.dtype)

    def states(self, x: Tensor, t: Tensor, valid: Tensor | None = None) -> Tensor:
        """The same from what the input layer has made of the features, ``x (B, T, W)``."""
        shared = t.shape[0] == 1 < x.shape[0]
        time = self.embed_time(t if self.training and not shared else _safe_rows(t))  # (B, C)
        rotary = self.rotary(x.shape[1])
        for block in self.blocks:
            x = block(x, time, rotary, valid, shared)
        return self.output_norm(x, time, shared)


def _safe_rows(t: Tensor) -> Tensor:
    """Pad ``t (B,)`` with copies to a multiple of 16 rows a thread on the CPU.

    Below that its matrix products use other kernels for a few rows than for many, and a sequence's bits would
    depend on how many others are generated with it; those for a single row depend on where in memory the weights
    lie. Compiled code has a kernel for each number of rows anyway.
    """
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return t
    multiple = 16 * torch.get_num_threads()
    return torch.cat([t, t[-1:].expand(-t.shape[0] % multiple)])
