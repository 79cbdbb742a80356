"""What TensorBoard is shown of a run: each step once, and nothing of a run that was replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ddlm.types import ConfigError
from training.runs import Counting, run, small_config

pytest.importorskip("tensorboard", reason="the extra `track` is not installed")


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("events.out.tfevents.*"))


def shown(folder: Path, name: str = "train/loss") -> list[int]:
    """Steps of a curve, in the order in which TensorBoard draws them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def test_a_fresh_start_leaves_no_events_of_the_old_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=4), track=["tensorboard"])
    old = files(folder)
    assert old
    (folder / "tensorboard" / "notes.txt").write_text("mine")
    run(folder, small_config(steps=2), track=["tensorboard"], fresh=True, overwrite=True)
    assert set(files(folder)).isdisjoint(old)
    assert shown(folder) == [1, 2]
    run(folder, small_config(steps=2), fresh=True, overwrite=True)
    assert files(folder) == []
    assert (folder / "tensorboard" / "notes.txt").read_text() == "mine"


def test_a_fresh_start_after_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=3), track=["tensorboard"])
    shutil.rmtree(folder / "checkpoints")
    old = files(folder)
    run(folder, small_config(steps=2), track=["tensorboard"], fresh=True)
    assert set(files(folder)).isdisjoint(old)


def test_a_folder_that_holds_no_run_keeps_its_events(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    mine = tmp_path / "tensorboard" / "events.out.tfevents.1.mine.1.0"
    mine.touch()
    run(tmp_path, small_config(steps=1), fresh=True, overwrite=True)
    assert files(tmp_path) == [mine]


@pytest.mark.parametrize("left", [4, 0])
def test_steps_that_are_made_again_are_shown_once(tmp_path: Path, left: int) -> None:
    """The last checkpoint is gone, as if the run had been killed before it: its metrics are there."""
    folder = tmp_path / "run"
    config = small_config(steps=6, checkpoint_every=2, keep=3, eval_every=2)
    options = {"track": ["tensorboard"], "held_out": Counting()}
    run(folder, config, **options)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > left:
            shutil.rmtree(checkpoint)
    config.train.steps = 8
    run(folder, config, **options)
    assert len(files(folder)) == 2
    assert shown(folder) == list(range(1, 9))
    assert shown(folder, "validation/cross_entropy") == [2, 4, 6, 8]


def test_a_refused_command_writes_no_events(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, small_config(steps=2), track=["tensorboard"])
    before = files(folder)
    wider = small_config(steps=4)
    wider.model.width = 64
    with pytest.raises(ConfigError, match="another architecture"):
        run(folder, wider, track=["tensorboard"])
    assert files(folder) == before
