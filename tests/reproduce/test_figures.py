"""Figures 1 and 3: a curve for each checkpoint, and seconds against length beside the norm of x."""

import json
import re
from pathlib import Path

import pytest
import torch

from ddlm.checkpoint import save_model
from ddlm.cli import main
from ddlm.config import Config
from ddlm.data.shards import TokenShards
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.reproduce import speed, traces
from ddlm.reproduce.workshop import Workshop

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run folder with three checkpoints of different weights."""
    folder = tmp_path_factory.mktemp("trained") / "mine"
    config = Config()
    m = config.model
    m.layers, m.heads, m.width, m.feed_forward, m.length = 1, 2, 16, 32, 16
    m.embedding_width, m.time_width, m.vocab_size = 16, 16, TokenShards(shards).vocab_size
    config.process.t_max, config.data.path = 3.5, str(shards)
    for step in (10, 20, 100):
        torch.manual_seed(step)
        net = DDLM(m, NoiseProcess(config.process.t_min, config.process.t_max))
        save_model(
            folder / "checkpoints" / f"step-{step}", net, config, tokenizer_from=shards, step=step
        )
    (folder / "checkpoints" / "best.json").write_text('{"step": 20}')
    return folder


@pytest.fixture(autouse=True)
def short(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(traces, "SEQUENCES", 2)
    monkeypatch.setattr(traces, "STEPS", 6)
    monkeypatch.setattr(Workshop, "measure", lambda *a: ({}, []))
    # One length, a glance at every case: that it is the benchmark's own function matters, not the seconds.
    monkeypatch.setattr(
        speed, "_SMALL", speed._SMALL | {"rounds": 1, "lengths": (4,), "budget": 0.01}
    )


def reproduce(out, item, model, *more):
    given = ["--judge", "none", "--features", "none"] if item == "figure1" else []
    arguments = ["reproduce", item, "--model", model, "--out", out, *given, *more]
    return main([*map(str, arguments)])


def words(svg):
    """Everything that is written in a picture, on one line."""
    return " ".join(" ".join(re.findall(r">([^<]+)<", svg.read_text("utf-8"))).split())


def results(out, item):
    return json.loads((out / f"{item}.json").read_text("utf-8"))["results"]


def test_figure_1_has_switches_and_entropy_of_every_checkpoint(run, tmp_path, capsys):
    assert reproduce(tmp_path, "figure1", run) == 0
    assert "figure1-paths.png, figure1-paths.svg" in capsys.readouterr().out
    assert (tmp_path / "figure1-paths.png").stat().st_size > 10_000
    curves = results(tmp_path, "figure1")["curves"]
    assert list(curves) == ["step 10", "step 20", "step 100"]
    assert all(len(c["switches"]) == len(c["entropy"]) == 6 for c in curves.values())
    assert curves["step 10"]["entropy"] != curves["step 100"]["entropy"]
    text = words(tmp_path / "figure1-paths.svg")
    for label in (*curves, "switched tokens (%)", "entropy (nats per token)"):
        assert label in text
    assert "Curves: 3 checkpoints of the run folder mine. Mean over 2 sequences; 6 euler" in text
    assert "Bands: one standard deviation" in text


def test_figure_1_has_one_curve_of_a_model_alone(run, tmp_path):
    assert reproduce(tmp_path, "figure1", run / "checkpoints" / "step-20") == 0
    assert list(results(tmp_path, "figure1")["curves"]) == ["step 20"]
    assert "One curve: the model alone" in words(tmp_path / "figure1-paths.svg")


def test_of_many_checkpoints_the_first_and_the_last_are_among_the_curves():
    found = [Path(f"step-{i}") for i in range(30)]
    chosen = traces._spaced(found)
    assert len(chosen) == len(set(chosen)) == traces.MOST_CHECKPOINTS
    assert (chosen[0], chosen[-1]) == (found[0], found[-1])
    assert traces._spaced(found[:3]) == found[:3]


def test_figure_3_draws_a_record_of_the_benchmark(run, tmp_path, capsys):
    record = BENCHMARKS / "sample-base-h200.json"
    assert reproduce(tmp_path, "figure3", run, "--speed", record) == 0
    shown = capsys.readouterr().out
    assert "figure3-speed.png" in shown
    assert "measuring" not in shown
    assert (tmp_path / "figure3-speed.png").stat().st_size > 10_000
    text = words(tmp_path / "figure3-speed.svg")
    assert "GPT-NeoX (autoregressive)" in text
    assert "Record sample-base-h200.json with random weights, by `ddlm benchmark sample" in text
    beside = words(tmp_path / "figure3-x_norm.svg")
    assert "right part, seconds against length: figure3-speed" in beside
    assert results(tmp_path, "figure3")["speed"]["kind"] == "benchmark-sample"


def test_figure_3_measures_a_small_model(run, tmp_path):
    pytest.importorskip("transformers", reason="the autoregressive models need transformers")
    assert reproduce(tmp_path, "figure3", run) == 0
    cases = json.loads((tmp_path / "speed.json").read_text("utf-8"))["results"]["cases"]
    assert {"ddlm 50", "gpt_neox"} <= {c["candidate"] for c in cases}
    text = words(tmp_path / "figure3-speed.svg")
    assert "Measured for this figure" in text
    assert "up to the length that takes them 0.01 s" in text  # why a line may end early
    # The record does not stand in the way of another measurement into the same folder.
    assert reproduce(tmp_path, "figure3", run) == 0


def test_figure_3_says_how_to_add_the_speed_of_a_larger_model(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "MOST_PARAMETERS", 1000)
    (tmp_path / "figure3-speed.png").write_text("of another measurement")
    assert reproduce(tmp_path, "figure3", run) == 0
    assert not (tmp_path / "figure3-speed.png").exists()
    how = f"`ddlm benchmark sample --weights {run} --out speed.json` measures it"
    assert how in capsys.readouterr().out
    text = words(tmp_path / "figure3-x_norm.svg")
    assert "is left out: the model has 0.0M parameters" in text
    assert "--speed speed.json adds it" in text
    assert results(tmp_path, "figure3")["speed"] is None


@pytest.mark.parametrize(
    ("item", "file", "message"),
    [
        ("figure2", "sample-base.json", "--speed is for figure3, and it is not among the items"),
        ("figure3", "train-small.json", "a record of `ddlm benchmark sample` is needed"),
        ("figure3", "no-such.json", "no speed record at"),
    ],
)
def test_a_record_that_is_of_no_use_is_refused_before_anything_is_sampled(
    item, file, message, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(traces, "trace", lambda *a: pytest.fail("sampled"))
    assert reproduce(tmp_path / "out", item, run, "--speed", BENCHMARKS / file) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
