"""What is refused before anything is trained or measured: what could only fail, or mislead, after hours."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.config import Config
from ddlm.reproduce.recipes import MAIN, Recipe, configuration, settings
from ddlm.reproduce.trainings import refuse_others
from ddlm.reproduce.weights import Weights
from ddlm.reproduce.workshop import Workshop
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from ddlm.evaluation.judges import Judge


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
    _check_plotter(chosen)
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
    if shop.weights is None:
        _check_named(shop, chosen)
    if glue := [r for r in chosen if r.kind == "glue"]:
        _check_glue(glue, glue_data)


def _check_lengths(shop: Workshop) -> None:
    """A training of no length is begun, fails, and leaves a folder that refuses any other length."""
    if shop.steps is not None and shop.steps < 1:
        raise ConfigError(f"--steps {shop.steps} was given, at least 1 is needed")
    if shop.steps is not None and shop.budget is not None:
        raise ConfigError(
            "--steps and --budget exclude each other, the length of a training is either updates or seconds: give one"
        )
    if shop.budget is not None and not (math.isfinite(shop.budget) and shop.budget > 0):
        raise ConfigError(f"--budget {shop.budget:g} was given, more than 0 seconds are needed")


def _check_plotter(chosen: Sequence[Recipe]) -> None:
    """Curves are all that an item of traces shows; figure1 has a table beside its picture and goes without one."""
    for recipe in chosen:
        if recipe.kind == "traces" and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                f"{recipe.name} draws curves and matplotlib is missing: pip install 'ddlm[plots]', or leave it out"
            )


def check_counts(chosen: Sequence[Recipe], prompts: int | None, continuations: int | None) -> None:
    """Refuse numbers of prompts and continuations where no item takes them.

    Raises:
        ConfigError: naming the option.
    """
    from ddlm.evaluation.measure import MOST_SEEDS

    for name, number in (("prompts", prompts), ("continuations", continuations)):
        if number is None:
            continue
        if number < 2:
            raise ConfigError(f"--{name} is {number}, it must be at least 2")
        if name == "continuations" and number > MOST_SEEDS:
            raise ConfigError(f"--{name} is {number}, it must be at most {MOST_SEEDS}")
        if not any(r.needs_text() for r in chosen):
            raise ConfigError(
                f"--{name} is for items that read held-out text, {chosen[0].name} does not: leave it out"
            )


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
    config = _main(shop)
    if shards.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{shop.data} has {shards.vocab_size} ids, the scale {shop.scale} has {config.model.vocab_size}:"
            f" prepare the data with --vocab_size {config.model.vocab_size}"
        )


def _main(shop: Workshop) -> Config:
    return configuration(shop.scale, MAIN, shop.data, shop.steps, shop.budget)


def _check_named(shop: Workshop, chosen: Sequence[Recipe]) -> None:
    """What is named beside a training and would fail after it: held-out text, judge, feature model."""
    from ddlm.data.shards import TokenShards
    from ddlm.evaluation.judges import refuse_seen
    from ddlm.evaluation.protocol import held_out

    judge = _check_judges(shop) if any(r.kind == "measure" for r in chosen) else None
    if not any(r.needs_text() for r in chosen):
        return
    tokenizer, length = TokenShards(shop.data).tokenizer, _main(shop).model.length
    windows = held_out(shop.held_out_text, tokenizer, length, shop.protocol.prompts)
    what = f"the held-out text {windows.source}"
    if judge is not None:
        judge.check_held_out(windows.hashes, what)
    if shop.baseline not in (None, "none"):
        refuse_seen(Path(str(shop.baseline)), windows.hashes, what)


def _check_judges(shop: Workshop) -> Judge | None:
    """Find the models that judge, as far as they are not trained here; the weights are loaded when they are needed."""
    from ddlm.evaluation.extras import missing_extra, quiet, why_not_loaded
    from ddlm.evaluation.hub import local_folder
    from ddlm.evaluation.judges import Judge

    name, features = shop.judge_names()
    trained = str(shop.training_folder("judge")) if shop.judge_trained_here else None
    judge = None
    if name not in ("none", trained):
        judge = Judge(name, precision=shop.precision)
        _refuse_unfinished(judge.folder, f"the judge {name}")
    if features not in ("none", trained, name):
        folder, _ = local_folder(features, what="feature model", flag="--features")
        transformers = missing_extra("transformers", "eval")
        try:
            with quiet():
                transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
                transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the Rust parser of tokenizers raises bare ones
            raise ConfigError(
                f"the feature model {features} cannot be loaded: {why_not_loaded(error)}"
            ) from error
        _refuse_unfinished(folder, f"the feature model {features}")
    return judge


def _refuse_unfinished(folder: Path, what: str) -> None:
    if not any(folder.glob("model*.safetensors")):
        raise ConfigError(f"{what} has no weights (model.safetensors): finish it or name another")


def _check_given(shop: Workshop, chosen: Sequence[Recipe]) -> None:
    """With given weights nothing is trained: what would be has to be named."""
    measured = [r.name for r in chosen if r.kind == "measure"]
    if measured and shop.judge_trained_here:
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
    from ddlm.data.shards import TokenShards
    from ddlm.data.tokenizer import Tokenizer
    from ddlm.evaluation.baseline import read_plan

    if not any(r.needs_baseline() for r in chosen):
        raise ConfigError(
            "--baseline is for autoregressive rows, and no item named has one: leave it out"
        )
    if shop.baseline == "none":
        return
    folder = Path(str(shop.baseline))
    if not (folder / "plan.json").is_file():
        raise ConfigError(f"{folder} is not a folder of `ddlm baseline`: it has no plan.json")
    if shop.weights is not None:
        beside, wanted = shop.weights.path, Tokenizer.load(shop.weights.folder).hash
        length = shop.weights.config.model.length
    else:
        beside, wanted = shop.data, TokenShards(shop.data).tokenizer_hash
        length = _main(shop).model.length
    if Tokenizer.load(folder).hash != wanted:
        raise ConfigError(
            f"{folder} and {beside} have different tokenizers: their numbers would not compare"
        )
    try:
        found = read_plan(folder).length
    except (ValueError, TypeError):
        raise ConfigError(f"{folder}/plan.json is damaged: name another --baseline") from None
    if found != length:
        raise ConfigError(
            f"{folder} writes {found} tokens, the diffusion model {length}: name a baseline of that model.length"
        )
    _refuse_unfinished(folder, f"the baseline {folder}")


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
