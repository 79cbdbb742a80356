"""What is refused before anything is trained or written."""

import json
from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.downstream.glue import TASKS
from ddlm.evaluation.protocol import Protocol
from ddlm.reproduce.items import reproduce_item
from ddlm.reproduce.recipes import find
from ddlm.reproduce.workshop import Workshop


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
    ],
)
def test_trainings_of_no_length_are_refused_and_leave_nothing(
    options, message, shards, tmp_path, capsys
):
    out = tmp_path / "out"
    assert message in refused(capsys, "table8", "--data", shards, "--out", out, *options)
    assert not out.exists()


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
    shop = Workshop("tiny", tmp_path, str(shards), str(shards), Protocol(), quiet=True)
    written = reproduce_item(find("table7"), shop, {"data": None, "hub": False})
    assert written == [
        "glue/table.md", "table7-tmax10-uniform-random.zip", "table7-tmax10-uniform-span.zip",
    ]  # fmt: skip
    assert [Path(o["submit"]).name for o in submitted] == written[1:]
