"""Small denoisers the sampling tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ddlm.checkpoint import save_model
from ddlm.config import Config, ModelConfig, ProcessConfig, SampleConfig
from ddlm.data.tokenizer import Tokenizer
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.sampling import Request, halting
from ddlm.types import Posterior, ReadOut

PROCESS = NoiseProcess(0.5, 5.0)
LENGTH = 24
VOCAB = 96


def network(layers: int = 1, seed: int = 0) -> DDLM:
    """A randomly initialised network, stirred so that its posteriors depend on everything."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=VOCAB,
        length=LENGTH,
        layers=layers,
        heads=2,
        width=32,
        feed_forward=64,
        embedding_width=16,
        time_width=16,
        likelihood_head=True,  # settles like a trained network: the evidence wins as t falls
    )
    model = DDLM(config, PROCESS).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
        model.head.weight.mul_(8)
    return model


def write_model(
    home: Path, length: int = 32, seed: int = 0, sample: SampleConfig | None = None
) -> Path:
    """A model folder ``home/m`` with a tokenizer of its own; random weights drawn from ``seed``."""
    tokenizer = Tokenizer.train(["the river runs to the sea and the sun is on it again " * 20], 300)
    tokenizer.save(home / "tokenizer")
    config = Config(
        model=ModelConfig(
            vocab_size=300, length=length, layers=1, heads=2, width=32, feed_forward=64,
            embedding_width=16, time_width=16, likelihood_head=True,
        ),
        process=ProcessConfig(0.5, 5.0),
        sample=sample or SampleConfig(),
    )  # fmt: skip
    torch.manual_seed(seed)
    save_model(
        home / "m",
        DDLM(config.model, NoiseProcess(0.5, 5.0)),
        config,
        tokenizer_from=home / "tokenizer",
    )
    return home / "m"


class Gaussian:
    """Data x_0 ~ N(0, s^2 I): x0_hat = x s^2 / (s^2 + t^2), and the flow is known: x(t) ~ sqrt(s^2 + t^2)."""

    def __init__(self, s: float = 1.5, width: int = 3) -> None:
        self.s, self.width = s, width

    def embeddings(self) -> Tensor:
        return torch.ones(2, self.width, dtype=torch.float64)

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        is_noised: Tensor,
        x0_hat: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        readout: ReadOut | None = None,
    ) -> Posterior:
        share = self.s**2 / (self.s**2 + t.square())
        zero = torch.zeros(xt.shape[:2])
        return Posterior(share[:, None, None] * xt, zero.long(), zero)


def one_of_everything(request: Callable[..., Request]) -> list[Request]:
    """What a request may ask for, once each; ``request`` makes one from a seed and options."""
    return [
        request(1),
        request(2, length=11, solver="heun", temperature=0.7),
        request(3, solver="sde", refine=2),
        request(4, halt=halting.Patience(2)),
        request(5, solver="dpmpp_2m", top_k=7),
        request(6, length=5, guidance=2.0),
        request(7, halt=halting.KLBelow(0.05)),
        request(8, trace=True, halt=halting.EntropyBelow(0.5, freeze=True)),
        request(9, solver="sde", halt=halting.Fixed(5)),
    ]
