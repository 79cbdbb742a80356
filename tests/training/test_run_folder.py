"""The run folder: nothing in it changes before a command is known to work, and nothing is lost in between."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ddlm.checkpoint import checkpoints, load_model
from ddlm.cli import main
from ddlm.config import check_config, load_config, read_config
from ddlm.files import write_folder
from ddlm.network.denoiser import DDLM
from ddlm.training import metrics, saving
from ddlm.training.distributed import open_world
from ddlm.training.loop import train
from ddlm.types import ConfigError
from training.runs import Counting, losses, run, small_config, tensors_of


def validations(folder: Path) -> list[int]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x["step"] for x in lines if x["kind"] == "validation"]


def test_a_refused_resume_leaves_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=2))
    before = (folder / "config.yaml").read_text()
    wider = small_config(steps=4)
    wider.model.width = 64
    with pytest.raises(ConfigError, match="another architecture"):
        run(folder, wider)
    assert (folder / "config.yaml").read_text() == before
    assert run(folder, read_config(folder / "config.yaml")).step == 2


@pytest.mark.parametrize("mistake", ["tracker", "spans"])
def test_a_refused_fresh_start_destroys_nothing(tmp_path: Path, mistake: str) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=2))
    config, options = small_config(steps=2), {}
    if mistake == "tracker":
        options["track"] = ["tensorbord"]
    else:
        config.mask.strategy, config.mask.k_max = "span", 17
    with pytest.raises(ConfigError):
        run(folder, config, fresh=True, overwrite=True, **options)
    assert load_model(folder).step == 2
    assert len(losses(folder)) == 2


def test_a_fresh_start_takes_everything_of_the_old_run_along(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=4))
    for name in ("samples", "skipped"):
        (folder / name).mkdir()
        (folder / name / "step-4.jsonl").write_text("old")
    (folder / "notes.txt").write_text("mine")
    run(folder, small_config(steps=2), fresh=True, overwrite=True)
    assert not list(folder.glob("s*/step-4.jsonl"))
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_no_run_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/mine.txt").write_text("mine")
    run(tmp_path, small_config(steps=1), fresh=True, overwrite=True)
    assert (tmp_path / "samples/mine.txt").read_text() == "mine"


def test_after_going_back_good_checkpoints_stay(tmp_path: Path) -> None:
    """A damaged one of a later step must not push out what is written after it."""
    folder = tmp_path / "run"
    run(folder, small_config(steps=9, checkpoint_every=1, keep=3))
    assert [p.name for p in checkpoints(folder)] == ["step-7", "step-8", "step-9"]
    weights = folder / "checkpoints/step-9/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (folder / "checkpoints/step-8/model.safetensors").write_bytes(b"x")
    assert run(folder, small_config(steps=8, checkpoint_every=1, keep=1)).step == 8
    assert [p.name for p in checkpoints(folder)] == ["step-8"]
    assert load_model(folder).step == 8


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_folder(folder, lambda new: (new / "a").write_text("one") and None)
    script = f"""
        import os
        from pathlib import Path
        from ddlm.files import write_folder
        real = Path.rename
        def rename(self, target):
            real(self, target)
            os._exit(9)
        Path.rename = rename
        write_folder(Path({str(folder)!r}), lambda new: (new / "a").write_text("two") and None)
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False).returncode
    assert code == 9
    assert not folder.exists()
    (tmp_path / "checkpoints").mkdir()
    for path in tmp_path.glob(".x.*"):
        path.rename(tmp_path / "checkpoints" / path.name)
    doomed = (
        tmp_path / "checkpoints/.step-3.old"
    )  # what a killed prune leaves: it was to be removed
    doomed.mkdir()
    saving.clear_leftovers(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["x"]
    assert (tmp_path / "checkpoints/x/a").read_text() == "one"


def test_a_finished_run_is_not_written_again(tmp_path: Path) -> None:
    folder, config = tmp_path / "run", small_config(steps=4, eval_every=4)
    first = run(folder, config, held_out=Counting())
    stamp = (first.checkpoint / "manifest.json").stat().st_mtime_ns
    again = run(folder, config, held_out=Counting())
    assert (again.step, again.checkpoint) == (4, first.checkpoint)
    assert again.validation == json.loads(json.dumps(first.validation))
    assert (first.checkpoint / "manifest.json").stat().st_mtime_ns == stamp
    assert validations(folder) == [4]


def test_an_evaluation_that_a_signal_kept_from_being_made_is_made_up_for(tmp_path: Path) -> None:
    import signal

    from training.test_never_lost import Signalling

    config = small_config(steps=6, eval_every=2, checkpoint_every=6)
    undisturbed, folder = tmp_path / "whole", tmp_path / "cut"
    run(undisturbed, config, held_out=Counting())
    first = run(folder, config, held_out=Counting(), source=Signalling(1, signal.SIGTERM))
    assert first.stopped == signal.SIGTERM
    last = run(folder, config, held_out=Counting())
    assert sorted({*validations(folder), first.step}) == sorted(
        {*validations(undisturbed), first.step}
    )
    assert tensors_of(last.checkpoint) == tensors_of(undisturbed / "checkpoints/step-6")
    best = [(f / "checkpoints/best.json").read_text() for f in (folder, undisturbed)]
    assert best[0] == best[1]


def test_a_best_one_that_could_not_be_written_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = saving.save_model, [0]

    def full_twice(folder: Path, *args: Any, **options: Any) -> Path:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, *args, **options)

    monkeypatch.setattr(saving, "save_model", full_twice)
    run(tmp_path / "run", small_config(steps=4, eval_every=2), held_out=Counting())
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text())["step"] == 4


def test_a_full_disk_does_not_end_a_run_at_a_line_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: metrics.Reporter, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics.Reporter, "_append", full)
    assert run(tmp_path / "run", small_config(steps=3), quiet=False).step == 3
    assert capsys.readouterr().err.count("metrics.jsonl not written (No space left on device)") == 1


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    class Second(Counting):
        def batch(self, step: int) -> Any:
            done = subprocess.run(
                [sys.executable, "-c", f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
from pathlib import Path
from training.runs import run, small_config
try:
    run(Path({str(tmp_path / "run")!r}), small_config(steps=1))
except Exception as error:
    print(error)
"""], capture_output=True, text=True, check=True)  # fmt: skip
            said.append(done.stdout)
            return super().batch(step)

    said: list[str] = []
    run(tmp_path / "run", small_config(steps=1), source=Second())
    assert "another process is training in" in said[0]
    assert len(losses(tmp_path / "run")) == 1


def test_a_file_system_without_locks_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert run(tmp_path / "run", small_config(steps=1)).step == 1


def test_another_optimiser_starts_its_moments_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, then in (("muon", "adamw"), ("adamw", "muon")):
        folder = tmp_path / first
        run(folder, small_config(steps=2, optimizer=first))
        assert run(folder, small_config(steps=4, optimizer=then), quiet=False).step == 4
        assert "its moments start anew" in capsys.readouterr().err


def test_a_time_warp_that_was_not_trained_is_named(tmp_path: Path) -> None:
    plain = small_config(steps=2)
    plain.time.warp = False
    run(tmp_path / "run", plain)
    with pytest.raises(ConfigError, match=r"trained without a time warp.*time\.warp=false"):
        run(tmp_path / "run", small_config(steps=4))


def test_the_pace_is_that_of_steps_alone(tmp_path: Path) -> None:
    """Evaluations, samples and checkpoints between two lines of metrics do not count as slow steps."""
    import time

    def slow(model: Any, step: int) -> None:
        time.sleep(3.0)

    run(tmp_path / "run", small_config(steps=30, log_every=10, sample_every=10), sample=slow)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    pace = [16 * 16 * 10 / x["tokens_per_second"] for x in lines if x["kind"] == "train"]
    assert lines[-1]["seconds"] > 6
    assert max(pace[1:]) < pace[0] + 2, "the seconds of samples were counted as those of steps"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"threads": -1}, "train.threads is -1"),
        ({"seed": 2**64}, "train.seed is 18446744073709551616"),
        ({"seed": -1}, "train.seed is -1"),
        ({"lr": float("inf")}, "train.lr is inf"),
    ],
)
def test_settings_that_cannot_work(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        check_config(small_config(**setting))


def test_an_odd_time_width() -> None:
    config = small_config()
    config.model.time_width = 3
    with pytest.raises(ConfigError, match=r"model\.time_width is 3, it must be an even number"):
        check_config(config)


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "data:\n  path: 2024-02-30\n"])
def test_yaml_that_python_cannot_build(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml is not YAML"):
        load_config(str(tmp_path / "c.yaml"))


def test_half_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 is set and RANK, .*torchrun"):
        open_world(small_config())


def test_what_a_run_remarks_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(steps=2, warmup=20, eval_every=1)
    train(config, tmp_path / "run", source=Counting())
    said = capsys.readouterr().err
    assert "train.warmup of 20 steps is not over when the run ends at 2" in said
    assert "there is no held-out text: no evaluations" in said


def test_a_model_card_may_be_edited(tmp_path: Path) -> None:
    result = run(tmp_path / "run", small_config(steps=1))
    manifest = result.checkpoint / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["README.md"] = "0" * 64
    manifest.write_text(json.dumps(content))
    (result.checkpoint / "README.md").write_text("edited")
    assert load_model(result.checkpoint).step == 1


def test_samples_that_cannot_be_written_do_not_end_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk while they are written: said once, and the steps since the last checkpoint are not lost."""

    def sample(model: DDLM, step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "samples")

    config = small_config(steps=4, sample_every=1)
    result = train(config, tmp_path / "run", source=Counting(), sample=sample)
    assert result.step == 4
    assert load_model(tmp_path / "run").step == 4
    assert capsys.readouterr().err.count("samples/ not written (No space left on device)") == 1


def test_overwrite_without_fresh_is_not_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=2))
    with pytest.raises(ConfigError, match="--overwrite goes with --fresh: add that to delete"):
        run(folder, small_config(steps=4), overwrite=True)
    assert len(losses(folder)) == 2


def test_a_time_warp_of_other_pieces_is_named(tmp_path: Path) -> None:
    folder, config = tmp_path / "run", small_config(steps=2)
    run(folder, config)
    config.time.bins, config.train.steps = 50, 4
    with pytest.raises(ConfigError, match=r"another architecture \(time\.bins 100 -> 50\)"):
        run(folder, config)
    config.time.warp = False  # without one the pieces do not matter
    assert run(folder, config).step == 4


def test_the_command_names_what_is_in_the_way_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for command in ("train", "baseline"):
        assert main([command, "--config", "tiny", "--out", str(file / "run")]) == 2
        line = capsys.readouterr().err
        assert line == f"error: --out {file / 'run'}: {file} is no folder: name another\n"
