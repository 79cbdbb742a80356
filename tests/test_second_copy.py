"""Whether a model uses a copy of a text: the real script over the shipped weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddlm.data.prepare import prepare
from scripts import run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/second_copy.py"
BOOKS = ROOT / "src/ddlm/data/corpus/prose.jsonl.xz"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled books in the tokens of the shipped weights."""
    folder = tmp_path_factory.mktemp("copy") / "shards"
    prepare(str(BOOKS), folder, tokenizer=str(ROOT / "models/ddlm-tiny"), val_fraction=0.01)
    return folder


def arguments(out: Path, shards: Path, *options: str) -> list[str]:
    return ["models/ddlm-tiny", "--data", str(shards), "--out", str(out), *options]


def test_a_copy_before_the_text_helps_and_noise_hurts(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.json"
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *arguments(out, shards, "--sequences", "32", "--times", "2", "7"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    low, high = json.loads(out.read_text(encoding="utf-8"))["results"]["rows"]
    assert (low["t"], high["t"]) == (2, 7)
    assert low["other"] < 2 < 4 < high["other"]
    for row in (low, high):
        assert row["difference"] == pytest.approx(row["other"] - row["same"])
        assert row["difference"] > -row["half"]
    assert high["difference"] > high["half"]


def test_too_little_text_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path / "copy.json", shards, "--sequences", "1000000")
    assert run_script(SCRIPT, *given, cwd=ROOT) == 2
    error = capsys.readouterr().err
    assert "fewer --sequences" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "copy.json").exists()
