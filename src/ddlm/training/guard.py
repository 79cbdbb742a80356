"""Watches the numbers of a run: skipped updates are counted and written down, a run that diverges is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddlm.config import Config
from ddlm.diffusion.time_warp import TimeWarp
from ddlm.files import write_tensors, write_text
from ddlm.training.distributed import World
from ddlm.training.metrics import Reporter, loss_by_level
from ddlm.training.saving import DIVERGED
from ddlm.training.sharded import whole
from ddlm.training.state import StepOutcome, TrainState
from ddlm.types import ConfigError

PATIENCE = 10  # skipped updates in a row before the run is stopped


class Diverged(ConfigError):  # noqa: N818 - it names what happened
    """Too many updates in a row had no finite gradient."""


class HostFlag:
    """A flag on its way from a device to the host: reading it waits for the step that made it, for no later one."""

    def __init__(self, flag: Tensor) -> None:
        self._flag, self._arrived = flag, None
        if flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        """Its value."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)


class Guard:
    """Reads the outcome of each step; on an accelerator one step late, so that the device never waits for the host.

    Args:
        run: Run folder; what went wrong is written into ``skipped/`` there.
        config: Resolved configuration.
        state: Its ``skipped`` is counted up.
        reporter: Where to say it.
        world: The processes; all of them watch.
    """

    def __init__(
        self, run: Path, config: Config, state: TrainState, reporter: Reporter, world: World
    ) -> None:
        self.run, self.config, self.state, self.reporter = run, config, state, reporter
        self.world = world
        self.in_a_row = 0
        self._first = (
            0  # of the updates that were skipped in a row: the weights are those before it
        )
        self._pending: tuple[int, StepOutcome, Tensor, HostFlag] | None = None

    def watch(self, outcome: StepOutcome, tokens: Tensor) -> None:
        """Take note of the step that was just made with this process's ``tokens``.

        Raises:
            Diverged: after ``PATIENCE`` skipped updates in a row, with advice.
        """
        finite = HostFlag(outcome.grad_norm.isfinite())
        previous, self._pending = self._pending, (self.state.step - 1, outcome, tokens, finite)
        if outcome.loss.device.type == "cpu":
            self.catch_up()
        elif previous is not None:
            self._read(*previous)

    def catch_up(self) -> None:
        """Read what is pending (before a checkpoint)."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)

    def _read(self, step: int, outcome: StepOutcome, tokens: Tensor, finite: HostFlag) -> None:
        if finite.read():
            self.in_a_row = 0
            return
        if self.in_a_row == 0:
            self._first = step
        self.in_a_row += 1
        self.state.skipped += 1
        # The norm is that of all processes: they all come here, and the batch is written down whole.
        tokens = self.world.gather(tokens.to(outcome.t.device))
        if self.reporter.active:
            self.reporter.say(f"step {step}: the gradient is not finite, update skipped")
            self.reporter.attempt("skipped/", lambda: self._write_down(step, outcome, tokens))
        if self.in_a_row >= PATIENCE:
            if self.reporter.active:  # a checkpoint of these weights would only fail again
                text = json.dumps({"step": self._first}) + "\n"
                self.reporter.attempt(DIVERGED, lambda: write_text(self.run / DIVERGED, text))
            raise Diverged(
                f"{PATIENCE} updates in a row up to step {step} had no finite gradient: lower train.lr (now "
                f"{self.config.train.lr:g}), lengthen train.warmup or set train.precision=fp32, then run the same "
                f"command again, which goes back to the last checkpoint before step {self._first}; the batches are in "
                f"{self.run / 'skipped'}"
            )

    def _write_down(self, step: int, outcome: StepOutcome, tokens: Tensor) -> None:
        process = self.state.model.process
        folder = self.run / "skipped"
        folder.mkdir(exist_ok=True)
        t, ce = outcome.t.cpu(), outcome.cross_entropy.cpu()
        levels = loss_by_level(t, ce, process.t_min, process.t_max)
        facts = {
            "step": step,
            "loss": str(float(outcome.loss)),
            "grad_norm": str(float(outcome.grad_norm)),
            "loss_by_level": {k: str(v) for k, v in levels.items()},
        }
        write_text(folder / f"step-{step}.json", json.dumps(facts, indent=1) + "\n")
        write_tensors(
            folder / f"step-{step}.safetensors",
            {"tokens": tokens.cpu(), "t": t, "cross_entropy": ce},
        )

    @torch.no_grad()
    def check_warp(self) -> None:
        """Refuse to go on, and to keep, a learned distribution of t that is none.

        Raises:
            Diverged: with advice.
        """
        if self.state.warp is not None:
            self._rising_cdf(self.state.warp, self._levels())

    def _levels(self) -> Tensor:
        process = self.state.model.process
        return torch.linspace(process.t_min, process.t_max, 11)

    def _rising_cdf(self, warp: TimeWarp, t: Tensor) -> Tensor:
        cdf = warp.cdf(t)
        if not bool((cdf.diff() > 0).all()):
            raise Diverged(
                "the learned time distribution is no longer monotone: lower time.lr and run the same command again"
            )
        return cdf

    @torch.no_grad()
    def norms(self) -> dict[str, Any]:
        """Root-mean-square norm of the raw embedding rows; with a time warp, whether it rises and what it learned."""
        state = self.state
        values: dict[str, Any] = {}
        table = state.model.embedding
        values["embedding_norm"] = float(whole(table.float().norm()) / table.shape[0] ** 0.5)
        if state.warp is not None:
            t = self._levels()
            cdf, fitted = self._rising_cdf(state.warp, t), state.warp.unnormalized_cdf(t)
            values["warp"] = {
                f"{a:.3g}": {"cdf": round(float(b), 4), "fitted_loss": round(float(c), 4)}
                for a, b, c in zip(t, cdf, fitted, strict=True)
            }
        return values
