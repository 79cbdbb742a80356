"""``ddlm finetune`` from the shell's side."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.integrations.transformers import DDLMForSequenceClassification
from downstream.test_finetune import split
from downstream.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "rte").mkdir()
    for seed, (name, count) in enumerate([("train", 32), ("validation", 20)]):
        part = split(count, seed, "rte")
        with gzip.open(folder / "rte" / f"{name}.jsonl.gz", "wt") as file:
            for a, b, y in zip(*part.texts, part.labels, strict=True):
                file.write(json.dumps({"sentence1": a, "sentence2": b, "label": int(y)}) + "\n")
    return folder


def run(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def test_one_setting_two_seeds(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--batch", 16, "--lr", 1e-3, "--t", 5, "--seeds", 2, "--epochs", 2, "--device", "cpu"]
    options = ["--task", "rte", "--data", data, "--out", tmp_path / "out", *fixed]
    assert run("--model", model, *options, "--save", tmp_path / "saved") == 0
    printed = capsys.readouterr().out
    assert "## Not GLUE scores: subsets" in printed
    record = json.loads(
        (tmp_path / "out/tiny/rte-subset/final/batch16-lr0.001-t5-seed2.json").read_text()
    )
    assert record["kind"] == "finetune"
    assert record["config"]["time"] == 5
    assert {"command", "commit", "versions", "hardware", "date", "fingerprint"} <= set(record)
    assert not (tmp_path / "out/tiny/rte-subset/search").exists(), "one setting needs no search"
    saved = tmp_path / "saved/tiny/rte-subset/batch16-lr0.001-t5-seed1"
    assert {"model.safetensors", "tokenizer.json", "modeling_ddlm.py"} <= {
        p.name for p in saved.iterdir()
    }
    tuned = DDLMForSequenceClassification.from_pretrained(saved)
    assert tuned.config.time == 5
    assert tuned.config.auto_map["AutoModelForSequenceClassification"].startswith("modeling_ddlm.")

    assert run("--model", "scratch", "--config", model, *options) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| rte-subset | tiny |" in table
    assert "| rte-subset | tiny-scratch |" in table
    assert "paper: DDLM, span masks" in table


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ddlm.downstream.search.Study.run", lambda *a, **k: pytest.fail("trained"))
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_text("mine")
    out.mkdir()
    (out / "tiny").write_text("mine")
    for options, message in (
        (["--out", file], f"--out {file}: {file} is no folder: name another"),
        (["--out", file / "a"], f"--out {file}/a: {file} is no folder: name another"),
        (["--out", out], f"--out {out}/tiny: {out}/tiny is no folder: name another"),
        # nobody may write there, root included
        (["--out", "/proc/a/b"], "--out /proc/a/b: nothing can be written in /proc ("),
        (["--out", tmp_path / "new", "--save", file], f"--save {file}: {file} is no folder"),
    ):
        assert run("--model", model, "--task", "rte", "--data", data, "--lr", "1e-3", *options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert file.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "rt"], "unknown task 'rt': choose one of cola"),
        (["--task", "rte", "--t", "11"], "--t 11 was given, 1 to 10 is needed"),
        (["--task", "rte", "--lr", "0"], "--lr 0 was given, a positive number is needed"),
        (["--task", "rte", "--seeds", "0"], "--seeds 0 was given, at least 1 is needed"),
        (["--task", "rte", "--submit", "x.zip"], "rte is a subset"),
        (["--task", "cola"], "cola is not there"),
        (["--task", "rte", "--model", "nowhere/at/all"], "neither a DDLM folder nor a model"),
        (["--task", "rte", "--weight_decay", "-1"], "--weight_decay -1 was given, 0 or more"),
        (["--task", "rte", "--layer_decay", "-0.5"], "--layer_decay -0.5 was given, a factor"),
        (["--task", "rte", "--layer_decay", "0"], "--layer_decay 0 was given, a factor above 0"),
        (["--task", "rte", "--tokenizer", "/nonexistent"], "--tokenizer is for --model scratch"),
        (["--task", "rte", "--config", "tiny"], "--config is for --model scratch"),
        (["--task", "rte", "--name", "a/b"], "--name 'a/b' cannot be used"),
        (["--task", "rte", "--name", ".."], "--name '..' cannot be used"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    model_option = [] if "--model" in arguments else ["--model", model]
    assert run(*arguments, *model_option, "--data", data) == 2
    stderr = capsys.readouterr().err.strip()
    assert message in stderr
    assert "\n" not in stderr


def test_a_zip_that_cannot_be_written_is_refused_before_training(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ddlm.downstream.search.Study.run", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr("ddlm.commands.finetune._check_submittable", lambda loaded: None)
    file = tmp_path / "file"
    file.write_text("mine")
    options = ["--task", "rte", "--model", model, "--data", data, "--out", tmp_path / "out"]
    for place, message in (
        (tmp_path, f"--submit {tmp_path} is a folder, the zip is a file: name one in it"),
        (file / "a.zip", f"--submit {file}: {file} is no folder: name another"),
    ):
        assert run(*options, "--submit", place) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "nothing"}', '{"task": "rte"}'])
def test_a_broken_summary_is_found_before_training(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    broken = tmp_path / "out" / "other" / "rte-subset" / "summary.json"
    broken.parent.mkdir(parents=True)
    broken.write_text(text)
    fast = ["--batch", 16, "--lr", 1e-3, "--t", 1, "--seeds", 1, "--epochs", 1, "--device", "cpu"]
    options = ["--task", "rte", "--model", model, "--data", data, "--out", tmp_path / "out"]
    assert run(*options, *fast) == 2
    assert f"{broken} is not a summary of runs: remove it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tiny").exists()


def test_help_says_what_is_for_a_ddlm_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert capsys.readouterr().out.count("DDLM only") == 2


def test_ctrl_c_says_what_goes_on(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted in its second run: the record of the first is kept and the same command takes it up."""
    import ddlm.downstream.search as search

    real, calls = search.finetune, []

    def second_is_interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "finetune", second_is_interrupted)
    options = [
        "--batch",
        16,
        "--lr",
        1e-3,
        "--t",
        1,
        "--seeds",
        2,
        "--epochs",
        1,
        "--device",
        "cpu",
    ]
    command = [
        "--task",
        "rte",
        "--model",
        model,
        "--data",
        data,
        "--out",
        tmp_path / "out",
        *options,
    ]
    assert run(*command) == 130
    assert "finished runs are kept" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").rglob("*.json")] == ["batch16-lr0.001-t1-seed1.json"]
    assert run(*command) == 0
    assert len(calls) == 3, "the first run was not made again"


def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train with its own share of a batch that is a multiple of the one recorded."""
    there = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert run("--model", "nowhere", "--task", "rte", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 processes were started and each would fine-tune into" in line
    assert not (tmp_path / "out").exists()
