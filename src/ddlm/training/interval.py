"""What the steps since the last line of metrics amount to: loss, pace, model FLOPs and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddlm.config import Config
from ddlm.training.flops import step_flops
from ddlm.training.metrics import loss_by_level
from ddlm.training.state import StepOutcome, TrainState

LAST = 1000
"""Steps whose losses are kept, on the device: however rarely a line is written."""


class Interval:
    """The steps between two lines of metrics; the losses are those of the last :data:`LAST` of them.

    Args:
        config: Resolved configuration.
        state: The run; it is read only.
        matrix_rate: Matrix products of all processes together, FLOP/s, for the MFU.
    """

    def __init__(self, config: Config, state: TrainState, matrix_rate: float) -> None:
        self.config, self.state, self.matrix_rate = config, state, matrix_rate
        self.outcomes: deque[StepOutcome] = deque(maxlen=LAST)
        self._flops = 0.0
        # Seconds that went into something else than steps; those up to the last step.
        self.aside, self._aside_then = 0.0, 0.0
        self._begun = (state.step, state.seconds)

    def add(self, outcome: StepOutcome, noised: int) -> None:
        """A step that was made, with the noised positions of the global batch."""
        self.outcomes.append(outcome)
        conditioned = int(noised * self.config.train.self_condition)
        self._flops += step_flops(self.config, noised, conditioned)
        self._aside_then = self.aside

    @contextlib.contextmanager
    def besides(self) -> Iterator[None]:
        """Time that counts for no step."""
        start = time.monotonic()
        yield
        self.aside += time.monotonic() - start

    def _pace(self) -> tuple[int, float]:
        """Steps, and the seconds that they alone took."""
        steps, elapsed = self.state.step - self._begun[0], self.state.seconds - self._begun[1]
        return steps, max(elapsed - self._aside_then, 1e-9)

    def values(self) -> dict[str, Any]:
        """A line of metrics. Steps without a finite loss count in none of the means; NaN where there is no other."""
        state, config, process = self.state, self.config, self.state.model.process
        steps, seconds = self._pace()
        t = torch.cat([o.t for o in self.outcomes]).cpu()
        cross_entropy = torch.cat([o.cross_entropy for o in self.outcomes]).cpu()
        known = cross_entropy.isfinite()
        return {
            "loss": _finite_mean(torch.stack([o.loss for o in self.outcomes])),
            "loss_by_level": loss_by_level(
                t[known], cross_entropy[known], process.t_min, process.t_max
            ),
            "lr": state.optimizer.param_groups[0]["lr"],
            "grad_norm": float(self.outcomes[-1].grad_norm),
            "tokens_per_second": steps * config.train.batch * config.model.length / seconds,
            "model_flops_per_second": self._flops / seconds,
            "mfu": self._flops / seconds / self.matrix_rate,
            "seconds": round(state.seconds, 3),
            "skipped": state.skipped,
        }

    def progress(self) -> tuple[float, float]:
        """Which part of the run is done, and the seconds that are left at this pace."""
        train, state = self.config.train, self.state
        steps, seconds = self._pace()
        done = state.step / train.steps
        left = (train.steps - state.step) * seconds / max(steps, 1)
        if train.budget is not None:
            done = max(done, state.seconds / train.budget)
            left = min(left, train.budget - state.seconds)
        return done, left

    def restart(self) -> None:
        """Begin the next one; what went into something else after the last step counts there."""
        self._begun = (self.state.step, self.state.seconds)
        self.aside, self._aside_then = self.aside - self._aside_then, 0.0
        self.outcomes.clear()
        self._flops = 0.0


def _finite_mean(x: Tensor) -> float:
    return float(x[x.isfinite()].mean())
