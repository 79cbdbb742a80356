"""Attention that starts by looking at what is alike: queries equal to keys.

W hidden width.

With random queries and keys a new network attends to everything alike and has to learn first that a position may look
for something. With W_q = W_k the score of two positions is the inner product of one projection of both: largest for a
position itself and for those that hold something similar. That trained transformers show such a diagonal in W_q W_k^T
is the observation of Trockman & Kolter (2023), who start from it.
"""

from __future__ import annotations

import torch

from ddlm.training.sharded import put
from ddlm.training.state import TrainState

_SCALE = 2.0  # of both: scores of four times the size, so that likeness shows beside the noise


@torch.no_grad()
def match_queries(state: TrainState) -> None:
    """Give queries and keys of every block the same weights, in a new state and in its average.

    Args:
        state: A new run's.
    """
    for i, (name, parameter) in enumerate(state.model.named_parameters()):
        if name.endswith("qkv.weight"):
            width = parameter.shape[1]
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            shared = _SCALE * value[:width]
            value = torch.cat([shared, shared, value[2 * width :]])
            put(parameter, value)
            if state.ema is not None:
                put(state.ema.shadow[i], value)
