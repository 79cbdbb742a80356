"""Quality of text against the compute of training: checkpoints of a model, each sampled and judged in the same way.

    python benchmarks/compute_curve.py runs/a/checkpoints/step-250 models/ddlm-tiny runs/b/checkpoints/step-* \
        --judge models/ddlm-tiny-ar --real runs/c4_en_validation.jsonl.gz --out benchmarks/compute-curve.json

Writes the record, and beside it the figure as .png and .svg. ± is half of the 95% interval over the texts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ddlm
from ddlm.analysis.figures import LINES, PALETTE, figure
from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation.diversity import table, token_entropy
from ddlm.evaluation.intervals import ratio
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.protocol import decode, held_out
from ddlm.record import make_record, write_record
from ddlm.reproduce.subjects import read_subject
from ddlm.types import ConfigError

SAME: dict[str, Any] = {"noise_scale": 1.0, "grid": "uniform"}
"""What models may have defaults of their own for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="model folders, in any order")
    parser.add_argument("--judge", required=True, help="folder or hub id of a causal model")
    parser.add_argument("--real", required=True, help="held-out text: shards or a file")
    parser.add_argument("--out", type=Path, required=True, help="record to write (JSON)")
    parser.add_argument("--samples", type=int, default=128, help="texts of each model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solver", default="sde")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--refine", type=int, default=0, help="rounds after the last step")
    parser.add_argument(
        "--figure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw it (not for models of equal compute)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--judge_precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    if arguments.samples < 2:
        parser.error(f"--samples is {arguments.samples}, an interval needs at least 2")
    settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "models", "figure")}
    settings |= SAME
    try:
        judge = Judge(arguments.judge, precision=arguments.judge_precision)
        first = ddlm.load(arguments.models[0])
        real = measure_real(first.tokenizer, first.length, judge, arguments)
        points = [measure(path, judge, arguments) for path in arguments.models]
        points.sort(key=lambda p: p["flops"])
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = make_record("compute-curve", settings, {"points": points, "real": real}, seed=0)
    write_record(arguments.out, record)
    if arguments.figure:
        draw(points, real, arguments.out.with_suffix(""))
    print(arguments.out)
    return 0


def measure(path: str, judge: Judge, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compute spent on a model and the quality of its unconditional texts."""
    known = read_subject(Path(), path)
    if "flops" not in known.values:
        raise ConfigError(f"{path}: {known.missing.get('flops', 'its training is not known')}")
    lm = ddlm.load(path, precision=arguments.precision)
    made = lm.generate(
        f"{{{lm.length}}}",
        samples=arguments.samples,
        seed=0,
        steps=arguments.steps,
        solver=arguments.solver,
        temperature=arguments.temperature,
        refine=arguments.refine,
        **SAME,
    )
    found = judged([g.text for g in made], [g.tokens for g in made], judge)
    print(
        f"{path}: {known.values['flops']:.2e} FLOPs, AR-NLL {found['nll']:.2f} ± {found['half']:.2f}, "
        f"{found['nll_per_character']:.2f} a character"
    )
    return {"model": path, **known.values, **found, "first": made[0].text}


def measure_real(
    tokenizer: Tokenizer, length: int, judge: Judge, arguments: argparse.Namespace
) -> dict[str, float]:
    """The same of held-out text.

    Raises:
        DataError: when the judge was trained on it.
    """
    windows = held_out(arguments.real, tokenizer, length, arguments.samples)
    judge.check_held_out(windows.hashes, f"the held-out text {windows.source}")
    ids: list[list[int]] = windows.tokens.tolist()
    return judged([decode(tokenizer, row) for row in ids], ids, judge)


def judged(texts: Sequence[str], ids: Sequence[Sequence[int]], judge: Judge) -> dict[str, float]:
    """Nats per judge token over all texts, half of its 95% interval over texts, entropy of the model's tokens.

    Per character the texts of models with different vocabularies compare: 64 longer tokens are more text.
    """
    scores = judge.score(texts)
    nats = [s.nll for s in scores]
    found = ratio(nats, [s.tokens for s in scores], range(len(scores)), "texts")
    return {
        "nll": found.value,
        "nll_per_character": math.fsum(nats) / sum(map(len, texts)),
        "half": found.width / 2,
        "entropy": token_entropy(table(ids)),
    }


def draw(points: Sequence[dict[str, Any]], real: dict[str, float], path: Path) -> None:
    """AR-NLL against training FLOPs on a logarithmic axis, with real text as a line."""
    with figure(
        path,
        "Likelihood of the text against the compute of training",
        "training FLOPs (matrix products)",
        "AR-NLL (nats per judge token)",
    ) as axes:
        sizes = sorted({p["parameters"] for p in points})
        for i, size in enumerate(sizes):
            line = [p for p in points if p["parameters"] == size]  # another size is another line
            axes.errorbar(
                [p["flops"] for p in line],
                [p["nll"] for p in line],
                yerr=[p["half"] for p in line],
                marker="o",
                capsize=3,
                color=PALETTE[i % 7],
                label=f"unconditional samples, {size / 1e6:.1f}M parameters",
            )
        axes.axhline(real["nll"], color=PALETTE[7], linestyle=LINES[1], label="held-out real text")
        axes.set_xscale("log")
        low, high = (math.log10(f(p["flops"] for p in points)) for f in (min, max))
        # Whole decades, which carry the labels.
        axes.set_xlim(10 ** math.floor(low), 10 ** (math.floor(high) + 1))
        axes.set_ylim(0, None)


if __name__ == "__main__":
    sys.exit(main())
