"""Likelihood against diversity: sets of unconditional texts at several temperatures, all measured in the same way.

    python benchmarks/diversity_curve.py "diffusion@0.8=runs/a/samples" "diffusion@0.9=runs/b/samples" \
        "autoregressive@0.8=runs/c/samples" --judge smollm2 --real runs/c4_en_validation.jsonl.gz \
        --model models/ddlm-small --out benchmarks/diversity-small.json

A set is LABEL@TEMPERATURE=FOLDER, the folder being the ``samples`` of ``ddlm evaluate --model``: its files
unconditional-*.jsonl, one a seed. Points of one label are joined. Writes the record, and beside it the figure as .png
and .svg. Intervals are 95%, over the seeds; of real text, which has none, over five random fifths.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddlm.analysis.figures import LINES, PALETTE, figure
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.measure import Units, measure_row
from ddlm.evaluation.protocol import decode, held_out
from ddlm.evaluation.samples import Sample, read_samples
from ddlm.lm import load
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError, DataError

SET = re.compile(r"(?P<label>[^@=]+)@(?P<temperature>[0-9.]+)=(?P<folder>.+)")
METRICS = ("nll", "token_entropy", "dist_1", "dist_2", "repetition")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="+", help="LABEL@TEMPERATURE=FOLDER")
    parser.add_argument("--judge", required=True, help="folder or hub id of a causal model")
    parser.add_argument("--real", required=True, help="held-out text: shards or a file")
    parser.add_argument("--model", required=True, help="model whose tokenizer cuts the real text")
    parser.add_argument("--out", type=Path, required=True, help="record to write (JSON)")
    arguments = parser.parse_args()
    try:
        sets = [read_set(argument) for argument in arguments.sets]
        judge = Judge(arguments.judge)
        count = texts_of_a_seed([samples for _, _, samples in sets])
        real = real_texts(arguments, judge, count)
        points = [
            {"label": label, "temperature": temperature, **measured(label, samples, judge)}
            for label, temperature, samples in sets
        ]
        of_real = measured("real text", real, judge)
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    write_record(
        arguments.out, make_record("diversity-curve", settings, {"points": points, "real": of_real})
    )
    draw(points, of_real, arguments.out.with_suffix(""))
    print(arguments.out)
    return 0


def read_set(argument: str) -> tuple[str, float, list[Sample]]:
    """Label, temperature and texts of one set.

    Raises:
        ConfigError: naming what is wrong with the argument.
    """
    found = SET.fullmatch(argument)
    if found is None:
        raise ConfigError(f"{argument}: LABEL@TEMPERATURE=FOLDER is needed")
    files = sorted(Path(found["folder"]).glob("unconditional-*.jsonl"))
    if not files:
        raise ConfigError(f"{found['folder']} holds no unconditional-*.jsonl")
    # a file is a seed, also where each of its texts was drawn with one of its own, as by `ddlm generate`
    samples = [
        replace(sample, seed=number)
        for number, file in enumerate(files)
        for sample in read_samples(file)
    ]
    return found["label"], float(found["temperature"]), samples


def texts_of_a_seed(sets: Sequence[Sequence[Sample]]) -> int:
    """How many texts each seed of each set has.

    Raises:
        ConfigError: when they differ: entropy grows with the number of texts.
    """
    counts = {count for samples in sets for count in Counter(s.seed for s in samples).values()}
    if len(counts) > 1:
        raise ConfigError(
            f"the seeds have {', '.join(map(str, sorted(counts)))} texts: entropies compare at one number only"
        )
    return counts.pop()


def real_texts(arguments: argparse.Namespace, judge: Judge, count: int) -> list[Sample]:
    """As many held-out windows as a seed has texts.

    Raises:
        DataError: when the judge was trained on them.
    """
    lm = load(arguments.model)
    windows = held_out(arguments.real, lm.tokenizer, lm.length, count)
    judge.check_held_out(windows.hashes, f"the held-out text {windows.source}")
    rows: list[list[int]] = windows.tokens.tolist()
    return [Sample(decode(lm.tokenizer, row), tokens=row) for row in rows]


def measured(name: str, samples: Sequence[Sample], judge: Judge) -> dict[str, Any]:
    """Values and half intervals of a set."""
    row = measure_row(
        name, "unconditional", samples, units=Units("own tokens"), judge=judge, self_bleu_size=2
    )
    found: dict[str, Any] = {"texts": len(samples), "over": row.facts["intervals_over"]}
    for metric in METRICS:
        estimate = row.metrics[metric]
        found[metric] = {"value": estimate.value, "half": estimate.width / 2}
    likelihood, entropy = found["nll"], found["token_entropy"]
    print(
        f"{name}: AR-NLL {likelihood['value']:.2f} ± {likelihood['half']:.2f} "
        f"at entropy {entropy['value']:.2f} ± {entropy['half']:.2f}",
        flush=True,
    )
    return found


def draw(points: Sequence[dict[str, Any]], real: dict[str, Any], path: Path) -> None:
    """AR-NLL over entropy, one line a label, temperatures beside the points."""
    with figure(
        path,
        "Likelihood against diversity",
        f"token entropy of {real['texts']} texts (nats)",
        "AR-NLL (nats per judge token)",
    ) as axes:
        for i, label in enumerate(dict.fromkeys(p["label"] for p in points)):
            line = sorted(
                (p for p in points if p["label"] == label), key=lambda p: p["temperature"]
            )
            xs = [p["token_entropy"]["value"] for p in line]
            ys = [p["nll"]["value"] for p in line]
            axes.errorbar(
                xs,
                ys,
                xerr=[p["token_entropy"]["half"] for p in line],
                yerr=[p["nll"]["half"] for p in line],
                marker="o",
                markersize=4,
                capsize=2,
                color=PALETTE[i % 7],
                label=label,
            )
            for x, y, point in zip(xs, ys, line, strict=True):
                axes.annotate(
                    f"{point['temperature']:g}",
                    (x, y),
                    textcoords="offset points",
                    xytext=(6, -11),
                    fontsize=8,
                    color=PALETTE[i % 7],
                )
        axes.errorbar(
            [real["token_entropy"]["value"]],
            [real["nll"]["value"]],
            yerr=[real["nll"]["half"]],
            marker="*",
            markersize=10,
            capsize=2,
            color=PALETTE[7],
            linestyle=LINES[0],
            label="real text (C4 validation)",
        )


if __name__ == "__main__":
    sys.exit(main())
