"""The grid of the paper (Table 8, left), resumable: a record for every run, then seeds of the best setting.

Pruning is the median rule (Golovin et al. 2017, Vizier): after an epoch, a run of the search whose best value so far is
below the median of what the finished runs had reached by then is stopped. It starts after three finished runs and
three tenths of the epochs, is stated in every record, and never touches the final seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ddlm.checkpoint import FINETUNED
from ddlm.downstream.finetune import Outcome, Setting, Stop, finetune
from ddlm.downstream.glue import GlueData
from ddlm.downstream.models import Source
from ddlm.downstream.report import read_summary
from ddlm.files import CheckpointError, foreign_files, verify_files, write_text
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError, DataError

PRUNE_AFTER_RUNS = 3
PRUNE_AFTER_SHARE = 0.3

GRID = ("batch", "lr", "time", "seed")
"""What may differ between the runs of one folder."""

Progress = Callable[[str, float, str], None]
"""``(run, share of it done, line)``."""


@dataclass(frozen=True)
class Grid:
    """The values that are tried, all with all.

    Attributes:
        batch: Batch sizes.
        lr: Learning rates.
        time: Times in the paper's units; ignored for models without a time.
        base: Every other setting.
    """

    batch: Sequence[int]
    lr: Sequence[float]
    time: Sequence[float]
    base: Setting

    def settings(self, has_time: bool, seed: int = 0) -> list[Setting]:
        """Every combination once, in a fixed order; a value that is given twice counts once."""
        times: Sequence[float | None] = self.time if has_time else [None]
        rates, batches = dict.fromkeys(self.lr), dict.fromkeys(self.batch)
        return [
            dataclasses.replace(self.base, batch=b, lr=lr, time=t, seed=seed)
            for t, lr, b in itertools.product(dict.fromkeys(times), rates, batches)
        ]


@dataclass
class Study:
    """One model on one task: its folder of records.

    Attributes:
        source: The model.
        data: The task.
        folder: ``<out>/<model>/<task or task-subset>``.
        device: For :func:`ddlm.downstream.finetune.finetune`.
        progress: Told what is going on.
        finals: Records of the final seeds of the last :meth:`run`, older runs with the same settings among them.
    """

    source: Source
    data: GlueData
    folder: Path
    device: str | None = None
    progress: Progress | None = None
    finals: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self, grid: Grid, seeds: int, *, prune: bool, predict_test: bool, save: Path | None
    ) -> dict[str, Any]:
        """Search, repeat the best setting with ``seeds`` other seeds, and write ``summary.json``.

        The search uses seed 0 and the repetitions seeds 1 to ``seeds``: the winner's own run is the luckiest of the
        search and would flatter the mean. A grid of one setting needs no search.

        Args:
            grid: What is tried.
            seeds: Repetitions of the best setting.
            prune: Stop weak runs of the search.
            predict_test: Have test predictions in the records of new runs, and in that of the best seed.
            save: Folder for the models of the final seeds; a run whose model lacks there is made again.

        Returns:
            The summary.

        Raises:
            ConfigError: when the folder holds another model, other data or other settings than the grid varies.
        """
        candidates = grid.settings(self.source.has_time)
        self._check_folder(candidates[0])
        best = candidates[0]
        if len(candidates) > 1:
            best = self._search(candidates, prune)
        finals = [
            self._final(dataclasses.replace(best, seed=s), predict_test, save)
            for s in range(1, seeds + 1)
        ]
        key = self.data.task.metrics[0]
        top = max(range(seeds), key=lambda i: _worth(finals[i], key))
        if predict_test and not finals[top].get("predictions"):
            # of a run without --submit: its weights are gone, and the best seed's alone are needed
            finals[top] = self._final(
                dataclasses.replace(best, seed=top + 1), True, save, again=True
            )
        self.finals = finals
        summary = self._summary(best, finals, searched=len(candidates), prune=prune)
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _search(self, candidates: list[Setting], prune: bool) -> Setting:
        key = self.data.task.metrics[0]
        finished: list[list[float]] = []
        best, best_value = candidates[0], -math.inf
        for setting in candidates:
            rule = median_rule(finished, setting.epochs) if prune else None
            record = self._one(setting, "search", rule)
            results = record["results"]
            values = [e[key] for e in results["history"]]
            if not results["pruned"] and not results["diverged"]:
                finished.append([-math.inf if v is None else v for v in values])
            value = results["best"].get(key)
            if value is not None and value > best_value:
                best, best_value = setting, value
        return best

    def _one(self, setting: Setting, stage: str, stop: Stop | None) -> dict[str, Any]:
        """A run, or its record when it was made before; one that was stopped counts where ``stop`` would stop it too.

        So a search finds what a fresh one would: an earlier one may have had other values or pruned otherwise.
        """
        old = self._read(self._path(setting, stage), _plain(setting))
        if old is not None and old["results"].get("pruned"):
            reached = old["results"]["best"].get(self.data.task.metrics[0])
            reached = math.nan if reached is None else reached
            if stop is None or not stop(len(old["results"]["history"]), reached):
                old = None
        return old or self._make(setting, stage, stop)

    def _final(
        self, setting: Setting, predict_test: bool, save: Path | None, *, again: bool = False
    ) -> dict[str, Any]:
        """A final seed; one that was made before is made again when its model is wanted and lacks."""
        old = self._read(self._path(setting, "final"), _plain(setting))
        target = None if save is None else self._saved_at(save, setting)
        if old is not None:
            if not again and (target is None or self._is_saved(target, setting)):
                return old
            predict_test = predict_test or bool(old.get("predictions"))
        elif target is not None:
            self._is_saved(target, setting)  # refuses another run's
        return self._make(setting, "final", None, predict_test=predict_test, target=target)

    def _make(
        self,
        setting: Setting,
        stage: str,
        stop: Stop | None,
        *,
        predict_test: bool = False,
        target: Path | None = None,
    ) -> dict[str, Any]:
        """A run and its record; its model in ``target`` comes first, so that a record never lacks its model."""
        progress = self.progress
        name = f"{self.source.label} {self.data.report_name} {stage} {setting.name}"
        outcome = finetune(
            self.source,
            self.data,
            setting,
            stop=stop,
            progress=None if progress is None else lambda share, line: progress(name, share, line),
            predict_test=predict_test,
            keep_model=target is not None,
            device=self.device,
        )
        if target is not None:
            self.source.save(outcome.model, target, self._about(setting), length=setting.length)
        record = make_record(
            "finetune",
            _plain(setting),
            _results(outcome),
            seed=setting.seed,
            task=self.data.report_name,
            not_glue=self.data.differences,
            model=self.source.label,
            fingerprint=self.source.fingerprint,
            stage=stage,
            pruning=None if stop is None else __doc__.split("\n\n")[1].replace("\n", " "),
            sizes={name: len(split) for name, split in self.data.splits.items()},
            data_sha256=self.hashes,
            predictions=outcome.predictions,
        )
        write_record(self._path(setting, stage), record)
        return record

    def _path(self, setting: Setting, stage: str) -> Path:
        return self.folder / stage / f"{setting.name}.json"

    def _saved_at(self, save: Path, setting: Setting) -> Path:
        return save / self.source.label / self.data.report_name / setting.name

    def _about(self, setting: Setting) -> dict[str, Any]:
        """What the manifest of a saved model says of its run."""
        return {
            "kind": FINETUNED,
            "task": self.data.report_name,
            "fingerprint": self.source.fingerprint,
            "config": _plain(setting),
            "data_sha256": self.hashes,
        }

    def _is_saved(self, target: Path, setting: Setting) -> bool:
        """Whether ``target`` holds the whole model of this run.

        Raises:
            ConfigError: when it is of another run: models are not overwritten.
        """
        try:
            manifest = verify_files(target)
        except CheckpointError:
            foreign_files(
                target
            )  # refuses somebody else's folder now, not once the seed has trained
            return False
        about = self._about(setting)
        if self.source.owns(manifest.get("fingerprint")):
            del about["fingerprint"]
        if not _holds(manifest, about):
            raise ConfigError(
                f"{target} is of another model, other settings or other data: choose another --save"
            )
        return True

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hash of each split."""
        return {name: split.sha256() for name, split in self.data.splits.items()}

    def _check_folder(self, like: Setting) -> None:
        """Refuse a folder with anything that this call must not be mixed with.

        Raises:
            ConfigError: naming the file.
        """
        fixed = {k: v for k, v in _plain(like).items() if k not in GRID}
        for stage in ("search", "final"):
            for path in sorted((self.folder / stage).glob("*.json")):
                self._read(path, fixed)
        path = self.folder / "summary.json"
        if path.is_file():
            summary = read_summary(path)
            if not self.source.owns(summary.get("fingerprint", self.source.fingerprint)):
                raise ConfigError(f"{path} is of another model: choose another --name or --out")
            if summary.get("data_sha256", self.hashes) != self.hashes:
                raise ConfigError(
                    f"{path} was made with other data: choose another --name or --out"
                )

    def _read(self, path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The record at ``path`` if it is of this model, this data and the settings ``wanted``.

        Raises:
            ConfigError: when it is of others: records are never mixed or overwritten.
        """
        if not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same_model = self.source.owns(record["fingerprint"])
            same_setting = _holds(record["config"], wanted)
            same_data = record["sizes"] == {n: len(s) for n, s in self.data.splits.items()}
            if "data_sha256" in record:  # earlier records know the sizes only
                same_data &= record["data_sha256"] == self.hashes
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is not a record of a run: remove it to run again") from None
        if not same_model:
            raise ConfigError(f"{path} is of another model: choose another --name or --out")
        if not same_setting or not same_data:
            raise ConfigError(
                f"{path} was made with other settings or data: choose another --name or --out"
            )
        return record

    def _summary(
        self, best: Setting, finals: list[dict[str, Any]], *, searched: int, prune: bool
    ) -> dict[str, Any]:
        bests = [r["results"]["best"] for r in finals]
        skip = {"epoch", "tokens_per_second"}
        metrics = {}
        for name in sorted({k for b in bests for k in b} - skip):
            values = [b[name] for b in bests if b.get(name) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                metrics[name] = {
                    "mean": statistics.fmean(values),
                    "deviation": spread,
                    "values": values,
                }
        return {
            "model": self.source.label,
            "fingerprint": self.source.fingerprint,
            "data_sha256": self.hashes,
            "task": self.data.report_name,
            "title": self.data.task.title,
            "is_glue": self.data.is_glue,
            "not_glue": self.data.differences,
            "setting": dataclasses.asdict(best) | {"seed": None},
            "searched": searched,
            "pruned": prune and searched > 1,
            "seeds": len(finals),
            "diverged": sum(bool(r["results"].get("diverged")) for r in finals),
            "metrics": metrics,
            "seconds": sum(r["results"]["seconds"] for r in finals),
        }


def median_rule(finished: list[list[float]], epochs: int) -> Stop:
    """Stop a run whose best is below the median best of the finished runs after as many epochs.

    Args:
        finished: The metric after each epoch of every finished run.
        epochs: Of a whole run.
    """

    def stop(done: int, best: float) -> bool:
        if len(finished) < PRUNE_AFTER_RUNS or done < math.ceil(PRUNE_AFTER_SHARE * epochs):
            return False
        reached = statistics.median(max(values[:done]) for values in finished)
        return not best >= reached  # NaN is stopped too

    return stop


def _plain(setting: Setting) -> dict[str, Any]:
    """As a record holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(setting)))
    return plain


def _holds(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return {**found, **wanted} == found


def _worth(record: dict[str, Any], key: str) -> float:
    """The deciding metric of a run, below any other when it is undefined."""
    value = record["results"]["best"].get(key)
    return -math.inf if value is None else float(value)


def _results(outcome: Outcome) -> dict[str, Any]:
    return {
        "best": outcome.best,
        "history": outcome.history,
        "pruned": outcome.pruned,
        "diverged": outcome.diverged,
        "seconds": outcome.seconds,
        "at_length": outcome.at_length,
    }
