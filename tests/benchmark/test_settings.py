"""Settings that a measurement does not depend on are refused, not ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddlm.cli import main

SIZES = {
    "vocab_size": 64, "length": 16, "layers": 1, "heads": 2, "width": 32, "feed_forward": 64,
    "embedding_width": 16,
}  # fmt: skip
SMALL = [x for name, value in SIZES.items() for x in (f"--model.{name}", str(value))]


@pytest.mark.parametrize(
    ("kind", "setting", "value", "reads"),
    [
        ("sample", "train.batch", "8", "model, process"),
        ("sample", "sample.steps", "10", "model, process"),
        ("sample", "time.warp", "true", "model, process"),
        ("sample", "mask.k_max", "3", "model, process"),
        ("sample", "data.path", "shards", "model, process"),
        ("train", "sample.steps", "10", "model, process, time, mask, train"),
        ("train", "data.path", "shards", "model, process, time, mask, train"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(
    kind: str, setting: str, value: str, reads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", kind, "--config", "tiny", f"--{setting}", value]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == (
        f"error: --{setting} changes nothing that ddlm benchmark {kind} measures, which reads the sections {reads}: "
        "leave it out\n"
    )


def test_sizes_and_process_are_taken(tmp_path: Path) -> None:
    """A whole configuration may be named: what it says of training is not read."""
    few = ["--rounds", "1", "--no-peers", "--lengths", "4", "--batches", "1", "--queue", "4"]
    few += ["--exit_steps", "4", "--out", str(tmp_path / "record.json")]
    settings = ["--config", "tiny", *SMALL, "--process.t_max", "4"]
    assert main(["benchmark", "sample", *settings, *few]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["config"]["sizes"]["width"] == 32
