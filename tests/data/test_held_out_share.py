"""How much of a corpus of few documents is held out, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.data import formats
from ddlm.data.prepare import prepare
from ddlm.data.sources import documents
from ddlm.data.tokenizer import Tokenizer


def test_lines_without_blank_ones_are_documents_of_a_limited_size(tmp_path: Path) -> None:
    """Of a megabyte of lines, or of one long line, a few percent can be held out."""
    lines = "".join(f"line {i} of a text that has no blank line\n" for i in range(25_000))
    for name, text in (("lines", lines), ("one", lines.replace("\n", " "))):
        file = tmp_path / f"{name}.txt"
        file.write_text(text, encoding="utf-8")
        pieces = [d.text for d in documents(file)]
        assert "".join(pieces) == text
        assert len(pieces) > 7
        assert max(map(len, pieces)) < 2 * formats._TXT_LIMIT


@pytest.mark.parametrize(("documents", "told"), [(2, True), (40, False)])
def test_a_large_share_that_is_held_out_is_told(
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    documents: int,
    told: bool,
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    text = "\n<|end|>\n".join(f"the river number {i}" for i in range(documents))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    argv = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "shards")]
    assert main([*argv, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    note = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note:")]
    assert bool(note) == told
    if told:
        assert "% of the tokens are held out and 1% were asked for" in note[0]
        assert "--val_fraction 0" in note[0]


def test_the_report_counts_the_tokens_that_are_held_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("the river\n<|end|>\nthe other river\n", encoding="utf-8")
    report = prepare(tmp_path / "a.txt", tmp_path / "shards", tokenizer=tokenizer)
    assert report.val_documents == 1
    assert 0 < report.val_tokens < report.tokens
