"""The curve of quality against compute: the real script over the shipped weights and their judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(out: Path, *models: str, cache: Path) -> subprocess.CompletedProcess[str]:
    real = ROOT / "src/ddlm/data/corpus/prose.jsonl.xz"
    command = [sys.executable, str(ROOT / "benchmarks/compute_curve.py"), *models]
    command += ["--judge", "models/ddlm-tiny-ar", "--real", str(real), "--out", str(out)]
    command += ["--samples", "4", "--steps", "4"]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"DDLM_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_record_and_a_figure_come_out(tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    done = run(out, "models/ddlm-tiny", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    (point,) = results["points"]
    assert point["parameters"] == 5_152_512
    # Six for a parameter and token, less those that are only looked up, more for attention and self-conditioning
    assert 5 < point["flops"] / (point["parameters"] * point["tokens"]) < 7
    assert results["real"]["nll"] < point["nll"] < 12  # four steps write worse than people
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert out.with_suffix(".svg").is_file()


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "curve.json", str(tmp_path), cache=tmp_path / "cache")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "curve.json").exists()
