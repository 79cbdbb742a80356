"""An untrained baseline has the sizes that are named, whatever transformers calls them."""

from __future__ import annotations

import pytest
import torch

from ddlm.evaluation.autoregressive import sample_autoregressive, untrained
from ddlm.types import ConfigError

transformers = pytest.importorskip("transformers", reason="baselines need transformers")
SIZES = {"vocab_size": 50, "layers": 3, "heads": 2, "width": 8, "feed_forward": 20, "length": 4}


def written_out(architecture: str) -> torch.nn.Module:
    """The same model in transformers' own names."""
    if architecture == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=50, n_layer=3, n_head=2, n_embd=8, n_inner=20, n_positions=6,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=7, eos_token_id=7,
            )
        )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=50, num_hidden_layers=3, num_attention_heads=2, hidden_size=8,
            intermediate_size=20, max_position_embeddings=6, bos_token_id=7, eos_token_id=7,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["gpt-neox", "gpt2"])
def test_the_sizes_are_those_of_the_diffusion_model(architecture: str) -> None:
    torch.manual_seed(0)
    ours = untrained(architecture, SIZES, 6, bos_token_id=7, eos_token_id=7)
    torch.manual_seed(0)
    theirs = written_out(architecture)
    assert ours.config.to_dict() == theirs.config.to_dict()
    tokens = torch.arange(6)[None]
    ours.train()  # dropout would show
    theirs.eval()
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_another_architecture() -> None:
    with pytest.raises(ConfigError, match="architecture bert is unknown"):
        untrained("bert", SIZES, 6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(temperature: float) -> None:
    model = untrained("gpt2", SIZES, 6).eval()
    tokens, noised = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match="it must be above 0"):
        sample_autoregressive(model, tokens, noised, [1], start=0, temperature=temperature)
