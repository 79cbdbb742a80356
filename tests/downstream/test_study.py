"""What a folder of results keeps apart, what is made again and what is not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ddlm.downstream.search as search
from ddlm.cli import main
from ddlm.downstream.finetune import Outcome
from ddlm.downstream.glue import TASKS
from ddlm.downstream.models import Source, find_source
from ddlm.downstream.search import Grid, Study
from ddlm.types import ConfigError
from downstream.test_finetune import SETTING, made_up, split
from downstream.tiny import write_tiny_model

GRID = Grid(batch=[16], lr=[3e-3], time=[1], base=dataclasses.replace(SETTING, epochs=1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return find_source(str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture
def study(source: Source, tmp_path: Path) -> Study:
    return Study(source, made_up("mrpc", 32), tmp_path / "out" / "tiny" / "mrpc-subset", "cpu")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the runs that are made."""
    real, made = search.finetune, []

    def counted(source: Any, data: Any, setting: Any, **options: Any) -> Any:
        made.append(setting.seed)
        return real(source, data, setting, **options)

    monkeypatch.setattr(search, "finetune", counted)
    return made


def records(study: Study) -> dict[str, dict[str, Any]]:
    return {p.stem[-1]: json.loads(p.read_text()) for p in (study.folder / "final").iterdir()}


# ---- one model, one data set, one choice of what the search does not vary


def write_wnli(folder: Path, test: str = "test", tests: int = 146) -> Path:
    """WNLI's sizes, made-up sentences."""
    (folder / "wnli").mkdir(parents=True)
    for seed, (name, count) in enumerate([("train", 635), ("validation", 71), (test, tests)]):
        part = split(count + 1, seed, "wnli")
        with gzip.open(folder / "wnli" / f"{name}.jsonl.gz", "wt") as file:
            for a, b, y in list(zip(*part.texts, part.labels, strict=True))[:count]:
                row = {"sentence1": a, "sentence2": b, "label": int(y)}
                file.write(json.dumps(row) + "\n")
    return folder


def test_a_submission_is_of_this_calls_model_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_wnli(tmp_path / "data")
    fast = ["--lr", 1e-3, "--t", 1, "--seeds", 1, "--epochs", 1, "--length", 32, "--device", "cpu"]
    options = ["--task", "wnli", "--data", data, "--out", tmp_path / "out", "--name", "m", *fast]

    def run(*more: Any) -> int:
        return main([str(x) for x in ["finetune", *options, *more]])

    first = tmp_path / "out/m/wnli/final/batch64-lr0.001-t1-seed1.json"
    assert run("--model", model, "--batch", 64, "--submit", tmp_path / "a.zip") == 0
    record = json.loads(first.read_text())
    record["results"]["best"]["accuracy"] = 1.0  # ahead of whatever the other setting reaches
    record["predictions"]["test"] = [0.0, 1.0] * 73
    first.write_text(json.dumps(record))
    assert run("--model", model, "--batch", 128, "--submit", tmp_path / "b.zip") == 0
    second = json.loads(first.with_name("batch128-lr0.001-t1-seed1.json").read_text())
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        rows = archive.read("WNLI.tsv").decode().splitlines()[1:]
    assert [float(row.split("\t")[1]) for row in rows] == second["predictions"]["test"]

    capsys.readouterr()
    other = ["--model", "scratch", "--config", model, "--batch", 256]
    assert run(*other, "--submit", tmp_path / "c.zip") == 2
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "c.zip").exists()
    # one name is one model in the table, whatever the task
    (tmp_path / "data" / "wnli").rename(tmp_path / "data" / "rte")
    assert run(*other, "--task", "rte") == 2
    assert "results of another model (wnli): choose another --name" in capsys.readouterr().err


def test_a_short_test_split_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    data = write_wnli(tmp_path / "data", "test_subset", 10)
    command = ["finetune", "--task", "wnli", "--model", model, "--data", data, "--batch", 64]
    fast = ["--lr", 1e-3, "--t", 1, "--seeds", 1, "--epochs", 1, "--device", "cpu"]
    places = ["--out", tmp_path / "out", "--submit", tmp_path / "a.zip"]
    assert main([str(x) for x in [*command, *fast, *places]]) == 2
    assert "GLUE's 146 examples of wnli test, 10 were found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_model_data_or_protocol_is_refused(
    study: Study, tmp_path: Path
) -> None:
    def run(one: Study, grid: Grid) -> None:
        one.run(grid, 1, prune=True, predict_test=False, save=None)

    run(study, GRID)
    # no record of these has the name of one that is there
    elsewhere = dataclasses.replace(GRID, lr=[1e-3])
    other = find_source("scratch", config=str(write_tiny_model(tmp_path / "other")), name="tiny")
    with pytest.raises(ConfigError, match="is of another model: choose another --name or --out"):
        run(dataclasses.replace(study, source=other), elsewhere)
    with pytest.raises(ConfigError, match="made with other settings or data"):
        run(Study(study.source, made_up("mrpc", 40), study.folder, "cpu"), elsewhere)
    longer = dataclasses.replace(elsewhere, base=dataclasses.replace(GRID.base, epochs=2))
    with pytest.raises(ConfigError, match="made with other settings or data"):
        run(study, longer)
    run(study, elsewhere)  # the search may grow
    for path in (study.folder / "final").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"summary\.json is of another model"):
        run(dataclasses.replace(study, source=other), elsewhere)


def test_a_record_of_the_former_fingerprint_is_not_made_again(
    study: Study, runs: list[int], tmp_path: Path
) -> None:
    def run(one: Study) -> None:
        one.run(GRID, 1, prune=True, predict_test=False, save=tmp_path / "saved")

    run(study)
    newer = dataclasses.replace(study.source, fingerprint="new", former=study.source.fingerprint)
    run(dataclasses.replace(study, source=newer))
    assert runs == [1]
    with pytest.raises(ConfigError, match="is of another model"):
        run(dataclasses.replace(study, source=dataclasses.replace(newer, former=None)))


def test_the_summary_counts_the_seeds_that_diverged(study: Study) -> None:
    results = [
        {"best": {"accuracy": value}, "diverged": value is None, "seconds": 1.0}
        for value in (0.5, None, 0.7)
    ]
    finals = [{"results": r} for r in results]
    summary = study._summary(GRID.base, finals, searched=1, prune=False)
    assert (summary["seeds"], summary["diverged"]) == (3, 1)
    assert summary["metrics"]["accuracy"]["values"] == [0.5, 0.7]


# ---- what is made again


def test_a_folder_of_other_files_is_refused_before_training(
    study: Study, runs: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "saved/tiny/mrpc-subset/batch16-lr0.003-t1-seed1"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else than a model"):
        study.run(GRID, 2, prune=True, predict_test=False, save=tmp_path / "saved")
    assert runs == []
    assert (folder / "thesis.txt").read_text() == "mine"


def test_saved_models_are_made_once(study: Study, runs: list[int], tmp_path: Path) -> None:
    def run() -> None:
        study.run(GRID, 2, prune=True, predict_test=False, save=tmp_path / "saved")

    run()
    assert runs == [1, 2]
    before = records(study)
    run()
    assert runs == [1, 2], "nothing lacks"
    assert records(study) == before
    folder = tmp_path / "saved/tiny/mrpc-subset/batch16-lr0.003-t1-seed2"
    (folder / "model.safetensors").unlink()
    run()
    assert runs == [1, 2, 2], "the one without its model"
    assert (folder / "model.safetensors").is_file()
    # the models of another model or setting are not overwritten
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["fingerprint"] = "of another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="choose another --save"):
        run()


def test_a_model_comes_whole_and_before_its_record(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study.source.encoder, "save", full)
    with pytest.raises(OSError, match="No space left"):
        study.run(GRID, 1, prune=True, predict_test=False, save=tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.safetensors"))
    assert not study.folder.exists(), "no record without its model"


def test_predictions_are_of_one_more_run_at_most(
    study: Study, runs: list[int], tmp_path: Path
) -> None:
    def run(predict_test: bool, save: Path | None = None) -> None:
        study.run(GRID, 3, prune=True, predict_test=predict_test, save=save)

    run(False)
    before = records(study)
    best = max(before, key=lambda s: before[s]["results"]["best"]["accuracy"])
    run(True)
    assert runs == [1, 2, 3, int(best)]
    after = records(study)
    assert {s for s in after if after[s]["predictions"]} == {best}
    assert {s for s in after if after[s] != before[s]} == {best}
    run(True)
    assert len(runs) == 4
    run(False, tmp_path / "saved")
    assert records(study)[best]["predictions"] == after[best]["predictions"], "kept"


def test_finals_are_the_records_of_the_call(study: Study) -> None:
    for lr in (3e-3, 1e-3):
        study.run(dataclasses.replace(GRID, lr=[lr]), 1, prune=True, predict_test=True, save=None)
        assert [r["config"]["lr"] for r in study.finals] == [lr]
    assert TASKS["mrpc"].test_splits == tuple(study.finals[0]["predictions"])


def test_a_value_given_twice_is_tried_once(study: Study, runs: list[int]) -> None:
    doubled = dataclasses.replace(GRID, batch=[16, 16], lr=[3e-3, 0.003], time=[1, 1.0])
    assert doubled.settings(True) == GRID.settings(True)
    assert len(dataclasses.replace(doubled, batch=[8, 16, 8]).settings(True)) == 2
    summary = study.run(doubled, 1, prune=True, predict_test=False, save=None)
    assert (summary["searched"], summary["pruned"]) == (1, False)
    assert runs == [1], "one setting needs no search"


def test_a_run_that_another_search_stopped_is_made_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are those of its rate; it is stopped where the rule says so after the first of two epochs."""
    made: list[float] = []

    def scored(
        source: Any, data: Any, setting: Any, *, stop: Any = None, **options: Any
    ) -> Outcome:
        made.append(setting.lr)
        history = [{"accuracy": setting.lr, "epoch": i} for i in (1, 2)]
        pruned = stop is not None and stop(1, setting.lr)
        kept = history[:1] if pruned else history
        return Outcome(history=kept, best=kept[-1], pruned=pruned)

    monkeypatch.setattr(search, "finetune", scored)
    base = dataclasses.replace(SETTING, epochs=2)

    def best(*rates: float) -> float:
        made.clear()
        grid = Grid(batch=[16], lr=rates, time=[1], base=base)
        summary = study.run(grid, 1, prune=True, predict_test=False, save=None)
        return float(summary["setting"]["lr"])

    assert best(0.5, 0.6, 0.7, 0.2, 0.1) == 0.7
    assert len(made) == 6
    best(0.5, 0.6, 0.7, 0.2, 0.1)
    assert made == [], "the same search goes on"
    assert best(0.2, 0.1) == 0.2
    assert made == [0.2, 0.1, 0.2], "both whole, and the final seed"
