"""Training: one step, and the loop around it.

B sequences of the global batch, b of this process, T positions.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddlm.config import Config
from ddlm.device import slow_precision
from ddlm.network.denoiser import DDLM
from ddlm.training.data import open_data
from ddlm.training.distributed import World, accumulates, open_world, wrap
from ddlm.training.draws import MicroBatch, micro_batches
from ddlm.training.flops import step_flops
from ddlm.training.guard import Guard
from ddlm.training.initial import kept_origin, open_initial, origin, start_from
from ddlm.training.interrupts import Interrupts
from ddlm.training.matching import match_queries
from ddlm.training.metrics import Reporter, loss_by_level, open_trackers
from ddlm.training.optim import clipped_step, learning_rate
from ddlm.training.prefetch import Prefetcher, noise_of
from ddlm.training.saving import find_resumable, prepare_run, save_checkpoint
from ddlm.training.spectral import start_from_corpus
from ddlm.training.speed import can_compile, compile_denoiser, matrix_rate
from ddlm.training.state import StepOutcome, TrainState
from ddlm.training.validation import BatchSource, validation_loss
from ddlm.types import ConfigError

Sample = Callable[[DDLM, int], None]
"""Writes samples of the (averaged) model at a step; given by the caller, training knows no sampler."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended.

    Attributes:
        step: Updates made in all.
        checkpoint: The last checkpoint.
        stopped: Number of the signal that ended it early, 0 when the run is complete.
        validation: The last held-out evaluation.
    """

    step: int
    checkpoint: Path
    stopped: int = 0
    validation: dict[str, Any] = field(default_factory=dict)


def train_step(
    state: TrainState,
    objective: nn.Module,
    parts: Sequence[MicroBatch],
    config: Config,
    world: World,
) -> StepOutcome:
    """One update of the weights from the micro-batches of this process's share of the batch.

    Every noised position of the global batch weighs the same, whatever process and micro-batch it is in: the losses of
    all parts add up to the mean over the global batch.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, state.step, state.seconds)
    state.optimizer.zero_grad(set_to_none=True)
    losses, rows, times, cross_entropy = [], [], [], []
    for i, part in enumerate(parts):
        accumulates(objective, last=i == len(parts) - 1)
        loss, per_sequence = objective(part.batch, part.self_condition)
        (loss * world.size).backward()  # DDP and FSDP average over processes; the sum is meant
        losses.append(loss.detach())
        rows.append(part.rows)
        times.append(part.batch.t)
        cross_entropy.append(per_sequence)
    grad_norm = clipped_step(state.optimizer, config.train.clip)
    if state.ema is not None:
        state.ema.update(state.model.parameters(), state.step)
    order = torch.cat(rows).argsort().to(world.device)  # back to the order of the global batch
    outcome = StepOutcome(
        loss=world.gather(torch.stack(losses).sum()[None]).sum(),
        grad_norm=grad_norm,
        t=world.gather(torch.cat(times)[order]),
        cross_entropy=world.gather(torch.cat(cross_entropy)[order]),
    )
    if state.warp is not None and state.warp_optimizer is not None:
        ce = outcome.cross_entropy.cpu()
        if bool(ce.isfinite().all()):
            state.warp_optimizer.zero_grad()
            state.warp.loss(outcome.t.cpu(), ce).backward()
            state.warp_optimizer.step()
    state.step += 1
    return outcome


def train(
    config: Config,
    run: Path,
    *,
    source: BatchSource | None = None,
    held_out: BatchSource | None = None,
    sample: Sample | None = None,
    initial: str | Path | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    track: Sequence[str] = (),
    quiet: bool = False,
) -> TrainResult:
    """Train until the steps or the budget are used up, or go on with a run that was interrupted.

    Args:
        config: Everything about the run.
        run: Run folder; an existing one is resumed.
        source: This process's batches; None: the shards at ``data.path``.
        held_out: Held-out batches for the periodic evaluation; None: the shards' held-out split.
        sample: Called with the averaged model every ``train.sample_every`` steps.
        initial: A model (folder, run or hub id) whose weights a new run starts from, with a new optimiser; a run
            that is resumed has its own. None: random weights.
        fresh: Start anew; refused when the folder holds a run, unless ``overwrite``.
        overwrite: With ``fresh``: remove the run that is there.
        track: Trackers besides metrics.jsonl: tensorboard, trackio, wandb.
        quiet: Say nothing on the terminal.

    Raises:
        ConfigError: in one line, for anything the user has to change.
        OSError: when the last checkpoint cannot be written.
    """
    started = time.monotonic()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = open_world(config)
    data = open_data(config, world, source, held_out)
    given = open_initial(initial, run, config, data, fresh)
    if given is not None:
        world.barrier()  # every process has read it: a fresh run may replace the very run it starts from
    if world.is_main:
        prepare_run(run, config, fresh, overwrite)
    world.barrier()
    reporter = Reporter(
        run,
        config,
        active=world.is_main,
        trackers=open_trackers(track, run, config) if world.is_main else (),
        quiet=quiet,
    )
    state = TrainState.create(config, world.device)
    objective = wrap(state.model, config, world)
    if world.size > 1 and config.train.strategy == "fsdp":
        state = TrainState.around(state.model, config)  # over the sharded parameters
    resumed = find_resumable(run, config, reporter.say)
    if resumed is not None:
        data.check_tokenizer(resumed)
        state.restore(resumed)
        data.provenance.update(kept_origin(resumed))
        reporter.say(f"resuming {run} at step {state.step}")
    elif given is not None and initial is not None:
        start_from(state, given)
        data.provenance["initial"] = origin(initial, given)
        reporter.say(f"starting from the weights of {initial}")
    else:
        if config.train.attention == "matching":
            match_queries(state)
        if config.train.embeddings == "spectral" and data.shards is not None:
            reporter.say("counting the neighbours of every token for the embeddings to start from")
            start_from_corpus(state, data.shards, config.train.seed, world)
    slow = slow_precision(config.train.precision, world.device)
    if slow is not None:
        reporter.say(slow)
    elif state.model.compute_dtype == torch.float32 and config.train.precision == "auto":
        reporter.say("no bfloat16 instructions were found: training in float32")
    if config.train.compile and can_compile(world.device):
        compile_denoiser(state.model)
    elif config.train.compile:
        reporter.say(
            "no C++ compiler (g++, or what CXX names) was found: training without compiling"
        )
    reporter.start(state.step)
    loop = _Loop(config, run, world, state, objective, reporter, data, sample, started)
    try:
        if given is not None and resumed is None and config.train.eval_every:
            loop.evaluate()  # what training makes of the weights is told by what they were worth before
        return loop.run_to_end()
    finally:
        reporter.close()
        if source is None:
            world.close()


class _Loop:
    """The loop's parts, held together while it runs."""

    def __init__(
        self,
        config: Config,
        run: Path,
        world: World,
        state: TrainState,
        objective: nn.Module,
        reporter: Reporter,
        data: Any,
        sample: Sample | None,
        started: float,
    ) -> None:
        self.config, self.run, self.world, self.state = config, run, world, state
        self.objective, self.reporter, self.data, self.sample = objective, reporter, data, sample
        self.clock = started - state.seconds
        self.guard = Guard(run, config, state, reporter)
        self.validation: dict[str, Any] = {}
        self.checkpoint: Path | None = None
        self.logged = (state.step, state.seconds)
        self.outcomes: list[StepOutcome] = []
        self.flops = 0.0
        self.matrix_rate = matrix_rate(config, world.device) * world.size

    def run_to_end(self) -> TrainResult:
        """Step after step, with evaluations, samples and checkpoints in between."""
        config, state, every = self.config, self.state, self.config.train
        with (
            Interrupts() as interrupts,
            Prefetcher(config, self.data.train, self.world, state.step) as prefetcher,
        ):
            stopped = 0
            while not self.finished():
                inputs = prefetcher.next()
                noise = noise_of(inputs, config, self.world)
                parts = micro_batches(
                    config,
                    inputs.tokens,
                    inputs.draw,
                    noise,
                    state.times,
                    self.world.rows(every.batch).start,
                    self.world.device,
                )
                outcome = train_step(state, self.objective, list(parts), config, self.world)
                self.guard.watch(outcome, inputs.tokens)
                self.outcomes.append(outcome)
                noised = inputs.draw.total_noised
                self.flops += step_flops(config, noised, int(noised * every.self_condition))
                seconds, signal_number = self.world.agree(
                    time.monotonic() - self.clock, interrupts.signal
                )
                state.seconds, stopped = seconds, int(signal_number)
                if stopped:
                    break
                if state.step % every.log_every == 0:
                    self.log()
                if every.eval_every and state.step % every.eval_every == 0:
                    self.evaluate()
                if every.sample_every and state.step % every.sample_every == 0:
                    self.write_samples()
                if state.step % every.checkpoint_every == 0:
                    self.save(last=False)
            if not stopped and every.eval_every and not self.evaluated_now():
                self.evaluate()
            self.log()
            if self.checkpoint is None or self.checkpoint.name != f"step-{state.step}":
                self.save(last=True)
        assert self.checkpoint is not None
        return TrainResult(state.step, self.checkpoint, stopped, self.validation)

    def finished(self) -> bool:
        """Whether the steps or the budget are used up; the same answer in every process."""
        budget = self.config.train.budget
        return self.state.step >= self.config.train.steps or (
            budget is not None and self.state.seconds >= budget
        )

    def log(self) -> None:
        """One line of metrics over the steps since the last one."""
        state, config = self.state, self.config
        if not self.outcomes:
            return
        steps, seconds = state.step - self.logged[0], state.seconds - self.logged[1]
        t = torch.cat([o.t for o in self.outcomes]).cpu()
        cross_entropy = torch.cat([o.cross_entropy for o in self.outcomes]).cpu()
        process = state.model.process
        values: dict[str, Any] = {
            "loss": float(torch.stack([o.loss for o in self.outcomes]).mean()),
            "loss_by_level": loss_by_level(t, cross_entropy, process.t_min, process.t_max),
            "lr": state.optimizer.param_groups[0]["lr"],
            "grad_norm": float(self.outcomes[-1].grad_norm),
            "tokens_per_second": steps
            * config.train.batch
            * config.model.length
            / max(seconds, 1e-9),
            "model_flops_per_second": self.flops / max(seconds, 1e-9),
            "mfu": self.flops / max(seconds, 1e-9) / self.matrix_rate,
            "seconds": round(state.seconds, 3),
            "skipped": state.skipped,
        }
        values |= self.guard.norms()
        self.reporter.record("train", state.step, values)
        done = state.step / config.train.steps
        if config.train.budget is not None:
            done = max(done, state.seconds / config.train.budget)
        pace = seconds / max(steps, 1)
        left = (config.train.steps - state.step) * pace
        if config.train.budget is not None:
            left = min(left, config.train.budget - state.seconds)
        self.reporter.show(state.step, done, left, values)
        self.logged = (state.step, state.seconds)
        self.outcomes = []
        self.flops = 0.0

    def evaluated_now(self) -> bool:
        return self.validation.get("step") == self.state.step

    def evaluate(self) -> None:
        """Held-out cross-entropy of the averaged weights."""
        if self.data.held_out is None:
            return
        with self.state.averaged():
            values = validation_loss(
                lambda batch, rows: self.objective(batch, rows)[0],
                self.config,
                self.data.held_out,
                self.world.device,
            )
        self.validation = {"step": self.state.step, **values}
        self.reporter.record("validation", self.state.step, values)
        self.reporter.say(
            f"step {self.state.step}  held-out cross-entropy {values['cross_entropy']:.4f} nats"
        )
        best = self.state.best.get("cross_entropy", float("inf"))
        if values["cross_entropy"] < best:
            self.state.best = {
                "step": self.state.step,
                "cross_entropy": values["cross_entropy"],
            }
            self.save(last=False)  # the best is kept: it has to exist

    def write_samples(self) -> None:
        """Samples of the averaged weights, by the callable that was given."""
        if self.sample is not None and self.world.is_main and self.config.train.strategy == "ddp":
            with self.state.averaged() as model, torch.no_grad():
                self.sample(model, self.state.step)
        self.world.barrier()

    def save(self, last: bool) -> None:
        """Write a checkpoint; a full disk ends the run only at its end."""
        self.guard.catch_up()
        folder = self.run / "checkpoints" / f"step-{self.state.step}"
        if self.checkpoint == folder:
            return
        try:
            self.checkpoint = save_checkpoint(
                self.state,
                self.config,
                self.run,
                self.world,
                self.data.tokenizer_folder,
                self.data.provenance,
            )
        except OSError as error:
            if last:
                raise ConfigError(
                    f"the checkpoint of step {self.state.step} could not be written ({error.strerror or error}): "
                    f"free some space in {self.run} and run the same command again; earlier checkpoints are whole"
                ) from error
            self.reporter.say(
                f"checkpoint not written ({error.strerror or error}); the previous one stays, going on"
            )


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name
