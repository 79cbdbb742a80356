"""The whole chain learns: a network overfitted on 64 sentences writes their second halves back, token for token."""

from __future__ import annotations

import lzma
import re

import pytest
import torch

from ddlm.config import ModelConfig
from ddlm.data import bundled_corpus
from ddlm.data.tokenizer import Tokenizer
from ddlm.device import product_dtype
from ddlm.diffusion.objective import NoisedBatch, denoising_loss
from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import UniformTime
from ddlm.network.denoiser import DDLM
from ddlm.sampling import sample

SENTENCES, LENGTH, KEPT, VOCABULARY = 64, 64, 32, 512
STEPS = 550


def sentences() -> torch.Tensor:
    """64 sentences of the bundled books of at least 64 tokens, cut there, ``(64, 64)``; no two begin alike."""
    with lzma.open(bundled_corpus(), "rt", encoding="utf-8") as lines:
        text = re.sub(r"\\[nr]", " ", "".join(next(lines) for _ in range(40)))
    tokenizer = Tokenizer.train([text], VOCABULARY)
    found = [tokenizer.encode(s.strip())[:LENGTH] for s in re.split(r"(?<=[.!?]) ", text)]
    whole = {tuple(ids[:KEPT]): ids for ids in found if len(ids) == LENGTH}
    assert len(whole) >= SENTENCES
    return torch.tensor(list(whole.values())[:SENTENCES])


def overfitted(tokens: torch.Tensor, steps: int) -> DDLM:
    """A small network after ``steps`` updates on nothing but ``tokens``."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        length=LENGTH,
        layers=2,
        heads=4,
        width=128,
        feed_forward=256,
        embedding_width=32,
        time_width=32,
        self_conditioning=False,
        likelihood_head=True,  # what the noise says is given: the steps go into the text
    )
    process = NoiseProcess(1.0, 10.0)
    model = DDLM(config, process)
    model.compute_dtype = product_dtype("auto", "cpu")
    times = UniformTime(process.t_min, process.t_max)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        is_noised = (torch.arange(LENGTH) >= KEPT).expand(tokens.shape)
        t, _ = times.sample(len(tokens), generator)
        noise = torch.randn(*tokens.shape, config.embedding_width, generator=generator)
        batch = NoisedBatch.make(tokens, is_noised, t, noise)
        loss = denoising_loss(model, process, batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_overfitted_network_writes_its_sentences_back() -> None:
    tokens = sentences()
    is_noised = (torch.arange(LENGTH) >= KEPT).expand(SENTENCES, LENGTH)
    given = tokens.masked_fill(is_noised, 0)  # what is to be written is not in the input

    def written_back(model: DDLM) -> float:
        result = sample(
            model,
            given,
            is_noised,
            model.process,
            steps=25,
            generator=torch.Generator().manual_seed(2),
        )
        assert torch.equal(result.tokens[:, :KEPT], tokens[:, :KEPT])
        return float((result.tokens == tokens).all(-1).float().mean())

    assert written_back(overfitted(tokens, steps=5)) == 0.0  # the measure can fail
    assert written_back(overfitted(tokens, steps=STEPS)) >= 0.95
