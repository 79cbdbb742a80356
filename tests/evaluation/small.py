"""Small real models that need no hub: random weights, a tokenizer trained on the spot."""

import random

import torch

from ddlm.config import Config
from ddlm.data.tokenizer import Tokenizer

TEXT = (
    "the a river sea old man walked into of and house green saw never light again under it was not"
)
WORDS = TEXT.split()


def sentences(number, seed=0, words=14):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)).capitalize() + "." for _ in range(number)]


def save_gpt2(folder, *, seed=0, positions=64, tokenizer=None, **options):
    import transformers

    tokenizer = tokenizer or Tokenizer.train(sentences(200), 300)
    tokenizer.save(folder)
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.end_id,
        eos_token_id=tokenizer.end_id,
        initializer_range=0.5,  # so that scores of different texts differ
        **options,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def baseline_config(steps=30):
    """Of a diffusion model that a baseline is matched to; ``data`` is not set."""
    config = Config()
    m, t = config.model, config.train
    m.layers, m.heads, m.width, m.feed_forward, m.length = 2, 2, 32, 64, 16
    t.steps, t.batch, t.lr, t.warmup, t.precision = steps, 16, 3e-3, 5, "fp32"
    return config
