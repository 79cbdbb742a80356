"""The curve of quality against compute: the real script over the shipped weights and their judge."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddlm.data.sources import document_hash, documents
from ddlm.evaluation.judges import TRAINED_HASHES, Judge
from ddlm.files import write_tensors
from ddlm.integrations.export import export_model
from scripts import load_script, run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/compute_curve.py"
REAL = ROOT / "src/ddlm/data/corpus/prose.jsonl.xz"
JUDGE = "models/ddlm-tiny-ar"


def arguments(out: Path, *models: str, judge: str = JUDGE) -> list[str]:
    given = ["--judge", judge, "--real", str(REAL), "--out", str(out)]
    return [*models, *given, "--samples", "4", "--steps", "4"]


def run(out: Path, *models: str, cache: Path, judge: str = JUDGE) -> int:
    """The script in this process, its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDLM_CACHE", str(cache))
        return run_script(SCRIPT, *arguments(out, *models, judge=judge), cwd=ROOT)


@pytest.mark.slow
def test_a_record_and_a_figure_come_out(tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(out, "models/ddlm-tiny")],
        cwd=ROOT,
        env=os.environ | {"DDLM_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert (record["config"]["noise_scale"], record["config"]["grid"]) == (1.0, "uniform")
    results = record["results"]
    (point,) = results["points"]
    assert point["parameters"] == 5_809_920
    # Six for a parameter and token, less those that are only looked up, more for attention and self-conditioning
    assert 5 < point["flops"] / (point["parameters"] * point["tokens"]) < 7
    assert results["real"]["nll"] < point["nll"] < 12  # four steps write worse than people
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert out.with_suffix(".svg").is_file()


def test_a_models_own_defaults_do_not_count(tmp_path: Path) -> None:
    """What the curve holds fixed it holds fixed for all: two exports of the same weights give one point."""
    model = "models/ddlm-tiny"
    other = export_model(
        ROOT / model,
        tmp_path / "other",
        dtype="bfloat16",
        sample=["noise_scale=0.3", "grid=karras"],
    )
    out = tmp_path / "curve.json"
    assert run(out, model, str(other), "--no-figure", cache=tmp_path / "cache") == 0
    a, b = json.loads(out.read_text(encoding="utf-8"))["results"]["points"]
    assert a["first"] == b["first"]
    assert a["nll"] == b["nll"]


def test_a_folder_that_is_no_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "curve.json", str(tmp_path), cache=tmp_path / "cache") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "curve.json").exists()


def test_the_interval_is_that_of_the_number_it_stands_beside(tmp_path: Path) -> None:
    """Nats per token of all texts together: long texts count for more, in the number and in its interval."""
    curve = load_script(SCRIPT)
    judge = Judge(str(ROOT / JUDGE), cache=tmp_path)
    texts = ["It was late.", "Xq zv!", "She looked at the river, and at the house beyond it. " * 3]
    found = curve.judged(texts, [[1, 2], [3, 4], [5, 6]], judge)
    scores = judge.score(texts)
    nats, tokens = (np.array([getattr(s, name) for s in scores]) for name in ("nll", "tokens"))
    assert found["nll"] == pytest.approx(nats.sum() / tokens.sum())
    # The ratio of two sums (Cochran 1977, section 6.4), 97.5% of the t-distribution with two degrees of freedom.
    residuals = nats - found["nll"] * tokens
    error = math.sqrt(3 / 2 * (residuals**2).sum()) / tokens.sum()
    assert found["half"] == pytest.approx(4.302653 * error, rel=1e-5)


def test_a_judge_that_was_trained_on_the_real_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge, out = tmp_path / "judge", tmp_path / "curve.json"
    shutil.copytree(ROOT / JUDGE, judge)
    seen = np.sort(np.array([document_hash(d.text) for d in documents(str(REAL))], dtype=np.uint64))
    write_tensors(judge / TRAINED_HASHES, {"hashes": torch.from_numpy(seen.view(np.int64))})
    assert run(out, "models/ddlm-tiny", cache=tmp_path / "cache", judge=str(judge)) == 2
    error = capsys.readouterr().err
    assert "are training data of the judge" in error
    assert error.count("\n") == 1
    assert not out.exists()
