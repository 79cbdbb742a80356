"""A network made ready for sampling: nothing that stays the same from step to step is computed twice.

B sequences, T positions, N positions read out, D embedding width, H hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddlm.diffusion.posterior import kl_divergence, summarize
from ddlm.network.denoiser import DDLM
from ddlm.types import Posterior, ReadOut

DEVICE_ROWS = 256  # a list of positions is padded to a multiple of this on an accelerator


class InferenceDenoiser:
    """A frozen copy of a network as a :class:`ddlm.types.Denoiser`.

    What it saves over calling the network: the embedding table is normalised once, matrices are kept in the
    precision they are multiplied in instead of being cast in every step, and on the CPU the head, the widest matrix
    of all, sees only positions that are still to be decided (elsewhere, and when compiled, shapes stay static).
    Estimates agree with the network's.

    Args:
        model: The network; it is copied, not changed.
        dtype: Precision of the matrix products, float32 or bfloat16.
        device: Where to run; None stays where the network is.
    """

    def __init__(
        self,
        model: DDLM,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        if device is not None:
            frozen = frozen.to(device)
        frozen.compute_dtype = dtype
        self._table = frozen.embeddings()
        self._head_weight = frozen.head_weight().to(dtype)  # (V, H), or (V, H + D)
        for module in frozen.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        self.model = frozen
        self.dtype = dtype

    def embeddings(self) -> Tensor:
        """Normalised table ``(V, D)`` float32."""
        return self._table

    @torch.no_grad()
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
        """See :class:`ddlm.types.Denoiser`; at kept positions the CPU reads out nothing: x_t itself, entropy 0."""
        readout = readout or ReadOut()
        hidden = self.model.hidden_states(xt, t, is_noised, x0_hat, valid)  # (B, T, H)
        compiling = torch.compiler.is_compiling()
        if compiling or hidden.device.type != "cpu":
            read = self._read(hidden, readout)
            if compiling or readout.top_k is None:
                return read
            # other kernels serve top_k: sequences that cut nothing keep the bits they have without those that do
            whole = self._read(hidden, replace(readout, top_k=None))
            return _choose(readout.top_k > 0, read, whole)
        index = is_noised.flatten().nonzero().squeeze(-1)  # (N,)
        padded = self._padded(index)
        part = self._read(hidden.flatten(0, 1)[padded], readout, padded, padded // xt.shape[1])
        return _spread(part, index, xt, hidden if readout.keep_hidden else None)

    @torch.no_grad()
    def divergence(
        self, new: Posterior, old: Posterior, temperature: Tensor | None = None
    ) -> Tensor:
        """KL(new || old) in nats at every position; see :meth:`ddlm.network.denoiser.DDLM.divergence`."""
        if new.hidden is None or old.hidden is None:
            raise ValueError(
                "both posteriors need hidden states: read them out with keep_hidden=True"
            )
        lead = new.hidden.shape[:-1]
        index = self._padded(torch.arange(lead.numel(), device=new.hidden.device))
        p = replace(new, hidden=new.hidden.flatten(0, -2)[index].to(self.dtype))
        q = replace(old, hidden=old.hidden.flatten(0, -2)[index].to(self.dtype))
        tau = None if temperature is None else temperature.expand(lead).flatten()[index]
        bias, chunk = self.model.head.bias, self.model.chunk
        kl = kl_divergence(p, q, self._head_weight, bias, chunk, temperature=tau)
        return kl[: lead.numel()].reshape(lead)

    def _padded(self, index: Tensor) -> Tensor:
        """Repeat the last entry up to a number of rows whose products give each row the same bits.

        On the CPU a multiple of 16 a thread: for fewer rows other kernels are used. Elsewhere whole chunks: the
        number of rows chooses the kernel. Compiled code is made for each number of rows.
        """
        if index.numel() == 0 or torch.compiler.is_compiling():
            return index
        on_cpu = index.device.type == "cpu"
        multiple = 16 * torch.get_num_threads() if on_cpu else DEVICE_ROWS
        return torch.cat([index, index[-1:].expand(-index.numel() % multiple)])

    def _read(
        self,
        hidden: Tensor,
        readout: ReadOut,
        index: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Posterior:
        """Posterior of ``hidden (B, T, H)``, or ``(N, H)`` at positions ``index (N,)`` of sequences ``rows (N,)``."""

        def spread(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x[:, None] if rows is None else x[rows]

        at = readout.draw_at

        return summarize(
            hidden.to(self.dtype),
            self._head_weight,
            self.model.head.bias,
            self._table,
            chunk=self.model.chunk,
            temperature=spread(readout.temperature),
            top_k=spread(readout.top_k),
            draw_at=at if at is None or index is None else at.flatten()[index],
            keep_hidden=readout.keep_hidden and rows is None,
        )


def _choose(rows: Tensor, a: Posterior, b: Posterior) -> Posterior:
    """``a (B, T)`` in the sequences where ``rows (B,)`` is True, ``b`` in the others, of the same hidden states."""
    assert a.log_normalizer is not None
    assert b.log_normalizer is not None
    each = rows[:, None]  # (B, 1)
    return Posterior(
        x0_hat=torch.where(each[..., None], a.x0_hat, b.x0_hat),
        tokens=torch.where(each, a.tokens, b.tokens),
        entropy=torch.where(each, a.entropy, b.entropy),
        log_normalizer=torch.where(each, a.log_normalizer, b.log_normalizer),
        hidden=a.hidden,
    )


def _spread(part: Posterior, index: Tensor, xt: Tensor, hidden: Tensor | None) -> Posterior:
    """Put what was read at ``index (N,)`` back into ``(B, T)``."""
    n = index.numel()
    batch, length, width = xt.shape

    def scalar(values: Tensor) -> Tensor:
        return (
            values.new_zeros(batch * length).index_copy_(0, index, values[:n]).view(batch, length)
        )

    x0_hat = xt.reshape(-1, width).index_copy(0, index, part.x0_hat[:n].to(xt.dtype))
    assert part.log_normalizer is not None
    return Posterior(
        x0_hat=x0_hat.view(batch, length, width),
        tokens=scalar(part.tokens),
        entropy=scalar(part.entropy),
        log_normalizer=scalar(part.log_normalizer),
        hidden=hidden,
    )
