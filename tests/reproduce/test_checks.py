"""What is refused before anything is trained or written."""

import importlib.util
import inspect
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ddlm.cli import main
from ddlm.commands.finetune import finetune
from ddlm.config import load_config
from ddlm.data.prepare import prepare
from ddlm.data.shards import TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.downstream.glue import TASKS
from ddlm.evaluation.baseline import make_plan
from ddlm.evaluation.hub import DEFAULT_FEATURES
from ddlm.evaluation.judges import TRAINED_HASHES
from ddlm.evaluation.protocol import Protocol
from ddlm.evaluation.samples import Sample
from ddlm.files import write_tensors
from ddlm.reproduce.items import reproduce_item
from ddlm.reproduce.recipes import find
from ddlm.reproduce.workshop import Workshop
from evaluation.small import save_gpt2


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(Workshop, "train", lambda *a: pytest.fail("trained"))


def refused(capsys, *arguments):
    assert main(["reproduce", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0 was given, at least 1 is needed"),
        (["--steps", "-3"], "--steps -3 was given"),
        (["--budget", "0"], "--budget 0 was given, more than 0 seconds are needed"),
        (["--budget", "-5"], "--budget -5 was given"),
        (["--budget", "60", "--steps", "5"], "--steps and --budget exclude each other"),
    ],
)
def test_trainings_of_no_length_are_refused_and_leave_nothing(
    options, message, shards, tmp_path, capsys
):
    out = tmp_path / "out"
    assert message in refused(capsys, "table8", "--data", shards, "--out", out, *options)
    assert not out.exists()


@pytest.mark.parametrize("item", ["figure2", "figure3"])
def test_curves_that_could_not_be_drawn_are_refused_before_the_training(
    item, shards, tmp_path, capsys, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *a: None if name == "matplotlib" else found(name, *a),
    )
    out = tmp_path / "out"
    error = refused(capsys, item, "table8", "--data", shards, "--out", out, "--steps", "2")
    assert f"{item} draws curves and matplotlib is missing: pip install 'ddlm[plots]'" in error
    assert not out.exists()


@pytest.mark.parametrize("option", ["--prompts", "--continuations"])
def test_numbers_of_samples_that_no_item_takes_are_refused(option, shards, tmp_path, capsys):
    out = tmp_path / "out"
    error = refused(capsys, "figure2", "table1", "--data", shards, "--out", out, option, "5")
    assert f"{option} is for items that read held-out text, figure2 does not" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ([], (8, 1)),
        (["--prompts", "3"], (3, 1)),
        (["--prompts", "2", "--continuations", "3"], (2, 3)),
    ],
)
def test_table_4_shows_as_many_samples_as_were_asked_for(
    options, counts, shards, tmp_path, monkeypatch
):
    tokenizer, asked = TokenShards(shards).tokenizer, []

    def drawn(protocol, task, generator, tokenizer, windows, *rest):
        asked.append((protocol.prompts, protocol.continuations, len(windows.tokens)))
        return [Sample(text="a", tokens=[1, 2], is_noised=[False, True])]

    monkeypatch.setattr(Workshop, "train", lambda *a: None)
    monkeypatch.setattr(
        "ddlm.commands.evaluate.load_generator", lambda *a: (None, tokenizer, 16, None)
    )
    monkeypatch.setattr("ddlm.evaluation.protocol.draw", drawn)
    out = tmp_path / "out"
    given = ["table4", "--data", str(shards), "--out", str(out), "--steps", "2", *options]
    assert main(["reproduce", *given]) == 0
    assert asked == [(*counts, counts[0])]
    assert (out / "table4.html").is_file()
    record = json.loads((out / "table4.json").read_text())
    assert (record["seed"], record["config"]["protocol"]["prompts"]) == (0, counts[0])


def glue_folder(folder, tests=True):
    """The first examples of every task, as a folder of GLUE."""
    for task in TASKS.values():
        (folder / task.name).mkdir(parents=True)
        for split in task.sizes:
            if split in task.test_splits and not tests:
                continue
            rows = [
                dict.fromkeys(task.columns, f"text {i}") | {"label": i % 2, "idx": i}
                for i in range(4)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task.name / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize("item", ["table6", "table7"])
def test_glue_that_is_not_there_is_refused_before_the_training(item, shards, tmp_path, capsys):
    given = (item, "--data", shards, "--steps", "2", "--out", tmp_path / "out")
    error = refused(capsys, *given, "--glue_data", "/nonexistent")
    assert f"{item}: /nonexistent/cola is not there: --glue_data needs a folder" in error
    assert not (tmp_path / "out").exists()


def test_subsets_cannot_be_submitted_but_fine_tuned_on(shards, tmp_path, capsys, monkeypatch):
    glue = glue_folder(tmp_path / "glue")
    given = ("--data", shards, "--steps", "2", "--out", tmp_path / "out", "--glue_data", glue)
    error = refused(capsys, "table7", *given)
    assert "table7 writes predictions for GLUE's server" in error
    assert "cola in" in error
    assert "train has 4 of GLUE's 8,551 examples" in error
    assert not (tmp_path / "out").exists()
    began = []
    monkeypatch.setattr(
        "ddlm.reproduce.items.reproduce_item",
        lambda recipe, *a: began.append(recipe.name) or ["glue/table.md"],
    )
    assert main(["reproduce", "table6", *map(str, given)]) == 0
    assert began == ["table6"]


def test_the_archives_of_table_7_are_among_what_is_written(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Workshop, "train", lambda *a: None)
    submitted = []
    monkeypatch.setattr("ddlm.commands.finetune.finetune", lambda **o: submitted.append(o))
    shop = Workshop(
        "tiny", tmp_path, str(shards), str(shards), Protocol(), quiet=True, model_precision="fp32"
    )
    finished(shop, "table7")
    written = reproduce_item(find("table7"), shop, {"data": None, "hub": False})
    assert [o["precision"] for o in submitted] == ["fp32", "fp32"]
    archives = ["table7-tmax10-uniform-random.zip", "table7-tmax10-uniform-span.zip"]
    assert written == ["glue/table.md", *archives, "table7.md", "table7.tex", "table7.json"]
    assert [Path(o["submit"]).name for o in submitted] == archives
    page = (tmp_path / "table7.md").read_text()
    dashes, paper = " | ".join("-" * 7), "10.9 | 85.3 | 81.2/69.9 | 65.4/87.1 | 73.3/71.1 | 79.7"
    assert f"| random masking | {dashes} | {paper} | 50.8 |" in page
    assert f"GLUE's server, which takes {', '.join(archives)}." in page
    assert "81.2/74.8" in (tmp_path / "table7.tex").read_text()
    assert json.loads((tmp_path / "table7.json").read_text())["results"]["rows"] == []


def finished(shop, item):
    """What a training leaves for the tables."""
    for train in find(item).trainings():
        folder = shop.training_folder("model", train)
        folder.mkdir(parents=True)
        (folder / "finished.json").write_text('{"steps": 6, "tokens": 768}')


def test_table_6_has_our_scores_beside_the_papers(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Workshop, "train", lambda *a: None)

    def fine_tuned(*, name, out, **options):
        for task, metric, is_glue in (
            ("cola", "matthews", True),
            ("qqp-subset", "accuracy", False),
        ):
            (out / name / task).mkdir(parents=True)
            score = {"mean": 0.2, "deviation": 0.1, "values": [0.1, 0.2, 0.3]}
            setting = {"batch": 16, "lr": 1e-4, "time": 5.0, "length": 128, "epochs": 10}
            summary = {
                "model": name, "task": task, "is_glue": is_glue, "not_glue": [], "setting": setting,
                "searched": 1, "pruned": False, "seeds": 4, "diverged": 1, "metrics": {metric: score},
            }  # fmt: skip
            (out / name / task / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr("ddlm.commands.finetune.finetune", fine_tuned)
    shop = Workshop("tiny", tmp_path, str(shards), str(shards), Protocol(), quiet=True)
    finished(shop, "table6")
    written = reproduce_item(find("table6"), shop, {"data": None, "hub": False})
    assert written == ["glue/table.md", "table6.md", "table6.tex", "table6.json"]
    page = (tmp_path / "table6.md").read_text()
    empty, paper = " | ".join("-" * 6), "30.3 | 88.6 | 81.8 | 87.3 | 75.9 | 82.9 | 54 |"
    # t(2) = 4.303, deviation 10: 24.84
    assert f"| span masking | 20.00 ±24.84 | {empty} | {paper}" in page
    assert "| from scratch | 20.00 ±24.84 |" in page
    assert f"| RoBERTa-base | - | {empty} | 63 | 94.8 |" in page
    assert "span masking on cola: 1 of 4" in page
    assert "Sanity rows" not in page
    record = json.loads((tmp_path / "table6.json").read_text())["results"]
    assert [r["label"] for r in record["rows"]] == [
        "from scratch", "random masking", "mixed masking", "span masking",
    ]  # fmt: skip
    assert record["paper"]["GPT-2"][-1] == 66.8
    assert "66.8" in (tmp_path / "table6.tex").read_text()


@pytest.mark.parametrize("item", ["table6", "table7"])
def test_the_tables_of_glue_say_where_their_inputs_are_not_the_papers(item):
    length = inspect.signature(finetune).parameters["length"].default
    assert f"Inputs are cut to {length} tokens, the paper's to 64." in find(item).notes


# ---- what is named beside a training


def baseline_in(folder, shards, length=64, weights=True):
    """What a baseline's checks read, without a training."""
    config = load_config("tiny")
    config.model.length = length
    data = TokenShards(shards)
    data.tokenizer.save(folder)
    plan = asdict(make_plan(config, data, "gpt-neox", None))
    (folder / "plan.json").write_text(json.dumps(plan))
    if weights:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_judges_that_are_not_there_are_refused_before_the_training(shards, tmp_path, capsys):
    given = ("table8", "--data", shards, "--steps", "2", "--out", tmp_path / "out")
    error = refused(capsys, *given, "--judge", "/nonexistent/judge")
    assert "no judge folder at /nonexistent/judge" in error
    error = refused(capsys, *given, "--judge", "none", "--features", "/nonexistent/features")
    assert "no feature model folder at /nonexistent/features" in error
    judge, other = save_gpt2(tmp_path / "judge"), save_gpt2(tmp_path / "other")
    capsys.readouterr()  # the bars of saving
    (judge / "tokenizer.json").write_text("{")
    error = refused(capsys, *given, "--judge", "none", "--features", judge)
    assert f"the feature model {judge} cannot be loaded" in error
    (other / "model.safetensors").unlink()
    assert f"the judge {other} has no weights" in refused(capsys, *given, "--judge", other)
    assert not (tmp_path / "out").exists()


def test_text_that_cannot_be_read_is_refused_before_the_training(shards, tmp_path, capsys):
    given = ("table4", "--data", shards, "--steps", "2", "--out", tmp_path / "out")
    assert "/nonexistent/text" in refused(capsys, *given, "--held_out", "/nonexistent/text")
    (tmp_path / "short.txt").write_text("a river")
    error = refused(capsys, *given, "--held_out", tmp_path / "short.txt")
    assert "has 0 windows of 64 tokens" in error
    rows = [json.dumps({"text": f"other words {i} here"}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    options = {"vocab_size": 270, "val_fraction": 0.5, "processes": 1}
    prepare(str(tmp_path / "text.jsonl"), tmp_path / "other", **options)
    error = refused(capsys, *given, "--held_out", tmp_path / "other")
    assert "was prepared with another tokenizer" in error
    assert not (tmp_path / "out").exists()


def test_a_baseline_that_does_not_fit_is_refused_before_the_training(shards, tmp_path, capsys):
    given = ("table5", "--data", shards, "--steps", "2", "--out", tmp_path / "out")
    given += ("--judge", "none", "--baseline")
    other = baseline_in(tmp_path / "other", shards)
    Tokenizer.train(["another text"], 280).save(other)
    error = refused(capsys, *given, other)
    assert f"{other} and {shards} have different tokenizers" in error
    short = baseline_in(tmp_path / "short", shards, length=32)
    assert "writes 32 tokens, the diffusion model 64" in refused(capsys, *given, short)
    begun = baseline_in(tmp_path / "begun", shards, weights=False)
    assert f"the baseline {begun} has no weights" in refused(capsys, *given, begun)
    seen = baseline_in(tmp_path / "seen", shards)
    hashes = TokenShards(shards).document_hashes("val").astype("<u8").view("<i8")
    write_tensors(seen / TRAINED_HASHES, {"hashes": torch.from_numpy(hashes)})
    assert f"are training data of the model {seen}" in refused(capsys, *given, seen)
    assert not (tmp_path / "out").exists()


def test_a_judge_is_trained_only_where_none_is_named(tmp_path):
    def shop(scale="tiny", **named):
        return Workshop(scale, tmp_path, "data", "data", Protocol(), **named)

    own = str(tmp_path / "models" / "judge")
    recipe, judge = find("table8"), ("judge", None)
    assert shop().judge_names() == (own, own)
    assert judge in shop().wanted(recipe)
    assert shop(judge="smollm2").judge_names() == ("smollm2", "smollm2")
    assert judge not in shop(judge="smollm2").wanted(recipe)
    assert shop(judge="none").judge_names() == ("none", "none")
    assert judge not in shop(judge="none").wanted(recipe)
    assert shop(features="smollm2").judge_names() == (own, "smollm2")
    assert judge in shop(features="smollm2").wanted(recipe)
    assert shop("base", judge="smollm2").judge_names() == ("smollm2", DEFAULT_FEATURES)
