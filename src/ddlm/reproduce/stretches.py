"""Real text on the stretches that a record's rows count: for records without a row of real text for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation import diversity
from ddlm.evaluation.measure import Row, Units, measure_row
from ddlm.evaluation.protocol import (
    REAL,
    held_out,
    is_noised,
    make_sample,
    real_continuations,
    task_name,
)
from ddlm.evaluation.report import COLUMNS
from ddlm.record import make_record

KIND = "real-text"
"""Of the records that :func:`measure_real` makes."""

WHOLE = "unconditional"
_SHOWN = ("dist_1", "dist_2", "dist_3", "self_bleu", "token_entropy", "zipf")
_HEADS = {c.key: c.head for c in COLUMNS}


def measure_real(model: str | Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Diversity of the windows that an evaluation's prompts came from: whole, and where each of its tasks writes.

    Args:
        model: Folder with the tokenizer.
        evaluation: Record of the evaluation.

    Raises:
        DataError: when the held-out text is not there.
    """
    protocol, facts = evaluation["config"]["protocol"], evaluation["results"]["facts"]
    tokenizer, length = Tokenizer.load(model), int(protocol["length"])
    windows = held_out(facts["held_out"], tokenizer, length, int(facts["prompts"]))
    every = is_noised(WHOLE, length).tolist()
    whole = [make_sample(tokenizer, ids, every, None) for ids in windows.tokens.tolist()]
    rows: list[Row] = [measure_row(REAL, WHOLE, whole, units=Units("own tokens"))]
    groups = diversity.consecutive(len(windows.tokens), int(protocol["continuations"]))
    for task in protocol["tasks"]:
        if task != WHOLE:
            samples = real_continuations(task, windows, tokenizer)
            rows.append(
                measure_row(
                    REAL,
                    task_name(task, length),
                    samples,
                    units=Units("own tokens"),
                    groups=groups,
                )
            )
    return make_record(KIND, {"model": str(model), **_key(evaluation)}, {"rows": rows})


def _key(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal for the same windows in the same groups."""
    protocol, facts = evaluation["config"]["protocol"], evaluation["results"]["facts"]
    return {
        "held_out": facts.get("held_out"),
        "prompts": facts.get("prompts"),
        "length": protocol.get("length"),
        "continuations": protocol.get("continuations"),
    }


def stretch_note(evaluation: Mapping[str, Any], reals: Sequence[Mapping[str, Any]]) -> str | None:
    """How the row of real text differs from those of continuations, and the figures that do compare.

    Args:
        evaluation: Record of an evaluation.
        reals: Records of :func:`measure_real`.

    Returns:
        Some sentences; None where there is nothing to tell apart, or each task has its row of real text.
    """
    rows = evaluation["results"]["rows"]
    whole = [row for row in rows if row["name"] == REAL and row["task"] == WHOLE]
    given: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["task"] != WHOLE:
            if row["name"] == REAL:
                return None
            given.setdefault(row["task"], row)
    if not whole or not given:
        return None
    written = " and ".join(dict.fromkeys(f"{_each(row)}" for row in given.values()))
    tasks = " and ".join(given)
    note = (
        f"Rows of real text and sanity rows are whole windows of {_each(whole[0])} tokens. Distinct-n, self-BLEU,"
        f" entropy and Zipf of the rows {tasks} are of {written} tokens and do not compare with them."
    )
    likely = [
        f"{row['metrics']['nll_reference']['value']:.2f} ({task})"
        for task, row in given.items()
        if "nll_reference" in row["metrics"]
    ]
    if likely:
        note += f" AR-NLL of the real text of these prompts: {', '.join(likely)}."
    model, key = Path(evaluation["config"]["model"]).name, _key(evaluation)
    for real in reals:
        about = real["config"]
        if Path(about["model"]).name == model and {k: about.get(k) for k in key} == key:
            parts = [f"{_stretch(row)}: {_figures(row)}" for row in real["results"]["rows"]]
            note += (
                f" The {about['prompts']} windows that the prompts come from, as real text on each stretch"
                f" (`python benchmarks/{real['command']}`): {'; '.join(parts)}."
            )
            break
    return note


def _each(row: Mapping[str, Any]) -> int:
    return round(row["facts"]["generated_units"] / row["facts"]["samples"])


def _stretch(row: Mapping[str, Any]) -> str:
    return f"whole {_each(row)}" if row["task"] == WHOLE else f"{_each(row)} of {row['task']}"


def _figures(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{_HEADS[m]} {row['metrics'][m]['value']:.2f}" for m in _SHOWN)
