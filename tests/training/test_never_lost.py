"""A run survives whatever ends it: kills, signals, full disks, damaged checkpoints, gradients that are not finite."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddlm.checkpoint import checkpoints, load_model
from ddlm.config import Config
from ddlm.training.guard import Diverged
from ddlm.training.resume import find_resumable
from ddlm.types import ConfigError
from training.runs import B, Counting, losses, run, shards_in, small_config, tensors_of


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at 20 random moments: it resumes every time, and the final weights are those of an undisturbed run."""
    script = f"""
        import os, random, sys, time
        sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
        from pathlib import Path
        from training.runs import run, small_config, tensors_of
        folder = Path({str(tmp_path)!r})
        config = small_config(steps=100, checkpoint_every=2, eval_every=20)

        def start(name):
            child = os.fork()
            if child == 0:
                try:
                    run(folder / name, config, held_out=None)
                    os._exit(0)
                except BaseException as error:
                    print("failed:", repr(error), flush=True)
                    os._exit(1)
            return child

        assert os.waitpid(start("whole"), 0)[1] == 0
        random.seed(0)
        kills = 0
        while True:
            child = start("cut")
            if kills == 20:
                assert os.waitpid(child, 0)[1] == 0
                break
            time.sleep(random.uniform(0.0, 0.2))
            os.kill(child, 9)
            status = os.waitpid(child, 0)[1]
            assert status == 9, f"the run was over before the kill number {{kills + 1}}: {{status}}"
            kills += 1
        a, b = (tensors_of(folder / n / "checkpoints" / "step-100") for n in ("whole", "cut"))
        assert a and a == b, "the weights differ"
        print("kills", kills)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["kills", "20"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))


class Signalling(Counting):
    """Sends the process a signal while the batch of a step is made."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__()
        self.at, self.number = at, number

    def batch(self, step: int) -> Tensor:
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(tmp_path: Path, number: int) -> None:
    config = small_config(steps=12)
    before = signal.getsignal(number)
    stopped = run(tmp_path / "cut", config, source=Signalling(5, number))
    assert stopped.stopped == number
    assert 1 <= stopped.step < 12
    assert stopped.checkpoint.name == f"step-{stopped.step}"
    assert signal.getsignal(number) == before
    resumed = run(tmp_path / "cut", config)
    whole = run(tmp_path / "whole", config)
    assert resumed.stopped == 0
    assert tensors_of(resumed.checkpoint) == tensors_of(whole.checkpoint)


def test_the_command_says_what_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddlm.cli import main
    from ddlm.data.loader import Batches

    shards_in(tmp_path)
    real = Batches.batch

    def interrupted(self: Batches, step: int) -> Tensor:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step)

    config = small_config(steps=8)
    config.model.vocab_size = 300
    config.data.path = str(tmp_path / "data")
    from ddlm.config import dump_config

    (tmp_path / "c.yaml").write_text(dump_config(config))
    out = str(tmp_path / "run")
    monkeypatch.setattr(Batches, "batch", interrupted)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--out", out]) == 130
    assert f"ddlm train --config {out} --out {out}" in capsys.readouterr().err
    monkeypatch.setattr(Batches, "batch", real)
    assert main(["train", "--config", out, "--out", out]) == 0
    assert load_model(out).step == 8
    assert (load_model(out).folder / "tokenizer.json").is_file()


def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddlm.training import saving

    real, calls = saving.save_model, [0]

    def full(folder: Path, *args: Any, **options: Any) -> Path:
        calls[0] += 1
        if calls[0] >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, *args, **options)

    config = small_config(steps=9, checkpoint_every=3)
    monkeypatch.setattr(saving, "save_model", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        run(tmp_path / "run", config)
    assert calls[0] == 4  # steps 3, 6 and 9, and once more at the end
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-3"]
    monkeypatch.setattr(saving, "save_model", real)
    assert run(tmp_path / "run", config).step == 9
    whole = run(tmp_path / "whole", config)
    assert tensors_of(tmp_path / "run/checkpoints/step-9") == tensors_of(whole.checkpoint)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    config = small_config(steps=6, checkpoint_every=3)
    run(tmp_path / "run", config)
    state = tmp_path / "run/checkpoints/step-6/training/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    whole = run(tmp_path / "whole", small_config(steps=9, checkpoint_every=3))
    again = run(tmp_path / "run", small_config(steps=9, checkpoint_every=3))
    # it went back to step 3, where both runs were still warming up in the same way
    assert tensors_of(again.checkpoint) == tensors_of(whole.checkpoint)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_when_every_checkpoint_is_damaged_nothing_is_lost(tmp_path: Path) -> None:
    run(tmp_path / "run", small_config(steps=3))
    (tmp_path / "run/checkpoints/step-3/model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is damaged"):
        run(tmp_path / "run", small_config(steps=6))
    assert (tmp_path / "run/checkpoints/step-3").is_dir()


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    config = small_config(steps=24, checkpoint_every=4, eval_every=4, keep=2, lr=1e-2)

    class Shifting(Counting):
        """Held-out data that turns to noise after four evaluations of four batches: the best one is the fourth."""

        calls = 0

        def batch(self, step: int) -> Tensor:
            Shifting.calls += 1
            tokens = super().batch(step)
            return tokens if Shifting.calls <= 16 else torch.randint_like(tokens, 64)

    run(tmp_path / "run", config, held_out=Shifting())
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    kept = [p.name for p in checkpoints(tmp_path / "run")]
    assert best["step"] == 16
    assert kept == ["step-16", "step-20", "step-24"]
    assert load_model(tmp_path / "run").step == 16


def exploding(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the gradient infinite at some steps, as an overflow would."""
    from ddlm.training import step as step_module

    real = step_module.clipped_step

    def step(optimizer: Any, largest_norm: float) -> Tensor:
        if exploding.step in steps:  # type: ignore[attr-defined]
            optimizer.param_groups[0]["params"][0].grad[0] = float("inf")
        exploding.step += 1  # type: ignore[attr-defined]
        return real(optimizer, largest_norm)

    exploding.step = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(step_module, "clipped_step", step)


def test_a_gradient_that_is_not_finite_is_skipped_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exploding(monkeypatch, range(4, 6))
    result = run(tmp_path / "run", small_config(steps=10))
    state = json.loads((result.checkpoint / "training/state.json").read_text())
    assert state["skipped"] == 2
    facts = json.loads((tmp_path / "run/skipped/step-4.json").read_text())
    assert facts["grad_norm"] == "inf"
    assert len(facts["loss_by_level"]) == 5
    from safetensors.torch import load_file

    batch = load_file(tmp_path / "run/skipped/step-4.safetensors")
    assert torch.equal(batch["tokens"], Counting().batch(4))
    model = load_model(result.checkpoint).model
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_run_that_diverges_stops_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exploding(monkeypatch, range(3, 1000))
    with pytest.raises(Diverged, match=r"lower train\.lr.*before step 3") as error:
        run(tmp_path / "run", small_config(steps=100, checkpoint_every=2))
    assert "\n" not in str(error.value)
    assert [f.name for f in checkpoints(tmp_path / "run")] == ["step-2"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(x, parse_constant=pytest.fail) for x in lines]  # NaN is no JSON
    assert parsed[-1]["grad_norm"] is None
    assert parsed[-1]["loss"] > 0


def test_a_run_that_diverged_goes_on_from_sound_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint between the update that spoilt the weights and the first one skipped is passed over."""
    with monkeypatch.context() as patch:
        exploding(patch, range(4, 1000))
        with pytest.raises(Diverged):
            run(tmp_path / "run", small_config(steps=100, checkpoint_every=2))
    assert [f.name for f in checkpoints(tmp_path / "run")] == ["step-2", "step-4"]
    said: list[str] = []
    found = find_resumable(tmp_path / "run", small_config(), said.append)
    assert found is not None
    assert found.name == "step-2"
    assert said == ["passing over step-4: no update after step 4 had a finite gradient"]
    # a checkpoint that goes on from there is like any other, and the note is gone
    run(tmp_path / "run", small_config(steps=8, checkpoint_every=3, keep=1))
    assert [f.name for f in checkpoints(tmp_path / "run")] == ["step-8"]
    assert not (tmp_path / "run/checkpoints/diverged.json").exists()


def test_the_end_within_skipped_updates_keeps_what_was_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exploding(monkeypatch, range(5, 1000))
    result = run(tmp_path / "run", small_config(steps=8, checkpoint_every=2, keep=1))
    assert result.checkpoint.name == "step-8"
    assert [f.name for f in checkpoints(tmp_path / "run")] == ["step-4", "step-8"]


def test_a_broken_time_warp_is_not_kept(tmp_path: Path) -> None:
    config = small_config(steps=20, checkpoint_every=2, log_every=100)
    config.time.lr = 1e20
    with pytest.raises(Diverged, match=r"lower time\.lr"):
        run(tmp_path / "run", config)
    assert checkpoints(tmp_path / "run") == []


def test_fresh_does_not_destroy_unasked(tmp_path: Path) -> None:
    config = small_config(steps=4)
    run(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path / "run", config, fresh=True)
    assert load_model(tmp_path / "run").step == 4
    run(tmp_path / "run", small_config(steps=2), fresh=True, overwrite=True)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-2"]
    assert len(losses(tmp_path / "run")) == 2


def test_a_budget_is_kept_across_a_resume(tmp_path: Path) -> None:
    """The schedule follows the time spent; time spent before an interruption counts."""
    config = small_config(budget=1.5, steps=10**6, warmup=1, checkpoint_every=10**6)
    first = run(tmp_path / "run", config, source=Signalling(5, signal.SIGTERM))
    spent = json.loads((first.checkpoint / "training/state.json").read_text())["seconds"]
    assert first.stopped == signal.SIGTERM
    assert 0 < spent < 1.5
    second = run(tmp_path / "run", config)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert second.step > first.step
    assert 1.5 <= lines[-1]["seconds"] < 4.0
    rates = [x["lr"] for x in lines if x["kind"] == "train"]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * config.train.lr


def test_a_resume_with_another_architecture_names_the_differences(tmp_path: Path) -> None:
    run(tmp_path / "run", small_config(steps=2))
    changed: Config = small_config(steps=4)
    changed.model.layers, changed.process.t_max = 3, 8.0
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "run", changed)
    assert "model.layers 2 -> 3" in str(error.value)
    assert "process.t_max 5.0 -> 8.0" in str(error.value)
    assert load_model(tmp_path / "run").config.model.layers == 2


def test_batch_size_is_a_free_choice_on_resume(tmp_path: Path) -> None:
    run(tmp_path / "run", small_config(steps=2))
    said: list[str] = []
    found = find_resumable(tmp_path / "run", small_config(steps=4, batch=B // 2), said.append)
    assert found is not None
    (line,) = said
    assert f"train.batch {B} -> {B // 2}" in line
    find_resumable(tmp_path / "run", small_config(steps=4), said.append)
    assert len(said) == 1
    assert run(tmp_path / "run", small_config(steps=4, batch=B // 2)).step == 4
