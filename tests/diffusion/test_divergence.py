"""The KL divergence of two posteriors at a temperature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ddlm.diffusion.posterior import kl_divergence, summarize


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_each_position_has_its_own_temperature(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, table = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 5, 4), (7, 4), (7,), (7, 3))
    )
    new, old = (
        summarize(h, weight, bias, table, keep_hidden=True) for h in (hidden, hidden.flip(0))
    )
    tau = torch.linspace(0.3, 2.0, 10, dtype=torch.float64).view(2, 5)
    p, q = (
        (F.linear(h, weight, bias) / tau[..., None]).log_softmax(-1)
        for h in (hidden, hidden.flip(0))
    )
    want = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    got = kl_divergence(new, old, weight, bias, chunk, temperature=tau)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    plain = kl_divergence(new, old, weight, bias, chunk)
    assert torch.equal(
        plain, kl_divergence(new, old, weight, bias, chunk, temperature=torch.ones_like(tau))
    )
