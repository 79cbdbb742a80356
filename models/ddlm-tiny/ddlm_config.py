# Cut out of ddlm.config of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelConfig:
    """Sizes of the network (DDLM, Table 1)."""

    vocab_size: int = 32_000
    """Entries of the vocabulary V."""
    length: int = 64
    """Longest sequence, in tokens."""
    layers: int = 8
    """Transformer blocks L."""
    heads: int = 8
    """Attention heads; must divide the width."""
    width: int = 1024
    """Hidden width H of the transformer."""
    feed_forward: int = 4096
    """Inner width of the feed-forward layers."""
    embedding_width: int = 256
    """Width D of the token embeddings, in which the diffusion happens; rows have norm sqrt(D)."""
    time_width: int = 128
    """Width of the time embedding that drives the conditional layer norms."""
    self_conditioning: bool = True
    """Feed the previous estimate of x_0 back (CDCD). Off keeps the shape and feeds zeros."""
    likelihood_head: bool = False
    """Add the exact log-likelihood of the noised embedding, x_t . e_w / t^2, to the logits, so that the network has
    only the context to model. Not in the paper; docs/log.md has the measured gain."""
    neighbours: int = 0
    """Reach of the short convolutions before attention and feed-forward, in positions to each side (0: none, as in
    the paper). No gain has been measured (docs/log.md)."""
