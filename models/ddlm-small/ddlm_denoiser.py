# Cut out of ddlm.network.denoiser of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from .ddlm_config import ModelConfig
from .ddlm_posterior import kl_divergence, summarize, weighted_cross_entropy
from .ddlm_process import NoiseProcess
from .ddlm_transformer import Transformer
from .ddlm_types import Posterior, ReadOut


class DDLM(nn.Module):
    """Denoiser p(x_0 | x_t, t) over token embeddings (DDLM, section 3).

    Args:
        config: Sizes of the network.
        process: Noise process; only its input scale is used here.

    Attributes:
        compute_dtype: Precision of the matrix products inside the network; the solver's state, the softmax and
            the expectation stay in float32 whatever is chosen (on a GPU the latter's product is TF32 beside 16-bit
            logits).
        chunk: Positions whose logits may exist at once; None: as many as suit the device.
    """

    def __init__(self, config: ModelConfig, process: NoiseProcess) -> None:
        super().__init__()
        self.config = config
        self.process = process
        self.compute_dtype = torch.float32
        self.chunk: int | None = None
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.embedding_width))
        # [noised | clean | self-conditioning | noise mask]; the shape is the same with self-conditioning off
        self.transformer = Transformer(config, input_width=3 * config.embedding_width + 1)
        self.head = nn.Linear(config.width, config.vocab_size)
        nn.init.normal_(
            self.embedding, std=0.001
        )  # CDCD, appendix: small, because only the direction is used
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embeddings(self) -> Tensor:
        """e_w = sqrt(D) E_w / ||E_w|| for every token, ``(V, D)`` float32 (CDCD, section 3.3)."""
        return math.sqrt(self.config.embedding_width) * F.normalize(self.embedding.float(), dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings of ``tokens (B, T)``: ``(B, T, D)``."""
        rows = F.embedding(tokens, self.embedding).float()
        return math.sqrt(self.config.embedding_width) * F.normalize(rows, dim=-1)

    def hidden_states(
        self,
        xt: Tensor,
        t: Tensor,
        is_noised: Tensor,
        x0_hat: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """What the posterior is read from, ``(B, T, H)``; arguments as in :class:`ddlm.types.Denoiser`.

        With ``likelihood_head`` it is ``(B, T, H + D)``: Bayes' rule gives, for rows of equal norm,
        log p(w | x_t) = log p(w | the other positions) + x_t . e_w / t^2 + const, the second term being the
        log-likelihood of N(x_t; e_w, t^2 I). With x_t / t^2 appended here and e_w to the rows of W_out, the
        transformer is left with the first term alone: what the context says.
        """
        hidden = self.encode(xt, t, is_noised, x0_hat, valid)
        if not self.config.likelihood_head:
            return hidden
        evidence = torch.where(is_noised[..., None], xt / t[:, None, None].square(), 0.0)
        return torch.cat([hidden, evidence.to(hidden.dtype)], dim=-1)

    def head_weight(self) -> Tensor:
        """Rows the hidden states are compared with: W_out ``(V, H)``, or [W_out | e_w] ``(V, H + D)``."""
        if not self.config.likelihood_head:
            return self.head.weight
        return torch.cat([self.head.weight, self.embeddings().to(self.head.weight.dtype)], dim=-1)

    def encode(
        self,
        xt: Tensor,
        t: Tensor,
        is_noised: Tensor,
        x0_hat: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Last states of the transformer ``(B, T, H)``; arguments as in :class:`ddlm.types.Denoiser`."""
        noised = is_noised[..., None]  # (B, T, 1)
        scaled = xt * self.process.input_scale(t)[:, None, None]
        zero = xt.new_zeros(())
        if x0_hat is None or not self.config.self_conditioning:
            estimate = torch.zeros_like(xt)
        else:
            estimate = torch.where(noised, x0_hat, zero)
        features = torch.cat(
            [
                torch.where(noised, scaled, zero),
                torch.where(noised, zero, xt),
                estimate,
                noised.to(xt.dtype),
            ],
            dim=-1,
        )  # (B, T, 3 D + 1)
        with self._autocast(xt):
            return self.transformer(features, t, valid)

    def encode_clean(self, x0: Tensor, t: Tensor, valid: Tensor | None = None) -> Tensor:
        """What :meth:`encode` gives where nothing is noised, without multiplying the inputs that are zero then.

        Args:
            x0: Clean embeddings ``(B, T, D)``.
            t: Time ``(B,)``, or ``(1,)`` for all.
            valid: False at padding, ``(B, T)``, or None.

        Returns:
            Last states of the transformer ``(B, T, H)``.
        """
        layer, width = self.transformer.input, self.config.embedding_width
        with self._autocast(x0):
            x = F.linear(x0, layer.weight[:, width : 2 * width], layer.bias)
            return self.transformer.states(x, t, valid)

    def read_out(self, hidden: Tensor, readout: ReadOut | None = None) -> Posterior:
        """Posterior of hidden states ``(..., H)``."""
        readout = readout or ReadOut()

        def per_sequence(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(x.shape + (1,) * (hidden.dim() - 1 - x.dim()))

        return summarize(
            hidden.to(self.compute_dtype),
            self.head_weight(),
            self.head.bias,
            self.embeddings(),
            chunk=self.chunk,
            temperature=per_sequence(readout.temperature),
            top_k=per_sequence(readout.top_k),
            draw_at=readout.draw_at,
            keep_hidden=readout.keep_hidden,
        )

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        is_noised: Tensor,
        x0_hat: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        readout: ReadOut | None = None,
    ) -> Posterior:
        """Estimate p(x_0 | x_t, t); see :class:`ddlm.types.Denoiser`."""
        return self.read_out(self.hidden_states(xt, t, is_noised, x0_hat, valid), readout)

    def cross_entropy(
        self, hidden: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Training loss over hidden states ``(N, H)``; see :class:`ddlm.types.Trainable`."""
        return weighted_cross_entropy(
            hidden.to(self.compute_dtype),
            self.head_weight(),
            self.head.bias,
            targets,
            weights,
            self.chunk,
        )

    def divergence(
        self, new: Posterior, old: Posterior, temperature: Tensor | None = None
    ) -> Tensor:
        """KL(new || old) in nats at every position; see :class:`ddlm.types.ComparesPosteriors`.

        Args:
            new: Posterior of this step, with ``hidden (..., H)``.
            old: Posterior of the step before, with ``hidden``.
            temperature: ``(...)``, of both; None for 1.
        """
        weight, bias = self.head_weight(), self.head.bias
        return kl_divergence(new, old, weight, bias, self.chunk, temperature=temperature)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part and their total."""
        parts = {
            "embedding": self.embedding.numel(),
            "transformer": sum(p.numel() for p in self.transformer.parameters()),
            "head": sum(p.numel() for p in self.head.parameters()),
        }
        return parts | {"total": sum(parts.values())}

    def _autocast(self, like: Tensor) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        kind = (
            "cpu" if like.is_meta else like.device.type
        )  # shapes alone: autocast knows no meta device
        return torch.autocast(kind, dtype=self.compute_dtype, enabled=enabled)
