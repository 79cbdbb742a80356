"""Items made from given weights: nothing is trained, the table says whose they are, nothing is mixed."""

import json
import re
from dataclasses import fields

import pytest
import torch

from ddlm.checkpoint import save_model
from ddlm.cli import main
from ddlm.config import Config, load_config
from ddlm.data.shards import TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.diffusion.process import NoiseProcess
from ddlm.evaluation import baseline
from ddlm.lm import load
from ddlm.network.denoiser import DDLM
from ddlm.reproduce import weights as weights_module
from ddlm.reproduce.weights import departures, read_weights
from ddlm.reproduce.workshop import Workshop


def small_config(shards):
    config = Config()
    m, t = config.model, config.train
    m.layers, m.heads, m.width, m.feed_forward, m.length = 1, 2, 16, 32, 16
    m.embedding_width, m.time_width, m.vocab_size = 16, 16, TokenShards(shards).vocab_size
    config.process.t_max, config.mask.strategy, config.data.path = 3.5, "blend", str(shards)
    t.optimizer, t.precision, t.lr, t.batch, t.steps, t.warmup = "muon", "fp32", 1e-3, 8, 6, 2
    return config


def save(folder, shards, seed):
    config = small_config(shards)
    torch.manual_seed(seed)
    net = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    return save_model(folder, net, config, tokenizer_from=shards, step=1234)


@pytest.fixture(scope="module")
def weights(shards, tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "mine", shards, 0)


@pytest.fixture(scope="module")
def autoregressive(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("autoregressive") / "mine-ar"
    data = TokenShards(shards)
    baseline.train_baseline(
        baseline.make_plan(small_config(shards), data, "gpt-neox", 64), data, out
    )
    return out


@pytest.fixture(autouse=True)
def nothing_is_trained(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("_train_model", "_train_baseline"):
        monkeypatch.setattr(Workshop, name, lambda *a: pytest.fail("trained"))


def test_departures_are_those_from_the_papers_main_recipe(shards):
    assert departures(load_config("base")) == []
    config = load_config("base")
    config.model.embedding_width, config.process.t_max = 64, 5.0  # the paper's ratio
    assert departures(config) == []
    found = departures(small_config(shards))
    assert found[0] == "t_max 3.5, which is 14 at the paper's embedding width (10)"
    assert "mask.strategy blend (span)" in found
    assert "train.optimizer muon (adamw)" in found
    config.model.likelihood_head, config.process.t_min = True, 0.5
    assert departures(config) == ["t_min 0.5 (1)", "model.likelihood_head on (off)"]


def test_every_setting_is_named_or_left_out_on_purpose():
    sections = ("model", "process", "time", "mask", "train")
    config = Config()
    known = {f"{s}.{f.name}" for s in sections for f in fields(getattr(config, s))}
    listed = [*weights_module._RECIPE, *weights_module._NOT_NAMED]
    assert len(listed) == len(set(listed))
    assert set(listed) == known


def test_the_beginning_and_the_decay_rates_are_named():
    config = load_config("base")
    config.train.betas, config.train.embeddings = (0.9, 0.98), "spectral"
    config.train.attention = "matching"
    assert departures(config) == [
        "train.betas (0.9, 0.98) ((0.9, 0.999))",
        "train.embeddings spectral (random)",
        "train.attention matching (random)",
    ]


def test_equal_weights_at_another_place_are_the_same(weights, shards, tmp_path):
    there = save(tmp_path / "copy", shards, 0)
    assert read_weights(str(there)).hash == read_weights(str(weights)).hash
    assert read_weights(str(weights)).step == 1234
    other = save(tmp_path / "other", shards, 1)
    assert read_weights(str(other)).hash != read_weights(str(weights)).hash


@pytest.mark.slow
def test_tables_are_made_of_the_weights_and_say_so(
    weights, autoregressive, shards, tmp_path, capsys
):
    out = tmp_path / "out"
    given = ["--model", str(weights), "--judge", str(autoregressive), "--out", str(out)]
    given += ["--prompts", "20", "--continuations", "2", "--model_precision", "bf16"]
    table5 = ["reproduce", "table5", "table4", "table1", "--baseline", str(autoregressive), *given]
    assert main(table5) == 0
    assert not (out / "models").exists()
    record = json.loads((out / "table5.json").read_text())
    facts, hash_ = record["results"]["facts"], read_weights(str(weights)).hash
    assert record["config"]["model_precision"] == "bf16"
    assert facts["weights"]["hash"] == record["config"]["weights"]["hash"] == hash_
    assert (facts["weights"]["step"], facts["training_tokens"]) == (1234, 1234 * 8 * 16)
    assert facts["held_out"] == str(shards)  # the weights lead to their text: no --data was given
    assert facts["judge_is_baseline"]
    rows = {r["label"]: r["metrics"] for r in record["results"]["rows"]}
    assert len(rows) == 6, "the rows of GPT-Neo show the paper's numbers alone"
    # Features come from the judge, where no others are named.
    assert rows["diffusion, infill"]["mauve"]["value"] >= 0
    for page in ("table5.md", "table5.tex", "table4.html", "table1.md"):
        text = (out / page).read_text().replace("&#x27;", "'")
        assert f"{weights}, step 1,234, hash {hash_[:12]}" in text, page
        assert "t_max 3.5, which is 14 at the paper's embedding width (10)" in text, page
        assert "mask.strategy blend (span)" in text, page
    page = (out / "table5.md").read_text()
    assert f"The autoregressive rows are of {autoregressive}. It is the judge as well" in page
    assert "| mine | paper |" in (out / "table1.md").read_text()
    # A second call samples nothing; the baseline may be left out.
    before = {p: p.stat().st_mtime_ns for p in (out / "samples").iterdir()}
    assert main(["reproduce", "table5", "--baseline", "none", *given]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "samples").iterdir()} == before
    page = (out / "table5.md").read_text()
    assert re.search(r"^\| autoregressive, prefix [^|]*\| - \| - \|", page, re.MULTILINE)
    assert "The autoregressive rows were left out." in page
    # Another model, or none, does not come into the same folder.
    other = save(tmp_path / "other", shards, 1)
    for arguments, whose in (
        (["--model", str(other), "--judge", "none"], f"not of {other} (step 1,234, hash"),
        (["--data", str(shards)], "not of models trained there"),
    ):
        capsys.readouterr()
        assert main(["reproduce", "table8", *arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"holds results of {weights} (step 1,234, hash {hash_[:12]})" in error
        assert whose in error
        assert error.count("\n") == 1
    assert not (out / "table8.json").exists()


def test_weights_do_not_come_among_models_trained_there(weights, shards, tmp_path, capsys):
    main(["reproduce", "table1", "--data", str(shards), "--out", str(tmp_path)])
    assert main(["reproduce", "table1", "--model", str(weights), "--out", str(tmp_path)]) == 2
    assert f"holds results of models trained there, not of {weights}" in capsys.readouterr().err
    (tmp_path / "table1.json").write_text("{")
    assert main(["reproduce", "table1", "--model", str(weights), "--out", str(tmp_path)]) == 2
    assert "table1.json is not a record of ddlm" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_need_no_text(weights, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")
    monkeypatch.setattr("ddlm.reproduce.traces.SEQUENCES", 2)
    monkeypatch.setattr("ddlm.commands.reproduce._trained_on", lambda weights: "")
    arguments = ["reproduce", "figure2", "--model", str(weights), "--out", str(tmp_path)]
    assert main(arguments) == 0
    text = " ".join(re.findall(r">([^<]+)<", (tmp_path / "figure2-x_norm.svg").read_text()))
    assert "200 steps (mine)" in text
    assert "mask.strategy blend" in text


@pytest.mark.slow
def test_figures_are_sampled_as_the_protocol_says_and_say_how(
    shards, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")
    monkeypatch.setattr("ddlm.reproduce.traces.SEQUENCES", 2)
    config = small_config(shards)
    config.sample.solver, config.sample.temperature, config.sample.steps = "sde", 0.8, 30
    config.sample.grid = "karras"
    net = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    folder = save_model(tmp_path / "other", net, config, tokenizer_from=shards)
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--out", str(out), "--model_precision", "fp32"]
    assert main(["reproduce", "figure2", *arguments]) == 0
    how = "200 euler steps on a uniform grid, temperature 1, no early exit"
    assert how in capsys.readouterr().out
    record = json.loads((out / "figure2.json").read_text())
    settings = record["config"]["protocol"]["settings"]
    assert (settings["solver"], settings["temperature"], settings["steps"]) == ("euler", 1.0, 200)
    assert record["results"]["sampling"]["samples"] == 2
    lm = load(folder, precision="fp32")
    made = lm.generate(
        f"{{{lm.length}}}", 2, 200, solver="euler", grid="uniform", temperature=1.0, trace=True
    )
    norms = torch.stack([g.traces[0].x_norm for g in made]).mean((0, 2))
    assert record["results"]["curves"]["1"]["x_norm"] == pytest.approx(norms.tolist(), rel=1e-4)
    text = " ".join(re.findall(r">([^<]+)<", (out / "figure2-x_norm.svg").read_text()))
    assert "200 euler steps" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table3"], "table3 compares 4 trainings, --model gives one: leave --model out"),
        (["table2"], "table2 compares 13 trainings"),
        (["table5", "table6"], "table6 fine-tunes models that were pretrained differently"),
        (["table7"], "`ddlm finetune`"),
        (["table8", "--steps", "5"], "--steps and --budget are for training"),
        (["table8"], "table8 needs a judge and with --model none is trained: --judge PATH"),
        (["table5", "--judge", "none"], "table5 has autoregressive rows"),
        (["table8", "--judge", "none", "--baseline", "none"], "no item named has one"),
        (["table5", "--judge", "none", "--baseline", "no-such"], "it has no plan.json"),
        (["table8", "--judge", "no-such-folder/x/y"], "no judge folder at"),
    ],
)
def test_what_cannot_be_made_of_one_model_is_refused(
    arguments, message, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ddlm.evaluation.protocol.draw", lambda *a: pytest.fail("sampled"))
    assert main(["reproduce", *arguments, "--model", str(weights), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_are_refused(weights, autoregressive, shards, tmp_path, capsys):
    def refusal(*arguments):
        assert main(["reproduce", *map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "--baseline takes it, not --model" in refusal("table4", "--model", autoregressive)
    other = tmp_path / "other"
    other.mkdir()
    Tokenizer.train(["another text"], 280).save(other)
    (other / "plan.json").write_text((autoregressive / "plan.json").read_text())
    given = ("table5", "--model", weights, "--judge", "none", "--baseline", other)
    assert "different tokenizers" in refusal(*given)
    (weights / "config.yaml").rename(weights / "gone")
    try:
        assert "config.yaml" in refusal("table4", "--model", weights)
    finally:
        (weights / "gone").rename(weights / "config.yaml")
    lost = save(tmp_path / "lost", shards, 0)
    config = small_config(shards)
    config.data.path = str(tmp_path / "nowhere")
    net = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    save_model(lost, net, config, tokenizer_from=shards)
    assert "table4 reads held-out text" in refusal("table4", "--model", lost)
