"""What a run says of itself where it would seem to do nothing."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from ddlm.config import load_config
from ddlm.training.interrupts import Interrupts
from ddlm.training.loop import train
from ddlm.training.remarks import slow_updates
from training.runs import Counting, shards_in, small_config


def test_a_run_without_anything_left_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(steps=4)
    train(config, tmp_path / "run", source=Counting())
    assert "nothing to train" not in capsys.readouterr().err
    config.train = dataclasses.replace(config.train, lr=1e-2, warmup=20)
    train(config, tmp_path / "run", source=Counting())
    said = capsys.readouterr().err
    assert (
        "nothing to train: 4 steps are made and train.steps is 4, a larger number goes on" in said
    )
    assert "warmup" not in said
    config.train = dataclasses.replace(config.train, steps=8, budget=1e-3)
    train(config, tmp_path / "run", source=Counting())
    assert "the train.budget of 0.001 s is used up" in capsys.readouterr().err


def test_updates_of_minutes_are_told_before_the_first() -> None:
    base = load_config("base")
    line = slow_updates(base, 100e9)
    assert line is not None
    assert line.startswith("an update of 65,536 tokens takes ")
    assert f"after train.log_every {base.train.log_every};" in line
    assert slow_updates(base, 400e12) is None
    assert slow_updates(load_config("tiny"), 30e9) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_acknowledged_once(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with Interrupts(tell=True) as interrupts:
        signal.raise_signal(number)
        assert interrupts.signal == number
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (
        capfd.readouterr().err
        == f"\n{number.name}: stopping after this step; Ctrl-C stops at once\n"
    )
    with Interrupts():
        signal.raise_signal(number)
    assert capfd.readouterr().err == ""


def test_a_model_of_more_entries_than_the_tokenizer_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shards_in(tmp_path)
    config = small_config(steps=1)
    config.data.path = str(shards.folder)
    for size, told in ((shards.vocab_size + 10, False), (2 * shards.vocab_size, True)):
        config.model.vocab_size = size
        train(config, tmp_path / f"run-{size}")
        said = capsys.readouterr().err
        assert (f"--model.vocab_size {shards.vocab_size} is enough" in said) == told


@pytest.mark.parametrize(
    ("batch", "fraction", "said"),
    [
        (4, 0.5, None),
        (4, 0.0, "none of the 4"),
        (4, 1.0, "all of the 4"),
        (1, 0.5, "none of the 1"),
    ],
)
def test_a_batch_without_both_kinds_of_sequences_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch: int,
    fraction: float,
    said: str | None,
) -> None:
    config = small_config(steps=1, batch=batch, self_condition=fraction)
    train(config, tmp_path / "run", source=Counting(batch))
    lines = capsys.readouterr().err
    assert ("are self-conditioned" in lines) == (said is not None)
    assert (said or "") in lines
