"""What is refused before anything is trained or measured: what could only fail, or mislead, after hours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddlm.reproduce.recipes import MAIN, Recipe, configuration, settings
from ddlm.reproduce.trainings import refuse_others
from ddlm.reproduce.weights import Weights
from ddlm.reproduce.workshop import Workshop
from ddlm.types import ConfigError


def check(shop: Workshop, chosen: Sequence[Recipe] = (), glue_data: Path | None = None) -> None:
    """Refuse what could only fail after hours.

    Args:
        shop: Where everything of the scale lies.
        chosen: The items that are wanted.
        glue_data: Folder of GLUE for the items that fine-tune on it; None: the hub.

    Raises:
        ConfigError: for data or models that are not there or do not fit, and for a folder of another model's results.
    """
    settings(shop.protocol.settings, {})
    _check_lengths(shop)
    if shop.weights is not None:
        for recipe in chosen:
            refuse_comparison(recipe)
        _check_given(shop, chosen)
    else:
        _check_data(shop)
    refuse_mixture(shop.folder, shop.weights)
    if shop.weights is None:
        refuse_others(shop, chosen)
    if shop.baseline is not None:
        _check_baseline(shop, chosen)
    if glue := [r for r in chosen if r.kind == "glue"]:
        _check_glue(glue, glue_data)


def _check_lengths(shop: Workshop) -> None:
    """A training of no length is begun, fails, and leaves a folder that refuses any other length."""
    if shop.steps is not None and shop.steps < 1:
        raise ConfigError(f"--steps {shop.steps} was given, at least 1 is needed")
    if shop.budget is not None and not (math.isfinite(shop.budget) and shop.budget > 0):
        raise ConfigError(f"--budget {shop.budget:g} was given, more than 0 seconds are needed")


def _check_glue(chosen: Sequence[Recipe], source: Path | None) -> None:
    """Read every task as the fine-tuning will, and whether GLUE's server would take the predictions."""
    from ddlm.downstream.glue import find_tasks, read_task

    submits = [r.name for r in chosen if r.raw.get("submit")]
    for task in find_tasks("all"):
        try:
            data = read_task(task, source)
        except ConfigError as error:
            # the option has another name in `ddlm finetune`
            why = str(error).replace("--data", "--glue_data")
            raise type(error)(f"{chosen[0].name}: {why}") from None
        missing = [s for s in task.test_splits if s not in data.splits]
        lacks = data.differences or [f"it has no {' and no '.join(missing)}"] * bool(missing)
        if submits and lacks:
            raise ConfigError(
                f"{submits[0]} writes predictions for GLUE's server, which needs GLUE's own data; {task.name} in "
                f"{source or 'the hub'} is a part of it ({lacks[0]}): name the whole with --glue_data, or leave it "
                "out to read the hub"
            )


def _check_data(shop: Workshop) -> None:
    from ddlm.data.shards import TokenShards

    shards = TokenShards(shop.data)
    config = configuration(shop.scale, MAIN, shop.data, shop.steps, shop.budget)
    if shards.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{shop.data} has {shards.vocab_size} ids, the scale {shop.scale} has {config.model.vocab_size}:"
            f" prepare the data with --vocab_size {config.model.vocab_size}"
        )


def _check_given(shop: Workshop, chosen: Sequence[Recipe]) -> None:
    """With given weights nothing is trained: what would be has to be named."""
    measured = [r.name for r in chosen if r.kind == "measure"]
    if measured and shop.judge == "auto" and shop.judged_here:
        raise ConfigError(
            f"{measured[0]} needs a judge and with --model none is trained: --judge PATH (such as a folder of"
            " `ddlm baseline`), or --judge none"
        )
    if measured:
        shop.open_judges()  # a judge that is not there is named now
    rows = [r.name for r in chosen if r.needs_baseline()]
    if rows and shop.baseline is None:
        raise ConfigError(
            f"{rows[0]} has autoregressive rows and with --model none is trained: --baseline PATH (a folder of"
            " `ddlm baseline`), or --baseline none"
        )
    text = [r.name for r in chosen if r.needs_text()]
    if text and not shop.held_out_text:
        raise ConfigError(
            f"{text[0]} reads held-out text and {shop.weights and shop.weights.path} does not lead to any:"
            " name prepared shards or raw text with --held_out"
        )


def _check_baseline(shop: Workshop, chosen: Sequence[Recipe]) -> None:
    from ddlm.data.tokenizer import Tokenizer

    if not any(r.needs_baseline() for r in chosen):
        raise ConfigError(
            "--baseline is for autoregressive rows, and no item named has one: leave it out"
        )
    if shop.baseline == "none":
        return
    folder = Path(str(shop.baseline))
    if not (folder / "plan.json").is_file():
        raise ConfigError(f"{folder} is not a folder of `ddlm baseline`: it has no plan.json")
    if (
        shop.weights is not None
        and Tokenizer.load(folder).hash != Tokenizer.load(shop.weights.folder).hash
    ):
        raise ConfigError(
            f"{folder} and {shop.weights.path} have different tokenizers: their numbers would not compare"
        )


def refuse_comparison(recipe: Recipe) -> None:
    """Refuse an item that one model cannot be all rows of.

    Raises:
        ConfigError: saying why.
    """
    if recipe.of_one_model():
        return
    what = (
        "fine-tunes models that were pretrained differently (one model: `ddlm finetune`)"
        if recipe.kind == "glue"
        else f"compares {len(recipe.trainings())} trainings"
    )
    raise ConfigError(f"{recipe.name} {what}, --model gives one: leave --model out")


def refuse_mixture(folder: Path, weights: Weights | None) -> None:
    """Refuse a folder with results of another model, so that no two tables in it are of different ones.

    Raises:
        ConfigError: naming the record, whose it is, and what to change.
    """
    wanted = None if weights is None else weights.hash
    for file in sorted([*folder.glob("table*.json"), *folder.glob("figure*.json")]):
        try:
            config = json.loads(file.read_text("utf-8"))["config"]
            found = config.get("weights")
            there = None if found is None else found["hash"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{file} is not a record of ddlm: take it out of {folder} or name another --out"
            ) from None
        if there != wanted:
            raise ConfigError(
                f"{file} holds results of {_whose(found)}, not of {_whose(weights and weights.describe())}:"
                " name another folder with --out"
            )


def _whose(weights: Any) -> str:
    if not weights:
        return "models trained there"
    step = "" if weights["step"] is None else f"step {weights['step']:,}, "
    return f"{weights['path']} ({step}hash {weights['hash'][:12]})"
