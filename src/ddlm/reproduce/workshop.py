"""Trains, samples and measures what an item needs and what is not there yet."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddlm.config import Config
from ddlm.evaluation.hub import DEFAULT_FEATURES, DEFAULT_JUDGE
from ddlm.evaluation.intervals import spread
from ddlm.evaluation.judges import Judge, refuse_seen
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.measure import Progress, Row, Units, measure_row, replicates
from ddlm.evaluation.protocol import (
    Protocol,
    Windows,
    decode,
    draw,
    held_out,
    sanity_rows,
    task_name,
)
from ddlm.evaluation.samples import Sample
from ddlm.files import write_text
from ddlm.reproduce.milestones import Milestones
from ddlm.reproduce.recipes import MAIN, SIZES, Line, Recipe, configuration, run_name, settings
from ddlm.reproduce.trainings import (
    DONE,
    Training,
    begun_note,
    budget_note,
    describe,
    is_begun,
    kept_budget,
    refuse_others,
)
from ddlm.reproduce.weights import Weights
from ddlm.types import ConfigError


@dataclass
class Workshop:
    """Everything of one scale lies in one folder: models, baseline, judge, samples, results.

    Attributes:
        scale: ``tiny``, ``small`` or ``base``.
        folder: Where.
        data: Prepared shards for training.
        held_out_text: Shards or raw text that prompts come from.
        protocol: How much is sampled and measured.
        steps: Updates of every training, or None for the configuration's.
        budget: Seconds for all trainings of an item together, or None.
        judge: Folder or hub id, ``auto`` or ``none``.
        features: The same for MAUVE features.
        precision: Of the judge.
        model_precision: Of the samples; None: bf16 where the device has instructions for it, fp32 elsewhere.
        weights: The main model, given: then nothing is trained.
        baseline: Folder of the autoregressive model, given; ``none`` leaves its rows out, None trains it.
        quiet: Say nothing.
    """

    scale: str
    folder: Path
    data: str
    held_out_text: str
    protocol: Protocol
    steps: int | None = None
    budget: float | None = None
    judge: str = "auto"
    features: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    model_precision: Literal["fp32", "bf16"] | None = None
    weights: Weights | None = None
    baseline: str | None = None
    quiet: bool = False
    _judge: Judge | None = field(default=None, init=False)
    _features: Featurizer | None = field(default=None, init=False)
    _open: bool = field(default=False, init=False)

    # Training.

    def train(self, recipe: Recipe) -> None:
        """Train every model of an item that is not finished; the budget is shared evenly among all that it needs.

        Raises:
            ConfigError: when a model that is there was trained otherwise than this workshop would.
            KeyboardInterrupt: when a training was stopped by a signal; the next call goes on.
        """
        if self.weights is not None:
            return
        wanted = self.wanted(recipe)
        share = self.share(recipe)
        refuse_others(self, [recipe])
        missing = [w for w in wanted if not (self.training_folder(*w) / DONE).is_file()]
        for number, (what, train) in enumerate(missing, 1):
            folder = self.training_folder(what, train)
            self.say(f"training {number} of {len(missing)}: {folder.name}")
            kept = self._kept_share(folder, share)
            made_with = {"wanted": describe(self, what, train, kept)}
            if not is_begun(folder):
                write_text(begun_note(folder), json.dumps(made_with, indent=1) + "\n")
            began = time.monotonic()
            result = (
                self._train_model(train, folder, kept)
                if train is not None
                else self._train_baseline(what, folder, kept)
            )
            result["seconds_of_last_call"] = time.monotonic() - began
            result |= made_with
            write_text(folder / DONE, json.dumps(result, indent=1) + "\n")

    def wanted(self, recipe: Recipe) -> list[Training]:
        """Every training that an item needs, finished ones too."""
        found: list[Training] = [("model", t) for t in recipe.trainings()]
        if recipe.needs_baseline() and self.baseline is None:
            found.append(("baseline", None))
        if recipe.kind == "measure" and self.judge_trained_here:
            found.append(("judge", None))
        return found

    def share(self, recipe: Recipe) -> float | None:
        """Seconds of each training of an item, whichever of them are finished: equal also after an interruption."""
        wanted = self.wanted(recipe)
        return None if self.budget is None or not wanted else self.budget / len(wanted)

    def _train_model(
        self, train: Mapping[str, Any], folder: Path, share: float | None
    ) -> dict[str, Any]:
        from ddlm.training.loop import signal_name
        from ddlm.training.loop import train as run

        config = self.configuration("model", train, share)
        sample = None
        if train == MAIN:
            config.train.sample_every = config.train.checkpoint_every
            sample = Milestones(folder, config, Path(self.data))
        result = run(config, folder, sample=sample, quiet=self.quiet)
        if result.stopped:
            raise KeyboardInterrupt(
                f"{signal_name(result.stopped)} at step {result.step} of {folder.name}; the same command goes on"
            )
        return {
            "steps": result.step,
            "tokens": result.step * config.train.batch * config.model.length,
            "validation": result.validation,
        }

    def _train_baseline(self, what: str, folder: Path, share: float | None) -> dict[str, Any]:
        """The row of the table is GPT-NeoX; a judge is another architecture with another seed."""
        from ddlm.data.shards import TokenShards
        from ddlm.evaluation import baseline

        config = self.configuration(what, None, share)
        shards = TokenShards(self.data)
        plan = baseline.make_plan(config, shards, "gpt2" if what == "judge" else "gpt-neox", None)
        return baseline.train_baseline(plan, shards, folder)

    def configuration(
        self, what: str, train: Mapping[str, Any] | None, share: float | None
    ) -> Config:
        """What a training is made with."""
        config = configuration(self.scale, train or MAIN, self.data, self.steps, share)
        if what == "judge":
            config.train.seed += 1
        return config

    def _kept_share(self, folder: Path, share: float | None) -> float | None:
        """The budget a run was begun with, so that going on with it does not change its schedule."""
        if share is None:
            return None
        kept = kept_budget(folder)
        if kept is not None:
            return kept
        write_text(budget_note(folder), f"{share:.1f}\n")
        return share

    def training_folder(self, what: str, train: Mapping[str, Any] | None = None) -> Path:
        """Where a training lies; items that need the same one share it."""
        return self.folder / "models" / (run_name(train) if train is not None else what)

    def model_folder(self, line: Line) -> Path:
        """Folder of the model of a row."""
        if line.model == "baseline":
            return Path(self.baseline) if self.baseline else self.training_folder("baseline")
        return self.weights.folder if self.weights else self.training_folder("model", line.train)

    @property
    def main_folder(self) -> Path:
        """Folder of the main model."""
        return self.weights.folder if self.weights else self.training_folder("model", MAIN)

    @property
    def label(self) -> str:
        """What titles call the model: the given weights, or the scale."""
        return self.weights.name if self.weights else self.scale

    # Measuring.

    @property
    def judged_here(self) -> bool:
        """Whether judge and features are trained here."""
        return SIZES[self.scale].judged_here

    @property
    def judge_trained_here(self) -> bool:
        """Whether an item that is judged needs a judge trained: none is named, and the scale takes none of the hub."""
        return self.judged_here and self.judge == "auto"

    def judge_names(self) -> tuple[str, str]:
        """Judge and feature model, ``auto`` replaced: folder, hub id or ``none``."""
        judge, features = self.judge, self.features
        if judge == "auto":
            judge = str(self.training_folder("judge")) if self.judged_here else DEFAULT_JUDGE
        if features == "auto":
            features = judge if self.judged_here else DEFAULT_FEATURES
        return judge, features

    def open_judges(self) -> tuple[Judge | None, Featurizer | None]:
        """Judge and feature model, loaded once."""
        if not self._open:
            judge, features = self.judge_names()
            self._judge = None if judge == "none" else Judge(judge, precision=self.precision)
            self._features = None if features == "none" else Featurizer(features)
            self._open = True
        return self._judge, self._features

    def measure(
        self, recipe: Recipe, progress: Progress
    ) -> tuple[dict[tuple[str, str], Row], list[Row]]:
        """All rows of an item by (label, task), and the sanity rows.

        Raises:
            ConfigError: if the models do not share one tokenizer and length.
        """
        from ddlm.commands.evaluate import load_generator

        judge, features = self.open_judges()
        rows: dict[tuple[str, str], Row] = {}
        sanity: list[Row] = []
        common: dict[str, Any] = {
            "units": Units("own tokens"),
            "judge": judge,
            "features": features,
            "progress": progress,
        }
        windows: Windows | None = None
        first_tokenizer: Any = None
        for folder, lines in _by_model(self, recipe.lines):
            generator, tokenizer, length, _ = load_generator(str(folder), self.model_precision)
            if windows is None:
                first_tokenizer = tokenizer
                windows = held_out(self.held_out_text, tokenizer, length, self.protocol.prompts)
                if judge is not None:
                    judge.check_held_out(windows.hashes, f"the held-out text {windows.source}")
                common["references"] = [decode(tokenizer, w) for w in windows.tokens.tolist()]
            elif tokenizer.hash != first_tokenizer.hash or length != windows.tokens.shape[1]:
                raise ConfigError(
                    f"{folder} has another tokenizer or length than the other models of {recipe.name}"
                )
            refuse_seen(folder, windows.hashes, f"the held-out text {windows.source}")
            protocol = replace(self.protocol, length=length)
            for line in lines:
                for task in tasks_of(recipe, line):
                    self.say(f"measuring {line.label}, {task}")
                    samples = draw(
                        protocol,
                        task,
                        generator,
                        tokenizer,
                        windows,
                        self.folder / "samples",
                        settings(protocol.settings, line.sample),
                        progress,
                    )
                    row = measure_row(line.label, task_name(task, length), samples, **common)
                    rows[line.label, task] = _with_steps(row, samples)
        if windows is None:
            return rows, sanity
        tasks = [task for _, task in rows]
        sanity = sanity_rows(self.protocol, tasks, windows, first_tokenizer, **common)
        for line in recipe.lines:
            if line.model == "real":
                rows[line.label, line.task or "unconditional"] = sanity[0]
        return rows, sanity

    def say(self, text: str) -> None:
        """One line of progress."""
        if not self.quiet:
            print(text, flush=True)


def tasks_of(recipe: Recipe, line: Line) -> list[str]:
    """The tasks a row is measured on, in the order of the columns."""
    if line.task is not None:
        return [line.task]
    return list(dict.fromkeys(c.task for c in recipe.columns if c.task is not None))


def _by_model(shop: Workshop, lines: Sequence[Line]) -> list[tuple[Path, list[Line]]]:
    """Rows grouped by model, so that each model is loaded once."""
    groups: dict[Path, list[Line]] = {}
    for line in lines:
        if line.model == "baseline" and shop.baseline == "none":
            continue
        if line.model in ("diffusion", "baseline"):
            groups.setdefault(shop.model_folder(line), []).append(line)
    return list(groups.items())


def _with_steps(row: Row, samples: Sequence[Sample]) -> Row:
    """The row with the mean number of steps performed as a metric, its interval over the same parts as the others'."""
    steps = [s.steps for s in samples]
    if not steps or any(n is None for n in steps):
        return row
    known = np.asarray(steps, dtype=float)
    parts, over = replicates(samples)
    found = spread(float(known.mean()), [float(known[p].mean()) for p in parts], over)
    return replace(row, metrics={**row.metrics, "mean_steps": found})
