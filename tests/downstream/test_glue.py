from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ddlm.downstream.glue import TASKS, Split, compute_metrics, find_tasks, read_task
from ddlm.types import ConfigError, DataError


def write(folder: Path, task: str, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / task / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def cola(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"sentence": f"sentence {i}.", "label": x, "idx": i} for i, x in enumerate(labels)]


# ---- metrics, against values computed by hand


def test_metrics_of_a_confusion_table_by_hand() -> None:
    """TP 3, FP 1, FN 1, TN 2."""
    labels = [1, 1, 1, 1, 0, 0, 0]
    predictions = [1, 1, 1, 0, 1, 0, 0]
    matthews = (3 * 2 - 1 * 1) / math.sqrt((3 + 1) * (3 + 1) * (2 + 1) * (2 + 1))
    assert compute_metrics(TASKS["cola"], predictions, labels)["matthews"] == pytest.approx(
        matthews
    )
    both = compute_metrics(TASKS["mrpc"], predictions, labels)
    assert both == pytest.approx({"accuracy": 5 / 7, "f1": 2 * 3 / (2 * 3 + 1 + 1)})
    assert list(both) == ["accuracy", "f1"], "accuracy decides"
    assert compute_metrics(TASKS["rte"], predictions, labels) == pytest.approx({"accuracy": 5 / 7})


def test_correlations_by_hand() -> None:
    found = compute_metrics(TASKS["stsb"], [1.0, 2.0, 9.0], [0.0, 1.0, 2.0])
    # deviations (-3, -2, 5) and (-1, 0, 1): 8 / sqrt(38 * 2)
    pearson = 8 / math.sqrt(38 * 2)
    expected = {"pearson_spearman": (pearson + 1) / 2, "pearson": pearson, "spearman": 1.0}
    assert found == pytest.approx(expected)
    constant = compute_metrics(TASKS["stsb"], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0])
    assert all(map(math.isnan, constant.values())), "undefined, not zero"


def test_one_class_has_no_metric() -> None:
    with pytest.raises(DataError, match="one class only, matthews is not defined"):
        compute_metrics(TASKS["cola"], [1, 0], [1, 1])


# ---- tasks and data


def test_unknown_task_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown task 'cloa': choose one of cola, sst2, .*wnli or all"
    ):
        find_tasks("cloa")
    assert [t.name for t in find_tasks("all")] == list(TASKS)


def test_a_subset_is_not_glue(tmp_path: Path) -> None:
    write(tmp_path, "cola", "train_subset", cola([0, 1, 1]))
    write(tmp_path, "cola", "validation", cola([0, 1]))
    data = read_task(TASKS["cola"], tmp_path)
    assert data.report_name == "cola-subset"
    assert data.differences == [
        "train has 3 of GLUE's 8,551 examples",
        "validation has 2 of GLUE's 1,043 examples",
    ]


def test_without_training_data_validation_is_divided(tmp_path: Path) -> None:
    """By the text: a question that occurs twice never falls on both sides."""
    rows = [
        {"question": f"question {i // 2}?", "sentence": f"{i}.", "label": i % 2} for i in range(200)
    ]
    write(tmp_path, "qnli", "validation", rows)
    data = read_task(TASKS["qnli"], tmp_path)
    train, held_out = data.splits["train"], data.splits["validation"]
    assert len(train) + len(held_out) == 200
    assert 20 <= len(held_out) <= 70
    assert not set(train.texts[0]) & set(held_out.texts[0])
    assert not data.is_glue


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "x", "label": 1}], r":1 lacks the columns sentence of cola: it has text, label"),
        (cola([0, 2]), r":2: label 2 of cola must be a whole number from 0 to 1"),
        (cola([0, -1]), r":2: label -1 of cola"),
        (cola([0, 0.5]), r":2: label 0\.5 of cola"),
        (cola([0, "1"]), r":2: label '1' of cola"),
        (cola([0, None]), r":2: label None of cola"),
        ([{"sentence": 3, "label": 1}], r":1: sentence must be text"),
        ([{"sentence": "a\ud800", "label": 1}], r":1: sentence holds half of a surrogate pair"),
        (cola([0, 10**400]), r":2: label 10+ of cola must be a whole number"),
        (
            cola([1, 1]),
            r"cola validation holds the label 1 only: matthews are not defined on one class",
        ),
        ([], r"cola validation holds no label"),
    ],
)
def test_bad_rows_are_one_line(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write(tmp_path, "cola", "train", cola([0, 1]))
    write(tmp_path, "cola", "validation", rows)
    with pytest.raises(DataError, match=message) as caught:
        read_task(TASKS["cola"], tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_regression_label(tmp_path: Path) -> None:
    write(tmp_path, "stsb", "train", [{"sentence1": "a", "sentence2": "b", "label": 5.5}])
    with pytest.raises(DataError, match=r"label 5\.5 of stsb must be a number from 0 to 5"):
        read_task(TASKS["stsb"], tmp_path)


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        read_task(TASKS["cola"], tmp_path)
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_text('{"sentence": "a", "label": 1}\n{oops\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: not readable as JSON lines"):
        read_task(TASKS["cola"], tmp_path)
    whole = gzip.compress(b'{"sentence": "a", "label": 1}\n' * 1000)
    (tmp_path / "cola" / "train.jsonl").unlink()
    (tmp_path / "cola" / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not readable as JSON lines"):
        read_task(TASKS["cola"], tmp_path)
    # flipped bits in the middle: the decompressor itself stumbles
    altered = bytearray(whole)
    altered[20:40] = b"\xff" * 20
    (tmp_path / "cola" / "train.jsonl.gz").write_bytes(bytes(altered))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz:\d+: not readable as JSON lines"):
        read_task(TASKS["cola"], tmp_path)


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "cola", "train", cola([0, 1]))
    file = tmp_path / "cola" / "validation.jsonl"
    rows = "\n\n".join(json.dumps(row) for row in cola([0, 1]))
    file.write_text(f"\ufeff{rows}\n\n", "utf-8")
    assert read_task(TASKS["cola"], tmp_path).splits["validation"].labels == [0, 1]
    file.write_text(f"{rows}\n\n{json.dumps(cola([2])[0])}\n", "utf-8")
    with pytest.raises(DataError, match=r"validation\.jsonl:5: label 2 of cola"):
        read_task(TASKS["cola"], tmp_path)


def test_equal_data_has_one_hash() -> None:
    one = Split((["a", "b"], ["c", "d"]), [0.0, 1.0], [0, 1])
    assert one.sha256() == Split((["a", "b"], ["c", "d"]), [0.0, 1.0], [1, 0]).sha256()
    others = [
        Split((["a", "b"], ["c", "d"]), [1.0, 1.0], [0, 1]),
        Split((["a", "b"], ["cd", ""]), [0.0, 1.0], [0, 1]),
        Split((["b", "a"], ["d", "c"]), [1.0, 0.0], [0, 1]),
    ]
    assert len({s.sha256() for s in [one, *others]}) == 4


def test_without_a_network_the_folder_is_suggested(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be read from the hub .*--data"):
        read_task(TASKS["wnli"], None)


@pytest.mark.parametrize("name", ["cola", "mrpc", "rte", "stsb", "wnli"])
def test_real_data_is_whole(shared_data: Path, name: str) -> None:
    data = read_task(TASKS[name], shared_data / "glue")
    assert data.is_glue, data.differences
    assert {k: len(v) for k, v in data.splits.items()} == TASKS[name].sizes


@pytest.mark.parametrize("name", ["qqp", "mnli", "qnli"])
def test_real_subsets_are_named_so(shared_data: Path, name: str) -> None:
    assert read_task(TASKS[name], shared_data / "glue").report_name == f"{name}-subset"


def test_a_limit_makes_a_subset(shared_data: Path) -> None:
    data = read_task(TASKS["wnli"], shared_data / "glue", limit=100)
    assert len(data.splits["train"]) == 100
    assert data.report_name == "wnli-subset"
