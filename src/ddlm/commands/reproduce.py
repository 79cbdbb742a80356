"""``ddlm reproduce``: the paper's tables and figures at any scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ddlm.reproduce.weights import Weights


def reproduce(
    items: list[str] | None = None,
    *,
    model: str | None = None,
    baseline: str | None = None,
    scale: Literal["tiny", "small", "base"] = "tiny",
    budget: float | None = None,
    steps: int | None = None,
    data: Path | None = None,
    held_out: str | None = None,
    out: Path | None = None,
    judge: str = "auto",
    features: str = "auto",
    prompts: int | None = None,
    continuations: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    model_precision: Literal["fp32", "bf16"] | None = None,
    glue_data: Path | None = None,
    speed: Path | None = None,
    hub: bool = False,
    list: bool = False,
) -> None:
    """Train what is missing, go on with what was interrupted, measure, and write the table beside the paper's numbers.

    ddlm reproduce --list

    ddlm reproduce table3 table8 --scale tiny --data shards --steps 3000

    ddlm reproduce table8 figure2 --model models/ddlm-tiny --judge models/ddlm-tiny-ar --held_out shards

    Args:
        items: table1 ... table8, figure1 ... figure3.
        model: Trained weights for the main model: folder, run folder or hub id; then nothing is trained, and only items
            whose rows all come from that model (table1, table4, table5, table8, figures) can be made.
        baseline: Folder of `ddlm baseline` for the autoregressive rows of table5, or none to leave them out; unset:
            trained here.
        scale: Configuration that models are trained with; with --model: how much is sampled.
        budget: Seconds of training for the whole item, shared evenly among its models; none: the configuration's.
        steps: Updates of every model instead: equal work, also on a busy machine.
        data: Shards for training, made with `ddlm prepare`.
        held_out: Text that prompts come from: shards (their held-out split) or files; unset: the same as --data, with
            --model else the shards it was trained on.
        out: Folder of the scale's models and results; unset: runs/reproduce/SCALE, with --model runs/reproduce/NAME.
        judge: For AR-NLL: folder, hub id, smollm2, none, or auto (tiny and small: trained here; base: GPT-Neo-1.3B).
        features: For MAUVE: folder, hub id, smollm2, none, or auto (tiny and small: the judge; base: gpt2-large).
        prompts: Held-out windows, instead of the scale's number; of table4, which shows them, instead of 8.
        continuations: Samples for each prompt, instead of 5; of table4 instead of 1.
        precision: Of the judge's forward pass.
        model_precision: Of the diffusion models' matrix products; none: bf16 where the device has instructions for it.
        glue_data: Folder of GLUE for table6 and table7; none: from the hub.
        speed: Record of `ddlm benchmark sample`, for the right part of figure3; none: measured here if the model is
            small.
        hub: Also fine-tune the models that table6 takes from the hub.
        list: Print what every item needs, and stop.
    """
    from dataclasses import replace

    from ddlm.reproduce import items as work
    from ddlm.reproduce.checks import check, check_counts, refuse_comparison
    from ddlm.reproduce.recipes import SIZES, find
    from ddlm.reproduce.weights import read_weights
    from ddlm.reproduce.workshop import Workshop
    from ddlm.types import ConfigError

    if list:
        _print_list(scale)
        return
    if not items:
        raise ConfigError("name what to reproduce, such as table3; see ddlm reproduce --list")
    chosen = [find(name) for name in items]
    if model is None and data is None:
        raise ConfigError("name the prepared shards: --data DIR (made with `ddlm prepare`)")
    if speed is not None and not any(recipe.name == "figure3" for recipe in chosen):
        raise ConfigError("--speed is for figure3, and it is not among the items: leave it out")
    weights = None
    if model is not None:
        for recipe in chosen:
            refuse_comparison(recipe)
        if steps is not None or budget is not None:
            raise ConfigError(
                "--steps and --budget are for training, with --model nothing is trained: leave them out"
            )
        weights = read_weights(model)
    check_counts(chosen, prompts, continuations)
    given = {"prompts": prompts, "continuations": continuations}
    counts: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    protocol = replace(SIZES[scale].protocol, **counts)
    shop = Workshop(
        scale=scale,
        folder=out or Path("runs/reproduce") / (weights.name if weights else scale),
        data=str(data or ""),
        held_out_text=held_out or str(data or "") or _trained_on(weights),
        protocol=protocol,
        steps=steps,
        budget=budget,
        judge=judge,
        features=features,
        precision=precision,
        model_precision=model_precision,
        weights=weights,
        baseline=baseline,
    )
    check(shop, chosen, glue_data)
    if speed is not None:
        from ddlm.analysis.gallery import read_speed

        read_speed(speed)  # before hours of training
    for recipe in chosen:
        written = work.reproduce_item(recipe, shop, {"data": glue_data, "hub": hub}, counts, speed)
        print(f"{shop.folder}: {', '.join(written)}")


def _trained_on(weights: Weights | None) -> str:
    """The shards that given weights were trained on, where they are here."""
    path = weights.config.data.path if weights else ""
    return path if path and Path(path).is_dir() else ""


def _print_list(scale: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from ddlm.reproduce.costs import explanation
    from ddlm.reproduce.items import listing

    heads, lines = listing(scale)
    console = Console(highlight=False)
    # On 80 columns there is room for the longest words, without space around them. A name that is longer is folded,
    # since one that was cut off could not be looked up.
    narrow = console.width < 120
    table = Table(title=f"scale {scale}", title_justify="left", padding=0 if narrow else (0, 1))
    for head, width in zip(heads, (7, 16, 14, 8, 11, 4, 12), strict=True):
        table.add_column(head, overflow="fold", width=width if narrow else None)
    for line in lines:
        table.add_row(*line[:-1], line[-1].replace(", ", "\n"))
    console.print(table)
    console.print(explanation(scale))
