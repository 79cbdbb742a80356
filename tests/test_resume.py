"""Sample files that are gone on with: with the very same prompts, and without a loss after a kill at any moment."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import ddlm.bulk
from ddlm.cli import main
from sampling.models import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    (line,) = [x for x in capsys.readouterr().err.split("\n") if x]
    return line


# ---- prompts of equal text


def of_equal_text(folder: Path, as_many: bool) -> tuple[list[int], list[int]]:
    """Two lists of tokens that decode to the same text."""
    from ddlm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    if as_many:  # parts of characters, which read as U+FFFD
        one, other = tokenizer.encode("é")[-1:], tokenizer.encode("ñ")[-1:]
    else:
        one = tokenizer.encode("the river")
        other = [token for letter in "the river" for token in tokenizer.encode(letter)]
    assert one != other
    assert (len(one) == len(other)) is as_many
    assert tokenizer.decode(one) == tokenizer.decode(other)
    return one, other


def exact(tokens: list[int], generate: int = 4, **more: str) -> dict[str, Any]:
    return {
        "tokens": [*tokens, *[0] * generate],
        "is_noised": [0] * len(tokens) + [1] * generate,
        **more,
    }


@pytest.mark.parametrize("as_many", [True, False])
@pytest.mark.parametrize("finished", [True, False])
def test_other_tokens_of_the_same_text_are_another_prompt(
    folder: Path, tmp_path: Path, finished: bool, as_many: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = of_equal_text(folder, as_many)
    prompts, out = write(tmp_path / "p.jsonl", exact(one)), tmp_path / "s.jsonl"
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common) == 0
    if not finished:  # as a kill before the last sample leaves it
        (row,) = rows(out)
        out.unlink()
        out.with_name("s.jsonl.parts").mkdir()
        write(tmp_path / "s.jsonl.parts" / "rank-0.jsonl", {"number": 0, "row": row})
    write(prompts, exact(other), exact(one))
    capsys.readouterr()
    assert run(*common, "--resume") == 2
    line = told(capsys)
    assert "holds a sample 1 of a prompt that reads the same in other tokens" in line
    assert "give the same ones, or --overwrite" in line
    write(prompts, exact(one), exact(other))
    assert run(*common, "--resume") == 0
    assert [row["tokens"][:-4] for row in rows(out)] == [one, other]


def test_other_positions_to_generate_are_another_prompt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "p.jsonl", {"template": "the {4}"}), tmp_path / "s.jsonl"
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common) == 0
    (row,) = rows(out)
    write(out, row | {"is_noised": [True] * len(row["tokens"])})
    capsys.readouterr()
    assert run(*common, "--resume") == 2
    assert "reads the same in other tokens ('tokens' or 'is_noised' differ)" in told(capsys)


@pytest.mark.parametrize(("before", "now"), [("a", "b"), ("a", None), (None, "b")])
def test_another_reference_is_another_prompt(
    folder: Path, tmp_path: Path, before: str | None, now: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def prompt(reference: str | None) -> dict[str, Any]:
        return {"template": "the {4}"} | ({"reference": reference} if reference else {})

    prompts, out = write(tmp_path / "p.jsonl", prompt(before)), tmp_path / "s.jsonl"
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common) == 0
    write(prompts, prompt(now), prompt(now))
    capsys.readouterr()
    assert run(*common, "--resume") == 2
    assert "holds a sample 1 with another reference" in told(capsys)
    assert len(rows(out)) == 1


@pytest.mark.parametrize(
    "absent", [("tokens", "is_noised", "reference"), ("tokens",), ("is_noised",)]
)
def test_samples_that_do_not_tell_their_tokens_are_gone_on_with(
    folder: Path, tmp_path: Path, absent: tuple[str, ...]
) -> None:
    given = exact(of_equal_text(folder, True)[0], reference="the river runs")
    prompts, out = write(tmp_path / "p.jsonl", given), tmp_path / "s.jsonl"
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common) == 0
    (row,) = rows(out)
    write(out, {k: v for k, v in row.items() if k not in absent})
    write(prompts, given, given)
    assert run(*common, "--resume") == 0
    assert len(rows(out)) == 2


# ---- a kill while the parts are removed


def test_a_kill_after_the_file_is_replaced_costs_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Folders are removed entry by entry, in any order: here the samples go first, and nothing after them."""
    prompts, out = tmp_path / "p.txt", tmp_path / "s.jsonl"
    prompts.write_text("the {4}\nsea {4}\n")
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common) == 0
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:  # at the beginning
            remove(path, ignore_errors=True)
            return
        (path / "rank-0.jsonl").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(ddlm.bulk.shutil, "rmtree", killed)
        assert run(*common, "--overwrite") == 130
    assert (tmp_path / "s.jsonl.parts").exists()
    written = out.read_bytes()
    capsys.readouterr()
    assert run(*common, "--resume") == 0
    assert "2 samples, 0 of them new" in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == written
    assert not (tmp_path / "s.jsonl.parts").exists()


# ---- several processes


@pytest.mark.parametrize(
    "asked", [("-",), ("--prompts", "-"), ("--prompts", "pipe")], ids=lambda asked: asked[-1]
)
def test_several_processes_cannot_share_standard_input(
    asked: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    there = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))
    # what is refused is refused before the model is read, which is not there
    assert run(*asked, "--model", "nowhere", "--out", "s.jsonl") == 2
    line = told(capsys)
    assert line.startswith("error: 2 processes were started and standard input, like any pipe,")
    assert line.endswith("write the prompts to a file and name it with --prompts FILE")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
