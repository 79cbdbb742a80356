# Cut out of ddlm.diffusion.process of ddlm 0.1.0 (Apache-2.0) when this model was exported.
# Change the package, not this file.
from __future__ import annotations

import math
from dataclasses import dataclass
import torch
from torch import Tensor
from .ddlm_types import ConfigError, expand_time


@dataclass(frozen=True)
class NoiseProcess:
    """Variance-exploding diffusion of token embeddings, from ``t_max`` (noise) down to ``t_min`` (text).

    Args:
        t_min: Time at which text is read off; must be positive (the score divides by t^2).
        t_max: Time at which generation starts.
        sigma_data: Root mean square of a coordinate of the clean embeddings; 1 for rows of norm sqrt(D).

    Raises:
        ConfigError: when ``0 < t_min < t_max`` or ``sigma_data > 0`` does not hold.
    """

    t_min: float
    t_max: float
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not (
            math.isfinite(self.t_min) and math.isfinite(self.t_max) and 0 < self.t_min < self.t_max
        ):
            raise ConfigError(
                f"t_min={self.t_min:g} and t_max={self.t_max:g} were given, 0 < t_min < t_max is needed: "
                "change process.t_min or process.t_max"
            )
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ConfigError(
                f"sigma_data={self.sigma_data:g} was given, a positive number is needed"
            )

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor, is_noised: Tensor) -> Tensor:
        """x_t = x_0 + t * noise where ``is_noised``, x_0 elsewhere.

        Args:
            x0: Clean embeddings ``(B, T, D)``.
            t: Time of each sequence ``(B,)``.
            noise: Standard normal draws ``(B, T, D)``.
            is_noised: ``(B, T)`` bool.

        Returns:
            ``(B, T, D)``; at kept positions exactly ``x0``.
        """
        return torch.where(is_noised[..., None], x0 + expand_time(t, x0) * noise, x0)

    def input_scale(self, t: Tensor) -> Tensor:
        """1 / sqrt(sigma_data^2 + t^2): brings x_t to unit variance (EDM, c_in); shape of ``t``."""
        return torch.rsqrt(self.sigma_data**2 + t.square())

    def score(self, x0_hat: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Score of the marginal, s(x, t) = (x0_hat - x) / t^2 (score interpolation; CDCD, section 3.1).

        Args:
            x0_hat: Expected clean embedding ``(B, T, D)``.
            xt: ``(B, T, D)``.
            t: ``(B,)``.
        """
        return (x0_hat - xt) / expand_time(t, xt).square()

    def drift(self, x0_hat: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Probability-flow ODE, dx/dt = -t * s(x, t) = (x - x0_hat) / t (EDM, equation 1 with sigma = t)."""
        return (xt - x0_hat) / expand_time(t, xt)
