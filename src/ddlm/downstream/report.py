"""Table 6 in its layout with the paper's numbers beside ours, and the zip that GLUE's server takes."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddlm.downstream.finetune import Setting
from ddlm.downstream.glue import ENTAILMENT, NLI, TASKS, Task
from ddlm.types import ConfigError, DataError

COLUMNS = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte")
MORE = ("stsb", "wnli")

PAPER: dict[str, tuple[float, ...]] = {
    "paper: from scratch": (12.7, 81.5, 75.1, 78.6, 65.1, 63.0, 54.3),
    "paper: DDLM, random masks": (22.0, 84.8, 76.4, 85.0, 71.0, 78.5, 55.4),
    "paper: DDLM, mixed masks": (23.2, 84.9, 79.3, 85.2, 72.4, 64.2, 54.5),
    "paper: DDLM, span masks": (30.3, 88.6, 81.8, 87.3, 75.9, 82.9, 54.0),
    "paper: RoBERTa-base (126.6M)": (63.0, 94.8, 90.6, 86.5, 89.9, 90.8, 77.3),
    "paper: GPT-2 (124.4M)": (46.6, 92.2, 82.8, 87.9, 80.9, 86.7, 66.8),
}
"""DDLM (arXiv 2305.10818), Table 6, GLUE dev, in the order of :data:`COLUMNS`."""

_ROW = {"model", "task", "is_glue", "not_glue", "setting", "searched", "pruned", "metrics"}
_SETTING = {"batch", "lr", "time", "length", "epochs"}  # further ones came later


def read_summaries(out: Path) -> list[dict[str, Any]]:
    """Every ``summary.json`` under ``out``, by model and task.

    Raises:
        DataError: naming one that cannot be read.
    """
    return [read_summary(path) for path in sorted(out.glob("*/*/summary.json"))]


def read_summary(path: Path) -> dict[str, Any]:
    """One ``summary.json``.

    Raises:
        DataError: when it is none.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        known = summary["task"].removesuffix("-subset") in TASKS
        if not known or not summary.keys() >= _ROW or not summary["setting"].keys() >= _SETTING:
            raise KeyError(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path} is not a summary of runs: remove it, the command that made it writes it anew"
        ) from None
    return dict(summary)


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: our rows and the paper's on whole GLUE tasks, then what is no GLUE score, then the settings."""
    whole = [s for s in summaries if s["is_glue"]]
    extra = [t for t in MORE if any(s["task"] == t for s in whole)]
    names = [*COLUMNS, *extra]
    lines = [
        "# GLUE, validation sets",
        "",
        "Metric in percent, the best epoch of each run: Matthews correlation for CoLA, mean of Pearson and Spearman",
        "for STS-B, matched accuracy for MNLI, accuracy elsewhere. Mean ± standard deviation (seeds).",
        "The paper's rows are copied from its Table 6 for comparison; they are not ours.",
        "",
        "| model | " + " | ".join(TASKS[n].title for n in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for model in dict.fromkeys(s["model"] for s in whole):
        cells = {s["task"]: _cell(s, TASKS[s["task"]]) for s in whole if s["model"] == model}
        lines.append(f"| {model} | " + " | ".join(cells.get(n, "") for n in names) + " |")
    for row, values in PAPER.items():
        cells = dict(zip(COLUMNS, (f"{v:.1f}" for v in values), strict=True))
        lines.append(f"| {row} | " + " | ".join(cells.get(n, "") for n in names) + " |")
    subsets = [s for s in summaries if not s["is_glue"]]
    if subsets:
        lines += [
            "",
            "## Not GLUE scores: subsets",
            "",
            "| data | model | result | why |",
            "|---|---|---|---|",
        ]
        for s in sorted(subsets, key=lambda s: (s["task"], s["model"])):
            task = TASKS[s["task"].removesuffix("-subset")]
            lines.append(
                f"| {s['task']} | {s['model']} | {_cell(s, task)} | {'; '.join(s['not_glue'])} |"
            )
    lines += [
        "",
        "## Settings and further metrics",
        "",
        "| data | model | batch | lr | t | length | epochs | other settings | settings tried | further metrics |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        x = s["setting"]
        task = TASKS[s["task"].removesuffix("-subset")]
        more = [
            f"{name} {100 * v['mean']:.1f}"
            for name, v in s["metrics"].items()
            if name != task.metrics[0]
        ]
        tried = f"{s['searched']}{' (median pruning)' if s['pruned'] else ''}"
        at = "" if x["time"] is None else f"{x['time']:g}"
        lines.append(
            f"| {s['task']} | {s['model']} | {x['batch']} | {x['lr']:g} | {at} | {x['length']} | {x['epochs']} "
            f"| {_unusual(x)} | {tried} | {', '.join(more)} |"
        )
    return "\n".join(lines) + "\n"


def _unusual(setting: Mapping[str, Any]) -> str:
    """Settings without a column of their own, where they are not the defaults."""
    usual: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Setting)}
    x = usual | dict(setting)
    words: dict[str, str] = {
        "pooling": f"pooling {x['pooling']}",
        "segments": "segments" if x["segments"] else "no segments",
        "layer_decay": f"layer decay {x['layer_decay']:g}",
        "weight_decay": f"weight decay {x['weight_decay']:g}",
        "precision": x["precision"],
    }
    return ", ".join(text for name, text in words.items() if x[name] != usual[name])


def _cell(summary: Mapping[str, Any], task: Task) -> str:
    found = summary["metrics"].get(task.metrics[0])
    # Seeds without a score are not in the mean: a mean over the lucky ones has to say so.
    lost = summary.get("diverged", 0)
    diverged = f"{lost} diverged" if lost else ""
    if found is None:
        return f"undefined ({diverged})" if diverged else "undefined"
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    count = ", ".join(x for x in (str(len(found["values"])), diverged) if x)
    return f"{100 * found['mean']:.1f}{spread} ({count})"


# File of the server's zip: (task, split, labels, lines).
_FILES: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "CoLA.tsv": ("cola", "test", TASKS["cola"].labels, 1_063),
    "SST-2.tsv": ("sst2", "test", TASKS["sst2"].labels, 1_821),
    "MRPC.tsv": ("mrpc", "test", TASKS["mrpc"].labels, 1_725),
    "STS-B.tsv": ("stsb", "test", (), 1_379),
    "QQP.tsv": ("qqp", "test", TASKS["qqp"].labels, 390_965),
    "MNLI-m.tsv": ("mnli", "test_matched", NLI, 9_796),
    "MNLI-mm.tsv": ("mnli", "test_mismatched", NLI, 9_847),
    "QNLI.tsv": ("qnli", "test", ENTAILMENT, 5_463),
    "RTE.tsv": ("rte", "test", ENTAILMENT, 3_000),
    "WNLI.tsv": ("wnli", "test", TASKS["wnli"].labels, 146),
    "AX.tsv": ("ax", "test", NLI, 1_104),
}


def best_predictions(records: Sequence[Mapping[str, Any]], task: Task) -> dict[str, list[float]]:
    """Test predictions of the run with the best validation metric among ``records``; none: an empty dictionary."""
    key = task.metrics[0]
    best: tuple[float, dict[str, list[float]]] | None = None
    for record in records:
        value = record["results"]["best"].get(key)
        if record.get("predictions") and value is not None and (best is None or value > best[0]):
            best = (value, record["predictions"])
    return {} if best is None else best[1]


def write_submission(
    path: Path,
    predictions: Mapping[str, Mapping[str, Sequence[float]]],
    index: Mapping[str, Sequence[int]],
) -> list[str]:
    """Write the zip for GLUE's server: one ``<Task>.tsv`` for each task, header ``index<TAB>prediction``.

    The server wants every file. A task without predictions gets a constant answer, its first label.

    Args:
        path: Zip to write.
        predictions: Task name -> test split -> class ids or values, in the order of the split.
        index: ``"task/split"`` -> position of each example in GLUE's file.

    Returns:
        Names of the files that hold a constant answer.

    Raises:
        ConfigError: when a split does not have GLUE's size or a class id has no label.
    """
    texts, constant = {}, []
    for file, (task, split, labels, size) in _FILES.items():
        values = predictions.get(task, {}).get(split)
        if values is None:
            constant.append(file)
            values, order = [0.0] * size, list(range(size))
        else:
            order = list(index.get(f"{task}/{split}", range(len(values))))
        if len(values) != size or sorted(order) != list(range(size)):
            raise ConfigError(
                f"{file} needs {size:,} predictions, numbered from 0, {len(values):,} were made"
            )
        rows = sorted(zip(order, values, strict=True))
        texts[file] = "index\tprediction\n" + "".join(
            f"{i}\t{_answer(value, labels, file)}\n" for i, value in rows
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in texts.items():
                archive.writestr(file, text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return constant


def _answer(value: float, labels: Sequence[str], file: str) -> str:
    if not labels:
        return f"{min(max(value, 0.0), 5.0):.3f}"  # the similarity of STS-B runs from 0 to 5
    if value != int(value) or not 0 <= value < len(labels):
        raise ConfigError(f"{file}: {value:g} is not a class of {', '.join(labels)}")
    return labels[int(value)]
