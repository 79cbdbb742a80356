"""An autoregressive model of matched size, trained from scratch on the same shards for as many tokens or seconds.

It is the "GPT" row of the paper's Table 5 at any scale, and a judge where no hub can be reached. The network and the
loop are transformers' own; here are only the sizes, the batches and the note of what it was trained on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ddlm.config import Config
from ddlm.data.loader import Batches
from ddlm.data.shards import TokenShards
from ddlm.device import can_compile, resolve_precision
from ddlm.evaluation.autoregressive import (
    Architecture,
    held_out_loss,
    keep_to_one_device,
    save_baseline,
    save_tokenizer,
    untrained,
)
from ddlm.evaluation.extras import missing_extra, quiet
from ddlm.evaluation.judges import TRAINED_HASHES, TRAINED_ON
from ddlm.files import read_json, write_tensors, write_text
from ddlm.muon import Muon
from ddlm.types import ConfigError

_PLAN = "plan.json"
_CLOCK = "clock.json"
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


def train_baseline(plan: Plan, shards: TokenShards, out: Path) -> dict[str, Any]:
    """Train, or go on with an interrupted training, and save a folder that transformers loads.

    Args:
        plan: What to train.
        shards: The data the plan was made for.
        out: Folder of the model; its ``checkpoints`` hold the state of an unfinished training.

    Returns:
        Parameters, steps, tokens, seconds and the held-out loss in nats per token.

    Raises:
        ConfigError: if ``out`` holds another training.
    """
    transformers = missing_extra("transformers", "eval")
    missing_extra("accelerate", "eval")
    plan = _claim(out, plan)
    save_tokenizer(shards, out)
    torch.manual_seed(plan.seed)
    checkpoints = out / "checkpoints"
    last = _last_checkpoint(checkpoints)
    # The Trainer restores weights by their names in the file, which for GPT-NeoX differ from those in the model:
    # its output head would stay untrained. from_pretrained knows both names.
    with quiet():
        model = (
            build(plan, shards.end_id)
            if last is None
            else transformers.AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
        )
    start = 0
    if last is not None:
        start = read_json(last / "trainer_state.json", global_step=int)["global_step"]
    clock = _Clock(plan, _elapsed(checkpoints))
    data = _Windows(shards, plan, start)
    optimizer = _optimizer(model, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.factor)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if plan.compile and not can_compile(device):
        print("no C++ compiler (g++, or what CXX names) was found: training without compiling")
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        bf16=plan.precision == "bf16",
        torch_compile=plan.compile and can_compile(device),
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=plan.clip,
        logging_steps=max(1, min(50, plan.steps // 10)),
        save_steps=max(1, min(1000, plan.steps // 5)),
        save_total_limit=2,
        ignore_data_skip=True,  # the batches are a function of the step: the data set starts where it stopped
        report_to=[],
        seed=plan.seed,
        remove_unused_columns=False,
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    keep_to_one_device(arguments)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        optimizers=(optimizer, schedule),
        callbacks=[_stopper(clock, checkpoints)],
    )
    steps = start
    # A training that was stopped after its last step has nothing left to do but what comes after; asked for no batch
    # at all, the Trainer would fail.
    if last is None or not (start >= plan.steps or clock.over):
        with quiet():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        steps = int(trainer.state.global_step)
    loss, counted = held_out_loss(model, shards, context=plan.context, batch=plan.batch)
    save_baseline(model, out)
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_blocks": sum(
            p.numel() for n, p in model.named_parameters() if ".layers." in n or ".h." in n
        ),
        "steps": steps,
        "tokens": steps * plan.batch * plan.context,
        "epochs": steps * plan.batch * plan.context / shards.tokens("train"),
        "seconds": clock.elapsed,
        "held_out_nll": loss,
        "held_out_tokens": counted,
    }
    _note_training_data(out, shards, results)
    return results


def build(plan: Plan, end_id: int) -> Any:
    """The untrained transformers model of a plan."""
    ends = {"bos_token_id": end_id, "eos_token_id": end_id}
    return untrained(plan.architecture, plan.model, plan.context, **ends)


class _Windows(IterableDataset[dict[str, torch.Tensor]]):
    """Windows of the shards from a step on, in the order of :class:`ddlm.data.loader.Batches`."""

    def __init__(self, shards: TokenShards, plan: Plan, start: int) -> None:
        self.batches = Batches(shards, length=plan.context, batch_size=plan.batch, seed=plan.seed)
        self.start, self.steps = start, plan.steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.start, self.steps):
            for row in self.batches.batch(step):
                yield {"input_ids": row, "labels": row}


class _Clock:
    """Learning rate and end of a training that is limited by steps, by time, or by both."""

    def __init__(self, plan: Plan, before: float) -> None:
        self.plan, self.before, self.began = plan, before, time.monotonic()

    @property
    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.began

    @property
    def over(self) -> bool:
        return self.plan.budget is not None and self.elapsed >= self.plan.budget

    def factor(self, step: int) -> float:
        start = self.plan.decay_from
        done = max(0.0, (step - start) / max(self.plan.steps - start, 1))
        if self.plan.budget is not None:
            done = self.elapsed / self.plan.budget
        warm = min(1.0, (step + 1) / max(1, self.plan.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return warm * (self.plan.final_lr + (1 - self.plan.final_lr) * cosine)


def _stopper(clock: _Clock, checkpoints: Path) -> Any:
    """A Trainer callback that ends on time and keeps the clock beside each checkpoint."""
    transformers = missing_extra("transformers", "eval")

    class Stopper(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop |= clock.over
            return control

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_text(checkpoints / _CLOCK, json.dumps({"elapsed": clock.elapsed}))

    return Stopper()


def _optimizer(model: torch.nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of the blocks; only matrices decay."""
    named = list(model.named_parameters())
    inner = [p for n, p in named if p.dim() > 1 and (".layers." in n or ".h." in n)]
    outer = [p for n, p in named if p.dim() > 1 and not (".layers." in n or ".h." in n)]
    groups: list[dict[str, Any]] = [
        {"params": outer, "weight_decay": plan.weight_decay, "orthogonal": False},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0, "orthogonal": False},
        {
            "params": inner,
            "weight_decay": plan.weight_decay,
            "orthogonal": plan.optimizer == "muon",
        },
    ]
    return Muon(groups, lr=plan.lr, betas=plan.betas)


def _claim(out: Path, plan: Plan) -> Plan:
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


def is_finished(out: Path) -> bool:
    """Whether a baseline is complete: what it was trained on is written last."""
    return (out / TRAINED_ON).is_file()


def _note_training_data(out: Path, shards: TokenShards, results: dict[str, Any]) -> None:
    hashes = np.sort(np.asarray(shards.document_hashes("train"), dtype="<u8"))
    part = out / f"{TRAINED_HASHES}.part"
    write_tensors(part, {"hashes": torch.from_numpy(hashes.view(np.int64))})
    part.replace(out / TRAINED_HASHES)
    note = {
        "data": shards.hash,
        "split": "train",
        "documents": len(hashes),
        "tokenizer": shards.tokenizer_hash,
        "tokens": results["tokens"],
    }
    write_text(out / TRAINED_ON, json.dumps(note, indent=1) + "\n")


def _last_checkpoint(folder: Path) -> Path | None:
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def _elapsed(checkpoints: Path) -> float:
    file = checkpoints / _CLOCK
    return float(json.loads(file.read_text("utf-8"))["elapsed"]) if file.is_file() else 0.0
