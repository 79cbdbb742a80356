"""The curve of quality against compute: the real script over the shipped weights and their judge."""

from __future__ import annotations

import importlib.util
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

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "src/ddlm/data/corpus/prose.jsonl.xz"
JUDGE = "models/ddlm-tiny-ar"


def run(
    out: Path, *models: str, cache: Path, judge: str = JUDGE
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/compute_curve.py"), *models]
    command += ["--judge", judge, "--real", str(REAL), "--out", str(out)]
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
    record = json.loads(out.read_text(encoding="utf-8"))
    assert (record["config"]["noise_scale"], record["config"]["grid"]) == (1.0, "uniform")
    results = record["results"]
    (point,) = results["points"]
    assert point["parameters"] == 5_152_512
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
    done = run(out, model, str(other), "--no-figure", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    a, b = json.loads(out.read_text(encoding="utf-8"))["results"]["points"]
    assert a["first"] == b["first"]
    assert a["nll"] == b["nll"]


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "curve.json", str(tmp_path), cache=tmp_path / "cache")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "curve.json").exists()


def test_the_interval_is_that_of_the_number_it_stands_beside(tmp_path: Path) -> None:
    """Nats per token of all texts together: long texts count for more, in the number and in its interval."""
    spec = importlib.util.spec_from_file_location("curve", ROOT / "benchmarks/compute_curve.py")
    assert spec is not None
    assert spec.loader is not None
    curve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curve)
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


def test_a_judge_that_was_trained_on_the_real_text_is_refused(tmp_path: Path) -> None:
    judge, out = tmp_path / "judge", tmp_path / "curve.json"
    shutil.copytree(ROOT / JUDGE, judge)
    seen = np.sort(np.array([document_hash(d.text) for d in documents(str(REAL))], dtype=np.uint64))
    write_tensors(judge / TRAINED_HASHES, {"hashes": torch.from_numpy(seen.view(np.int64))})
    done = run(out, "models/ddlm-tiny", cache=tmp_path / "cache", judge=str(judge))
    assert done.returncode == 2
    assert "are training data of the judge" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()
