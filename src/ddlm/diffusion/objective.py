"""The training loss of a batch: cross-entropy of the posterior at noised positions (CDCD, section 3.2; DDLM, 3).

B sequences, T positions, D embedding width, N noised positions (padded), H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddlm.diffusion.process import NoiseProcess
from ddlm.types import Trainable


@dataclass(frozen=True)
class NoisedBatch:
    """Everything random about one step on a batch, drawn before the network is touched.

    ``index`` and ``weight`` list the noised positions, padded to a multiple of the head's chunk with index 0 and
    weight 0, so that the head sees only noised positions and its shapes stay few.

    Attributes:
        tokens: ``(B, T)`` int64.
        is_noised: ``(B, T)`` bool.
        t: ``(B,)`` float32.
        noise: Standard normal draws ``(B, T, D)``.
        index: Flat positions b * T + i of the noised ones, ``(N,)`` int64.
        weight: Weight of each listed position in the loss, ``(N,)`` float32.
        ends: Noised positions of the first 1, 2, ... B sequences, on the host: how much of ``index`` is theirs.
    """

    tokens: Tensor
    is_noised: Tensor
    t: Tensor
    noise: Tensor
    index: Tensor
    weight: Tensor
    ends: tuple[int, ...]

    @classmethod
    def make(
        cls,
        tokens: Tensor,
        is_noised: Tensor,
        t: Tensor,
        noise: Tensor,
        *,
        multiple: int = 1,
        total_noised: int | None = None,
    ) -> NoisedBatch:
        """List the noised positions of a batch; every one weighs ``1 / total_noised``.

        Args:
            tokens: ``(B, T)``.
            is_noised: ``(B, T)``.
            t: ``(B,)``.
            noise: ``(B, T, D)``.
            multiple: Pad the list to a multiple of this.
            total_noised: Noised positions of the whole global batch; None: of this batch. With several processes
                or accumulation steps the sum of their losses is then the mean over the global batch.
        """
        index = is_noised.flatten().nonzero().squeeze(-1)  # (N,)
        count = index.numel()
        padding = -count % multiple
        weight = index.new_full(
            (count,), 1.0 / (total_noised or max(count, 1)), dtype=torch.float32
        )
        return cls(
            tokens=tokens,
            is_noised=is_noised,
            t=t,
            noise=noise,
            index=torch.nn.functional.pad(index, (0, padding)),
            weight=torch.nn.functional.pad(weight, (0, padding)),
            ends=tuple(is_noised.sum(1).cumsum(0).tolist()),
        )

    def to(self, device: torch.device | str) -> NoisedBatch:
        """Copy to a device without waiting for it: what is not pinned would wait for the step before."""
        pins = torch.device(device).type == "cuda"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if pins and value.device.type == "cpu" else value).to(
                device, non_blocking=True
            )
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Loss:
    """Loss of a batch.

    Attributes:
        loss: Weighted sum of the cross-entropies, nats; a scalar to differentiate.
        per_sequence: Mean cross-entropy of each sequence's noised positions in nats, ``(B,)``, detached.
        t: Times the sequences were trained at, ``(B,)``.
    """

    loss: Tensor
    per_sequence: Tensor
    t: Tensor


def denoising_loss(
    denoiser: Trainable, process: NoiseProcess, batch: NoisedBatch, self_condition: int = 0
) -> Loss:
    """-log p(x_0 | x_t, t) at the noised positions of a batch.

    Gradients reach the embeddings through the noised and the clean inputs; nothing but the cross-entropy trains.

    Args:
        denoiser: Network to train.
        process: Noise process.
        batch: Tokens, mask, times and noise.
        self_condition: The first this many sequences (all, where there are fewer) get the estimate of a first pass
            without gradient (Chen et al. 2022). Times are in random order over the batch, so a fixed part of it is as
            good as a coin per sequence, and the shapes never change.
    """
    x0 = denoiser.embed(batch.tokens)  # (B, T, D)
    xt = process.add_noise(x0, batch.t, batch.noise, batch.is_noised)
    x0_hat = None
    rows = min(self_condition, len(batch.ends))
    if rows > 0:
        x0_hat = first_estimate(denoiser, xt.detach(), batch, rows)
    hidden = denoiser.hidden_states(xt, batch.t, batch.is_noised, x0_hat)  # (B, T, H)
    noised = hidden.flatten(0, 1).index_select(0, batch.index)  # (N, H)
    targets = batch.tokens.flatten().index_select(0, batch.index)  # (N,)
    loss, cross_entropy = denoiser.cross_entropy(noised, targets, batch.weight)
    return Loss(loss=loss, per_sequence=_per_sequence(cross_entropy, batch), t=batch.t)


@torch.no_grad()
def first_estimate(denoiser: Trainable, xt: Tensor, batch: NoisedBatch, rows: int) -> Tensor:
    """x0_hat of the first ``rows`` sequences from a pass without gradient, zeros for the others, ``(B, T, D)``.

    It is read out at noised positions only: the network does not look at it elsewhere.
    """
    hidden = denoiser.hidden_states(xt[:rows], batch.t[:rows], batch.is_noised[:rows])
    index = batch.index[: batch.ends[rows - 1]]  # in order of position: those of the first rows
    noised = hidden.flatten(0, 1).index_select(0, index)  # (n, H)
    estimate = torch.zeros_like(xt).flatten(0, 1)  # (B T, D)
    estimate[index] = denoiser.read_out(noised).x0_hat.to(xt.dtype)
    return estimate.view_as(xt)


def _per_sequence(cross_entropy: Tensor, batch: NoisedBatch) -> Tensor:
    """Mean of ``cross_entropy (N,)`` over each sequence's noised positions, ``(B,)``; padding does not count."""
    rows = batch.index // batch.tokens.shape[1]
    real = (batch.weight > 0).to(cross_entropy.dtype)
    sums = cross_entropy.new_zeros(batch.tokens.shape[0]).index_add_(0, rows, cross_entropy * real)
    counts = torch.zeros_like(sums).index_add_(0, rows, real)
    return sums / counts.clamp_min(1.0)
