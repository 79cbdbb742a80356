"""One fine-tuning run: transformers' Trainer as the loop, the metric after each epoch, the best epoch taken.

DDLM, section 4.2: AdamW, a constant learning rate, 10 epochs (RTE 20), evaluation on the validation set after each
epoch. Every model goes through this loop: DDLM, the same architecture from scratch, BERT, RoBERTa, GPT-2.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddlm.downstream.classifiers import quiet
from ddlm.downstream.encoders import Encoded
from ddlm.downstream.glue import GlueData, Split, Task, compute_metrics
from ddlm.downstream.models import Source

EVAL_BATCH = 128

Stop = Callable[[int, float], bool]
"""``(epochs done, best value so far) -> stop``: the search's pruning."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides a run, besides model and data (Table 8, left).

    Attributes:
        batch: Sequences of one update.
        lr: Constant learning rate of AdamW.
        time: t in the paper's units (1, 5 or 10), None for models without a time.
        seed: Of new parts, order and dropout.
        epochs: Passes over the training split.
        length: Longest input in tokens; longer ones are cut.
        pooling: DDLM only, see :class:`ddlm.integrations.transformers.DDLMConfig`.
        segments: DDLM only: learned vectors that tell the texts of a pair apart.
        layer_decay: Learning rate of a layer is ``lr * layer_decay ** n``, n the layers above it with the new parts
            as one; 1: the same everywhere.
        weight_decay: AdamW's, on matrices only.
        precision: bf16 (autocast) or fp32.
    """

    batch: int
    lr: float
    time: float | None
    seed: int
    epochs: int
    length: int = 128
    pooling: str = "mean"
    segments: bool = True
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    precision: Literal["bf16", "fp32"] = "fp32"

    @property
    def name(self) -> str:
        """What the grid varies, as a file name."""
        at = "" if self.time is None else f"-t{self.time:g}"
        return f"batch{self.batch}-lr{self.lr:g}{at}-seed{self.seed}"


@dataclass
class Outcome:
    """What a run found.

    Attributes:
        history: Metrics of every validation split after each epoch, named ``metric`` for the first split and
            ``metric_<split>`` for further ones, with ``epoch`` and ``tokens_per_second`` (training only).
        best: The entry of the best epoch by the task's first metric.
        pruned: Stopped early by the search.
        diverged: The outputs were not finite after an epoch, as after a loss that is not.
        seconds: Of the whole run, evaluations included.
        at_length: Share of training examples as long as the longest input: those that were cut are among them.
        predictions: Class ids or values of each test split at the best epoch, when asked for.
        model: The best epoch's model, when asked for.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    pruned: bool = False
    diverged: bool = False
    seconds: float = 0.0
    at_length: float = 0.0
    predictions: dict[str, list[float]] = field(default_factory=dict)
    model: nn.Module | None = None


def finetune(
    source: Source,
    data: GlueData,
    setting: Setting,
    *,
    stop: Stop | None = None,
    progress: Callable[[float, str], None] | None = None,
    predict_test: bool = False,
    keep_model: bool = False,
    device: str | None = None,
) -> Outcome:
    """Fine-tune a fresh classifier of ``source`` on ``data``.

    The global generators of Python, NumPy and torch are set to the setting's seed, from which ``Trainer`` draws.

    Args:
        source: The model.
        data: The task's splits.
        setting: Hyperparameters.
        stop: Asked after each epoch; True ends the run (pruning).
        progress: Told the share of the run that is done and a line about it.
        predict_test: Predict the test splits with the best epoch's weights.
        keep_model: Put the best epoch's model into the outcome.
        device: ``cpu`` or ``cuda``; None takes CUDA where there is one.
    """
    import transformers
    from transformers.trainer_callback import PrinterCallback

    start = time.perf_counter()
    task = data.task
    transformers.set_seed(setting.seed)
    with quiet():
        model = source.classifier(task, setting.time, setting.pooling, setting.segments)
    train = _examples(source, data.splits["train"], task, setting.length)
    watch = _Watch(source, data, setting, train, stop, progress, predict_test or keep_model)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=setting.batch,
            num_train_epochs=setting.epochs,
            **_by_length(transformers.TrainingArguments),
            learning_rate=setting.lr,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=setting.precision == "bf16",
            seed=setting.seed,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            # said outright: asked for bf16 without it, the Trainer looks for a GPU and fails
            use_cpu=device == "cpu" or not torch.cuda.is_available(),
        )
        # Several visible GPUs would multiply the batch of the setting. ``n_gpu`` has no setter; the Trainer itself
        # writes the attribute behind it where it wants no DataParallel.
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            data_collator=_collator(source.encoder.pad_id, task),
            optimizers=_optimizer(model, setting, arguments.device),
            callbacks=[watch.callback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    outcome = watch.outcome
    if watch.best_state is not None:
        model.load_state_dict(watch.best_state)
    if predict_test:
        for name in task.test_splits:
            if name in data.splits:
                encoded = _examples(source, data.splits[name], task, setting.length)
                outcome.predictions[name] = predict(
                    model, encoded, task, source.encoder.pad_id, setting
                )
    outcome.model = model if keep_model else None
    outcome.at_length = sum(len(e["input_ids"]) >= setting.length for e in train) / len(train)
    outcome.seconds = time.perf_counter() - start
    return outcome


class _Watch:
    """What happens between the Trainer's epochs: clock, metrics, best weights, pruning."""

    def __init__(
        self,
        source: Source,
        data: GlueData,
        setting: Setting,
        train: list[dict[str, Any]],
        stop: Stop | None,
        progress: Callable[[float, str], None] | None,
        keep_state: bool,
    ) -> None:
        self.task = data.task
        self.setting = setting
        self.pad_id = source.encoder.pad_id
        self.tokens = sum(len(e["input_ids"]) for e in train)
        self.validation = {
            name: _examples(source, data.splits[name], data.task, setting.length)
            for name in data.task.validation_splits
            if name in data.splits
        }
        self.stop = stop
        self.progress = progress
        self.keep_state = keep_state
        self.best_state: dict[str, Tensor] | None = None
        self.outcome = Outcome()
        self.epoch_start = 0.0

    def after_epoch(self, model: nn.Module) -> bool:
        """Measure; True when the run is to end."""
        seconds = time.perf_counter() - self.epoch_start
        entry: dict[str, float] = {"epoch": len(self.outcome.history) + 1}
        for i, (name, examples) in enumerate(self.validation.items()):
            predictions = predict(model, examples, self.task, self.pad_id, self.setting)
            if not all(map(math.isfinite, predictions)):
                self.outcome.diverged = True
                values = dict.fromkeys(self.task.metrics, math.nan)
            else:
                values = compute_metrics(self.task, predictions, [e["labels"] for e in examples])
            entry |= {m if i == 0 else f"{m}_{name}": v for m, v in values.items()}
        entry["tokens_per_second"] = self.tokens / seconds
        self.outcome.history.append(entry)
        key = self.task.metrics[0]
        if not self.outcome.best or _worth(entry[key]) > _worth(self.outcome.best[key]):
            self.outcome.best = entry
            if self.keep_state:
                state = model.state_dict()
                self.best_state = {k: v.detach().to("cpu", copy=True) for k, v in state.items()}
        if self.progress is not None:
            done = len(self.outcome.history) / self.setting.epochs
            line = f"epoch {len(self.outcome.history)}: {key} {100 * entry[key]:.1f}"
            self.progress(done, f"{line}, best {100 * self.outcome.best[key]:.1f}")
        if self.outcome.diverged:
            return True
        if self.stop is not None and self.stop(len(self.outcome.history), self.outcome.best[key]):
            self.outcome.pruned = len(self.outcome.history) < self.setting.epochs
            return True
        return False

    def callback(self) -> Any:
        """The Trainer's callback."""
        from transformers import TrainerCallback

        watch = self

        class Callback(
            TrainerCallback
        ):  # transformers is imported on use, so its class is derived on use
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.epoch_start = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if watch.progress is not None:
                    watch.progress(state.global_step / max(state.max_steps, 1), "")

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if watch.after_epoch(kwargs["model"]):
                    control.should_training_stop = True

        return Callback()


def _worth(value: float) -> float:
    """An undefined metric is worse than any."""
    return -math.inf if math.isnan(value) else value


def _examples(source: Source, split: Split, task: Task, length: int) -> list[dict[str, Any]]:
    encoded: list[Encoded] = source.encoder(split.texts, length)
    kind = float if task.is_regression else int
    return [{**e, "labels": kind(label)} for e, label in zip(encoded, split.labels, strict=True)]


def _collator(
    pad_id: int, task: Task
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """Pads a batch to its longest example."""

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        rows = {"input_ids": pad_id, "token_type_ids": 0}
        batch = {
            name: torch.tensor([[*e[name], *[fill] * (longest - len(e[name]))] for e in examples])
            for name, fill in rows.items()
            if name in examples[0]
        }
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        dtype = torch.float32 if task.is_regression else torch.int64
        batch["labels"] = torch.tensor([e["labels"] for e in examples], dtype=dtype)
        return batch

    return collate


@torch.no_grad()
def predict(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    task: Task,
    pad_id: int,
    setting: Setting,
) -> list[float]:
    """Class ids (or values) in the order of the examples; batches are made by length."""
    device = next(model.parameters()).device
    collate = _collator(pad_id, task)
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    found: list[float] = [0.0] * len(examples)
    for start in range(0, len(order), EVAL_BATCH):
        rows = order[start : start + EVAL_BATCH]
        batch = {k: v.to(device) for k, v in collate([examples[i] for i in rows]).items()}
        batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            logits = model(**batch).logits.float()  # (B, C)
        values = logits[:, 0] if task.is_regression else logits.argmax(-1).float()
        # argmax of NaN is a class like any other: a diverged model must not look like a prediction
        values = torch.where(logits.isfinite().all(-1), values, torch.nan)
        for i, value in zip(rows, values.tolist(), strict=True):
            found[i] = value
    model.train(was_training)
    return found


def _optimizer(
    model: nn.Module, setting: Setting, device: torch.device
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a constant rate: matrices decay, vectors do not, lower layers may learn more slowly."""
    model.to(device)
    depths = {name: _layer(name) for name, _ in model.named_parameters()}
    top = max((d for d in depths.values() if d is not None), default=0) + 1
    base = f"{getattr(model, 'base_model_prefix', '')}."
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depths[name]
        if depth is None:  # below the layers (embeddings, input) or above them (head)
            depth = top if _is_above(name, base) else -1
        lr = setting.lr * setting.layer_decay ** (top - depth)
        decay = setting.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
        fused=True,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


# What follows the layers inside a model, by the names it has in transformers.
_LAST = (
    "pooler",
    "output_norm",
    "ln_f",
    "final_layer_norm",
    "final_norm",
    "norm_f",
    "model.norm.",
    "project_out",
)


def _layer(name: str) -> int | None:
    """Number of the transformer block a parameter belongs to."""
    found = re.search(r"\.(?:blocks|layers?|h|block)\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _is_above(name: str, base: str) -> bool:
    """Above the layers: new parts, which stand outside the pretrained model ``base``, and its last norm."""
    return not name.startswith(base) or any(part in name for part in _LAST)


def _by_length(arguments: Any) -> dict[str, Any]:
    """Batches of similar lengths, so that little is padding; the option has had two names."""
    if "group_by_length" in arguments.__dataclass_fields__:
        return {"group_by_length": True}
    return {"train_sampling_strategy": "group_by_length"}
