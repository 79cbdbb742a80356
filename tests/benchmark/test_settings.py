"""Settings that a measurement does not depend on are refused, not ignored."""

from __future__ import annotations

import json
import sys
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


@pytest.mark.parametrize("kind", ["train", "sample"])
def test_what_would_fail_after_the_measurement_is_refused_before(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddlm.benchmark.train.benchmark_train", lambda *a, **k: pytest.fail("ran"))
    monkeypatch.setattr("ddlm.benchmark.sample.benchmark_sample", lambda **k: pytest.fail("ran"))
    file = tmp_path / "file"
    file.write_text("")
    without = ["--no-peers"]
    for options, message in (
        ([*without, "--out", str(tmp_path)], "is a folder: name a file in it"),
        ([*without, "--out", str(file / "r.json")], f"--out {file}: {file} is no folder"),
        ([*without, "--profile", str(file)], f"--profile {file}: {file} is no folder"),
        ([], "the peers need the package 'transformers'"),
    ):
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert main(["benchmark", kind, "--config", "tiny", *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_figure_that_is_no_number_does_not_lose_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddlm.commands import benchmark as command

    results = {"loss": float("nan"), "tokens_per_second": 2.0}
    monkeypatch.setattr("ddlm.benchmark.train.benchmark_train", lambda *a, **k: results)
    monkeypatch.setattr(command, "_show_steps", lambda results: None)
    out = tmp_path / "r.json"
    assert main(["benchmark", "train", "--config", "tiny", "--no-peers", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["loss"] is None
    assert record["tokens_per_second"] == 2.0
    assert record["non_finite"] == ["results.loss = nan"]


def test_crossovers_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from ddlm.commands.benchmark import _show_crossover

    _show_crossover({"ddlm 50": {"gpt2": [64, 128], "gpt_neox": []}})
    assert capsys.readouterr().out == (
        "  ddlm 50 is faster than gpt2 at batch 1 at these lengths: 64, 128\n"
        "  ddlm 50 is faster than gpt_neox at batch 1 at these lengths: none\n"
    )


@pytest.mark.parametrize("kind", ["train", "sample"])
def test_one_of_several_processes_measures_nothing(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rate would be that of all, and the matrix products beside it those of one."""
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["benchmark", kind, "--config", "tiny"]) == 2
    assert "start one, without torchrun" in capsys.readouterr().err
