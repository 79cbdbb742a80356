"""What a run says while it goes on: metrics.jsonl always, a progress view in a terminal, trackers by name."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ddlm.config import Config, config_to_dict
from ddlm.files import write_text
from ddlm.types import ConfigError

LEVELS = 5


def loss_by_level(
    t: Tensor, cross_entropy: Tensor, t_min: float, t_max: float, levels: int = LEVELS
) -> dict[str, float]:
    """Mean cross-entropy (nats) of the sequences in each of ``levels`` equal intervals of t.

    Args:
        t: Times ``(n,)``.
        cross_entropy: Mean cross-entropy of each sequence ``(n,)``.
        t_min: Lower end of the first interval.
        t_max: Upper end of the last.
        levels: Number of intervals.

    Returns:
        ``{"1-2.8": 0.01, ...}``; intervals without a sequence are left out.
    """
    width = (t_max - t_min) / levels
    index = ((t - t_min) / width).long().clamp(0, levels - 1)
    means = {}
    for i in range(levels):
        chosen = cross_entropy[index == i]
        if chosen.numel():
            means[f"{t_min + i * width:.3g}-{t_min + (i + 1) * width:.3g}"] = float(chosen.mean())
    return means


class Tracker(Protocol):
    """A place that metrics are sent to besides metrics.jsonl."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    def start(self, step: int) -> None:
        """Begin: the run goes on after ``step``, and what it once said of later ones no longer holds."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, run: Path, config: Config) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("tensorboard is not installed: pip install 'ddlm[track]'") from None
        self._kind, self._folder = SummaryWriter, run / "tensorboard"
        self._writer: Any = None

    def start(self, step: int) -> None:
        # a writer makes its file at once: not before the run folder may change
        self._writer = self._kind(str(self._folder), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def remove_events(run: Path) -> None:
    """Remove the files that an earlier run in this folder wrote for TensorBoard."""
    for file in (run / "tensorboard").glob("events.out.tfevents.*"):
        file.unlink()


class _Service:
    """trackio and wandb share one interface."""

    def __init__(self, module: str, run: Path, config: Config) -> None:
        import importlib

        self.name = module
        try:
            self._module: Any = importlib.import_module(module)
        except ImportError:
            extra = "pip install 'ddlm[track]'" if module == "trackio" else f"pip install {module}"
            raise ConfigError(f"{module} is not installed: {extra}") from None
        self._module.init(project="ddlm", name=run.name, config=config_to_dict(config))

    def start(self, step: int) -> None:
        pass  # each start of a run is one of its own there

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def open_trackers(names: Sequence[str], run: Path, config: Config) -> list[Tracker]:
    """Trackers by name: tensorboard, trackio or wandb.

    Raises:
        ConfigError: for an unknown name or a package that is not installed.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(_TensorBoard(run, config))
        elif name in ("trackio", "wandb"):
            trackers.append(_Service(name, run, config))
        else:
            raise ConfigError(f"unknown tracker {name!r}: use tensorboard, trackio or wandb")
    return trackers


class Reporter:
    """Writes metrics.jsonl, shows the progress, feeds the trackers; does nothing on other processes than the first.

    Args:
        run: Run folder.
        config: Resolved configuration.
        active: Whether this process reports.
        trackers: Further places.
        quiet: Say nothing on the terminal.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        *,
        active: bool = True,
        trackers: Sequence[Tracker] = (),
        quiet: bool = False,
    ) -> None:
        self.run, self.config, self.active, self.trackers = run, config, active, list(trackers)
        self.quiet = quiet or not active
        self._path = run / "metrics.jsonl"
        self._file: Any = None
        self._progress: Any = None
        self._task: Any = None
        self._shown = ""
        self._unwritten: set[str] = set()

    def start(self, step: int) -> None:
        """Open the files; what a run that was killed left of steps after ``step`` is dropped.

        Args:
            step: Last step that the run goes on from; -1 for one that begins, whose step 0 may be told too.
        """
        if not self.active:
            return
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").split("\n")
            kept = [x for x in lines if _step(x) <= step]
            write_text(self._path, "".join(x + "\n" for x in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._track(lambda tracker: tracker.start(step))
        if not self.quiet and sys.stderr.isatty():
            self._open_progress()

    def _open_progress(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.description}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("compiling and starting", total=1.0)
        self._progress.start()

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and tell the trackers; nested values become ``outer/inner``."""
        if not self.active:
            return
        line = json.dumps(
            _finite({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        )
        self.attempt("metrics.jsonl", lambda: self._append(line))
        flat = dict(_flatten(values, f"{kind}/"))
        self._track(lambda tracker: tracker.log(flat, step))

    def _track(self, tell: Callable[[Tracker], None]) -> None:
        """Tell every tracker; one that fails, in whatever way its package does, is left out from then on."""
        for tracker in list(self.trackers):
            try:
                tell(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self.say(f"{tracker.name} failed ({reason}), going on without")

    def _append(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write something a run can do without: a full disk is said once and does not end it."""
        try:
            write()
        except OSError as error:
            if what not in self._unwritten:
                self.say(f"{what} not written ({error.strerror or error}), going on without")
            self._unwritten.add(what)

    def show(
        self, step: int, fraction: float, seconds_left: float, values: Mapping[str, Any]
    ) -> None:
        """Update the progress view: bar in a terminal, a plain line elsewhere."""
        if self.quiet:
            return
        levels = " ".join(f"{v:.2f}" for v in values.get("loss_by_level", {}).values())
        text = (
            f"step {step}  loss {values['loss']:.3f} [by noise {levels}]  "
            f"{values['tokens_per_second']:,.0f} tokens/s  {duration(seconds_left)} left"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=fraction, description=text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.quiet:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _close_file(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the view and the files."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._file is not None:
            self.attempt("metrics.jsonl", self._close_file)
            self._file = None
        self._track(lambda tracker: tracker.close())
        self.trackers = []


def last_validation(run: Path, step: int) -> dict[str, Any] | None:
    """The held-out evaluation of a step as metrics.jsonl has it, or None."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    except OSError:
        return None
    for line in reversed(lines):
        if _step(line) == step and (values := json.loads(line)).get("kind") == "validation":
            return {k: v for k, v in values.items() if k not in ("kind", "time")}
    return None


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    whole = max(int(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off in the middle by a kill


def _finite(value: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat.append((prefix + name, float(value)))
    return flat
