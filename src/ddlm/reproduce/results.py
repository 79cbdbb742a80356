"""The page of results: one table over models, filled from the records of their measurements. No number is typed.

Records of ``ddlm evaluate`` give the measures, those of ``benchmarks/results.py --speed`` the seconds, those of its
``--real`` real text on the stretches of the tasks, the models' folders the parameters and what the training cost. What
none of them holds is a dash with its reason in a footnote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddlm.evaluation.generators import Settings
from ddlm.evaluation.measure import SET_SIZE, Estimate
from ddlm.evaluation.report import COLUMNS, cell, markdown
from ddlm.record import commit_of, machine_of
from ddlm.reproduce.stretches import KIND, stretch_note
from ddlm.reproduce.subjects import Subject, read_subject
from ddlm.types import ConfigError

MEASURES = ("nll", "mauve", "dist_1", "dist_2", "dist_3", "self_bleu", "token_entropy", "zipf")
REAL = "real text"
_GROWING = ("self_bleu", "token_entropy", "zipf")
_POOLED = "Of all seeds' samples together: larger than in the rows without this mark, which are of one seed's samples."
SECONDS_FOR = 64  # tokens
PLAIN = Settings()
PEERS = {
    "gpt-neox": "gpt_neox",
    "gpt2": "gpt2",
}  # architecture of a baseline: name in the benchmark
_HEADS = {c.key: c.head for c in COLUMNS}
_INTRODUCTION = """# Results

<!-- Written by `python benchmarks/results.py` from the records that are named below: changes by hand are lost. -->

Models of this project and autoregressive baselines of their size. Every number is taken from a record that stands
beside the source with its command, commit, versions, hardware and date; [the measures are defined here](metrics.md).
± is half of the 95% interval over sampling seeds, prompts or groups; it does not cover another training seed. Numbers
under different judges do not compare.

"""


@dataclass(frozen=True)
class Found:
    """A record and where it lies."""

    path: Path
    content: Mapping[str, Any]

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured."""
        found: Mapping[str, Any] = self.content["results"]
        return found


@dataclass
class Notes:
    """Footnotes, each said once."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """The mark of a footnote."""
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def dash(self, reason: str) -> str:
        """A missing value and why it is missing."""
        return f"-{self.mark(reason)}"


def results_page(records: Path, root: Path) -> str:
    """The page, from all records in a folder and below.

    Args:
        records: Folder of JSON records.
        root: What the model folders named in the records are relative to.

    Raises:
        ConfigError: when there is no record of an evaluation, a record is no record, or two tell the same speed.
    """
    evaluations, speeds, reals = read_records(records)
    notes = Notes()
    # Of one way of measuring there is nothing to say; of two, the older rows are marked.
    mixed = (
        len({p for r in evaluations for row in r.results["rows"] if (p := pooled(row)) is not None})
        > 1
    )
    lines: list[list[str]] = []
    seen: list[Any] = []
    for number, record in enumerate(evaluations, 1):
        name = Path(record.content["config"]["model"]).name
        subject = read_subject(root, record.content["config"]["model"])
        rows = [row for row in record.results["rows"] if row["name"] == name]
        lines += [_line(number, record, row, subject, speeds, notes, mixed) for row in rows]
    for number, record in enumerate(evaluations, 1):
        for row in record.results["rows"]:
            # Models that were judged on the same text by the same judge share this row.
            if row["name"] == REAL and row["metrics"] not in seen:
                seen.append(row["metrics"])
                lines.append(_real_line(number, record, row, reals, notes))
    heads = ["model", "task", "steps", "parameters", "training tokens", "training FLOPs"]
    heads += ["judge", *[_HEADS[m] for m in MEASURES]]
    heads += [f"s / {SECONDS_FOR} tokens", "with early exit", "record"]
    parts = [_INTRODUCTION, markdown(heads, lines), "\n"]
    parts += [f"{i}. {text}\n" for i, text in enumerate(notes.texts, 1)]
    parts += ["\n## Records\n", *_sources([*evaluations, *speeds, *reals])]
    return "".join(parts)


def pooled(row: Mapping[str, Any]) -> bool | None:
    """Whether what grows with the samples is of all seeds together; None for a row without seeds."""
    facts = row["facts"]
    return None if facts.get("intervals_over") != "seeds" else SET_SIZE not in facts


def read_records(folder: Path) -> tuple[list[Found], list[Found], list[Found]]:
    """Records of evaluations of models, of sampling speed, and of real text, by file name.

    Raises:
        ConfigError: when there is none of an evaluation, or a file is no record.
    """
    found: dict[str, list[Found]] = {"evaluate": [], "sampling-speed": [], KIND: []}
    for path in sorted(folder.rglob("*.json"), key=lambda p: p.with_suffix("")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind = content["kind"]
            assert isinstance(content["results"], dict)
            assert isinstance(content["config"], dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ConfigError(f"{path} is not a record of ddlm: take it out of {folder}") from None
        found.setdefault(kind, []).append(Found(path, content))
    if not found["evaluate"]:
        raise ConfigError(
            f"{folder} holds no record of an evaluation: run ddlm evaluate --model DIR --out DIR and put its "
            "record.json there"
        )
    return found["evaluate"], found["sampling-speed"], found[KIND]


def _line(
    number: int,
    record: Found,
    row: Mapping[str, Any],
    subject: Subject,
    speeds: Sequence[Found],
    notes: Notes,
    mixed: bool,
) -> list[str]:
    facts = record.results["facts"]
    cost = [
        _count(subject.values.get(key)) or notes.dash(subject.missing[key])
        for key in ("parameters", "tokens", "flops")
    ]
    own = facts.get("judge") and facts["judge"].get("fingerprint") == facts.get("model")
    marks = (
        {"nll": notes.mark("Judged by itself: its own samples are likely to it.")} if own else {}
    )
    if mixed and pooled(row):
        marks |= dict.fromkeys(_GROWING, notes.mark(_POOLED))
    return [
        row["name"],
        row["task"],
        _steps(record, row, subject, notes),
        *cost,
        _judge(record, notes),
        *_measures(row, notes, marks),
        *seconds(subject, settings(record), speeds, notes),
        str(number),
    ]


def _real_line(
    number: int, record: Found, row: Mapping[str, Any], reals: Sequence[Found], notes: Notes
) -> list[str]:
    dash = notes.dash("Held-out text, not a model's.")
    judged = [_judge(record, notes), *_measures(row, notes, {})]
    unlike = stretch_note(record.content, [r.content for r in reals])
    mark = notes.mark(unlike) if unlike else ""
    return [f"{REAL}{mark}", row["task"], *[dash] * 4, *judged, dash, dash, str(number)]


def _judge(record: Found, notes: Notes) -> str:
    """Whose likelihood AR-NLL is, and in which precision where not in float32: only rows of one judge compare."""
    judge = record.results["facts"].get("judge")
    if not judge:
        return notes.dash("No judge was asked.")
    precision = judge.get("precision", "fp32")
    return Path(judge["judge"]).name + ("" if precision == "fp32" else f", {precision}")


def _steps(record: Found, row: Mapping[str, Any], subject: Subject, notes: Notes) -> str:
    """Mean steps made, of those allowed; early exit and what departs from the paper's sampling are named."""
    if subject.kind == "autoregressive":
        return notes.dash("An autoregressive model has no solver steps and no early exit.")
    mean = row["facts"].get("mean_steps")
    if mean is None:
        return notes.dash("The record does not say how many steps were made.")
    how = settings(record)
    parts = [f"{mean:.0f} of {how['steps'] + how['refine']}", how["halt"]]
    if how["solver"] != PLAIN.solver:
        parts.append(how["solver"])
    if how["grid_name"] != PLAIN.grid_name:
        parts.append(f"{how['grid_name']} grid")
    parts += [
        f"{name.replace('_', ' ')} {how[name]:g}"
        for name in ("temperature", "noise_scale")
        if how[name] != getattr(PLAIN, name)
    ]
    if how["refine"]:
        parts.append(f"the last {how['refine']} of them refining")
    return ", ".join(p for p in parts if p)


def settings(record: Found) -> dict[str, Any]:
    """How a record's samples were written; what an older one does not know was as it is without being asked for."""
    return asdict(PLAIN) | record.content["config"]["protocol"]["settings"]


def _measures(row: Mapping[str, Any], notes: Notes, marks: Mapping[str, str]) -> list[str]:
    cells = []
    absent = row["facts"].get("absent", {})
    for key in MEASURES:
        found = row["metrics"].get(key)
        if found is None:
            reason = absent.get(key, "not measured")
            cells.append(notes.dash(f"{_HEADS[key]}: {reason}."))
        elif found["value"] is None:
            cells.append(notes.dash(f"{_HEADS[key]}: not a finite number."))
        else:
            cells.append(cell(Estimate(**found)) + marks.get(key, ""))
    return cells


def seconds(
    subject: Subject, how: Mapping[str, Any], speeds: Sequence[Found], notes: Notes
) -> list[str]:
    """Seconds for 64 tokens without and with early exit, many sequences at once, of the row's own sampling.

    Raises:
        ConfigError: when two records tell the speed of one sampling of a model.
    """
    if subject.kind == "autoregressive":
        none = notes.dash("An autoregressive model has no solver steps and no early exit.")
        return [_peer_seconds(subject, speeds, notes), none]
    if subject.kind == "unknown":
        return [notes.dash(subject.missing["parameters"])] * 2
    asked = {key: value for key, value in how.items() if key != "halt"}
    mine = [
        (record, sampling)
        for record in speeds
        if Path(record.content["config"]["model"]).name == subject.name
        for sampling in record.results["samplings"]
        if asdict(PLAIN) | sampling["settings"] | {"halt": None} == asked | {"halt": None}
    ]
    if len(mine) > 1:
        files = " and ".join(str(record.path) for record, _ in mine)
        raise ConfigError(f"{files} both tell the speed of {subject.name}: keep one")
    if not mine:
        return [notes.dash("No record of the speed of this sampling of these weights.")] * 2
    record, sampling = mine[0]
    results = record.results
    where = f"{results['queue']} sequences through {results['slots']} slots on {machine_of(record.content)}"
    early = sampling["patience"]
    exits = (
        f"{where}; early exit after {sampling['patience_steps']} steps without a switch of a token: "
        f"{early['mean_steps']:.0f} of {sampling['plain']['mean_steps']:.0f} steps made."
    )
    each = SECONDS_FOR / results["length"]
    return [
        f"{sampling['plain']['seconds'] * each:.3g}{notes.mark(where + '.')}",
        f"{early['seconds'] * each:.3g}{notes.mark(exits)}",
    ]


def _peer_seconds(subject: Subject, speeds: Sequence[Found], notes: Notes) -> str:
    """A baseline's speed is that of the benchmark's peer of the same architecture and sizes: weights do not matter."""
    for record in speeds:
        sizes, results = record.content["config"]["sizes"], record.results
        same = all(sizes.get(key) == value for key, value in subject.sizes.items())
        peer = results["peer"]
        if (
            same
            and peer["name"] == PEERS.get(subject.architecture)
            and results["length"] == SECONDS_FOR
        ):
            how = notes.mark(
                f"{subject.architecture} of the same sizes with a key-value cache, {results['slots']} sequences at "
                f"once, on {machine_of(record.content)}."
            )
            return f"{peer['seconds']:.3g}{how}"
    return notes.dash(
        f"No record of the sampling speed of {subject.architecture} of these sizes at {SECONDS_FOR} tokens."
    )


def _count(value: float | None) -> str:
    """``5.1M``, ``82M``, ``1.9e+16``; empty for what is not known."""
    if value is None or not math.isfinite(value):
        return ""
    if value >= 1e12:
        return f"{value:.1e}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _sources(records: Sequence[Found]) -> list[str]:
    """Where each row comes from: file, command, commit, date, hardware."""
    parts = []
    for number, record in enumerate(records, 1):
        content = record.content
        judge = (record.results.get("facts") or {}).get("judge")
        judged = f"; judge `{Path(judge['judge']).name}`" if judge else ""
        command = content["command"]
        if command.partition(" ")[0].endswith(".py"):  # a script's record has its name only
            command = f"python benchmarks/{command}"
        parts.append(
            f"\n**{number}.** `{record.path.as_posix()}`, {content['date'][:10]}, commit {commit_of(content)}, "
            f"{machine_of(content)}{_drawn(record)}{judged}:\n\n```bash\n{command}\n```\n"
        )
    return parts


def _drawn(record: Found) -> str:
    """Where samples were drawn, as far as it was not where they were measured."""
    facts = record.results.get("facts") or {}
    known = [x for x in facts.get("drawn") or () if x["hardware"] is not None]
    here = machine_of(record.content)
    others = dict.fromkeys(m for x in known if (m := machine_of(x)) != here)
    return f"; samples drawn on {', '.join(others)}" if others else ""
