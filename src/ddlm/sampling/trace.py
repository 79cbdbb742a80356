"""The recorded trajectory of a sequence: what Figures 1 and 2 of the paper are drawn from.

T positions, n looks, D embedding width, P width of a sketch.

Per look and position the engine reads a few numbers off the device at once and lets them go; nothing on the device
grows with the number of steps. Cosines to the *final* score and state need directions of every step: they are kept
on the host as sketches (a fixed orthonormal projection of the D coordinates to P) until the sequence ends, and are
then turned into cosines. With P >= D they are exact; else a cosine c of one position is off by about
(1 - c^2) / sqrt(P), that of a whole sequence by a further 1 / sqrt(T).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddlm.types import ConfigError

SKETCH = 64  # P: exact up to D = 64, 2 x 8 KiB a look for 64 positions
KL_STRIDE = 8  # every position's KL is measured at every eighth look: a rotating eighth of the positions a look
_CHANNELS = 5  # entropy, KL, norm of x, norm of x0_hat, still noised


@dataclass(frozen=True, eq=False)
class Trace:
    """One sequence's trajectory; n is the number of steps it made.

    Attributes:
        times: t of each look, ``(n,)`` float32.
        tokens: Argmax, ``(n, T)`` int32.
        entropy: Of p(x_0 | x_t) in nats, ``(n, T)`` float32; 0 where given.
        kl: KL(p_k || p_{k-1}) in nats, ``(n, T)`` float32, of the posteriors at the request's temperature before
            any top_k (see :class:`ddlm.sampling.halting.KLBelow`); NaN where it was not measured: at the first
            look, at given positions, and, unless the request halts by KL, at all but a rotating eighth of the
            positions (position i at looks k with k = i mod 8), whose mean is an unbiased estimate of the
            sequence's. None when the denoiser cannot compare posteriors.
        x_norm: ||x||, ``(n, T)`` float32.
        x0_norm: ||x0_hat||, ``(n, T)`` float32; sqrt(D) once a token is certain.
        score_cosine: Cosine of the score with the last look's, ``(n, T)`` float32.
        x_cosine: Cosine of x with the last look's, ``(n, T)`` float32.
        sequence_score_cosine: The same for the score of all generated positions together, ``(n,)``.
        sequence_x_cosine: The same for x, ``(n,)``.
        generated: Positions that were to be generated, ``(T,)`` bool.
        is_noised: Not yet frozen before this look, ``(n, T)`` bool.
        exact: Whether the cosines are exact (P >= D) or sketched.
    """

    times: Tensor
    tokens: Tensor
    entropy: Tensor
    kl: Tensor | None
    x_norm: Tensor
    x0_norm: Tensor
    score_cosine: Tensor
    x_cosine: Tensor
    sequence_score_cosine: Tensor
    sequence_x_cosine: Tensor
    generated: Tensor
    is_noised: Tensor
    exact: bool

    @property
    def switches(self) -> Tensor:
        """Positions whose argmax switched at each look, ``(n,)`` int64; 0 at the first."""
        changed = (self.tokens[1:] != self.tokens[:-1]).sum(1)
        return torch.cat([changed.new_zeros(1), changed])

    @property
    def settled_step(self) -> Tensor:
        """Step (1..n) from which each position's argmax never switched again, ``(T,)`` int64."""
        same = self.tokens == self.tokens[-1]  # (n, T)
        return len(self.tokens) - same.flip(0).int().cumprod(0).sum(0) + 1

    def mean(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a quantity over the generated positions of each look, ``(n,)`` each.

        Args:
            name: ``entropy``, ``kl``, ``x_norm``, ``x0_norm``, ``score_cosine`` or ``x_cosine``.

        Raises:
            ConfigError: for the ``kl`` of a denoiser that cannot compare posteriors.
        """
        recorded: Tensor | None = getattr(self, name)
        if recorded is None:
            raise ConfigError(
                f"this trace has no {name}: its denoiser cannot compare posteriors (no method divergence)"
            )
        values = recorded[:, self.generated]
        count = (~values.isnan()).sum(1)
        mean = values.nanmean(1)
        square = (values - mean[:, None]).square().nansum(1) / count
        return mean, torch.where(count > 0, square, torch.nan).sqrt()

    def to_dict(self) -> dict[str, object]:
        """Plain lists and numbers for JSON; non-finite numbers become None."""

        def plain(x: Tensor) -> object:
            if x.dtype.is_floating_point:
                return _rounded(x.tolist())
            return x.tolist()

        out: dict[str, object] = {
            k: plain(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return out | {"switches": self.switches.tolist()}


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    assert isinstance(value, float)
    return round(value, 5) if value == value and abs(value) != float("inf") else None


@dataclass
class Recorder:
    """Collects the looks of one engine; one fused gather on the device a look, copied off as it goes.

    Args:
        width: D.
        device: Of the engine.
        dtype: Of the solver's state.
    """

    width: int
    device: torch.device
    dtype: torch.dtype
    compared: bool = False
    """Whether posteriors were compared at any look: what one engine's denoiser can do never changes."""
    _pages: dict[int, list[tuple[float, Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sketch = min(SKETCH, self.width)
        self.exact = self.width <= SKETCH
        generator = torch.Generator().manual_seed(0)
        gauss = torch.randn(self.width, self.width, generator=generator, dtype=torch.float64)
        basis = (
            torch.linalg.qr(gauss)[0]
            if not self.exact
            else torch.eye(self.width, dtype=torch.float64)
        )
        self.projection = basis[:, : self.sketch].to(self.device, self.dtype)  # (D, P)

    def record(
        self,
        rows: Tensor,
        ids: list[int],
        times: list[float],
        x: Tensor,
        x0_hat: Tensor,
        kl: Tensor | None,
        tokens: Tensor,
        entropy: Tensor,
        is_noised: Tensor,
    ) -> None:
        """Keep one look of the slots ``rows (R,)``, which hold the requests ``ids``; tensors are the engine's."""
        self.compared |= kl is not None
        x, x0_hat = x[rows], x0_hat[rows]  # (R, T, D)
        unmeasured = torch.full_like(entropy[rows], torch.nan) if kl is None else kl[rows].float()
        numbers = torch.stack(
            [
                entropy[rows],
                unmeasured.masked_fill(unmeasured.isinf(), torch.nan),
                x.norm(dim=-1).float(),
                x0_hat.norm(dim=-1).float(),
                is_noised[rows].float(),
            ],
            dim=-1,
        )  # (R, T, 5)
        # the score (x0_hat - x) / t^2 has the direction of x0_hat - x
        directions = torch.stack([x0_hat - x, x], dim=2) @ self.projection  # (R, T, 2, P)
        parts = (
            tokens[rows].int().cpu(),
            numbers.cpu(),
            directions.to(torch.float16 if not self.exact else torch.float32).cpu(),
        )
        for i, (key, t) in enumerate(zip(ids, times, strict=True)):
            page = (t, parts[0][i], parts[1][i], parts[2][i])
            self._pages.setdefault(key, []).append(page)

    def finish(self, key: int, length: int, generated: Tensor, steps: int) -> Trace | None:
        """The trace of a request that has ended, cut to its ``length`` positions; None if nothing was seen."""
        pages = self._pages.pop(key, [])[
            :steps
        ]  # looks after the end, before the host noticed, do not count
        if not pages:
            return None
        times, tokens, numbers, directions = zip(*pages, strict=True)
        table = torch.stack(numbers)[:, :length]  # (n, T, 5)
        wide = torch.stack(directions)[:, :length].float()  # (n, T, 2, P)
        entropy, kl, x_norm, x0_norm, noised = table.unbind(-1)
        cosine = torch.cosine_similarity(wide, wide[-1:], dim=-1)  # (n, T, 2)
        whole = wide[:, generated].transpose(1, 2).flatten(2)  # (n, 2, T P)
        together = torch.cosine_similarity(whole, whole[-1:], dim=-1)  # (n, 2)
        return Trace(
            times=torch.tensor(times),
            tokens=torch.stack(tokens)[:, :length],
            entropy=entropy,
            kl=kl.masked_fill(~generated, torch.nan) if self.compared else None,
            x_norm=x_norm,
            x0_norm=x0_norm,
            score_cosine=cosine[..., 0],
            x_cosine=cosine[..., 1],
            sequence_score_cosine=together[:, 0],
            sequence_x_cosine=together[:, 1],
            generated=generated,
            is_noised=noised > 0,
            exact=self.exact,
        )


def kl_eighth(rows: Tensor, look: Tensor, length: int, nowhere: int) -> Tensor:
    """Flat positions s * T + i of the rotating eighth of some slots, ``(R * ceil(T / 8),)`` int64.

    Args:
        rows: The slots ``(R,)``.
        look: Number of the look each is at, ``(R,)`` int64.
        length: T of the engine.
        nowhere: Stands for what would lie behind the last position, so that the number is the same at every look.
    """
    at = torch.arange(0, length, KL_STRIDE, device=rows.device) + (look % KL_STRIDE)[:, None]
    return torch.where(at < length, rows[:, None] * length + at, nowhere).flatten()
