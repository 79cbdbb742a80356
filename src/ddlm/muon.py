"""Muon: momentum whose matrices are orthogonalised before the update (Jordan et al. 2024; arXiv 2502.16982).

G parameters of one shape, M rows, N columns of each matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ddlm.device import product_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steepest at 0, keeps [0, 1] near 1
ITERATIONS = 5
RMS = 0.2  # of an update's entries at learning rate 1, as AdamW's usually are (arXiv 2502.16982, section 2.2)


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1, ``(G, M, N)`` -> ``(G, M, N)``.

    Five steps of X <- a X + (b A + c A^2) X with A = X X^T, which move every singular value of X / ||X|| into about
    [0.7, 1.2]; precision matters little for a direction, hence bfloat16 where the device computes in it.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x  # fewer rows than columns: A is the smaller of the two squares
    y = (y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(product_dtype("auto", x.device))
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return y.mT if tall else y


class Muon(torch.optim.AdamW):
    """AdamW in which the groups marked ``orthogonal`` are matrices that follow their orthogonalised momentum.

    One learning rate serves both: the update of an (M, N) matrix is scaled by 0.2 sqrt(max(M, N)), which gives its
    entries the root mean square of an AdamW update. Matrices that stand above each other in one parameter, as those of
    queries, keys and values do, are orthogonalised one by one when their group says how many ``parts`` there are. Like
    the fused AdamW it reads ``grad_scale`` and ``found_inf`` from the optimiser, without waiting for the device:
    gradients are divided by the one, and where the other says that they are not finite nothing changes.

    Args:
        groups: Parameter groups; ``orthogonal`` in each says which rule it follows, ``parts`` (1 where it is missing)
            into how many matrices of equal height its parameters are cut.
        lr: Learning rate.
        betas: Of AdamW.
        momentum: Decay of Muon's momentum (Nesterov's form).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=1e-8, fused=True)
        self.momentum = momentum

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds; an optimiser's own forgets whatever PyTorch's have not."""
        return super().__getstate__() | {"momentum": self.momentum}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a saved state; AdamW's own looks for ``step`` in every one, and matrices have none."""
        whole = state["state"]
        counted = {p: s for p, s in whole.items() if "momentum" not in s}
        super().__setstate__({**state, "state": defaultdict(dict, counted)})
        self.state = whole

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "gradients are computed before the step"
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["orthogonal"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        grad_scale, found_inf = (getattr(self, k, None) for k in ("grad_scale", "found_inf"))
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append((p, p.grad))
        parts = group.get("parts", 1)
        for shape, members in by_shape.items():
            parameters = [p for p, _ in members]
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in parameters]
            grad = torch.stack([g for _, g in members])  # (G, M, N)
            if grad_scale is not None:  # a direction has no size, but its share in the momentum has
                grad = grad / grad_scale
            momentum = torch.stack(buffers)
            # Nesterov: the step looks one gradient ahead
            new = momentum.lerp(grad, 1 - self.momentum)
            rows, columns = shape[0] // parts, shape[1]
            cut = grad.lerp(new, self.momentum).view(-1, rows, columns)  # (G parts, M, N)
            update = orthogonalize(cut).to(grad.dtype).reshape(grad.shape)
            scale = RMS * max(rows, columns) ** 0.5 * group["lr"]
            keep = 1 - group["lr"] * group["weight_decay"]
            if found_inf is not None:  # where, not a product: 0 * nan is nan
                is_bad = found_inf > 0
                new = torch.where(is_bad, momentum, new)
                update = torch.where(is_bad, 0.0, update)
                keep = torch.where(is_bad, 1.0, keep)
            for p, buffer, m, u in zip(parameters, buffers, new, update, strict=True):
                buffer.copy_(m)
                p.mul_(keep).sub_(u, alpha=scale)
