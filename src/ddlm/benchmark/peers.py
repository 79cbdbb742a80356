"""What a user would train instead: transformers' BertForMaskedLM and GPT-2 at the same size, batch and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ddlm.config import Config
from ddlm.device import product_dtype

MASKED = 0.15  # of the positions, as in BERT


def peer_step(
    name: str, config: Config, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """A function that makes one training step: forwards, backwards, clipping, fused AdamW, under the same autocast.

    Args:
        name: ``bert`` (masked language model) or ``gpt2`` (causal language model).
        config: Sizes, batch and precision.
        device: Where to train.
        compiled: Whether torch.compile wraps the model.
    """
    torch.manual_seed(0)
    model: Any = (_bert if name == "bert" else _gpt2)(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    called = torch.compile(model, dynamic=False) if compiled else model
    shape = (config.train.batch, config.model.length)
    tokens = torch.randint(0, config.model.vocab_size, shape, device=device)
    labels = tokens
    if name == "bert":
        labels = torch.where(torch.rand(shape, device=device) < MASKED, tokens, -100)
    half = product_dtype(config.train.precision, device) == torch.bfloat16

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = called(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _bert(config: Config) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    m = config.model
    return BertForMaskedLM(
        BertConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.width,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            intermediate_size=m.feed_forward,
            max_position_embeddings=m.length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _gpt2(config: Config) -> Any:
    from ddlm.evaluation.autoregressive import untrained

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return untrained("gpt2", asdict(config.model), config.model.length, use_cache=False, **ends)
