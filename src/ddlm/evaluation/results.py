"""What an evaluation leaves: the record and the tables of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddlm.evaluation import report
from ddlm.evaluation.mauve import FEWEST
from ddlm.evaluation.measure import POOLED, SET_SIZE, Row
from ddlm.files import write_text
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError, local


def check_results(out: Path, subject: str | Path) -> None:
    """Refuse a folder whose record is of something else: it took minutes to hours to make, and would be replaced.

    Args:
        out: Folder for the results.
        subject: The model or the sample file that is to be measured.

    Raises:
        ConfigError: naming what the record there is of.
    """
    file = out / "record.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")).get("config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # none, or nothing that anybody can read
    found = config.get("model") or config.get("samples") if isinstance(config, dict) else None
    if isinstance(found, str) and local(found).resolve() == local(subject).resolve():
        return
    what = f"of {found}" if isinstance(found, str) else "of another command"
    raise ConfigError(
        f"{file} is the record {what} and would be replaced by that of {subject}: name another folder with --out, "
        "or remove it"
    )


def write_results(
    out: Path,
    kind: str,
    config: dict[str, Any],
    rows: list[Row],
    curves: list[Row],
    facts: dict[str, Any],
    seed: int | None,
) -> dict[str, Any]:
    """Write the record and the tables of some rows; returns the record.

    Args:
        out: Folder for record.json, table.md and table.tex.
        kind: Of the record.
        config: What was asked for.
        rows: Of the table.
        curves: Points of quality against diversity, for a second table.
        facts: Judge, features and notes.
        seed: Of the record.
    """
    record = make_record(kind, config, {"rows": rows, "curves": curves, "facts": facts}, seed=seed)
    write_record(out / "record.json", record)
    judge = facts.get("judge") or {}
    notes = [
        f"AR-NLL in nats per token of the judge {Path(judge['judge']).name}."
        if judge
        else "No judge.",
        f"{facts.get('prompts', rows[0].facts['samples'])} prompts or samples; units: {rows[0].facts['units']}.",
        set_sizes(rows),
        *what_is_absent(rows, facts),
        *facts.get("notes", ()),
    ]
    write_text(out / "table.md", report.page("Evaluation", rows, curves, notes))
    write_text(out / "table.tex", report.to_latex(rows))
    return record


def set_sizes(rows: list[Row]) -> str:
    """How many samples the measures that grow with them are computed on: once, or for the rows that differ."""
    sizes = [row.facts[SET_SIZE] for row in rows]
    line = f"Self-BLEU, entropy, Zipf and across: sets of {sizes[0]} samples"
    part = rows[0].facts["self_bleu_size"]
    if part < sizes[0]:
        line += f" (self-BLEU: {part} of them)"
    others = [f"{row.name} {n}" for row, n in zip(rows, sizes, strict=True) if n != sizes[0]]
    return f"{line}, except {', '.join(others)}: these do not compare." if others else f"{line}."


def what_is_absent(rows: list[Row], facts: dict[str, Any]) -> list[str]:
    """Lines of what was asked for and is not there, or not as it should be; it must not vanish in silence.

    Args:
        rows: Of the table, the samples' own first.
        facts: Judge and features.
    """
    absent = rows[0].facts.get("absent", {})
    lines = []
    if facts.get("judge") and "nll_reference" in absent:
        lines.append(f"No real NLL: {absent['nll_reference']}.")
    if facts.get("features") and "mauve" in absent:
        lines.append(f"No MAUVE: {absent['mauve']}.")
    pooled = {row.name: n for row in rows if (n := row.facts.get("mauve", {}).get(POOLED))}
    if pooled:
        lines.append(
            f"MAUVE of {', '.join(pooled)}: of all seeds' samples together, a seed has {min(pooled.values())} and"
            f" {FEWEST} are needed."
        )
    return lines
