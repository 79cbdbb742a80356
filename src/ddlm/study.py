"""Recording for :mod:`ddlm.analysis`: trajectories of a model and of its checkpoints, and what is measured beside them.

S sequences, n steps, T positions, V vocabulary. Every part of a study is one record file in ``OUT/records``, written
when it is complete; a study that was interrupted goes on with the parts that are missing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ddlm.analysis import record
from ddlm.analysis.record import Array
from ddlm.analysis.trajectories import EVERY_KL, Trajectories
from ddlm.checkpoint import checkpoints, find_model
from ddlm.config import SampleConfig, read_config
from ddlm.data.shards import INDEX
from ddlm.device import find_device, has_bf16
from ddlm.files import read_manifest
from ddlm.lm import load
from ddlm.record import command_line, commit, hardware, versions
from ddlm.studied import StudiedLM, sampler
from ddlm.tracing import BESIDE, find_text, quality_rows, recording_cost, trace_sequences
from ddlm.types import ConfigError, DataError

Tell = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


@dataclass(frozen=True)
class Study:
    """What is to be recorded.

    Attributes:
        model: Model folder, run folder or hub id.
        out: Folder of the study.
        checkpoints: Further checkpoints to compare: steps of the same run, or model folders. None: up to four of the
            run that the model belongs to, evenly spaced.
        sequences: Sequences S of every setting.
        steps: Steps n of the trajectories.
        solver: See :meth:`ddlm.lm.DiffusionLM.iterate`; None: each model's own.
        temperature: Divides the logits; None: each model's own.
        noise_scales: Initial noise relative to t_max (Figure 3).
        step_counts: Numbers of steps allowed (Figure 1, right).
        patience: n_p of the early exits that are compared.
        judge: Causal language model for AR-NLL, folder or hub id; None: none.
        data: Prepared shards; None: those the model was trained on, where they are.
        template: What is written; None: a whole sequence from nothing.
        seed: Of the first sequence; every setting starts from the same noise.
        slots: Sequences advanced together.
        overwrite: Replace records of other settings, delete those of other models.
        device: See :func:`ddlm.lm.load`.
        precision: See :func:`ddlm.lm.load`.
    """

    model: str
    out: Path
    checkpoints: Sequence[str] | None = None
    sequences: int = 64
    steps: int = 200
    solver: Any = None
    temperature: float | None = None
    noise_scales: Sequence[float] = (0.5, 0.8, 1.0, 1.2)
    step_counts: Sequence[int] = (25, 50, 100, 200, 500)
    patience: Sequence[int] = (5, 10, 25, 50)
    judge: str | None = None
    data: str | None = None
    template: str | None = None
    seed: int = 0
    slots: int = 32
    overwrite: bool = False
    device: str | None = None
    precision: Any = None

    def __post_init__(self) -> None:
        for name, low in (("sequences", 1), ("steps", 3), ("slots", 1)):
            if getattr(self, name) < low:
                raise ConfigError(
                    f"{name}={getattr(self, name)} was given, a study needs at least {low}"
                )
        if any(not (math.isfinite(s) and s >= 0) for s in self.noise_scales):
            raise ConfigError("noise_scales must be finite numbers of 0 or more")
        if any(n < 3 for n in self.step_counts):
            raise ConfigError("step_counts must be 3 or more")
        if any(n < 1 for n in self.patience):
            raise ConfigError("patience must be 1 or more steps")


@dataclass
class Recording:
    """Carries out a :class:`Study`.

    Args:
        study: What is to be recorded.
        tell: Told about the progress.
        notes: What had to be left out, and why.
    """

    study: Study
    tell: Tell = lambda what, done, total: None
    notes: list[str] = field(default_factory=list)
    _labels: dict[Path, str] = field(default_factory=dict, init=False)

    def run(self) -> Path:
        """Record whatever is missing; returns the folder of the study.

        Raises:
            ConfigError: when there is no such model, judge or data, or ``out`` holds another study.
        """
        s = self.study
        main = find_model(s.model).absolute()
        folders = [*self._checkpoints(main), main]
        self._check_owner(main)
        if self._missing_of_text(main):
            find_text(main, s.data)  # refuses what cannot be used before hours of recording
        judge = self._judge()
        if s.overwrite:
            self._delete_others(folders)
        self._labels = labels_of(folders)
        for folder in folders:
            self._trajectories(folder, s.steps, 1.0)
        for scale in s.noise_scales:
            self._trajectories(main, s.steps, scale)
        for steps in s.step_counts:
            self._trajectories(main, steps, 1.0)
        self._quality(main, judge)
        self._beside(main)
        names = [self._name(f, s.steps, 1.0) for f in folders]
        index = {
            "model": s.model,
            "identity": identity(main),
            "checkpoints": names,
            "identities": {n: identity(f) for n, f in zip(names, folders, strict=True)},
            "labels": {n: self._labels[f] for n, f in zip(names, folders, strict=True)},
            "main": self._name(main, s.steps, 1.0),
            "noise": [self._name(main, s.steps, x) for x in sorted({*s.noise_scales, 1.0})],
            "steps": [self._name(main, n, 1.0) for n in sorted({*s.step_counts, s.steps})],
            "notes": self.notes,
            "run": run_of(main) is not None,
        }
        self._write(s.out / "records" / "study.npz", "study", index)
        return s.out

    # ---- what is looked at

    def _checkpoints(self, main: Path) -> list[Path]:
        """The other checkpoints, oldest first."""
        run = run_of(main)
        if self.study.checkpoints is None:
            found = [p for p in checkpoints(run) if p != main] if run else []
            count = min(4, len(found))
            return [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]
        chosen = []
        for name in self.study.checkpoints:
            step = name.removeprefix("step-")
            here = run / "checkpoints" / f"step-{step}" if run and step.isdigit() else Path(name)
            if run and step.isdigit() and not here.is_dir():
                there = ", ".join(p.name[5:] for p in checkpoints(run)) or "none"
                raise ConfigError(f"{run} has no checkpoint of step {step}; it has {there}")
            chosen.append(find_model(here).absolute())
        return [p for p in chosen if p != main]

    def _name(self, folder: Path, steps: int, scale: float) -> str:
        # The checkpoints of two runs have equal names of steps.
        model = f"{folder.name if run_of(folder) else 'model'}-{identity(folder)[:8]}"
        return f"{model}-n{steps}-noise{scale:g}.npz"

    def _settings(self, folder: Path) -> dict[str, Any]:
        """What the numbers of a model depend on beside the options: its weights, its sampler, the precision."""
        process, used = read_config(folder / "config.yaml").process, self._sampler(folder)
        return {
            "model": identity(folder), "solver": used.solver, "grid": used.grid,
            "temperature": used.temperature, "precision": self._precision,
            "process": [process.t_min, process.t_max],
        }  # fmt: skip

    @cached_property
    def _precision(self) -> str:
        """The precision that :class:`ddlm.lm.DiffusionLM` will take."""
        if self.study.precision is not None:
            return str(self.study.precision)
        device = find_device(self.study.device)
        return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"

    @cached_property
    def _place(self) -> dict[str, Any]:
        return {
            "command": command_line(), "commit": commit(), "versions": versions(),
            "hardware": hardware(),
        }  # fmt: skip

    def _write(
        self,
        path: Path,
        kind: str,
        header: Mapping[str, Any],
        arrays: Mapping[str, Array] | None = None,
    ) -> None:
        """Write a part, with when, where and by which command it was recorded: it may be drawn much later."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record.write(path, kind, {**header, "provenance": {"date": date, **self._place}}, arrays)

    def _delete_others(self, folders: Sequence[Path]) -> None:
        """Delete records of models that are not of this study; the last folder is the model.

        A part that cannot be recorded for the new model, for want of its text, must not stay as the old one's.
        """
        mine = {identity(f) for f in folders}
        for path in sorted((self.study.out / "records").glob("*.npz")):
            try:
                header = record.read(path).header
                if path.name == "study.npz":
                    stale = header["identity"] != identity(folders[-1])
                else:
                    stale = header["settings"]["model"] not in mine
            except (DataError, KeyError, TypeError):
                continue  # damaged: replaced if it is needed; else not ours to delete
            if stale:
                path.unlink()

    def _check_owner(self, main: Path) -> None:
        index = self.study.out / "records" / "study.npz"
        if index.is_file() and not self.study.overwrite:
            other = record.read(index, "study").header
            if other["identity"] != identity(main):
                raise ConfigError(
                    f"{self.study.out} holds a study of {other['model']}: give another --out, or --overwrite"
                )

    def _part(self, name: str, kind: str, settings: Mapping[str, Any]) -> Path | None:
        """Where a part belongs, or None when it is there already with these settings."""
        path = self.study.out / "records" / name
        if path.is_file():
            if self.study.overwrite:
                try:
                    if _alike(record.read(path, kind).header["settings"], settings):
                        return None
                except DataError:
                    pass
                return path
            found = record.read(path, kind).header["settings"]
            if not _alike(found, settings):
                changed = [k for k in settings if k in found and found[k] != settings[k]]
                unknown = [k for k in settings if k not in found]
                why = (
                    f"does not say with which {', '.join(unknown)} it was recorded"
                    if unknown and not changed
                    else f"was recorded with other {' and '.join(changed) or 'settings'}"
                )
                raise ConfigError(f"{path} {why}: give another --out, or --overwrite")
            return None
        return path

    # ---- the parts

    def _trajectories(self, folder: Path, steps: int, scale: float) -> None:
        """One setting: S traced sequences."""
        s = self.study
        settings = self._settings(folder) | {
            "steps": steps, "noise_scale": float(scale), "seed": s.seed, "sequences": s.sequences,
            "template": s.template, "kl": EVERY_KL,
        }  # fmt: skip
        path = self._part(self._name(folder, steps, scale), "trajectories", settings)
        if path is None:
            return
        lm = self._load(folder)
        label = self._labels[folder]
        what = f"{label}, {steps} steps, noise {scale:g}"
        arrays, header = trace_sequences(
            lm, s.template, sequences=s.sequences, steps=steps, noise_scale=scale, seed=s.seed,
            slots=s.slots, on_sequence=lambda done: self.tell(what, done, s.sequences),
        )  # fmt: skip
        header |= {
            "settings": settings, "label": label, "precision": self._precision,
            "training_step": read_manifest(folder).get("step"),
        }  # fmt: skip
        self._write(path, "trajectories", header, arrays)

    def _judge(self) -> Any:
        if self.study.judge is None:
            return None
        from ddlm.evaluation.judges import Judge

        return Judge(self.study.judge)

    def _quality(self, main: Path, judge: Any) -> None:
        """Measures of what each number of steps and each patience would have given."""
        s = self.study
        counts = sorted({*s.step_counts, s.steps})
        settings = self._settings(main) | {
            "step_counts": counts, "patience": list(s.patience),
            "sequences": s.sequences, "seed": s.seed, "template": s.template,
            "judge": judge.describe() if judge else None,
        }  # fmt: skip
        if s.template is not None:
            settings["scored"] = "what was generated"  # records from before hold all of the text
        path = self._part("quality.npz", "quality", settings)
        if path is None:
            return
        lm = self._load(main)
        rows = []
        for i, n in enumerate(counts):
            self.tell("quality", i, len(counts))
            drawn = Trajectories.load(s.out / "records" / self._name(main, n, 1.0))
            rows += quality_rows(lm, drawn, s.patience, judge)
        self._write(path, "quality", {"settings": settings, "rows": rows})

    def _beside(self, main: Path) -> None:
        """Loss curve, token frequencies and continuations, where there is text; the cost of recording."""
        settings = self._settings(main) | {"kl": EVERY_KL}
        cost = self._part("overhead.npz", "overhead", settings)
        if cost is not None:
            self.tell("cost of recording", 0, 1)
            lm = self._load(main)
            costs = recording_cost(lm.plain)  # a trace by itself, as of `ddlm generate --trace`
            costs["cost_with_kl"] = recording_cost(lm)["cost"]
            self._write(cost, "overhead", {"settings": settings, **costs})
        todo = self._missing_of_text(main)
        if not todo:
            return
        shards, kinds, why = find_text(main, self.study.data)
        if left_out := [n for n in todo if n not in kinds]:
            self.notes.append(why)
        for name in left_out:  # of other text or settings, to be replaced
            todo.pop(name)[0].unlink(missing_ok=True)
        if not todo:
            return
        lm = self._load(main)
        for name, (path, wanted) in todo.items():
            self.tell(name, 0, 1)
            header, arrays = BESIDE[name](lm, shards)
            self._write(path, name, {"settings": wanted, **header}, arrays)

    def _missing_of_text(self, main: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Path and settings of each part that is measured on text and not there yet, by its kind."""
        settings = self._settings(main) | {"data": self.study.data, "text": self._text(main)}
        used = self._sampler(main)
        sampled = {"steps": used.steps, "noise_scale": used.noise_scale, "refine": used.refine}
        wanted = {"schedule": settings, "frequency": settings, "samples": settings | sampled}
        todo = {n: (self._part(f"{n}.npz", n, x), x) for n, x in wanted.items()}
        return {n: (path, x) for n, (path, x) in todo.items() if path is not None}

    def _text(self, main: Path) -> dict[str, str] | None:
        """Which prepared text there is: a folder may be prepared anew. None where there is none to be used."""
        data = self.study.data
        if data is not None and not (Path(data) / INDEX).is_file():
            return None  # what was recorded of it stays
        shards, *_ = find_text(main, data)
        path = read_config(main / "config.yaml").data.path if data is None else data
        return None if shards is None else {"path": str(path), "hash": shards.hash}

    def _load(self, folder: Path) -> StudiedLM:
        lm = load(folder, device=self.study.device, precision=self.study.precision)
        return StudiedLM(lm, self._sampler(folder))

    def _sampler(self, folder: Path) -> SampleConfig:
        return sampler(folder, solver=self.study.solver, temperature=self.study.temperature)


def _alike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a record has the settings wanted, whatever else it names.

    Text that a record does not name, or that is gone, is not compared.
    """
    if found.get("text") is None or wanted.get("text") is None:
        wanted = {k: v for k, v in wanted.items() if k != "text"}
    return all(k in found and found[k] == v for k, v in wanted.items())


def run_of(folder: Path) -> Path | None:
    """The run folder that a checkpoint belongs to, or None."""
    folder = folder.absolute()
    return folder.parent.parent if folder.parent.name == "checkpoints" else None


def labels_of(folders: Sequence[Path]) -> dict[Path, str]:
    """Short names: the step, the run where two have the same step, the fingerprint where that is the same too."""
    found = {}
    for folder in folders:
        step = read_manifest(folder).get("step")
        found[folder] = f"step {step:,}" if step is not None else folder.name
    for tell in (lambda f: f" of {(run_of(f) or f).name}", lambda f: f" ({identity(f)[:8]})"):
        count = Counter(found.values())
        found = {f: x + tell(f) if count[x] > 1 else x for f, x in found.items()}
    return found


def identity(folder: Path) -> str:
    """A fingerprint of the weights, from the manifest's hashes."""
    files = read_manifest(folder)["files"]
    weights = {k: v for k, v in files.items() if "/" not in k and k.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]
