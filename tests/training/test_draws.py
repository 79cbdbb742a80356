"""Draws are a function of (seed, step) and do not depend on how the batch is cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ddlm.config import MaskConfig
from ddlm.diffusion.time_warp import UniformTime
from ddlm.training.distributed import Objective
from ddlm.training.draws import draw_noise, draw_step, is_self_conditioned, micro_batches, piece
from ddlm.training.state import TrainState
from training.runs import Counting, small_config


def test_times_fill_every_stratum_of_the_global_batch() -> None:
    u = draw_step(3, 5, 96, 16, MaskConfig()).u
    assert sorted((u * 96).long().tolist()) == list(range(96))


@pytest.mark.parametrize("strategy", ["prefix", "random", "mixed", "span"])
def test_the_draw_depends_on_seed_and_step_only(strategy: str) -> None:
    mask = MaskConfig(strategy=strategy)  # type: ignore[arg-type]
    a, b = (draw_step(0, 7, 32, 16, mask) for _ in range(2))
    assert torch.equal(a.is_noised, b.is_noised)
    assert a.total_noised == int(a.is_noised.sum())
    for other in (draw_step(0, 8, 32, 16, mask), draw_step(1, 7, 32, 16, mask)):
        assert not torch.equal(a.u, other.u)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_noise_is_the_same_however_it_is_cut(size: int) -> None:
    whole = draw_noise(0, 9, range(48), 4, 3)
    share = 48 // size
    parts = [draw_noise(0, 9, range(r * share, (r + 1) * share), 4, 3) for r in range(size)]
    assert torch.equal(torch.cat(parts), whole)
    assert abs(float(draw_noise(0, 0, range(256), 16, 16).std()) - 1) < 0.01


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_self_conditioned_rows_are_evenly_spread(fraction: float) -> None:
    rows = is_self_conditioned(range(64), fraction)
    assert int(rows.sum()) == 64 * fraction
    assert torch.equal(torch.cat([rows[:24], is_self_conditioned(range(24, 64), fraction)]), rows)


@pytest.mark.parametrize("micro_batch", [None, 8, 4, 2])
def test_micro_batches_add_up_to_the_batch(micro_batch: int | None) -> None:
    """Loss and gradients of the parts sum to those of the whole batch."""
    config = small_config()
    config.train = dataclasses.replace(config.train, micro_batch=micro_batch)
    state = TrainState.create(config)
    torch.nn.init.normal_(state.model.transformer.output_norm.film.weight, std=0.1)
    objective = Objective(state.model)
    draw, noise = draw_step(0, 0, 16, 16, config.mask), draw_noise(0, 0, range(16), 16, 16)
    times, tokens = UniformTime(1.0, 5.0), Counting().batch(0)
    parts = list(micro_batches(config, tokens, draw, noise, times, 0))
    assert len(parts) == 16 // (micro_batch or 16)
    assert sorted(torch.cat([p.rows for p in parts]).tolist()) == list(range(16))
    assert sum(p.self_condition for p in parts) == 8
    total = sum(objective(p.batch, p.self_condition)[0] for p in parts)
    gradients = torch.autograd.grad(total, list(state.model.parameters()))
    config.train.micro_batch = None
    (whole,) = micro_batches(config, tokens, draw, noise, times, 0)
    loss = objective(whole.batch, whole.self_condition)[0]
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        gradients, torch.autograd.grad(loss, list(state.model.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "share, length, device, expected",
    [
        (128, 64, "cpu", 128),
        (1024, 64, "cpu", 128),
        (192, 64, "cpu", 96),
        (1000, 64, "cpu", 125),
        (509, 64, "cpu", 509),  # prime: whole, not one by one
        (262, 64, "cpu", 262),  # 131 * 2: nothing between 64 and 128
        (64, 16384, "cpu", 1),  # one sequence is more than the limit
        (6, 8192, "cpu", 1),
        (1024, 64, "cuda", 1024),
    ],
)
def test_pieces_of_a_large_batch(share: int, length: int, device: str, expected: int) -> None:
    assert piece(share, length, device) == expected


def test_a_large_batch_on_a_cpu_is_cut_into_pieces() -> None:
    config = small_config()
    rows, length = 8, 2048
    config.model = dataclasses.replace(config.model, length=length, self_conditioning=True)
    draw = draw_step(0, 0, rows, length, config.mask)
    noise = torch.zeros(rows, length, config.model.embedding_width)
    tokens, times = torch.zeros(rows, length, dtype=torch.long), UniformTime(1.0, 5.0)
    parts = list(micro_batches(config, tokens, draw, noise, times, 0))
    assert [len(part.rows) for part in parts] == [4, 4]
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(rows))
