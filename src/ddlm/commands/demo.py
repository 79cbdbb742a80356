"""``ddlm demo``: from the bundled books to generated text in a few minutes, every part of the system once."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ddlm.data.shards import TokenShards
    from ddlm.lm import DiffusionLM

COMPILE_FROM = 120.0  # seconds of budget from which compiling for half a minute pays


def demo(
    *,
    out: Path = Path("runs/demo"),
    budget: float = 240.0,
    steps: int = 100,
    patience: int = 15,
    seed: int = 0,
    fresh: bool = False,
) -> int:
    """Train the tiny model on bundled books for a few minutes, let it write, measure and draw what it does.

    The run folder holds config.yaml, metrics.jsonl, checkpoints/, samples/, report.json and plots/. Ctrl-C leaves a
    checkpoint and the same command goes on from it; a run whose budget is spent is not trained again, only sampled.

    Args:
        out: Run folder.
        budget: Wall-clock time of the training, in seconds.
        steps: Sampling steps allowed for each sequence.
        patience: A sequence ends early when no token has switched for so many steps.
        seed: Seed of the training and of the samples.
        fresh: Delete the run that is there and start anew.
    """
    from rich.console import Console

    from ddlm import lm as language_model
    from ddlm import showcase

    console = Console(highlight=False)
    if fresh and (out / "config.yaml").is_file():
        shutil.rmtree(out)
    try:
        shards = _prepare(out, console)
        stopped = _train(out, budget, seed, console)
        if stopped:
            return 128 + stopped
        lm = language_model.load(out)
        showcase.watch(lm, steps, patience, seed, console)
        texts = showcase.write(lm, shards, steps, patience, seed, console)
        trajectories, agreement = showcase.follow(lm, texts["unconditional"], steps, out)
        results = showcase.measure(out, texts, shards, lm.length, steps) | {
            "same_as_full_run": agreement
        }
        showcase.show(results, texts, console)
        showcase.draw(out, trajectories, texts["unconditional"], console)
        _report(out, lm, results)
    except KeyboardInterrupt:
        again = f"ddlm demo --out {shlex.quote(str(out))} --budget {budget:g}"
        raise KeyboardInterrupt(f"interrupted; go on with: {again}") from None
    console.print(f"\nEverything is in [bold]{out}[/]. Write more: [bold]{_next_command(out)}[/]")
    return 0


def _prepare(out: Path, console: Console) -> TokenShards:
    """Token shards of the bundled books, with a tokenizer of the tiny model's size trained on them."""
    from ddlm.config import load_config
    from ddlm.data import bundled_corpus
    from ddlm.data.prepare import prepare
    from ddlm.data.shards import TokenShards

    console.rule("1. the bundled books become token shards", align="left")
    report = prepare(
        [str(bundled_corpus())],
        out / "data",
        vocab_size=load_config("tiny").model.vocab_size,
        val_fraction=0.02,
        progress=True,
    )
    console.print(
        f"{report.documents:,} documents, {report.tokens:,} tokens, {report.val_documents:,} documents held out"
    )
    return TokenShards(out / "data")


def _train(out: Path, budget: float, seed: int, console: Console) -> int:
    """Train for the rest of the budget; returns the signal that stopped it, 0 when it is spent."""
    from ddlm.config import load_config
    from ddlm.training.loop import signal_name, train

    config = load_config(
        "tiny",
        {
            "data.path": str(out / "data"),
            "train.budget": budget,
            "train.seed": seed,
            "train.compile": budget >= COMPILE_FROM and _can_compile(),
            # Small models are many times slower on more threads than free cores.
            "train.threads": 0
            if os.environ.get("OMP_NUM_THREADS")
            else max(1, round(_free_cores())),
        },
    )
    console.rule(f"2. training the tiny model for {budget:g} seconds", align="left")
    result = train(config, out)
    if result.stopped:
        again = f"ddlm demo --out {shlex.quote(str(out))} --budget {budget:g}"
        console.print(
            f"{signal_name(result.stopped)}: checkpoint {result.checkpoint}, go on with: {again}"
        )
    else:
        console.print(f"{result.step:,} steps, {result.checkpoint}")
    return result.stopped


def _can_compile() -> bool:
    """Whether torch.compile finds a compiler and the machine is free enough that the wait pays."""
    import torch

    from ddlm.training.speed import can_compile

    return can_compile(torch.device("cpu")) and _free_cores() > 0.5


def _free_cores() -> float:
    """Cores that other programs leave; all of them where the system does not tell its load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (os.cpu_count() or 1) - load


def _report(out: Path, lm: DiffusionLM, results: Mapping[str, Any]) -> None:
    from ddlm.record import make_record, write_record

    write_record(out / "report.json", make_record("demo", lm.config, results))


def _next_command(out: Path) -> str:
    return f'ddlm generate "She looked at the {{32}}" --model {shlex.quote(str(out))}'
