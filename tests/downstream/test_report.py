from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from ddlm.downstream.glue import TASKS
from ddlm.downstream.report import PAPER, best_predictions, table, write_submission
from ddlm.types import ConfigError

SERVER = {
    "CoLA.tsv": (1063, {"0", "1"}),
    "SST-2.tsv": (1821, {"0", "1"}),
    "MRPC.tsv": (1725, {"0", "1"}),
    "STS-B.tsv": (1379, None),
    "QQP.tsv": (390965, {"0", "1"}),
    "MNLI-m.tsv": (9796, {"entailment", "neutral", "contradiction"}),
    "MNLI-mm.tsv": (9847, {"entailment", "neutral", "contradiction"}),
    "QNLI.tsv": (5463, {"entailment", "not_entailment"}),
    "RTE.tsv": (3000, {"entailment", "not_entailment"}),
    "WNLI.tsv": (146, {"0", "1"}),
    "AX.tsv": (1104, {"entailment", "neutral", "contradiction"}),
}
"""What GLUE's server asks of each file: examples and label strings (None: a number from 0 to 5)."""


def summary(
    model: str, task: str, mean: float, deviation: float | None = 0.01, **more: Any
) -> dict[str, Any]:
    metric = TASKS[task.removesuffix("-subset")].metrics[0]
    setting = {"batch": 16, "lr": 1e-4, "time": 5.0, "length": 128, "epochs": 10}
    return {
        "model": model,
        "task": task,
        "is_glue": not task.endswith("-subset"),
        "not_glue": ["train has 9 of GLUE's 99 examples"] if task.endswith("-subset") else [],
        "setting": setting,
        "searched": 48,
        "pruned": True,
        "metrics": {metric: {"mean": mean, "deviation": deviation, "values": [mean] * 5}},
    } | more


def test_table_has_the_papers_layout() -> None:
    text = table(
        [
            summary("ours", "cola", 0.3456),
            summary("ours", "stsb", 0.8),
            summary("ours", "qqp-subset", 0.7),
        ]
    )
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| model"))
    assert head == "| model | CoLA | SST-2 | MRPC | QQP | MNLI | QNLI | RTE | STS-B |"
    assert "| ours | 34.6 ± 1.0 (5) |  |  |  |  |  |  | 80.0 ± 1.0 (5) |" in lines
    assert (
        "| paper: DDLM, span masks | 30.3 | 88.6 | 81.8 | 87.3 | 75.9 | 82.9 | 54.0 |  |" in lines
    )
    assert len([line for line in lines if line.startswith("| paper:")]) == len(PAPER) == 6
    glue, _, rest = text.partition("## Not GLUE scores")
    assert "70.0" not in glue, "a subset never stands in the table of GLUE scores"
    assert "| qqp-subset | ours | 70.0 ± 1.0 (5) | train has 9 of GLUE's 99 examples |" in rest


def test_seeds_that_diverged_are_named_in_the_cell() -> None:
    text = table(
        [
            summary("ours", "cola", 0.3456, diverged=2),
            summary("ours", "rte", 0.5, diverged=0),
            summary("ours", "mrpc", 0.5, diverged=3, metrics={}),
        ]
    )
    row = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert "| 34.6 ± 1.0 (5, 2 diverged) |" in row
    assert "| 50.0 ± 1.0 (5) |" in row
    assert "| undefined (3 diverged) |" in row


def test_submission_is_what_the_server_takes(tmp_path: Path) -> None:
    rte = [float(i % 2) for i in range(3000)]
    stsb = [i / 200 - 1 for i in range(1379)]
    order = list(reversed(range(3000)))
    predictions = {
        "rte": {"test": rte},
        "stsb": {"test": stsb},
        "mnli": {"test_matched": [2.0] * 9796, "test_mismatched": [1.0] * 9847},
    }
    constant = write_submission(tmp_path / "out" / "glue.zip", predictions, {"rte/test": order})
    assert set(constant) == set(SERVER) - {"RTE.tsv", "STS-B.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"}
    with zipfile.ZipFile(tmp_path / "out" / "glue.zip") as archive:
        assert set(archive.namelist()) == set(SERVER), "no folder, no other file"
        files = {name: archive.read(name).decode().splitlines() for name in SERVER}
    for name, (size, labels) in SERVER.items():
        header, *rows = files[name]
        assert header == "index\tprediction"
        index, answers = zip(*(row.split("\t") for row in rows), strict=True)
        assert [int(i) for i in index] == list(range(size)), name
        if labels is None:
            assert all(0 <= float(a) <= 5 for a in answers)
        else:
            assert set(answers) <= labels, name
    # the split stood in reverse order: GLUE's example 0 is its last one, label id 1
    assert files["RTE.tsv"][1] == "0\tnot_entailment"
    assert files["RTE.tsv"][2] == "1\tentailment"
    assert files["MNLI-m.tsv"][1] == "0\tcontradiction"
    assert files["MNLI-mm.tsv"][1] == "0\tneutral"
    assert files["STS-B.tsv"][1] == "0\t0.000", "similarities are clipped to the scale"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["glue.zip"]


@pytest.mark.parametrize(
    "values, message",
    [
        ([0.0] * 145, "WNLI.tsv needs 146 predictions"),
        ([2.0] * 146, "WNLI.tsv: 2 is not a class of 0, 1"),
    ],
)
def test_a_wrong_submission_is_not_written(
    tmp_path: Path, values: list[float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_submission(tmp_path / "glue.zip", {"wnli": {"test": values}}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_best_seed_predicts() -> None:
    records = [
        {"results": {"best": {"accuracy": value}}, "predictions": {"test": [float(seed)]}}
        for seed, value in enumerate([0.4, 0.6, 0.5, None])
    ]
    assert best_predictions(records, TASKS["rte"]) == {"test": [1.0]}
    assert best_predictions([], TASKS["rte"]) == {}


def test_the_table_names_settings_that_are_not_the_defaults() -> None:
    plain = summary("plain", "rte", 0.5)
    setting = {
        "pooling": "pair",
        "segments": False,
        "layer_decay": 0.8,
        "weight_decay": 0.0,
        "precision": "bf16",
    }
    usual = {
        "pooling": "mean",
        "segments": True,
        "layer_decay": 1.0,
        "weight_decay": 0.01,
        "precision": "fp32",
    }
    text = table(
        [
            plain,
            summary("pair", "rte", 0.5, setting=plain["setting"] | setting),
            summary("usual", "rte", 0.5, setting=plain["setting"] | usual),
        ]
    )
    _, _, rest = text.partition("## Settings")
    rows = {line.split(" | ")[1]: line for line in rest.splitlines() if line.startswith("| rte")}
    words = "pooling pair, no segments, layer decay 0.8, weight decay 0, bf16"
    assert f"| 10 | {words} | 48 (median pruning) |" in rows["pair"]
    for name in ("plain", "usual"):  # a summary from before these were settings, and one from after
        assert "| 10 |  | 48 (median pruning) |" in rows[name]
