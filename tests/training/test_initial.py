"""Starting from the weights of a model: they arrive, the optimiser is new, a resumed run keeps its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.checkpoint import checkpoints, load_model
from ddlm.cli import main
from ddlm.config import Config, dump_config
from ddlm.training.flops import run_flops
from ddlm.training.loop import train
from ddlm.types import ConfigError
from training.runs import Counting, run, shards_in, small_config, tensors_of


def validations(folder: Path) -> dict[int, float]:
    """Held-out cross-entropy by step, from metrics.jsonl."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["cross_entropy"] for x in lines if x["kind"] == "validation"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps."""
    folder = tmp_path_factory.mktemp("source") / "run"
    run(folder, small_config(steps=60, eval_every=60), held_out=Counting())
    return folder


def test_the_run_begins_where_the_model_stood(source: Path, tmp_path: Path) -> None:
    config = small_config(steps=3, eval_every=100, seed=1)
    run(tmp_path / "run", config, held_out=Counting(), initial=source)
    before, after = validations(source)[60], validations(tmp_path / "run")
    assert after[0] == before
    assert set(after) == {0, 3}
    assert after[3] != before
    run(tmp_path / "random", config, held_out=Counting())
    assert set(validations(tmp_path / "random")) == {3}
    assert validations(tmp_path / "random")[3] > before + 0.5
    warps = [
        (load_model(f).time_warp or pytest.fail("no warp")).state_dict()
        for f in (source, tmp_path / "run/checkpoints/step-0")
    ]
    assert all(torch.equal(warps[0][k], warps[1][k]) for k in warps[0])


def test_the_optimiser_is_new(source: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", small_config(steps=1, eval_every=1), held_out=Counting(),
                 initial=source)  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (line,) = [x for x in lines if x["kind"] == "train"]
    assert line["lr"] == pytest.approx(small_config().train.lr / 5, rel=0.01)  # first of 5 warm-ups
    steps = {
        float(v)
        for k, v in _tensors(result.checkpoint / "training/state.safetensors").items()
        if k.startswith("step.")
    }
    assert steps == {1.0}


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_resumed_run_keeps_its_own_weights(source: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", small_config(steps=6), initial=source)

    class Stopping(Counting):
        """Interrupts the run after three steps."""

        def batch(self, step: int) -> torch.Tensor:
            import os
            import signal

            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(step)

    cut = run(tmp_path / "cut", small_config(steps=6), initial=source, source=Stopping())
    assert 1 <= cut.step < 6
    # What is named now does not matter, not even whether it is there.
    again = run(tmp_path / "cut", small_config(steps=6), initial=tmp_path / "nowhere")
    assert tensors_of(again.checkpoint) == tensors_of(whole.checkpoint)
    provenance = load_model(again.checkpoint).provenance
    first, second = provenance["trainings"]
    assert (first["from_step"], second["from_step"]) == (0, cut.step)
    for part in (first, second):
        assert part["command"]
        assert part["versions"]["torch"] == torch.__version__
        assert {"commit", "hardware", "date"} <= part.keys()
    origin = provenance["initial"]
    flops = run_flops(small_config(), 60)
    assert origin == {
        "model": str(source), "step": 60, "tokens_seen": 60 * 16 * 16, "flops": flops,
    }  # fmt: skip


def test_another_architecture_is_named(source: Path, tmp_path: Path) -> None:
    changed = small_config(steps=2)
    changed.model.layers, changed.process.t_max = 3, 8.0
    with pytest.raises(ConfigError, match=r"model\.layers 2 -> 3; process\.t_max 5\.0 -> 8\.0"):
        run(tmp_path / "run", changed, initial=source)
    assert not (tmp_path / "run").exists()


def test_a_mistake_destroys_no_run(source: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", small_config(steps=2))
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError):
            run(tmp_path / "run", small_config(), initial=wrong, fresh=True, overwrite=True)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-2"]
    # A run may start anew from its own weights.
    config = small_config(steps=1, eval_every=1)
    run(tmp_path / "run", config, held_out=Counting(), initial=tmp_path / "run", fresh=True,
        overwrite=True)  # fmt: skip
    origin = load_model(tmp_path / "run").provenance["initial"]
    assert origin["step"] == 2


def prepared(folder: Path, size: int = 300, **settings: Any) -> Config:
    """A configuration for shards of its own."""
    shards_in(folder, size)
    config = small_config(**settings)
    config.model.vocab_size = 320
    config.data.path = str(folder / "data")
    (folder / "c.yaml").write_text(dump_config(config))
    return config


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not recorded"])
def test_the_command_refuses_another_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recorded: bool
) -> None:
    train(prepared(tmp_path / "a", steps=2), tmp_path / "a/run", quiet=True)
    prepared(tmp_path / "b", 310, steps=2)
    first = load_model(tmp_path / "a/run")
    if not recorded:
        file = first.folder / "manifest.json"
        content = json.loads(file.read_text())
        content["provenance"] = {}
        file.write_text(json.dumps(content))
    capsys.readouterr()
    command = ["train", "--config", str(tmp_path / "b/c.yaml"), "--out", str(tmp_path / "b/run")]
    assert main([*command, "--init", str(tmp_path / "a/run")]) == 2
    error = capsys.readouterr().err
    assert "another tokenizer" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b/run").exists()


def test_the_command_starts_from_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = prepared(tmp_path, steps=2, eval_every=2)
    train(config, tmp_path / "first", quiet=True)
    command = ["train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "second")]
    assert main([*command, "--init", str(tmp_path / "first")]) == 0
    assert f"starting from the weights of {tmp_path / 'first'}" in capsys.readouterr().err
    assert validations(tmp_path / "second")[0] == validations(tmp_path / "first")[2]
