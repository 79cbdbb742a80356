"""Muon against PyTorch's own, and what ours adds: one learning rate for all, skipped updates, resuming."""

from __future__ import annotations

import copy
import pickle
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from ddlm.config import TrainConfig, config_from_dict
from ddlm.muon import Muon, orthogonalize
from ddlm.training.optim import clipped_step, make_optimizer
from ddlm.training.state import TrainState
from ddlm.types import ConfigError
from training.runs import losses, run, small_config, tensors_of
from training.test_never_lost import Signalling


@pytest.mark.parametrize("shape", [(3, 48, 16), (2, 16, 48), (1, 32, 32)])
def test_singular_values_are_moved_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert values.min() > 0.5
    assert values.max() < 1.3
    # and the singular vectors stay: U^T X V is diagonal
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    middle = u.mT @ orthogonalize(x).float() @ vh.mT
    assert (middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.1


def test_it_moves_matrices_as_pytorchs_own_does() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24, 8))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(
        [{"params": ours, "weight_decay": 0.1, "orthogonal": True}], lr=0.02, betas=(0.9, 0.98)
    )
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        # the directions are bfloat16: a rounding apart
        assert (a - b).abs().max() < 5e-3 * (a - a.mean()).abs().max()


def test_matrices_above_each_other_are_orthogonalised_one_by_one() -> None:
    """Queries, keys and values in one parameter move as three parameters of their own would."""
    torch.manual_seed(0)
    merged = nn.Parameter(torch.randn(24, 8))
    single = [nn.Parameter(p.clone()) for p in merged.detach().chunk(3)]
    options = {"weight_decay": 0.1, "orthogonal": True}
    one = Muon([{"params": [merged], "parts": 3, **options}], lr=0.02, betas=(0.9, 0.98))
    three = Muon([{"params": single, **options}], lr=0.02, betas=(0.9, 0.98))
    for _ in range(4):
        merged.grad = torch.randn_like(merged)
        for p, grad in zip(single, merged.grad.chunk(3), strict=True):
            p.grad = grad.clone()
        one.step()
        three.step()
    assert torch.equal(merged, torch.cat(single))


def test_which_parameters_follow_which_rule() -> None:
    config = small_config(optimizer="muon")
    config.model.neighbours = 1
    state = TrainState.create(config)
    names = {id(p): n for n, p in state.model.named_parameters()}
    rule = {
        names[id(p)]: g["orthogonal"] for g in state.optimizer.param_groups for p in g["params"]
    }
    assert set(rule) == set(names.values())
    orthogonal = {n for n, is_orthogonal in rule.items() if is_orthogonal}
    assert len(orthogonal) == 4 * config.model.layers
    assert all(".blocks." in n for n in orthogonal)
    assert not any("film" in n or "head" in n or "neighbours" in n for n in orthogonal)


def test_large_gradients_are_clipped_before_the_momentum() -> None:
    """A spike counts in the momentum as a gradient of the largest allowed norm, as clip_grad_norm_ would have it."""
    torch.manual_seed(0)
    a, b = nn.Module(), nn.Module()
    a.up, b.up = nn.Linear(6, 5), nn.Linear(6, 5)
    b.load_state_dict(a.state_dict())
    config = TrainConfig(lr=0.1, optimizer="muon")
    mine, plain = make_optimizer(a, config), make_optimizer(b, config)
    for size in (1e-3, 1e4, 1e-3):  # the second is clipped
        x = torch.randn(4, 6)
        for model in (a, b):
            model.zero_grad()
            (model.up(x).square().sum() * size).backward()
        norm = clipped_step(mine, 1.0)
        assert (norm > 1.0) == (size > 1)
        torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        plain.step()
    momentum = [o.state[m.up.weight]["momentum"] for o, m in ((mine, a), (plain, b))]
    torch.testing.assert_close(*momentum, rtol=1e-4, atol=1e-8)
    assert momentum[0].norm() < 0.1


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.up = nn.Linear(6, 5)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, optimizer="muon", weight_decay=0.1))

    def update(poison: float) -> torch.Tensor:
        model.zero_grad()
        (model.up(torch.randn(4, 6)).square().sum() * poison).backward()
        return clipped_step(optimizer, 1.0)

    update(1.0)
    before = [p.detach().clone() for p in model.parameters()]
    momentum = optimizer.state[model.up.weight]["momentum"].clone()
    assert not update(float("nan")).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(momentum, optimizer.state[model.up.weight]["momentum"])
    update(1.0)
    assert not torch.equal(before[0], model.up.weight)


def test_a_saved_state_is_taken_up_bit_for_bit() -> None:
    """As transformers' Trainer and accelerate do it: load_state_dict, where AdamW's own asks every state for a step."""

    def make() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        groups = [
            {"params": [model.weight], "weight_decay": 0.1, "orthogonal": True},
            {"params": [model.bias], "weight_decay": 0.0, "orthogonal": False},
        ]
        return model, Muon(groups, lr=0.02, betas=(0.9, 0.98))

    def update(model: nn.Module, optimizer: Muon, step: int) -> None:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    whole, optimizer = make()
    for step in range(3):
        update(whole, optimizer, step)
    weights = {k: v.clone() for k, v in whole.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, other = make()
    resumed.load_state_dict(weights)
    other.load_state_dict(saved)
    assert set(other.state[resumed.weight]) == {"momentum"}  # checkpoints hold what they held
    assert set(other.state[resumed.bias]) == {"step", "exp_avg", "exp_avg_sq"}
    for step in range(3, 6):
        update(whole, optimizer, step)
        update(resumed, other, step)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_a_copy_goes_on_like_the_original() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    groups = [{"params": [model.weight], "weight_decay": 0.1, "orthogonal": True}]
    optimizer = Muon(groups, lr=0.02, betas=(0.9, 0.98), momentum=0.8)

    def update(model: nn.Linear, optimizer: Muon) -> None:
        model.weight.grad = torch.arange(30.0).view(5, 6).sin()
        optimizer.step()

    update(model, optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    third, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for pair in ((model, optimizer), (twin, other), (third, pickled)):
        update(*pair)
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.weight, third.weight)


def test_a_run_with_muon_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = small_config(optimizer="muon", weight_decay=0.01)
    config.model.neighbours = 2
    whole = run(tmp_path / "whole", config)
    stopped = run(tmp_path / "cut", config, source=Signalling(11, signal.SIGTERM))
    assert 1 <= stopped.step < 30
    resumed = run(tmp_path / "cut", config)
    assert tensors_of(resumed.checkpoint) == tensors_of(whole.checkpoint)
    trace = losses(tmp_path / "whole")
    assert trace == losses(tmp_path / "cut")
    assert sum(trace[-5:]) < 0.8 * sum(trace[:5])


def test_muon_is_refused_with_sharded_matrices() -> None:
    with pytest.raises(ConfigError, match=r"train.optimizer.*fsdp"):
        config_from_dict({"train": {"optimizer": "muon", "strategy": "fsdp"}})
