"""``ddlm demo``: from the bundled books to generated text in a few minutes, every part of the system once."""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.commands.demo_folder import choose, empty, shipped_weights, write_note

if TYPE_CHECKING:
    from rich.console import Console

    from ddlm.config import Config
    from ddlm.data.shards import TokenShards
    from ddlm.lm import DiffusionLM

# beside the shipped weights: writes better, too large to train in a demonstration
LARGER = "ddlm-small"
COMPILE_FROM = 120.0  # seconds of budget from which compiling for half a minute pays
FURTHER_LR = 3e-4  # of weights that are trained already: a new run's rate would undo them
# Held out of the bundled books. The shipped weights have read those books: what is held out from them says what the
# demonstration's own training does.
VAL_FRACTION, VAL_FRACTION_OF_WEIGHTS = 0.02, 0.01


def demo(
    *,
    model: str | None = None,
    out: Path = Path("runs/demo"),
    budget: float = 240.0,
    steps: int = 100,
    patience: int = 15,
    seed: int = 0,
    fresh: bool = False,
) -> int:
    """Let a model write, train a small one on bundled books for a few minutes, measure and draw what it does.

    Where models/ddlm-tiny and models/ddlm-small are, ddlm-small writes first, with its own settings, and ddlm-tiny is
    trained further: ddlm-small is too large to train in minutes on a CPU. Other weights write first themselves, then
    they are trained further. Without weights the tiny model is trained from nothing.

    The run folder holds config.yaml, metrics.jsonl, checkpoints/, samples/, report.json and plots/. Ctrl-C leaves a
    checkpoint and the same command goes on from it; a run whose budget is spent is not trained again, only sampled.

    Args:
        model: Model folder, run folder or hub id to start from, or none to train from nothing; not given:
            models/ddlm-tiny here or at the root of the checkout, where it exists.
        out: Run folder.
        budget: Wall-clock time of the training, in seconds.
        steps: Sampling steps allowed for each sequence.
        patience: A sequence ends early when no token has switched for so many steps.
        seed: Seed of the training and of the samples; a run that is there goes on with its own only.
        fresh: Delete the demonstration that is there and start anew.
    """
    began = time.monotonic()
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    from ddlm import lm as language_model
    from ddlm import showcase

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal knows ⟦ or has the letters
    console = Console(highlight=False)
    _check(budget, steps, patience, seed)
    chosen = choose(model, out, seed, fresh=fresh)
    larger = _larger(chosen) if model is None else None
    again = _again(
        out=str(out), budget=budget, steps=steps, patience=patience, seed=seed, model=model
    )
    numbers = itertools.count(1)

    def chapter(title: str) -> None:
        console.rule(Text(f"{next(numbers)}. {title}"), align="left")

    facts: dict[str, Any] = {"model": chosen, "writes_first": larger or chosen}
    try:
        threads = _set_threads()
        writer = None if larger is None else language_model.load(larger)
        given = None if chosen is None else language_model.load(chosen)
        if fresh:  # not before the weights are known to load
            empty(out)
        write_note(out, chosen, seed)
        if writer is not None:
            shown = _write_first(writer, str(larger), seed, out, chapter, console)
            facts["first_text_seconds"] = shown - began
            facts["first_samples_seconds"] = time.monotonic() - began
        elif given is not None:
            chapter(f"text condenses out of noise, with the weights of {chosen}")
            showcase.watch(given, steps, patience, seed, console)
        chapter("the bundled books become token shards")
        shards = _prepare(out, given, console)
        if given is not None and writer is None:
            chapter("the same weights continue and fill in held-out text (⟦written⟧)")
            first = showcase.write(
                given, shards, steps, patience, seed, console, showcase.FIRST, "first-"
            )
            showcase.show_texts(first, console)
            facts["first_samples_seconds"] = time.monotonic() - began
        chapter(_training(chosen, larger, budget))
        if writer is not None and given is not None:
            showcase.explain_smaller(writer, given, console)
        config = _configuration(out, given, budget, seed, threads)
        stopped = _train(config, out, chosen, again, console)
        if stopped:
            return 128 + stopped
        _show_trained(
            language_model.load(out), shards, steps, patience, seed, facts, chapter, console
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; go on with: {again}") from None
    where, command = escape(str(out)), escape(_next_command(out))
    console.print(
        f"\nEverything is in [bold]{where}[/]. Write more: [bold]{command}[/]", soft_wrap=True
    )
    return 0


def _check(budget: float, steps: int, patience: int, seed: int) -> None:
    """Refuse numbers that would fail only after the training.

    Raises:
        ConfigError: naming the option, what was given and what is needed.
    """
    from ddlm.config import MOST_STEPS
    from ddlm.types import ConfigError

    # One step has no switch to draw. The last sample has the seed of the first and a few dozen more.
    for option, value, least, most in (
        ("steps", steps, 2, MOST_STEPS),
        ("patience", patience, 1, MOST_STEPS),
        ("seed", seed, 0, 2**62),
    ):
        if value < least:
            raise ConfigError(f"--{option} {value} was given, at least {least} is needed")
        if value > most:
            raise ConfigError(f"--{option} {value} was given, at most {most} is possible")
    if not budget > 0:
        raise ConfigError(f"--budget {budget:g} was given, more than 0 seconds are needed")


def _larger(chosen: str | None) -> str | None:
    """Folder of the larger weights beside the shipped ones, None where they are not or others were chosen."""
    shipped = shipped_weights()
    if chosen is None or shipped is None or Path(chosen).resolve() != Path(shipped).resolve():
        return None
    folder = Path(chosen).parent / LARGER
    return str(folder) if (folder / "manifest.json").is_file() else None


def _write_first(
    lm: DiffusionLM,
    name: str,
    seed: int,
    out: Path,
    chapter: Callable[[str], None],
    console: Console,
) -> float:
    """Show what a model writes that is not trained here; returns the time at which its first text stood there."""
    from ddlm import showcase

    chapter(f"text condenses out of noise, with the weights of {name}")
    text = showcase.watch_defaults(lm, seed, console)
    shown = time.monotonic()
    chapter("the same weights continue and fill in a text (⟦written⟧)")
    others = showcase.write_defaults(lm, seed + 1, console)
    showcase.show_texts(others, console)
    showcase.save({"unconditional": [text], **others}, out / "samples", "first-")
    return shown


def _training(chosen: str | None, larger: str | None, budget: float) -> str:
    """Title of the chapter that trains."""
    if chosen is None:
        return f"training the tiny model for {budget:g} seconds"
    weights = "these weights" if larger is None else chosen
    return f"training {weights} further on the books for {budget:g} seconds"


def _prepare(out: Path, given: DiffusionLM | None, console: Console) -> TokenShards:
    """Token shards of the bundled books, with the given model's tokenizer or one that is trained on them."""
    from ddlm.config import load_config
    from ddlm.data import bundled_corpus
    from ddlm.data.prepare import prepare
    from ddlm.data.shards import TokenShards

    report = prepare(
        [str(bundled_corpus())],
        out / "data",
        tokenizer=None if given is None else given.tokenizer,
        vocab_size=load_config("tiny").model.vocab_size,
        val_fraction=VAL_FRACTION if given is None else VAL_FRACTION_OF_WEIGHTS,
        progress=True,
    )
    console.print(
        f"{report.documents:,} documents, {report.tokens:,} tokens, {report.val_documents:,} documents held out"
    )
    return TokenShards(out / "data")


def _configuration(
    out: Path, given: DiffusionLM | None, budget: float, seed: int, threads: int
) -> Config:
    """The tiny recipe; for given weights their own architecture, noise and masks, and a smaller learning rate."""
    from ddlm.config import load_config

    config = load_config(
        "tiny",
        {
            "data.path": str(out / "data"),
            "train.budget": budget,
            "train.seed": seed,
            "train.compile": budget >= COMPILE_FROM and _can_compile(),
            "train.threads": threads,
        },
    )
    if given is None:
        return config
    config.train.lr = min(config.train.lr, FURTHER_LR)
    return dataclasses.replace(given.config, data=config.data, train=config.train)


def _train(config: Config, out: Path, initial: str | None, again: str, console: Console) -> int:
    """Train for the rest of the budget; returns the signal that stopped it, 0 when it is spent."""
    from ddlm.training.loop import signal_name, train

    result = train(config, out, initial=initial)
    if result.stopped:
        line = f"{signal_name(result.stopped)}: checkpoint {result.checkpoint}, go on with: {again}"
    else:
        line = f"{result.step:,} step{'' if result.step == 1 else 's'}, {result.checkpoint}"
    console.print(line, markup=False, soft_wrap=True)
    return result.stopped


def _again(**options: str | float | None) -> str:
    """The command that goes on with a demonstration: what differs from the defaults."""
    defaults = inspect.signature(demo).parameters
    given: list[str] = []
    for name, value in options.items():
        if str(value) != str(defaults[name].default):
            given += [f"--{name}", f"{value:.12g}" if isinstance(value, float) else str(value)]
    return shlex.join(["ddlm", "demo", *given])


def _set_threads() -> int:
    """Let torch use as many threads as cores are free; returns their number, 0 where the environment says it."""
    import torch

    if os.environ.get("OMP_NUM_THREADS"):
        return 0
    # Small models are many times slower on more threads than free cores.
    threads = max(1, round(_free_cores()))
    torch.set_num_threads(threads)
    return threads


def _can_compile() -> bool:
    """Whether torch.compile finds a compiler and the machine is free enough that the wait pays."""
    import torch

    from ddlm.device import can_compile

    return can_compile(torch.device("cpu")) and _free_cores() > 0.5


def _free_cores() -> float:
    """Cores that other programs leave; all of them where the system does not tell its load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (os.cpu_count() or 1) - load


def _show_trained(
    lm: DiffusionLM,
    shards: TokenShards,
    steps: int,
    patience: int,
    seed: int,
    facts: Mapping[str, Any],
    chapter: Callable[[str], None],
    console: Console,
) -> None:
    """Let what was trained write, measure it, draw it, and report all of it beside ``facts``."""
    from ddlm import showcase

    out = Path(shards.folder).parent
    chapter("text condenses out of noise, with the weights just trained")
    showcase.watch(lm, steps, patience, seed, console)
    texts = showcase.write(lm, shards, steps, patience, seed, console)
    trajectories, agreement = showcase.follow(lm, texts["unconditional"], steps, out)
    results = {**facts, **showcase.measure(out, texts, shards, lm.length, steps)}
    results["same_as_full_run"] = agreement
    chapter("samples (written text in colour and between ⟦⟧)")
    showcase.show_texts(texts, console)
    chapter("measures")
    showcase.show_measures(results, console)
    showcase.draw(out, trajectories, texts["unconditional"], console)
    _report(out, lm, results)


def _report(out: Path, lm: DiffusionLM, results: Mapping[str, Any]) -> None:
    from ddlm.record import make_record, write_record

    write_record(out / "report.json", make_record("demo", lm.config, results))


def _next_command(out: Path) -> str:
    return f'ddlm generate "She looked at the {{32}}" --model {shlex.quote(str(out))}'
