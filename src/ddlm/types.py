"""Axis legend, tensor aliases, errors and the contracts every room shares.

Axes used in every file of the package:
    B  sequences of a batch        T  positions of a sequence      N  flattened positions
    D  embedding width             H  hidden width of the network  V  vocabulary size

Time runs from ``t_max`` (noise) to ``t_min`` (text); the noise level is sigma = t (EDM, variance exploding).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if (
    TYPE_CHECKING
):  # errors and contracts cost no import of torch: the tokenising processes start without it
    from torch import Tensor


class ConfigError(ValueError):
    """A mistake of the user: the message is one line saying what was found, needed and what to change."""


class DataError(ConfigError):
    """A file of the user's that cannot be used: missing, empty, malformed, truncated or altered."""


@dataclass(frozen=True)
class Posterior:
    """Summary of p(x_0 | x_t, t) at every position; the (B, T, V) probabilities themselves are never held.

    Attributes:
        x0_hat: Expected clean embedding, sum_w p_w e_w, ``(..., D)``.
        tokens: Most probable token, or one that was drawn (:attr:`ReadOut.draw_at`), ``(...)`` int64.
        entropy: Entropy of the posterior in nats, ``(...)``.
        cross_entropy: -log p(target) in nats, ``(...)``, or None when no targets were given.
        log_normalizer: log-sum-exp of the logits the summary was made from, ``(...)``.
        hidden: Hidden states the posterior was read from, ``(..., H)``; kept only on request, because comparing
            two posteriors (KL halting) needs both without storing either's logits.
    """

    x0_hat: Tensor
    tokens: Tensor
    entropy: Tensor
    cross_entropy: Tensor | None = None
    log_normalizer: Tensor | None = None
    hidden: Tensor | None = None

    def __getitem__(self, index: Tensor | slice | int) -> Posterior:
        """Select along the leading axes, the same way in every field."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return Posterior(
            x0_hat=self.x0_hat[index],
            tokens=self.tokens[index],
            entropy=self.entropy[index],
            cross_entropy=pick(self.cross_entropy),
            log_normalizer=pick(self.log_normalizer),
            hidden=pick(self.hidden),
        )

    def reshape(self, *shape: int) -> Posterior:
        """View the leading axes as ``shape``; feature axes stay last."""

        def scalar(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(*shape)

        def vector(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(*shape, x.shape[-1])

        return Posterior(
            x0_hat=self.x0_hat.reshape(*shape, self.x0_hat.shape[-1]),
            tokens=self.tokens.reshape(*shape),
            entropy=self.entropy.reshape(*shape),
            cross_entropy=scalar(self.cross_entropy),
            log_normalizer=scalar(self.log_normalizer),
            hidden=vector(self.hidden),
        )


@dataclass(frozen=True)
class ReadOut:
    """How a posterior is read from the network: what is asked of the head beyond the plain summary.

    Attributes:
        temperature: Divides the logits before the expectation (CDCD, score temperature); ``(B,)`` or None for 1.
        top_k: Keep only the k most probable tokens, ``(B,)`` int64 (0 = all), or None for all.
        draw_at: Uniform numbers in [0, 1), ``(B, T)``: there the tokens are drawn from the posterior (temperature and
            top_k applied), by inverting its distribution function; where below 0, or None, the most probable ones.
        keep_hidden: Fill :attr:`Posterior.hidden` (KL halting needs it).
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    draw_at: Tensor | None = None
    keep_hidden: bool = False


class Denoiser(Protocol):
    """What the sampler and the objective ask of a network (or of the closed-form oracle of the tests)."""

    def embeddings(self) -> Tensor:
        """Normalised embedding table ``(V, D)``, every row of norm sqrt(D)."""
        ...

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
        """Estimate p(x_0 | x_t, t) at every position.

        Args:
            xt: Unscaled noised embeddings ``(B, T, D)``; clean embeddings where ``is_noised`` is False.
            t: Time of each sequence ``(B,)`` in the precision of ``xt``; those at different times share one batch.
            is_noised: True where noise was applied, ``(B, T)``.
            x0_hat: Previous estimate ``(B, T, D)`` (self-conditioning) or None.
            valid: False at padding, ``(B, T)``; padding influences no other position. None means no padding.
            readout: Options of the read-out; None means the plain posterior.
        """
        ...


class Trainable(Protocol):
    """What the objective asks of a denoiser that is to be trained; anything with these four methods can be."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings of ``tokens (B, T)``, ``(B, T, D)``, differentiable in the table."""
        ...

    def hidden_states(
        self, xt: Tensor, t: Tensor, is_noised: Tensor, x0_hat: Tensor | None = None
    ) -> Tensor:
        """Hidden states ``(B, T, H)`` from which the posterior is read; arguments as in :class:`Denoiser`."""
        ...

    def read_out(self, hidden: Tensor) -> Posterior:
        """Posterior of any selection of hidden states ``(..., H)``."""
        ...

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(sum_i weight_i CE_i, CE)`` for hidden states ``(N, H)``; the second, ``(N,)``, is detached."""
        ...


@runtime_checkable
class ComparesPosteriors(Protocol):
    """A denoiser that can tell how far two of its posteriors are apart (needed by KL halting)."""

    def divergence(
        self, new: Posterior, old: Posterior, temperature: Tensor | None = None
    ) -> Tensor:
        """KL(new || old) in nats at every position, ``(...)``; both posteriors carry ``hidden``.

        ``temperature (...)`` divides the logits of both, None is 1.
        """
        ...


def local(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` as the home folder: a shell leaves ``--out=~/run`` alone, and Python has none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody unknown: then it is the name of a file
        return Path(path)


def check_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise ValueError unless ``tensor`` has ``shape`` (None matches any size).

    Raises:
        ValueError: naming the tensor, what was expected and what was found.
    """
    if tensor.dim() != len(shape) or any(
        s is not None and s != n for s, n in zip(shape, tensor.shape, strict=True)
    ):
        want = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({want}), got {tuple(tensor.shape)}")


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Give ``t`` (B,) trailing axes of size one so that it broadcasts over ``like`` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim()))
