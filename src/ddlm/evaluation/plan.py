"""What is to be trained as an autoregressive baseline, and the folder that was made for it.

A plan is matched to a diffusion model's configuration, and stands as plan.json in the baseline's folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ddlm.config import Config
from ddlm.data.loader import Batches
from ddlm.data.shards import TokenShards
from ddlm.device import resolve_precision
from ddlm.evaluation.autoregressive import Architecture
from ddlm.files import read_json, write_text
from ddlm.types import ConfigError

_PLAN = "plan.json"
_LATER = {"betas", "weight_decay", "clip", "final_lr", "matched_to"}  # no folder had them at first


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is trained.

    What has a default was the same for all once: folders from then do not say it, and it still holds for them.

    Attributes:
        architecture: ``gpt-neox`` or ``gpt2``.
        context: Tokens of a training sequence and positions of the model.
        batch: Sequences of a step.
        steps: Updates at most: as many tokens as those of the diffusion model, to the nearest whole step.
        budget: Wall-clock seconds at most, or None; the learning rate then follows the time.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up, then cosine decay to ``final_lr``; matched in tokens as ``steps`` are.
        decay_from: First step of the decay where no budget decides: the end of the warm-up; 0 in earlier folders.
        precision: ``bf16`` or ``fp32``.
        optimizer: ``adamw``, or ``muon`` for the matrices of the blocks. Queries, keys and values are one matrix to it:
            the diffusion model has them above each other and cuts them into three, here they interleave head by head
            (GPT-NeoX) or stand side by side (GPT-2).
        compile: Compile the model with torch.compile, where that has what it needs.
        seed: Seed of the weights and of the order of the data.
        length: Tokens of a sample, the diffusion model's length.
        data: Hash of the prepared data.
        model: Sizes the model is matched to.
        betas: Adam's decay rates.
        weight_decay: Decoupled weight decay of the matrices.
        clip: Largest global gradient norm.
        final_lr: Learning rate at the end of the decay, as a fraction of the peak.
        matched_to: The diffusion model's ``batch``, ``steps`` and ``warmup``.
    """

    architecture: Architecture
    context: int
    batch: int
    steps: int
    budget: float | None
    lr: float
    warmup: int
    precision: Literal["bf16", "fp32"]
    optimizer: Literal["adamw", "muon"]
    compile: bool
    seed: int
    length: int
    data: str
    model: dict[str, Any]
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    final_lr: float = 0.0
    matched_to: dict[str, int] = field(default_factory=dict)
    decay_from: int = 0


def make_plan(
    config: Config, shards: TokenShards, architecture: Architecture, context: int | None
) -> Plan:
    """Match a baseline to a diffusion model's configuration: same sizes, tokens (or seconds), optimisation.

    Not taken over from ``train``: ``ema`` (the last weights are kept, not an average), ``micro_batch`` (the batch goes
    through at once), ``self_condition``, ``embeddings`` and ``attention`` (an autoregressive model has nothing of the
    kind), ``device``, ``threads`` and ``strategy`` (transformers' Trainer decides) and the intervals of logs,
    evaluations, samples and checkpoints.

    Args:
        config: Of the diffusion model; ``model`` gives the sizes, ``train`` the optimisation.
        shards: Prepared data.
        architecture: ``gpt-neox`` or ``gpt2``.
        context: Tokens of a sequence; None takes four times the diffusion model's length, so that as a judge it can
            read samples that its tokenizer cuts into more pieces than they had: a byte that begins no character
            decodes to U+FFFD, three bytes. The batch shrinks accordingly.

    Raises:
        ConfigError: if the vocabulary or the sizes do not fit, or the context is shorter than a sample or longer than
            the text.
    """
    m, t = config.model, config.train
    context = 4 * m.length if context is None else context
    if context < 2:
        raise ConfigError(f"context {context} is too short for a language model: need at least 2")
    if context < m.length:
        raise ConfigError(
            f"context {context} is shorter than model.length, the {m.length} tokens of a sample: give --context"
            f" {m.length} or more"
        )
    if m.width % m.heads:
        raise ConfigError(f"model.width {m.width} must be a multiple of model.heads {m.heads}")
    # Whole sequences seldom make up the diffusion model's batch: the number of steps makes up for the difference.
    batch = max(1, round(t.batch * m.length / context))
    Batches(shards, length=context, batch_size=batch)  # refuses before the plan claims a folder
    share = t.batch * m.length / (batch * context)  # tokens of its step, in tokens of ours
    sizes = {"vocab_size": shards.vocab_size, "layers": m.layers, "heads": m.heads}
    sizes |= {"width": m.width, "feed_forward": m.feed_forward}
    return Plan(
        architecture=architecture,
        context=context,
        batch=batch,
        steps=max(1, round(t.steps * share)),
        budget=t.budget,
        lr=t.lr,
        warmup=round(t.warmup * share),
        decay_from=round(t.warmup * share),
        precision=resolve_precision(t.precision, "cuda" if torch.cuda.is_available() else "cpu"),
        optimizer=t.optimizer,
        compile=t.compile,
        seed=t.seed,
        length=m.length,
        data=shards.hash,
        model=sizes,
        betas=t.betas,
        weight_decay=t.weight_decay,
        clip=t.clip,
        final_lr=t.final_lr,
        matched_to={"batch": t.batch, "steps": t.steps, "warmup": t.warmup},
    )


def claim(out: Path, plan: Plan) -> Plan:
    """Write the plan into the folder, or refuse a folder made for another one; returns the plan of the folder."""
    file = out / _PLAN
    if not file.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no baseline: name another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(plan), indent=1) + "\n")
    different = _differences(out, plan)
    if different:
        k, (found, wanted) = next(iter(different.items()))
        raise ConfigError(
            f"{out} holds another baseline ({k}: {found!r}, wanted {wanted!r}): name another folder"
        )
    return read_plan(out)


def read_plan(out: Path) -> Plan:
    """The plan that a folder was made for; ConfigError where it is damaged."""
    found = {"betas": Plan.betas} | read_json(out / _PLAN, length=int, context=int, batch=int)
    try:
        return Plan(**found | {"betas": tuple(found["betas"])})
    except TypeError as error:  # a field is missing, or one that no plan has
        raise ConfigError(f"{out / _PLAN} is damaged ({error}): copy it again") from None


def _differences(out: Path, plan: Plan) -> dict[str, tuple[Any, Any]]:
    """What the folder's plan says otherwise: found and wanted.

    A folder from before steps were matched has the configuration's own, and says nothing of what was not taken over:
    the command that made it still goes on with it, in the way it was begun.
    """
    found = {"decay_from": plan.decay_from} | read_json(out / _PLAN)
    wanted = json.loads(json.dumps(asdict(plan)))
    if "matched_to" not in found:
        asked = {k: plan.matched_to.get(k, wanted[k]) for k in ("steps", "warmup")}
        wanted = {k: v for k, v in (wanted | asked).items() if k not in _LATER}
    return {k: (found.get(k), v) for k, v in wanted.items() if found.get(k) != v}


def has_plan(out: Path, plan: Plan) -> bool:
    """Whether the folder was made for this plan."""
    return (out / _PLAN).is_file() and not _differences(out, plan)
