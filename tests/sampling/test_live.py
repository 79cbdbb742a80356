"""The live view beside what is printed: a terminal for one, a file, a pipe or the same terminal for the other."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from ddlm.cli import main
from ddlm.live import LiveView
from ddlm.lm import DiffusionLM, load
from sampling.models import write_model

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder: Path) -> DiffusionLM:
    return load(folder, device="cpu")


class Terminal:
    """A pseudo-terminal that somebody reads."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.file: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._seen += os.read(self._master, 4096)
            except OSError:  # the other end is closed
                return

    def close(self) -> str:
        """All that was written."""
        self.file.close()
        self._reader.join(10)
        os.close(self._master)
        return self._seen.decode()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def test_a_file_gets_the_texts_while_the_terminal_shows_them_come(
    folder: Path, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "texts"
    with out.open("w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", terminal.file)
        common = ("--model", str(folder), "--steps", "4", "--samples", "2", "--live", "--json")
        assert main(["generate", "the river {8}", *common]) == 0
        monkeypatch.undo()
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert "tokens in flux" in terminal.close()


def test_a_line_is_whole_on_the_terminal_that_shows_the_view(
    lm: DiffusionLM, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"words": ["a word"] * 40})
    monkeypatch.setattr(sys, "stdout", terminal.file)
    console = Console(file=terminal.file, force_terminal=True, width=30)
    with LiveView(lm.tokenizer, console) as view:
        progress = lm.engine(slots=1).stream(lm.request("{8}", steps=3))
        for state in progress:
            view._drawn = 0.0
            view.update(0, state)  # type: ignore[arg-type]
            break
        view.say(line)
        view.say("next")
    monkeypatch.undo()
    seen = terminal.close()
    assert seen.index("in flux") < seen.index(f"{line}\r\n") < seen.index("next\r\n")


def test_texts_that_have_ended_make_room_for_those_under_way(lm: DiffusionLM) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    first, second, third = (
        next(iter(lm.engine(slots=1).stream(lm.request("{8}", steps=n)))) for n in (3, 4, 5)
    )
    with LiveView(lm.tokenizer, console, rows=1) as view:
        view.update(1, first)  # type: ignore[arg-type]
        for state in (second, third):  # text 1 has ended
            view._drawn = 0.0
            view.update(0, state)  # type: ignore[arg-type]
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 1 of 3" in shown
    assert "step 1 of 5" in shown


def test_rich_does_not_touch_standard_output(lm: DiffusionLM) -> None:
    before = sys.stdout
    with LiveView(lm.tokenizer, Console(file=io.StringIO(), force_terminal=True)):
        assert sys.stdout is before
