"""A model card from records: text is written by hand, every number comes from what was recorded.

    python benchmarks/card.py benchmarks/cards/ddlm-tiny.md --run runs/ddlm-tiny \
        --record benchmarks/results/ddlm-tiny.json --samples runs/results/ddlm-tiny/samples \
        --out runs/card.md
    ddlm export runs/ddlm-tiny --out models/ddlm-tiny --dtype bfloat16 --card runs/card.md

``--run`` may also be the folder of an autoregressive baseline, which tells of its training in its own record.json.
In the text ``{{facts}}`` becomes what the run recorded about itself, ``{{evaluation}}`` the table of the evaluation's
record, ``{{samples}}`` the first samples of each task in the order in which they were written: nobody picked them.
The model of a run is its best checkpoint: what the card says of the training is as of that checkpoint's step.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddlm.checkpoint import load_model
from ddlm.evaluation import diversity
from ddlm.evaluation.measure import Estimate, Row, group_names
from ddlm.evaluation.report import to_markdown
from ddlm.evaluation.samples import Sample, read_samples
from ddlm.record import commit_of, machine_of
from ddlm.reproduce.stretches import stretch_note
from ddlm.reproduce.subjects import read_subject
from ddlm.training.flops import run_flops
from ddlm.training.metrics import last_validation
from ddlm.types import ConfigError

SHOWN = 4  # samples of each task
_NAME = re.compile(r"(.+)-([0-9a-f]{12})-seed\d+")  # how ddlm.evaluation.protocol names its files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path, help="Markdown with the three marks")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--record", type=Path, required=True, help="record of ddlm evaluate")
    parser.add_argument("--samples", type=Path, required=True, help="folder of its sample files")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        filled = {
            "{{facts}}": facts(arguments.run),
            "{{evaluation}}": evaluation(record, beside(arguments.record)),
            "{{samples}}": samples(arguments.samples, record),
        }
        card = arguments.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for mark, text in filled.items():
        card = card.replace(mark, text)
    arguments.out.write_text(card, encoding="utf-8")
    print(arguments.out)
    return 0


def facts(run: Path) -> str:
    """What the run folder says about itself."""
    if (run / "plan.json").is_file():
        return _baseline_facts(run)
    loaded = load_model(run)
    config, step = loaded.config, loaded.step
    if step is None:
        raise ConfigError(f"{run} does not say how many updates were made")
    lines = [
        json.loads(x) for x in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    # The run may have gone on after its best checkpoint: those lines tell of other weights.
    trained = [x for x in lines if x["kind"] == "train" and x["step"] <= step]
    validation = last_validation(run, step)
    if not trained or validation is None:
        raise ConfigError(
            f"{run}/metrics.jsonl has no {'held-out evaluation of' if trained else 'line of training up to'} "
            f"step {step}, that of the checkpoint {loaded.folder.name}: the card needs both"
        )
    known = read_subject(Path(), str(loaded.folder)).values  # with all trainings before this one
    corpus = loaded.provenance.get("tokens")
    before = _earlier_updates(loaded.provenance)
    updates = f"{step:,} of {config.train.batch} x {config.model.length} tokens"
    if before:
        runs = "an earlier run" if len(before) == 1 else "earlier runs"
        updates += f", after {' and '.join(before)} of {runs}"
    if "tokens" in known:
        total = int(known["tokens"])
        tokens = f"{total:,}" + (f" ({total / corpus:.2f} epochs)" if corpus else "")
    else:
        tokens = f"{step * config.train.batch * config.model.length:,}{_UNKNOWN}"
    flops = (
        f"{known['flops']:.2e}" if "flops" in known else f"{run_flops(config, step):.2e}{_UNKNOWN}"
    )
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{loaded.model.parameter_counts()['total']:,}"),
        ("updates", updates),
        ("tokens seen", tokens),
        ("training FLOPs (matrix products)", flops),
        (
            "time of the last run" if before else "time",
            f"{trained[-1]['seconds'] / 3600:.2f} hours of wall clock",
        ),
        (
            "held-out cross-entropy, mean over t",
            f"{validation['cross_entropy']:.3f} nats a noised token",
        ),
        *[
            (f"at t = {level}", f"{value:.2f} nats")
            for level, value in validation["by_level"].items()
        ],
    ]
    return _table(rows)


def _baseline_facts(folder: Path) -> str:
    """The same of `ddlm baseline`, with its command and machine: no other file of the folder has them."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    found, plan = record["results"], record["config"]
    flops = read_subject(Path(), str(folder)).values["flops"]
    rows = [
        ("parameters", f"{found['parameters']:,}"),
        ("updates", f"{found['steps']:,} of {plan['batch']} x {plan['context']} tokens"),
        ("tokens seen", f"{found['tokens']:,} ({found['epochs']:.2f} epochs)"),
        ("training FLOPs (matrix products)", f"{flops:.2e}"),
        ("time", f"{found['seconds'] / 3600:.2f} hours of wall clock"),
        (
            "held-out text of the shards",
            f"{found['held_out_nll']:.3f} nats a token ({found['held_out_tokens']:,} tokens)",
        ),
        ("machine", machine_of(record)),
        ("command", _source(record)),
    ]
    return _table(rows)


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


_UNKNOWN = " in this run; those of the weights it began from are not known"


def _earlier_updates(provenance: Mapping[str, Any]) -> list[str]:
    """Updates of every training before this one, the first of them first."""
    found = []
    while provenance := provenance.get("initial") or {}:
        step = provenance.get("step")
        found.insert(0, "an unknown number" if step is None else f"{step:,}")
    return found


def beside(record: Path) -> list[Mapping[str, Any]]:
    """The records of real text that lie beside an evaluation's."""
    found = sorted(record.parent.glob("*-real.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in found]


def evaluation(record: dict[str, Any], reals: Sequence[Mapping[str, Any]] = ()) -> str:
    """The table of an evaluation, sanity rows included, what does not compare in it, and what it was made with."""
    rows = [
        Row(
            name=r["name"],
            task=r["task"],
            metrics={k: Estimate(**v) for k, v in r["metrics"].items()},
            facts=r["facts"],
        )
        for r in record["results"]["rows"]
    ]
    unlike = stretch_note(record, reals)
    note = f"{unlike}\n\n" if unlike else ""
    return f"{to_markdown(rows)}\n{note}{_source(record)}.\n"


def _source(record: Mapping[str, Any]) -> str:
    return f"`{record['command']}`, {record['date'][:10]}, commit {commit_of(record)}"


def samples(folder: Path, record: Mapping[str, Any]) -> str:
    """The first samples of every task, as they were written.

    Raises:
        ConfigError: when the folder does not hold those that the record's rows were measured on.
    """
    sets: dict[str, dict[str, list[Path]]] = {}  # by task and key, in the files' names
    for file in sorted(folder.glob("*.jsonl")):
        if name := _NAME.fullmatch(file.stem):
            sets.setdefault(name[1], {}).setdefault(name[2], []).append(file)
    model = Path(record["config"]["model"]).name
    chosen: list[tuple[Path, list[Sample]]] = []
    for row in record["results"]["rows"]:
        if row["name"] == model:  # the others are sanity rows
            chosen += _measured(row, list(sets.get(row["task"], {}).values()), folder)
    parts = []
    for file, found in sorted(chosen, key=lambda c: c[0]):
        parts += [f"{file.stem}:\n\n"]
        parts += [f"> {_marked(s)}\n\n" for s in found[:SHOWN]]
    return "".join(parts)


def _measured(
    row: Mapping[str, Any], sets: Sequence[Sequence[Path]], folder: Path
) -> list[tuple[Path, list[Sample]]]:
    """The files that a row of the table is of; those of the curves' points lie beside them under other keys."""
    read = [[(file, read_samples(file)) for file in files] for files in sets]
    fitting = [s for s in read if sum(len(found) for _, found in s) == row["facts"]["samples"]]
    if len(fitting) > 1:  # a curve of as many samples: what was measured tells them apart
        fitting = [
            s
            for s in fitting
            if math.isclose(
                _distinct([x for _, f in s for x in f]), row["metrics"]["dist_2"]["value"]
            )
        ]
    if len(fitting) != 1:
        raise ConfigError(
            f"{folder} has {len(fitting) or 'no'} sets of samples that could be the {row['facts']['samples']} of the "
            f"row {row['task']} of the record: name the folder samples beside that record"
        )
    return fitting[0]


def _distinct(found: Sequence[Sample]) -> float:
    """Distinct-2 as :func:`ddlm.evaluation.measure.measure_row` has it."""
    ordered = sorted(found, key=lambda s: s.seed or 0)  # as drawn: names would put seed 10 before 2
    ids = [s.generated_tokens(diversity.GAP) for s in ordered]
    shares = diversity.distinct(diversity.table(ids), 2, diversity.number(group_names(ordered)))
    return float(shares.mean())


def _marked(sample: Sample) -> str:
    """One line; what was given is in italics before and after."""
    text = sample.text
    if sample.conditional and sample.generated:
        start, end = sample.generated[0]
        text = f"[{text[:start]}] {text[start:end]}" + (f" [{text[end:]}]" if text[end:] else "")
    for character in "\\`*_<>|":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
