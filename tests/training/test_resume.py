"""What a run that goes on says of changed settings and data, and what a signal finds at an awkward moment."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddlm.checkpoint import load_model
from ddlm.config import Config, check_config
from ddlm.files import read_manifest
from ddlm.training import loop
from ddlm.types import ConfigError
from training.runs import Counting, run, shards_in, small_config
from training.test_never_lost import Signalling


def validations(folder: Path) -> list[int]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x["step"] for x in lines if x["kind"] == "validation"]


def test_a_signal_during_an_evaluation_is_obeyed_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = small_config(steps=6, eval_every=2, checkpoint_every=6)
    held_out = Signalling(1, signal.SIGTERM)  # the second of four batches
    first = run(folder, config, held_out=held_out)
    assert (first.stopped, first.step) == (signal.SIGTERM, 2)
    assert first.checkpoint.name == "step-2"
    assert validations(folder) == []
    run(folder, config, held_out=Counting())
    assert validations(folder) == [2, 4, 6]


def test_samples_are_written_after_the_checkpoint_of_their_step(tmp_path: Path) -> None:
    kept: list[bool] = []

    def sample(model: Any, step: int) -> None:
        kept.append((tmp_path / f"run/checkpoints/step-{step}").is_dir())

    run(tmp_path / "run", small_config(steps=4, sample_every=2, checkpoint_every=2), sample=sample)
    assert kept == [True, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_compiler_that_dies_of_the_signal_is_no_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def compiling(*_: Any) -> Any:
        os.kill(os.getpid(), number)
        raise RuntimeError("the C++ compiler was killed")

    monkeypatch.setattr(loop, "train_step", compiling)
    said = f"^{signal.Signals(number).name} at step 0, interrupted$"
    with pytest.raises(KeyboardInterrupt, match=said):
        run(tmp_path / "run", small_config(steps=4))
    monkeypatch.undo()
    assert run(tmp_path / "run", small_config(steps=4)).step == 4


def test_an_error_without_a_signal_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "run", small_config(steps=4))


def best(folder: Path) -> int | None:
    file = folder / "checkpoints/best.json"
    return int(json.loads(file.read_text())["step"]) if file.exists() else None


def random_masks(config: Config) -> Config:
    return dataclasses.replace(config, mask=dataclasses.replace(config.mask, strategy="random"))


def test_a_best_that_was_measured_otherwise_no_longer_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Growing(Counting):
        """Held-out text that later evaluations cannot predict, so that the first one would stay the best."""

        calls = 0

        def batch(self, step: int) -> Tensor:
            Growing.calls += 1
            tokens = super().batch(step)
            return tokens if Growing.calls <= 20 else torch.randint_like(tokens, 64)

    folder, config = tmp_path / "run", small_config(steps=4, eval_every=4)
    run(folder, config, held_out=Growing(), quiet=False)
    assert best(folder) == 4
    capsys.readouterr()
    Growing.calls = 1000
    config = random_masks(small_config(steps=8, eval_every=4))
    run(folder, config, held_out=Growing(), quiet=False)
    said = capsys.readouterr().err
    assert "the best evaluation so far, step 4 (" in said
    assert "mask.strategy span -> random" in said
    assert best(folder) == 8
    assert load_model(folder).config.mask.strategy == "random"


def test_without_evaluations_the_folder_stands_for_the_best_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=4, eval_every=4), held_out=Counting())
    run(folder, small_config(steps=8), held_out=Counting(), quiet=False)
    said = capsys.readouterr().err
    assert "whoever loads this run folder gets the best one so far, step 4 (" in said
    assert load_model(folder).step == 4


def test_other_shards_are_told_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shards_in(tmp_path / "a")
    second = shards_in(tmp_path / "b", documents=60)
    if first.tokenizer_hash != second.tokenizer_hash:  # the same words: they may well agree
        from ddlm.data.prepare import prepare

        prepare(str(tmp_path / "b/text.jsonl"), tmp_path / "c", tokenizer=str(first.folder))
        second = type(first)(tmp_path / "c")
    config = small_config(steps=4, eval_every=4)
    config.model.vocab_size = first.vocab_size
    config.data.path = str(first.folder)
    run(tmp_path / "run", config, source=None)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    config.data.path = str(second.folder)
    result = run(tmp_path / "run", config, source=None, quiet=False)
    said = capsys.readouterr().err
    assert (
        f"going on with other shards ({second.hash[:12]}) than before ({first.hash[:12]})" in said
    )
    assert "no longer counts" in said
    parts = read_manifest(result.checkpoint)["provenance"]["trainings"]
    assert [p["data"] for p in parts] == [first.hash, second.hash]


class Failing:
    """A tracker whose service goes away."""

    name = "wandb"

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, 0

    def start(self, step: int) -> None:
        self._call("start")

    def log(self, values: Any, step: int) -> None:
        self._call("log")

    def close(self) -> None:
        self._call("close")

    def _call(self, what: str) -> None:
        self.calls += 1
        if what == self.at:
            raise ConnectionError("no route to the service\nand a long story")


@pytest.mark.parametrize("at", ["start", "log", "close"])
def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    tracker = Failing(at)
    monkeypatch.setattr(loop, "open_trackers", lambda *_: [tracker])
    result = run(tmp_path / "run", small_config(steps=3), quiet=False)
    assert result.checkpoint.name == "step-3"
    said = capsys.readouterr().err
    assert said.count("wandb failed (no route to the service), going on without") == 1
    assert tracker.calls == {"start": 1, "log": 2, "close": 5}[at]


def test_the_grid_of_a_warp_needs_one() -> None:
    config = small_config()
    config.sample.grid = "warp"
    check_config(config)
    config.time.warp = False
    with pytest.raises(ConfigError, match=r"sample\.grid is warp.*without time\.warp"):
        check_config(config)


def test_samples_of_a_run_are_refined_as_the_model_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ddlm.sampling
    from ddlm.commands.train import _sampler
    from ddlm.training.state import TrainState

    shards = shards_in(tmp_path / "a")
    config = small_config()
    config.model.vocab_size, config.data.path = shards.vocab_size, str(shards.folder)
    config.sample.steps, config.sample.refine = 3, 5
    real, given = ddlm.sampling.sample, []

    def noted(*arguments: Any, **options: Any) -> Any:
        given.append(options["refine"])
        return real(*arguments, **options)

    monkeypatch.setattr(ddlm.sampling, "sample", noted)
    write = _sampler(config, tmp_path)
    assert write is not None
    write(TrainState.create(config).model, 7)
    assert given == [5]
    assert len((tmp_path / "samples/step-7.jsonl").read_text().splitlines()) == 4


def test_a_configuration_made_in_python_is_checked_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"train\.keep is 0"):
        run(tmp_path / "run", small_config(steps=2, keep=0))
    assert not (tmp_path / "run").exists()
