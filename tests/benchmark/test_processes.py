"""N processes and one process of N threads make the same steps in turn, under the real torchrun."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddlm.benchmark import processes
from ddlm.benchmark.processes import STEPS, WARM_UP
from ddlm.benchmark.step import Trainee, own_step
from ddlm.cli import main
from ddlm.config import dump_config
from ddlm.training.distributed import open_world
from training.runs import B, T, small_config


def processor_seconds(root: int) -> float:
    """What the descendants of a process have computed so far."""
    seconds: dict[int, float] = {}
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        pid = int(file.parent.name)
        parents[pid], seconds[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / 100
    below = {root}
    for _ in range(4):
        below |= {pid for pid, parent in parents.items() if parent in below}
    return sum(seconds[pid] for pid in below - {root})


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The record of the command that measures growth and processes, and what it printed."""
    place, said = tmp_path_factory.mktemp("benchmarked"), io.StringIO()
    (place / "small.yaml").write_text(dump_config(small_config(compile=False)))
    line = ["benchmark", "train", "--config", str(place / "small.yaml"), "--no-peers"]
    more = ["--growth", "--batches", "2", "4", "--processes", "2", "--rounds", "2"]
    with contextlib.redirect_stdout(said):
        assert main([*line, *more, "--out", str(place / "r.json")]) == 0
    return json.loads((place / "r.json").read_text()), said.getvalue()


@pytest.mark.slow
def test_both_sides_train_as_one_process_does(benchmarked: tuple[dict[str, Any], str]) -> None:
    found, config = benchmarked[0]["processes"], small_config(compile=False)
    world = open_world(config)
    step = own_step(Trainee.create(config, world), config, world)
    for _ in range(WARM_UP + 2 * STEPS):
        loss = float(step.run().loss)
    for name, shape in (("many", (2, 1)), ("one", (1, 2))):
        side = found[name]
        assert (side["processes"], side["threads"]) == shape
        assert side["loss"] == pytest.approx(loss, rel=1e-4)
        assert side["tokens_per_second"] == pytest.approx(B * T / side["seconds_per_step"])
        assert 0 < side["spread"][0] <= side["seconds_per_step"] <= side["spread"][1]
    assert found["ratio"] == pytest.approx(
        found["many"]["tokens_per_second"] / found["one"]["tokens_per_second"]
    )
    assert (found["processes"], found["batch"], found["rounds"]) == (2, B, 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processor time is read from /proc")
def test_a_side_that_waits_does_not_compute(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(small_config(compile=False)))
    with processes._Side(tmp_path / "config.yaml", 2, 1) as side:
        before = processor_seconds(side._process.pid)
        side.turn(STEPS)
        worked = processor_seconds(side._process.pid)
        assert worked > before  # they are seen
        time.sleep(2)
        assert processor_seconds(side._process.pid) - worked < 0.2
    assert side._process.poll() == 0  # the end of its input is an end in order


@pytest.mark.slow
def test_a_side_that_cannot_begin_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {batch: none of your business}\n")
    with pytest.raises(ChildProcessError, match=r"ended before its time: .*train\.batch"):
        processes._Side(tmp_path / "config.yaml", 1, 1)


@pytest.mark.slow
def test_the_command_records_growth_and_processes(
    benchmarked: tuple[dict[str, Any], str],
) -> None:
    record, said = benchmarked
    assert [entry["batch"] for entry in record["growth"]] == [2, 4]
    assert record["results"]["growth"] == record["growth"]
    assert record["processes"]["ratio"] > 0
    assert record["tokens_per_second"] > 0
    assert "times the cost at batch 2" in said
    assert "2 processes of one thread make" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--processes", "1"], "--processes is 1"),
        (["--processes", "-2"], "--processes is -2"),
        (["--processes", "3"], "train.batch=128 cannot be shared evenly by 3"),
        (["--processes", "2", "--train.micro_batch", "128"], "does not divide the 64 sequences"),
        (["--processes", "2", "--train.device", "cuda"], "train.device=cpu"),
        (["--processes", "2", "--train.strategy", "fsdp"], "train.strategy=ddp"),
    ],
)
def test_impossible_arguments_leave_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "train", "--config", "small", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""  # refused before anything is measured
    assert said.err.count("\n") == 1
    assert expected in said.err
