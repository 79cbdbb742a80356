"""An autoregressive model of matched size, trained from scratch on the same shards for as many tokens or seconds.

It is the "GPT" row of the paper's Table 5 at any scale, and a judge where no hub can be reached. The network and the
loop are transformers' own; here are only the sizes, the batches and the note of what it was trained on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ddlm.compiler import drop_unfinished_libraries
from ddlm.data.loader import Batches
from ddlm.data.shards import TokenShards
from ddlm.device import missing_compiler
from ddlm.evaluation.autoregressive import (
    Dtype,
    held_out_loss,
    keep_to_one_device,
    save_baseline,
    save_tokenizer,
    untrained,
)
from ddlm.evaluation.extras import missing_extra, quiet
from ddlm.evaluation.judges import TRAINED_HASHES, TRAINED_ON
from ddlm.evaluation.measure import Progress
from ddlm.evaluation.plan import Plan as Plan
from ddlm.evaluation.plan import claim
from ddlm.evaluation.plan import has_plan as has_plan
from ddlm.evaluation.plan import make_plan as make_plan
from ddlm.evaluation.plan import read_plan as read_plan
from ddlm.evaluation.progress import progress_bar
from ddlm.files import locked, read_json, write_tensors, write_text
from ddlm.muon import Muon

_CLOCK = "clock.json"


def train_baseline(
    plan: Plan, shards: TokenShards, out: Path, dtype: Dtype = "float32"
) -> dict[str, Any]:
    """Train, or go on with an interrupted training, and save a folder that transformers loads.

    Args:
        plan: What to train.
        shards: The data the plan was made for.
        out: Folder of the model; its ``checkpoints`` hold the state of an unfinished training, in float32.
        dtype: Of the finished weights; the held-out loss is theirs.

    Returns:
        Parameters, steps, tokens, seconds, the finished weights' type and the held-out loss in nats per token.

    Raises:
        ConfigError: if ``out`` holds another training, or another process trains there.
    """
    missing_extra("transformers", "eval")
    missing_extra("accelerate", "eval")
    out.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is training in {out}: wait for it, stop it, or name another folder"
    with locked(out, refusal):
        return _train(plan, shards, out, dtype)


def _train(plan: Plan, shards: TokenShards, out: Path, dtype: Dtype) -> dict[str, Any]:
    transformers = missing_extra("transformers", "eval")
    plan = claim(out, plan)
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
            else transformers.AutoModelForCausalLM.from_pretrained(
                last, dtype=torch.float32, trust_remote_code=False
            )
        )
    start = 0
    if last is not None:
        start = read_json(last / "trainer_state.json", global_step=int)["global_step"]
    clock = _Clock(plan, _elapsed(checkpoints))
    data = _Windows(shards, plan, start)
    optimizer = _optimizer(model, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.factor)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = missing_compiler(device)
    if plan.compile and missing:
        print(f"no {missing} was found: training without compiling")
    drop_unfinished_libraries()
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        bf16=plan.precision == "bf16",
        torch_compile=plan.compile and not missing,
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=plan.clip,
        logging_steps=max(1, min(50, plan.steps // 10)),
        save_steps=max(1, min(1000, plan.steps // 5)),
        save_total_limit=2,
        ignore_data_skip=True,  # the batches are a function of the step: the data set starts where it stopped
        report_to=[],
        seed=plan.seed,
        remove_unused_columns=False,
        disable_tqdm=True,  # its bar is of the steps, which a budget does not let it reach
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    keep_to_one_device(arguments)
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    steps = start
    # A training that was stopped after its last step has nothing left to do but what comes after; asked for no batch
    # at all, the Trainer would fail.
    if last is None or not (start >= plan.steps or clock.over):
        with quiet(), progress_bar() as progress:
            trainer.add_callback(_watch(clock, checkpoints, progress))
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        steps = int(trainer.state.global_step)
    kind = getattr(torch, dtype)
    for weights in model.parameters():  # not buffers: loaded, the model makes them anew in float32
        weights.data = weights.data.to(kind).float()
    loss, counted = held_out_loss(model, shards, context=plan.context, batch=plan.batch)
    save_baseline(model, out, dtype)
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_blocks": sum(
            p.numel() for n, p in model.named_parameters() if ".layers." in n or ".h." in n
        ),
        "steps": steps,
        "tokens": steps * plan.batch * plan.context,
        "epochs": steps * plan.batch * plan.context / shards.tokens("train"),
        "seconds": clock.elapsed,
        "dtype": dtype,
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

    def progress(self, step: int) -> tuple[str, int, int]:
        """What is counted, how far it is, and its limit: time or steps, whichever is nearer to its end."""
        plan, elapsed = self.plan, self.elapsed
        if plan.budget is None or elapsed / plan.budget < step / plan.steps:
            return "training, steps", step, plan.steps
        limit = math.ceil(plan.budget)
        return "training, seconds", min(int(elapsed), limit), limit

    def factor(self, step: int) -> float:
        start = self.plan.decay_from
        done = max(0.0, (step - start) / max(self.plan.steps - start, 1))
        if self.plan.budget is not None:
            done = self.elapsed / self.plan.budget
        warm = min(1.0, (step + 1) / max(1, self.plan.warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return warm * (self.plan.final_lr + (1 - self.plan.final_lr) * cosine)


def _watch(clock: _Clock, checkpoints: Path, progress: Progress) -> Any:
    """A Trainer callback that ends on time, tells how far it is and keeps the clock beside each checkpoint."""
    transformers = missing_extra("transformers", "eval")

    class Watch(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            progress(*clock.progress(state.global_step))
            control.should_training_stop |= clock.over
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                print(f"step {state.global_step}: {float(logs['loss']):.3f} nats per token")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_text(checkpoints / _CLOCK, json.dumps({"elapsed": clock.elapsed}))

    return Watch()


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
