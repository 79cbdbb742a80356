"""How fast the harness fine-tunes a DDLM beside a BERT with the same layers, width, heads, tokens and batches.

``python -m ddlm.downstream.speed --model DIR --data GLUE_FOLDER`` runs the two in turns and writes a record.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ddlm.allocator import keep_freed_blocks
from ddlm.device import resolve_precision
from ddlm.downstream.finetune import Setting, finetune
from ddlm.downstream.glue import TASKS, GlueData, read_task
from ddlm.downstream.models import Source, find_source
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError

_WARMUP = 3
"""Steps that are not timed."""

_DEVICE: Literal["cpu"] = "cpu"
"""Also where there is a GPU: processor time says little of one."""


def compare(model: str, data: GlueData, setting: Setting, rounds: int) -> dict[str, object]:
    """Tokens per second of training, DDLM and BERT in turns; evaluation and loading are not counted.

    Args:
        model: DDLM folder; speed does not depend on its weights.
        data: What is trained on.
        setting: One epoch of it is a round.
        rounds: Turns of each model.

    Returns:
        Tokens a second of wall-clock and of processor time for both, medians and the ratio DDLM / BERT of each turn.

    Raises:
        ConfigError: when a round is too short to be timed, or there is none.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds} was given, at least 1 is needed")
    examples = len(data.splits["train"])
    steps = setting.epochs * -(-examples // setting.batch)
    if steps <= _WARMUP:
        raise ConfigError(
            f"{examples} training examples in batches of {setting.batch} are {steps} steps, at least {_WARMUP + 1} "
            "are needed: give a larger --limit or more data"
        )
    ours = find_source(model)
    if ours.config is None:
        raise ConfigError(f"{model} is not a DDLM, which is what is compared with a BERT: name one")
    # The metric is not timed: a few examples of it are enough.
    few = {n: s.head(64) if n in data.task.validation_splits else s for n, s in data.splits.items()}
    data = GlueData(data.task, few, [*data.differences, "validation is cut for the measurement"])
    with tempfile.TemporaryDirectory() as folder:
        bert = _bert_like(ours, data, Path(folder))
        seconds: dict[str, list[tuple[float, float, float]]] = {"ddlm": [], "bert": []}
        for turn in range(rounds):
            pair = [("ddlm", ours), ("bert", bert)]
            for name, source in pair if turn % 2 == 0 else reversed(pair):
                seconds[name].append(_measure(source, data, setting))
    out: dict[str, object] = {}
    for i, kind in enumerate(("wall", "cpu"), 1):
        rates = {n: [x[0] / x[i] for x in rows] for n, rows in seconds.items()}
        ratios = [a / b for a, b in zip(rates["ddlm"], rates["bert"], strict=True)]
        out[kind] = {
            "ddlm_tokens_per_second": statistics.median(rates["ddlm"]),
            "bert_tokens_per_second": statistics.median(rates["bert"]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    classifier = ours.classifier(data.task, 1.0, setting.pooling, setting.segments)
    in_use = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    out["parameters_in_use"] = {"ddlm": in_use, "bert": bert_parameters(ours)}
    return out


def _measure(source: Source, data: GlueData, setting: Setting) -> tuple[float, float, float]:
    """Tokens of one epoch after its first steps, and the wall-clock and processor seconds they took."""
    marks: list[tuple[float, float, float]] = []

    def tell(share: float, line: str) -> None:
        if not line:
            marks.append((share, time.perf_counter(), time.process_time()))

    finetune(source, data, setting, progress=tell, device=_DEVICE)
    # The sampler puts its longest batch first, and first steps pay for allocation: they are left out.
    first, last = marks[_WARMUP - 1], marks[-1]
    tokens = sum(
        len(e["input_ids"]) for e in source.encoder(data.splits["train"].texts, setting.length)
    )
    return tokens * (last[0] - first[0]), last[1] - first[1], last[2] - first[2]


def _bert_config(ours: Source) -> Any:
    from transformers import BertConfig

    assert ours.config is not None
    model = ours.config.model
    return BertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.feed_forward,
        max_position_embeddings=512,
        # The DDLM's network has no dropout: BERT's own 0.1 would make it the slower one.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def bert_parameters(ours: Source) -> int:
    """Parameters of the BERT that a DDLM is compared with."""
    from transformers import BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(_bert_config(ours))
    return sum(p.numel() for p in model.parameters())


def _bert_like(ours: Source, data: GlueData, folder: Path) -> Source:
    """A random BERT of the same sizes with the same tokenizer, as a folder for AutoModel.

    Raises:
        ConfigError: when transformers does not read the tokenizer, or reads other ids with it.
    """
    from transformers import BertForSequenceClassification

    BertForSequenceClassification(_bert_config(ours)).save_pretrained(folder)
    ours.encoder.save(folder)
    few = tuple(column[:8] for column in data.splits["train"].texts)
    try:
        bert = find_source(str(folder), name="bert")
        ids = [[row["input_ids"] for row in s.encoder(few, 512)] for s in (bert, ours)]
        same = ids[0] == ids[1]
        why = "it reads other ids with it"
    except ConfigError as error:
        same, why = False, str(error).replace(str(folder), "the BERT")
    if not same:
        raise ConfigError(
            f"transformers cannot give a BERT the tokenizer of {ours.label} ({why}): compare a model whose tokenizer "
            "is a tokenizer.json"
        )
    return bert


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the comparison; its exit status is 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m ddlm.downstream.speed", description=__doc__)
    parser.add_argument("--model", required=True, help="DDLM folder")
    parser.add_argument("--data", required=True, help="folder with <task>/<split>.jsonl.gz")
    parser.add_argument("--task", default="mrpc", choices=list(TASKS))
    parser.add_argument("--limit", type=int, default=640, help="training examples of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="fp32")
    parser.add_argument("--out", default="runs/glue/speed.json")
    args = parser.parse_args(argv)
    keep_freed_blocks()  # as the command line does; both models have it
    try:
        precision = resolve_precision(args.precision, _DEVICE)
        setting = Setting(batch=32, lr=1e-4, time=1.0, seed=0, epochs=1, precision=precision)
        data = read_task(TASKS[args.task], args.data, args.limit)
        results = compare(args.model, data, setting, args.rounds)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_record(args.out, make_record("benchmark-finetune", setting, results))
    print(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
