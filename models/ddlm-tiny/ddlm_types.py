# Cut out of ddlm.types of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

from dataclasses import dataclass


class ConfigError(ValueError):
    """A mistake of the user: the message is one line saying what was found, needed and what to change."""


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


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Give ``t`` (B,) trailing axes of size one so that it broadcasts over ``like`` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim()))
