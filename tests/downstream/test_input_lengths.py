"""Accuracy by length of the input: the real script over saved classifiers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from downstream.test_command import data as data
from downstream.test_command import model as model
from downstream.test_command import run
from scripts import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/input_lengths.py"


def test_short_and_long_inputs_add_up(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    package = "transformers_modules"  # one of another place hides this test's
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, package).is_dir()])
    for name in [n for n in sys.modules if n.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    fixed = ["--batch", 16, "--lr", 1e-3, "--t", 5, "--seeds", 1, "--epochs", 1, "--device", "cpu"]
    options = ["--task", "rte", "--data", data, "--out", tmp_path / "out", *fixed]
    assert run("--model", model, *options, "--save", tmp_path / "saved") == 0
    (saved,) = (tmp_path / "saved" / "tiny").glob("*/*")
    out = tmp_path / "lengths.json"
    given = ["--data", str(data), "--task", "rte", "--border", "40", "--out", str(out)]
    assert run_script(SCRIPT, str(saved), *given, cwd=tmp_path) == 0
    short, long = (json.loads(out.read_text())["results"][x] for x in ("short", "long"))
    assert short["inputs"] + long["inputs"] == 20
    (record,) = (tmp_path / "out").glob("tiny/*/final/*.json")
    accuracy = json.loads(record.read_text())["results"]["best"]["accuracy"]
    right = sum(x["inputs"] * x["accuracy"] for x in (short, long))
    assert right == pytest.approx(20 * accuracy)
    assert run_script(SCRIPT, str(saved), str(saved), *given, cwd=tmp_path) == 0
    again = json.loads(out.read_text())["results"]
    for name, once in (("short", short), ("long", long)):  # twice the answers, no more inputs
        assert again[name]["standard_error"] == pytest.approx(once["standard_error"])


def test_a_task_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["x", "--data", str(tmp_path), "--out", str(tmp_path / "o.json")]
    assert run_script(SCRIPT, *given, cwd=tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mrpc" in line
    assert not (tmp_path / "o.json").exists()
