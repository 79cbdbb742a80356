"""What items cost beside their trainings: hours of fine-tuning, sampling and measuring, from counted operations.

Operations are those of :mod:`ddlm.training.flops`, matrix products only; the rate is the scale's
(:class:`ddlm.reproduce.recipes.Size`). Small batches of short texts do not fill a GPU, which takes longer then.
"""

from __future__ import annotations

import inspect
import math

from ddlm.config import Config, ModelConfig
from ddlm.reproduce.milestones import MOST
from ddlm.reproduce.recipes import MAIN, SIZES, Recipe, Size, configuration, settings

TOKENS = {
    "cola": 13.5,
    "sst2": 17.8,
    "mrpc": 76.9,
    "qqp": 37.7,
    "mnli": 48.8,
    "qnli": 69.6,
    "rte": 85.3,
    "stsb": 39.3,
    "wnli": 45.4,
}
"""Mean tokens of an example cut to 128, with the 4,096 pieces models/ddlm-tiny had, over 2,000 training examples (all
where there are fewer; of QNLI validation examples)."""

MEASURING = 20.3 / 5000
"""Processor seconds of a text in MAUVE and in the measures without a network (benchmarks/metrics-speed.json)."""

_JUDGE, _FEATURES = 1.3e9, 0.77e9  # parameters of GPT-Neo-1.3B and gpt2-large, which base takes
_SANITY = 5  # sets of as many texts as there are prompts: the sanity rows, and the references
_SAMPLES_SHOWN = 8  # prompts of table4
_TRACED = 32 * 200  # sequences times steps of one path in figures 1 to 3
_HOUR = 3600


def hours(recipe: Recipe, scale: str) -> float:
    """Hours of fine-tuning, sampling and measuring of an item made alone, its trainings not counted.

    Searches of fine-tuning are counted to their last epoch, though the median rule stops about half of their runs,
    and early exit as if no sequence left early: both are upper bounds. Models of the hub (--hub) are not counted.
    """
    size = SIZES[scale]
    config = configuration(scale, MAIN, "", None, None)
    if recipe.kind == "glue":
        return _fine_tuning(recipe, config.model) / size.rate / _HOUR
    return _sampling(recipe, size, config)


def _fine_tuning(recipe: Recipe, model: ModelConfig) -> float:
    """Operations of the grid and the final seeds, on all tasks, for every model of ours."""
    from ddlm.commands.finetune import finetune
    from ddlm.downstream.glue import find_tasks

    given = {k: p.default for k, p in inspect.signature(finetune).parameters.items()}
    runs = len(given["batch"]) * len(given["lr"]) * len(given["t"]) + given["seeds"]
    total = 0.0
    for task in find_tasks("all"):
        validation = sum(task.sizes[s] for s in task.validation_splits)
        # Backwards costs twice forwards; the validation set is read after every epoch.
        examples = task.epochs * (3 * task.sizes["train"] + validation)
        each = TOKENS[task.name]
        total += runs * examples * each * _forward(model, each, head=False)
    ours = sum(line.train is not None or line.model == "scratch" for line in recipe.lines)
    return ours * total


def _sampling(recipe: Recipe, size: Size, config: Config) -> float:
    """Hours of writing, judging and measuring."""
    from ddlm.reproduce.workshop import tasks_of

    protocol, length = size.protocol, config.model.length
    step = length * _forward(config.model, length, head=True)
    operations, seconds = 0.0, 0.0
    if recipe.kind == "samples":
        operations += _SAMPLES_SHOWN * protocol.settings.steps * step
    if recipe.kind == "traces":
        operations += len(recipe.raw["noise_scales"]) * _TRACED * step
    if recipe.kind == "measure":
        judged = length * _judging(size, config)
        texts = protocol.prompts * protocol.continuations
        for line in recipe.lines:
            if line.model not in ("diffusion", "baseline"):
                continue
            # An autoregressive model that keeps its cache reads every token once: one pass.
            ours = line.model == "diffusion"
            passes = settings(protocol.settings, line.sample).steps if ours else 1
            rows = len(tasks_of(recipe, line))
            operations += rows * texts * (passes * step + judged)
            seconds += rows * texts * MEASURING
        operations += _SANITY * protocol.prompts * judged
        seconds += _SANITY * protocol.prompts * MEASURING
    if recipe.name == "figure1":
        operations += MOST * _TRACED * step
    return (operations / size.rate + seconds) / _HOUR


def _forward(model: ModelConfig, length: float, *, head: bool) -> float:
    """Operations of a token in a pass forwards over sequences of ``length`` tokens."""
    from ddlm.training.flops import Product, attention_flops, block_products

    found = float(sum(p.flops for p in block_products(model, 1)))
    found += attention_flops(model.width, model.layers, 1, 1) * length
    if head:  # the logits, and the expectation over them
        wide = model.width + (model.embedding_width if model.likelihood_head else 0)
        found += Product(1, wide, model.vocab_size).flops
        found += Product(1, model.vocab_size, model.embedding_width).flops
    return found


def _judging(size: Size, config: Config) -> float:
    """Operations of a token in the judge and in the model of MAUVE's features."""
    from ddlm.training.flops import peer_flops

    if not size.judged_here:
        return 2 * (_JUDGE + _FEATURES)
    tokens = config.train.batch * config.model.length
    return 2 * peer_flops(config, "gpt2") / 3 / tokens  # one model is both


def shown(found: float) -> str:
    """Hours in two digits: more would promise what an estimate does not keep."""
    if found < 0.1:
        return "under 0.1"
    if found < 10:
        return f"{found:.1f}"
    return f"{round(found, 1 - math.floor(math.log10(found))):,.0f}"


def explanation(scale: str) -> str:
    """What the hours of the list are of."""
    size = SIZES[scale]
    unit, name = (1e12, "TFLOP/s") if size.rate >= 1e12 else (1e9, "GFLOP/s")
    return (
        f"Every item made alone; what another has made is not made again. Trainings: {size.trained_on}. Fine-tuning, "
        f"sampling and measuring: estimated for {size.machine}, counted matrix products at {size.rate / unit:g} {name} "
        f"({size.rate_from}). Fine-tuning: 9 tasks, 48 settings and 5 seeds of each model, 10 epochs (RTE 20), as if "
        "no run of the search were stopped early; without the hub's models (--hub). Disk: the main model's with the "
        f"weights of up to {MOST} steps on the way, which figure1 draws."
    )
