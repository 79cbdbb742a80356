"""Do classifiers answer inputs that are longer than pretraining's as well? Accuracy by length of the input.

    ddlm finetune --task mrpc --model models/ddlm-tiny --data GLUE_FOLDER ... --save saved
    python benchmarks/input_lengths.py saved/ddlm-tiny/mrpc/* --data GLUE_FOLDER --out benchmarks/input-lengths.json

Folders that ``--save`` wrote are read by ``transformers`` alone, as their users would. ± is one standard error over
inputs: the answers of several models to one input count once, as their mean.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from statistics import stdev

import torch

from ddlm.downstream.glue import TASKS, Split, read_task
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "models",
        nargs="+",
        help="folders that ddlm finetune --save wrote, of one task and tokenizer",
    )
    parser.add_argument("--data", type=Path, required=True, help="GLUE's folder")
    parser.add_argument("--task", choices=sorted(TASKS), default="mrpc")
    parser.add_argument("--border", type=int, default=64, help="tokens of the longest short input")
    parser.add_argument("--out", type=Path, required=True, help="record to write (JSON)")
    arguments = parser.parse_args()
    try:
        split = read_task(TASKS[arguments.task], arguments.data).splits["validation"]
        found = [answers(path, split) for path in arguments.models]
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {}
    for name, wanted in (("short", False), ("long", True)):
        # one row an input, whatever the number of models: their answers to it are alike
        rows = [x for x in zip(*found, strict=True) if (x[0][0] > arguments.border) is wanted]
        shares = [sum(right for _, right, _ in row) / len(row) for row in rows]
        share = sum(shares) / max(len(shares), 1)
        spread = stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
        labels = Counter(row[0][2] for row in rows)
        constant = max(labels.values(), default=0) / max(len(rows), 1)
        results[name] = {
            "inputs": len(rows),
            "models": len(found),
            "accuracy": share,
            "standard_error": spread,
            "commonest_label": constant,
        }
        print(
            f"{name}: {100 * share:.1f} ± {100 * spread:.1f} of {len(rows)} inputs; the commonest label has "
            f"{100 * constant:.1f}"
        )
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    write_record(arguments.out, make_record("input-lengths", settings, results, seed=0))
    return 0


@torch.no_grad()
def answers(folder: str, split: Split) -> list[tuple[int, bool, int]]:
    """Tokens of each input, whether the answer to it is right, and what that would be."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kinds = AutoTokenizer, AutoModelForSequenceClassification
    tokenizer, model = (k.from_pretrained(folder, trust_remote_code=True) for k in kinds)
    model.eval()
    found = []
    for *texts, label in zip(*split.texts, split.labels, strict=True):
        inputs = tokenizer(*texts, truncation=True, return_tensors="pt")
        right = int(model(**inputs).logits.argmax()) == int(label)
        found.append((inputs["input_ids"].shape[1], right, int(label)))
    return found


if __name__ == "__main__":
    sys.exit(main())
