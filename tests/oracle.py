"""Closed-form posteriors of a finite embedding table with a known prior: the truth that the other tests compare with.

B sequences, T positions, D embedding width, V vocabulary. Everything is computed plainly in float64, the whole
(B, T, V) at once and without any code of the package but its contracts, so that agreement means something.

With x_t = x_0 + t * noise and x_0 one of the embeddings e_w,
    p(x_0 = e_w | x_t)  is proportional to  prior(w) * exp(-||x_t - e_w||^2 / (2 t^2)),
and a kept position is known: its likelihood is 1 for the token whose embedding it holds and 0 for the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ddlm.types import Posterior, ReadOut


def random_embeddings(vocabulary: int, width: int, seed: int = 0) -> Tensor:
    """Rows of norm sqrt(D) in random directions, ``(V, D)`` float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    return math.sqrt(width) * rows / rows.norm(dim=-1, keepdim=True)


def random_prior(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Probabilities over the last axis, float64; ``spread`` is the standard deviation of their logarithms."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def read_posterior(
    log_posterior: Tensor, embeddings: Tensor, readout: ReadOut | None = None
) -> Posterior:
    """Posterior of ``log_posterior (B, T, V)``, computed plainly; ``hidden`` then holds the log-probabilities."""
    logits = log_posterior
    if readout is not None and readout.temperature is not None:
        logits = logits / readout.temperature.double()[:, None, None]
    if readout is not None and readout.top_k is not None:
        vocabulary = logits.shape[-1]
        k = torch.where(readout.top_k > 0, readout.top_k, vocabulary).clamp(max=vocabulary)
        rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        logits = logits.masked_fill(rank >= k[:, None, None], -math.inf)
    log_z = logits.logsumexp(-1)
    p = (logits - log_z[..., None]).exp()
    keep = readout is not None and readout.keep_hidden
    tokens = logits.argmax(-1)
    if readout is not None and readout.draw_at is not None:
        at = readout.draw_at.double()[..., None]
        drawn = (p.cumsum(-1) <= at).sum(-1).clamp(max=p.shape[-1] - 1)
        tokens = torch.where(readout.draw_at >= 0, drawn, tokens)
    return Posterior(
        x0_hat=p @ embeddings,
        tokens=tokens,
        entropy=torch.special.entr(p).sum(-1),
        log_normalizer=log_z,
        hidden=log_posterior if keep else None,
    )


class Oracle(ABC):
    """A denoiser that is right: implements ``ddlm.types.Denoiser``, ``Trainable`` and ``ComparesPosteriors``.

    Hidden states are the log-probabilities of the posterior themselves, (..., V).
    """

    def __init__(self, embeddings: Tensor) -> None:
        self.table = embeddings.double()  # (V, D)
        self.calls = 0  # how often the sampler asked

    @abstractmethod
    def log_joint(self, likelihood: Tensor) -> Tensor:
        """log of prior times likelihood for every whole sequence; ``likelihood (B, T, V)`` is given as logs."""

    @abstractmethod
    def marginals(self, joint: Tensor) -> Tensor:
        """log p(x_0 at a position) ``(B, T, V)``, unnormalised, from :meth:`log_joint`."""

    def log_likelihood(
        self, xt: Tensor, t: Tensor, is_noised: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """log p(x_t | token) at every position, ``(B, T, V)``; 0 or -inf where kept, 0 at padding."""
        xt, t = xt.double(), t.double()
        squared = (xt[:, :, None, :] - self.table).square().sum(-1)  # (B, T, V)
        variance = t.square()[:, None, None]
        gaussian = (
            -squared / (2 * variance) - 0.5 * self.table.shape[1] * (2 * math.pi * variance).log()
        )
        kept = torch.full_like(squared, -math.inf).scatter(-1, squared.argmin(-1, True), 0.0)
        out = torch.where(is_noised[..., None], gaussian, kept)
        return out if valid is None else torch.where(valid[..., None], out, 0.0)

    def log_density(self, xt: Tensor, t: Tensor, is_noised: Tensor) -> Tensor:
        """log p_t(x_t), kept positions given, ``(B,)`` nats: its gradient is the exact score."""
        joint = self.log_joint(self.log_likelihood(xt, t, is_noised))
        return joint.flatten(1).logsumexp(-1)

    def log_posterior(
        self, xt: Tensor, t: Tensor, is_noised: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """log p(x_0 | x_t, t) at every position, normalised, ``(B, T, V)``."""
        joint = self.log_joint(self.log_likelihood(xt, t, is_noised, valid))
        return self.marginals(joint).log_softmax(-1)

    # Denoiser

    def embeddings(self) -> Tensor:
        return self.table

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
        self.calls += 1
        return read_posterior(self.log_posterior(xt, t, is_noised, valid), self.table, readout)

    # Trainable

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def hidden_states(
        self, xt: Tensor, t: Tensor, is_noised: Tensor, x0_hat: Tensor | None = None
    ) -> Tensor:
        return self.log_posterior(xt, t, is_noised)

    def read_out(self, hidden: Tensor) -> Posterior:
        return read_posterior(hidden, self.table)

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        cross_entropy = -hidden.gather(-1, targets[:, None]).squeeze(-1)
        return (cross_entropy * weights).sum(), cross_entropy.detach()

    # ComparesPosteriors

    def divergence(
        self, new: Posterior, old: Posterior, temperature: Tensor | None = None
    ) -> Tensor:
        assert new.hidden is not None
        assert old.hidden is not None
        tau = 1.0 if temperature is None else temperature[..., None]
        log_p, log_q = ((x.hidden / tau).log_softmax(-1) for x in (new, old))
        p = log_p.exp()
        terms = p * (log_p - log_q)
        return torch.where(p > 0, terms, 0.0).sum(-1)


class IndependentOracle(Oracle):
    """Tokens drawn independently from ``prior (V,)``, or from ``prior (T, V)`` by position."""

    def __init__(self, embeddings: Tensor, prior: Tensor) -> None:
        super().__init__(embeddings)
        self.prior = prior.double()

    def log_joint(self, likelihood: Tensor) -> Tensor:
        return likelihood + self.prior.log()  # (B, T, V): positions do not meet

    def marginals(self, joint: Tensor) -> Tensor:
        return joint

    def log_density(self, xt: Tensor, t: Tensor, is_noised: Tensor) -> Tensor:
        joint = self.log_joint(self.log_likelihood(xt, t, is_noised))
        return joint.logsumexp(-1).sum(-1)


class MarkovPairOracle(Oracle):
    """Two tokens, the second drawn given the first: ``initial (V,)``, ``transition (V, V)`` with rows summing to 1.

    Every pair is enumerated, so what one position knows about the other is exact: sequences have length 2.
    """

    def __init__(self, embeddings: Tensor, initial: Tensor, transition: Tensor) -> None:
        super().__init__(embeddings)
        self.joint_prior = initial.double()[:, None] * transition.double()  # (V, V)

    def log_joint(self, likelihood: Tensor) -> Tensor:
        if likelihood.shape[1] != 2:
            raise ValueError(f"sequences of two tokens are needed, got {likelihood.shape[1]}")
        first, second = likelihood.unbind(1)  # (B, V) each
        return self.joint_prior.log() + first[:, :, None] + second[:, None, :]  # (B, V, V)

    def marginals(self, joint: Tensor) -> Tensor:
        return torch.stack([joint.logsumexp(2), joint.logsumexp(1)], dim=1)  # (B, 2, V)
