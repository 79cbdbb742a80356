"""The file of `--trace`: what is finished is kept, whatever ends the call."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ddlm.cli import main
from ddlm.commands import generate
from sampling.models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def read(path: Path, packed: bool) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if packed else path.open() as file:
        return [json.loads(line) for line in file]


def stop_at(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the work at the trajectory with this number."""
    made, count = generate._trace_row, 0

    def row(text: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return made(text)

    monkeypatch.setattr(generate, "_trace_row", row)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_an_interruption_leaves_the_finished_trajectories(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trace, part, packed = tmp_path / name, tmp_path / f"{name}.part", name.endswith(".gz")
    common = ("the {4}", "--model", folder, "--steps", 3, "--samples", 4, "--trace", trace)
    with monkeypatch.context() as changed:
        stop_at(3, KeyboardInterrupt(), changed)
        assert run(*common) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"interrupted; 2 of 4 trajectories are in {part}: rename it to use it as {name}"
    )
    assert list(tmp_path.iterdir()) == [part]
    begun = read(part, packed)
    assert [(row["seed"], len(row["traces"])) for row in begun] == [(0, 1), (1, 1)]
    assert run(*common) == 2  # it would be written over
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {part} exists, with trajectories of an earlier call")
    assert read(part, packed) == begun
    assert run(*common, "--overwrite") == 0
    assert list(tmp_path.iterdir()) == [trace]
    assert read(trace, packed)[:2] == begun
    assert len(read(trace, packed)) == 4


def test_a_trajectory_does_not_wait_for_a_longer_text_before_it(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace, part = tmp_path / "t.jsonl", tmp_path / "t.jsonl.part"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the {60}\nthe {4}\n")  # the first one has several windows
    common = ("--prompts", prompts, "--model", folder, "--steps", 3, "--trace", trace, "--json")
    with monkeypatch.context() as changed:
        stop_at(2, KeyboardInterrupt(), changed)
        assert run(*common) == 130
    out, err = capsys.readouterr()
    assert out == ""  # texts are printed in their order
    assert err.startswith(f"interrupted; 1 of 2 trajectories are in {part}")
    (row,) = read(part, packed=False)
    assert (row["number"], row["prompt"], len(row["traces"])) == (1, "the {4}", 1)
    assert run(*common, "--overwrite") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [text["prompt"] for text in printed] == ["the {60}", "the {4}"]
    by_number = {row["number"]: row for row in read(trace, packed=False)}
    assert [by_number[i]["text"] for i in (0, 1)] == [text["text"] for text in printed]


def test_a_failure_leaves_the_finished_trajectories(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace, part = tmp_path / "t.jsonl", tmp_path / "t.jsonl.part"
    common = ("the {4}", "--model", folder, "--steps", 3, "--samples", 4, "--trace", trace)
    stop_at(4, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    assert run(*common) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"note: 3 of 4 trajectories are in {part}: rename it to use it as t.jsonl",
        "error: No space left on device",
    ]
    assert len(read(part, packed=False)) == 3


def test_nothing_is_left_where_nothing_was_finished(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(1, KeyboardInterrupt(), monkeypatch)
    asked = ("the {4}", "--model", folder, "--steps", 3, "--trace", tmp_path / "t.jsonl")
    assert run(*asked) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_is_none(tmp_path: Path) -> None:
    """An interruption in the midst of writing: what is left ends with a whole line."""
    from rich.console import Console

    trace, part = tmp_path / "t.jsonl", tmp_path / "t.jsonl.part"

    def interrupted() -> None:
        with generate._trace_file(trace, 2, Console(stderr=True)) as add:
            add('{"a": 1}\n')
            with part.open("ab") as file:
                file.write(b'{"a": ')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of 2 trajectories"):
        interrupted()
    assert part.read_text() == '{"a": 1}\n'
