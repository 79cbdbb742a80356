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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ddlm.downstream.finetune import Outcome, Setting, Stop, finetune
from ddlm.downstream.glue import GlueData
from ddlm.downstream.models import Source
from ddlm.files import write_text
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError, DataError

PRUNE_AFTER_RUNS = 3
PRUNE_AFTER_SHARE = 0.3

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
        """Every combination, in a fixed order."""
        times: Sequence[float | None] = self.time if has_time else [None]
        return [
            dataclasses.replace(self.base, batch=b, lr=lr, time=t, seed=seed)
            for t, lr, b in itertools.product(times, self.lr, self.batch)
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
    """

    source: Source
    data: GlueData
    folder: Path
    device: str | None = None
    progress: Progress | None = None

    def run(
        self, grid: Grid, seeds: int, *, prune: bool, predict_test: bool, save: Path | None
    ) -> dict[str, Any]:
        """Search, repeat the best setting with ``seeds`` other seeds, and write ``summary.json``.

        The search uses seed 0 and the repetitions seeds 1 to ``seeds``: the winner's own run is the luckiest of the
        search and would flatter the mean. A grid of one setting needs no search.

        Returns:
            The summary.
        """
        candidates = grid.settings(self.source.has_time)
        best = candidates[0]
        if len(candidates) > 1:
            best = self._search(candidates, prune)
        finals = [
            self._one(
                dataclasses.replace(best, seed=s),
                "final",
                None,
                predict_test=predict_test,
                save=save,
            )
            for s in range(1, seeds + 1)
        ]
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

    def _one(
        self,
        setting: Setting,
        stage: str,
        stop: Stop | None,
        *,
        predict_test: bool = False,
        save: Path | None = None,
    ) -> dict[str, Any]:
        """A run, or its record when it was made before."""
        path = self.folder / stage / f"{setting.name}.json"
        wanted = json.loads(json.dumps(dataclasses.asdict(setting)))
        old = self._read(path, wanted)
        if old is not None and stop is None and old["results"].get("pruned"):
            old = None  # without pruning every run of the search is a whole one
        if old is not None and (not predict_test or old.get("predictions")) and save is None:
            return old
        progress = self.progress
        name = f"{self.source.label} {self.data.report_name} {stage} {setting.name}"
        outcome = finetune(
            self.source,
            self.data,
            setting,
            stop=stop,
            progress=None if progress is None else lambda share, line: progress(name, share, line),
            predict_test=predict_test,
            keep_model=save is not None,
            device=self.device,
        )
        record = make_record(
            "finetune",
            wanted,
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
        write_record(path, record)
        if save is not None and outcome.model is not None:
            target = save / self.source.label / self.data.report_name / setting.name
            self.source.save(outcome.model, target)
        return record

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hash of each split."""
        return {name: split.sha256() for name, split in self.data.splits.items()}

    def _read(self, path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The record at ``path`` if it is of this very run.

        Raises:
            ConfigError: when it is of another model or another setting: records are never mixed or overwritten.
        """
        if not path.is_file():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            same_model = record["fingerprint"] == self.source.fingerprint
            same_setting = record["config"] == wanted
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
            "task": self.data.report_name,
            "title": self.data.task.title,
            "is_glue": self.data.is_glue,
            "not_glue": self.data.differences,
            "setting": dataclasses.asdict(best) | {"seed": None},
            "searched": searched,
            "pruned": prune and searched > 1,
            "seeds": len(finals),
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


def _results(outcome: Outcome) -> dict[str, Any]:
    return {
        "best": outcome.best,
        "history": outcome.history,
        "pruned": outcome.pruned,
        "diverged": outcome.diverged,
        "seconds": outcome.seconds,
        "at_length": outcome.at_length,
    }
