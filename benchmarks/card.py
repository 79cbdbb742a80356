"""A model card from records: text is written by hand, every number comes from what was recorded.

    python benchmarks/card.py benchmarks/cards/ddlm-tiny.md --run runs/ddlm-tiny \
        --record benchmarks/results/ddlm-tiny.json --samples runs/results/ddlm-tiny/samples \
        --out runs/card.md
    ddlm export runs/ddlm-tiny --out models/ddlm-tiny --dtype bfloat16 --card runs/card.md

In the text ``{{facts}}`` becomes what the run recorded about itself, ``{{evaluation}}`` the table of the evaluation's
record, ``{{samples}}`` the first samples of each task in the order in which they were written: nobody picked them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ddlm.checkpoint import load_model
from ddlm.evaluation.measure import Estimate, Row
from ddlm.evaluation.report import to_markdown
from ddlm.evaluation.samples import Sample, read_samples
from ddlm.training.flops import run_flops
from ddlm.types import ConfigError

SHOWN = 4  # samples of each task


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
            "{{evaluation}}": evaluation(record),
            "{{samples}}": samples(arguments.samples),
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
    loaded = load_model(run)
    lines = [
        json.loads(x) for x in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    last = next(x for x in reversed(lines) if x["kind"] == "train")
    validation = next(x for x in reversed(lines) if x["kind"] == "validation")
    config, step = loaded.config, loaded.step
    if step is None:
        raise ConfigError(f"{run} does not say how many updates were made")
    before = loaded.provenance.get("initial") or {}  # the model that the run started from
    own = step * config.train.batch * config.model.length
    tokens = own + (before.get("tokens_seen") or 0)
    flops = run_flops(config, step) + (before.get("flops") or 0)
    corpus = loaded.provenance.get("tokens")
    updates = f"{step:,} of {config.train.batch} x {config.model.length} tokens"
    if before:
        updates += f", after {before['step']:,} of an earlier run"
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{loaded.model.parameter_counts()['total']:,}"),
        ("updates", updates),
        ("tokens seen", f"{tokens:,}" + (f" ({tokens / corpus:.2f} epochs)" if corpus else "")),
        ("training FLOPs (matrix products)", f"{flops:.2e}"),
        (
            "time of the last run" if before else "time",
            f"{last['seconds'] / 3600:.2f} hours of wall clock",
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
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def evaluation(record: dict[str, Any]) -> str:
    """The table of an evaluation, sanity rows included, and what it was made with."""
    rows = [
        Row(
            name=r["name"],
            task=r["task"],
            metrics={k: Estimate(**v) for k, v in r["metrics"].items()},
            facts=r["facts"],
        )
        for r in record["results"]["rows"]
    ]
    command = (
        " ".join(record["command"]) if isinstance(record["command"], list) else record["command"]
    )
    return f"{to_markdown(rows)}\n`{command}`, {record['date'][:10]}, commit {record['commit'][:12]}.\n"


def samples(folder: Path) -> str:
    """The first samples of every task, as they were written."""
    parts = []
    for file in sorted(folder.glob("*.jsonl")):
        parts += [f"{file.stem}:\n\n"]
        parts += [f"> {_marked(s)}\n\n" for s in list(read_samples(file))[:SHOWN]]
    return "".join(parts)


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
