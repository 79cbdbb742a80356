"""A demonstration of smaller sizes than the shipped ones, for the tests of what it does whatever the sizes."""

from __future__ import annotations

import contextlib
import lzma
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ddlm.config import dump_config, load_config
from ddlm.data import bundled_corpus

# `ddlm` with another file as the tiny configuration and other books.
_PROGRAM = """
import sys
from pathlib import Path
import ddlm.config, ddlm.data
from ddlm.cli import main
tiny, books = map(Path, sys.argv[1:3])
ddlm.config.shipped_configs = lambda: {"tiny": tiny}
ddlm.data.bundled_corpus = lambda: books
sys.exit(main(sys.argv[3:]))
"""


@dataclass(frozen=True)
class Done:
    """A demonstration that was run to its end."""

    folder: Path
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Small:
    """What takes the place of the shipped tiny configuration and of the bundled books."""

    config: Path
    books: Path

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """In this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ddlm.config.shipped_configs", lambda: {"tiny": self.config})
            patch.setattr("ddlm.data.bundled_corpus", lambda: self.books)
            patch.setenv("COLUMNS", "120")
            yield

    def program(self, arguments: list[str]) -> list[str]:
        """The command line of ``ddlm`` in a process of its own."""
        return [sys.executable, "-c", _PROGRAM, str(self.config), str(self.books), *arguments]


def make_small(folder: Path) -> Small:
    """The tiny configuration with a network smaller still, and every eighth part of the bundled books.

    With the shipped weights and all books the demonstration is run by test_readme.py.
    """
    sizes = {"vocab_size": 1024, "layers": 1, "heads": 2, "width": 32, "feed_forward": 64}
    options = {f"model.{name}": value for name, value in sizes.items()}
    config = load_config("tiny", options | {"model.embedding_width": 16, "train.batch": 8})
    (folder / "tiny.yaml").write_text(dump_config(config), encoding="utf-8")
    with lzma.open(bundled_corpus(), "rt", encoding="utf-8") as lines:
        (folder / "books.jsonl").write_text("".join(list(lines)[::8]), encoding="utf-8")
    return Small(folder / "tiny.yaml", folder / "books.jsonl")
