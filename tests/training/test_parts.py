"""Schedule, optimiser, average, metrics, data checks: each by itself."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddlm.config import TrainConfig
from ddlm.training import interval
from ddlm.training.data import open_data
from ddlm.training.distributed import World
from ddlm.training.draws import derive_seed
from ddlm.training.loop import train
from ddlm.training.metrics import duration, loss_by_level, open_trackers
from ddlm.training.optim import Ema, clipped_step, learning_rate, make_optimizer
from ddlm.training.state import TrainState
from ddlm.types import ConfigError
from training.runs import B, Counting, losses, run, shards_in, small_config

ALONE = World(0, 1, torch.device("cpu"))


def test_the_schedule_warms_up_and_decays() -> None:
    config = TrainConfig(lr=1.0, warmup=10, steps=110, final_lr=0.1)
    assert learning_rate(config, 0, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9, 0) == pytest.approx(1.0)
    assert learning_rate(config, 60, 0) == pytest.approx(0.55)
    assert learning_rate(config, 110, 0) == pytest.approx(0.1)


def test_with_a_budget_the_schedule_follows_the_clock() -> None:
    config = TrainConfig(lr=1.0, warmup=1, budget=100.0)
    assert learning_rate(config, 5, 50.0) == pytest.approx(0.5)
    assert learning_rate(config, 500_000, 25.0) == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 0.25))
    )
    assert learning_rate(config, 5, 101.0) == pytest.approx(0.0)


def test_clipping_in_the_kernel_is_clipping_before_it() -> None:
    """grad_scale and found_inf of the fused kernel against clip_grad_norm_ and a plain step."""
    torch.manual_seed(0)
    a, b = nn.Linear(5, 3), nn.Linear(5, 3)
    b.load_state_dict(a.state_dict())
    config = TrainConfig(lr=0.1, weight_decay=0.01)
    mine = make_optimizer(a, config)
    plain = torch.optim.AdamW(
        [{"params": [b.weight], "weight_decay": 0.01}, {"params": [b.bias], "weight_decay": 0.0}],
        lr=0.1,
        betas=config.betas,
        foreach=False,
    )
    for i in range(5):
        x = torch.randn(4, 5) * 10**i  # from below the limit to far above
        for model in (a, b):
            model.zero_grad()
            model(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(b.parameters(), 1.0)
        assert float(clipped_step(mine, 1.0)) == pytest.approx(float(expected), rel=1e-5)
        plain.step()
        torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(a.bias, b.bias)
    before = a.weight.clone()
    a.weight.grad[0, 0] = float("nan")
    clipped_step(mine, 1.0)
    assert torch.equal(a.weight, before)


def test_the_average_follows_and_swaps() -> None:
    weight = nn.Parameter(torch.zeros(3))
    ema = Ema([weight], 0.9)
    weight.data.fill_(1.0)
    for step in range(2000):
        ema.update([weight], step)
    torch.testing.assert_close(ema.shadow[0], torch.ones(3))
    weight.data.fill_(5.0)
    ema.swap([weight])
    assert torch.allclose(weight, torch.ones(3))
    assert torch.equal(ema.shadow[0], torch.full((3,), 5.0))


def test_loss_by_level_puts_each_time_in_its_interval() -> None:
    t = torch.tensor([1.0, 2.9, 3.1, 10.9, 11.0])
    levels = loss_by_level(t, torch.tensor([1.0, 3.0, 7.0, 4.0, 6.0]), 1.0, 11.0)
    assert levels == {"1-3": 2.0, "3-5": 7.0, "9-11": 5.0}


def test_durations() -> None:
    assert (duration(59), duration(61), duration(3725)) == ("0:59", "1:01", "1:02:05")


def test_metrics_have_every_quantity(tmp_path: Path) -> None:
    config = small_config(steps=6, eval_every=3, log_every=2)
    run(tmp_path / "run", config, held_out=Counting(8))
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(x["kind"], x["step"]) for x in lines] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6)
    ] or [x["step"] for x in lines if x["kind"] == "validation"] == [3, 6]  # fmt: skip
    train_line = next(x for x in lines if x["kind"] == "train")
    for key in (
        "loss",
        "loss_by_level",
        "lr",
        "grad_norm",
        "embedding_norm",
        "tokens_per_second",
        "mfu",
        "warp",
    ):
        assert key in train_line
    validation = next(x for x in lines if x["kind"] == "validation")
    assert len(validation["by_level"]) == 5
    assert validation["cross_entropy"] == pytest.approx(
        sum(validation["by_level"].values()) / 5, rel=1e-9
    )


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    run(tmp_path / "run", small_config(steps=2), track=["tensorboard"])
    (events,) = (tmp_path / "run/tensorboard").glob("events*")
    content = events.read_bytes()
    assert b"train/loss_by_level/" in content
    assert b"train/grad_norm" in content


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'"):
        open_trackers(["tensorbord"], tmp_path, small_config())


def test_no_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data was named"):
        train(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    shards_in(tmp_path)
    config = small_config()
    config.data.path = str(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"has 300 entries, the model only 64"):
        open_data(config, ALONE, None, None)


def test_a_run_refuses_shards_of_another_tokenizer(tmp_path: Path) -> None:
    config = small_config(steps=2)
    config.model.vocab_size = 320
    for name, size in (("a", 300), ("b", 310)):
        shards_in(tmp_path / name, size)
    config.data.path = str(tmp_path / "a" / "data")
    train(config, tmp_path / "run", quiet=True)
    config.data.path, config.train.steps = str(tmp_path / "b" / "data"), 4
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(config, tmp_path / "run", quiet=True)


def test_a_source_of_other_batches_is_refused(tmp_path: Path) -> None:
    for source, found in ((Counting(B // 2), "(8, 16)"), (Counting(length=8), "(16, 8)")):
        with pytest.raises(ConfigError, match=re.escape(f"has the shape {found}")):
            run(tmp_path, small_config(steps=1), source=source)


def test_a_run_folder_may_be_text(tmp_path: Path) -> None:
    result = run(str(tmp_path / "run"), small_config(steps=1))  # type: ignore[arg-type]
    assert result.checkpoint.parent.parent == tmp_path / "run"


def test_lines_of_metrics_far_apart_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interval, "LAST", 4)
    run(tmp_path / "each", small_config(steps=10))
    run(tmp_path / "all", small_config(steps=10, log_every=100))
    (mean,) = losses(tmp_path / "all")
    assert mean == pytest.approx(sum(losses(tmp_path / "each")[-4:]) / 4)


def test_threads_draw_the_weights_that_one_draws() -> None:
    config = small_config()
    alone = TrainState.create(config).model.embedding

    def same(_: int) -> bool:
        return torch.equal(TrainState.create(config).model.embedding, alone)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(60)))


def test_a_seed_of_numpy_is_that_seed() -> None:
    assert derive_seed(np.int64(3), "weights") == derive_seed(3, "weights")  # type: ignore[arg-type]


def test_a_run_goes_on_where_somebody_elses_files_are_in_a_checkpoints_place(
    tmp_path: Path,
) -> None:
    run(tmp_path, small_config(steps=1))
    place = tmp_path / "checkpoints/step-2"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    assert run(tmp_path, small_config(steps=3, checkpoint_every=1)).step == 3
    assert (place / "notes.txt").read_text() == "mine"
