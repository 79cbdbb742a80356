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

from ddlm.config import Config, check_config
from ddlm.device import can_compile
from ddlm.network.denoiser import DDLM
from ddlm.training.data import RunData, open_data
from ddlm.training.distributed import World, open_world, wrap
from ddlm.training.draws import check_spans, micro_batches
from ddlm.training.guard import Guard
from ddlm.training.initial import kept_origin, open_initial, origin, start_from, trainings
from ddlm.training.interrupts import Interrupts
from ddlm.training.interval import Interval
from ddlm.training.matching import match_queries
from ddlm.training.metrics import Reporter, last_validation, open_trackers
from ddlm.training.prefetch import Prefetcher, noise_of
from ddlm.training.remarks import remarks, slow_updates
from ddlm.training.resume import check_same, find_resumable, settle
from ddlm.training.saving import begin, check_fresh, clear_leftovers, held, save_checkpoint
from ddlm.training.spectral import start_from_corpus
from ddlm.training.speed import compile_denoiser, matrix_rate
from ddlm.training.state import TrainState
from ddlm.training.step import train_step as train_step
from ddlm.training.validation import BatchSource, validation_loss
from ddlm.types import ConfigError, local

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


def train(
    config: Config,
    run: str | Path,
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
    """
    started = time.monotonic()
    run = local(run)
    check_config(config)  # one made in Python has not been read from a file
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = open_world(config)
    check_spans(config)
    check_fresh(run, fresh, overwrite)
    data = open_data(config, world, source, held_out)
    given = open_initial(initial, run, config, data, fresh)
    try:
        with held(run, world):
            reporter = Reporter(
                run,
                config,
                active=world.is_main,
                trackers=open_trackers(track, run, config) if world.is_main else (),
                quiet=quiet,
            )
            try:
                loop = _open(
                    config, run, world, data, reporter, sample, initial, given, fresh, started
                )
                return loop.run_to_end()
            finally:
                reporter.close()
    finally:
        if source is None:
            world.close()


def _open(
    config: Config,
    run: Path,
    world: World,
    data: RunData,
    reporter: Reporter,
    sample: Sample | None,
    initial: str | Path | None,
    given: Any,
    fresh: bool,
    started: float,
) -> _Loop:
    """The state to start from, and the run folder claimed for it once nothing can be refused any more."""
    state = TrainState.create(config, world.device)
    objective = wrap(state.model, config, world)
    if world.size > 1 and config.train.strategy == "fsdp":
        state = TrainState.around(state.model, config)  # over the sharded parameters
    if world.is_main:
        clear_leftovers(run)
    world.barrier()
    resumed = None if fresh else find_resumable(run, config, reporter.say)
    check_same(run, resumed, world)
    if resumed is not None:
        data.check_tokenizer(resumed)
        if not state.restore(resumed):
            reporter.say("the optimiser is another than the checkpoint's: its moments start anew")
        evaluates = bool(config.train.eval_every) and data.held_out is not None
        settle(state, resumed, config, data.provenance, evaluates, reporter.say)
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
    data.provenance["trainings"] = trainings(resumed, state.step, data.provenance.get("data"))
    if config.train.compile and can_compile(world.device):
        compile_denoiser(state.model)
    entries = None if data.shards is None else data.shards.vocab_size
    for line in remarks(config, state, data.held_out is not None, sample is not None, entries):
        reporter.say(line)
    world.barrier()  # every process has read what it starts from: a fresh run may replace it
    if world.is_main:
        begin(run, config, state, fresh)
    world.barrier()
    reporter.start(-1 if resumed is None else state.step)
    loop = _Loop(config, run, world, state, objective, reporter, data, sample, started, resumed)
    if not loop.finished() and (slow := slow_updates(config, loop.interval.matrix_rate)):
        reporter.say(slow)
    if given is not None and resumed is None and config.train.eval_every:
        loop.evaluate()  # what training makes of the weights is told by what they were worth before
    return loop


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
        resumed: Path | None,
    ) -> None:
        self.config, self.run, self.world, self.state = config, run, world, state
        self.objective, self.reporter, self.data, self.sample = objective, reporter, data, sample
        self.clock = started - state.seconds
        self.interrupts, self.stopped = Interrupts(tell=not reporter.quiet), 0
        self.guard = Guard(run, config, state, reporter, world)
        self.interval = Interval(config, state, matrix_rate(config, world.device) * world.size)
        self.validation: dict[str, Any] = {}
        self.checkpoint = resumed

    def run_to_end(self) -> TrainResult:
        """Step after step, with evaluations, samples and checkpoints in between."""
        with (
            self.interrupts,
            Prefetcher(self.config, self.data.train, self.world, self.state.step) as prefetcher,
        ):
            try:
                self.steps(prefetcher)
            except Exception as error:
                # A compiler that runs for the first step dies of the signal, too. Nothing was made since the last
                # checkpoint that could be trusted.
                if not self.interrupts.signal or isinstance(error, ConfigError):
                    raise
                name = signal_name(self.interrupts.signal)
                raise KeyboardInterrupt(f"{name} at step {self.state.step}, interrupted") from error
            if not self.stopped and self.config.train.eval_every and not self.evaluated_now():
                if self.data.held_out is not None:
                    self.reporter.say("measuring on held-out text")
                self.evaluate()
            self.log()
            if self.checkpoint is None or self.checkpoint.name != f"step-{self.state.step}":
                self.save(last=True)
        assert self.checkpoint is not None
        return TrainResult(self.state.step, self.checkpoint, self.stopped, self.validation)

    def steps(self, prefetcher: Prefetcher) -> None:
        """All steps, until the run is finished or a signal came."""
        config, state, every = self.config, self.state, self.config.train
        self.catch_up()
        self.interval.aside = time.monotonic() - self.clock - state.seconds
        while not self.stopped and not self.finished():
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
            self.interval.add(outcome, inputs.draw.total_noised)
            seconds, signal_number = self.world.agree(
                time.monotonic() - self.clock, self.interrupts.signal
            )
            state.seconds, self.stopped = seconds, int(signal_number)
            if self.stopped:
                break
            if state.step % every.log_every == 0:
                self.log()
            if every.eval_every and state.step % every.eval_every == 0:
                self.evaluate()
            if state.step % every.checkpoint_every == 0:
                self.save(last=False)
            # after the checkpoint: who is told to stop while they are written has lost nothing
            if every.sample_every and state.step % every.sample_every == 0 and not self.stopped:
                self.write_samples()

    def was_stopped(self) -> bool:
        """Whether a signal has reached any process; all of them ask at once."""
        self.stopped = self.stopped or int(self.world.agree(self.interrupts.signal)[0])
        return bool(self.stopped)

    def finished(self) -> bool:
        """Whether the steps or the budget are used up; the same answer in every process."""
        budget = self.config.train.budget
        return self.state.step >= self.config.train.steps or (
            budget is not None and self.state.seconds >= budget
        )

    def log(self) -> None:
        """One line of metrics over the steps since the last one."""
        if not self.interval.outcomes:
            return
        values = self.interval.values() | self.guard.norms()
        self.reporter.record("train", self.state.step, values)
        self.reporter.show(self.state.step, *self.interval.progress(), values)
        self.interval.restart()

    def catch_up(self) -> None:
        """Do what a signal kept the run from doing at the step that it goes on from, and nothing twice."""
        state, every, main = self.state, self.config.train, self.world.is_main
        if self.checkpoint is None or state.step == 0:
            return
        known = last_validation(self.run, state.step) if main else None
        file = self.run / "samples" / f"step-{state.step}.jsonl"
        evaluate, write = (
            bool(missing)
            for missing in self.world.agree(
                float(main and known is None), float(main and not file.exists())
            )
        )
        if not evaluate:
            self.validation = known or {"step": state.step}
        elif every.eval_every and state.step % every.eval_every == 0:
            self.evaluate()
        if (
            write
            and not self.stopped
            and every.sample_every
            and state.step % every.sample_every == 0
        ):
            self.write_samples()

    def evaluated_now(self) -> bool:
        return self.validation.get("step") == self.state.step

    def evaluate(self) -> None:
        """Held-out cross-entropy of the averaged weights; a signal ends it, and whoever goes on makes up for it."""
        if self.data.held_out is None:
            return
        with self.interval.besides(), self.state.averaged():
            values = validation_loss(
                lambda batch, rows: self.objective(batch, rows)[0],
                self.config,
                self.data.held_out,
                self.world.device,
                stopped=self.was_stopped,
            )
        if values is None:
            return
        # each process has its own number, which on unlike GPUs differs in the last digits: a save needs them all
        values["cross_entropy"] = self.world.agree(values["cross_entropy"])[0]
        self.validation = {"step": self.state.step, **values}
        self.reporter.record("validation", self.state.step, values)
        self.reporter.say(
            f"step {self.state.step}  held-out cross-entropy {values['cross_entropy']:.4f} nats"
        )
        best = self.state.best.get("cross_entropy", float("inf"))
        if values["cross_entropy"] < best:
            before, self.state.best = (
                self.state.best,
                {"step": self.state.step, "cross_entropy": values["cross_entropy"]},
            )
            self.checkpoint = None  # one that was written before this evaluation does not say so
            if not self.save(last=False):  # the best is kept: it has to exist
                self.state.best = before

    def write_samples(self) -> None:
        """Samples of the averaged weights, by the callable that was given."""
        if self.sample is not None and self.world.is_main and self.config.train.strategy == "ddp":
            with self.interval.besides(), self.state.averaged() as model, torch.no_grad():
                write, step = self.sample, self.state.step
                self.reporter.attempt("samples/", lambda: write(model, step))
        self.world.barrier()

    def save(self, last: bool) -> bool:
        """Write a checkpoint, and whether it is there; a full disk ends the run only at its end."""
        self.guard.catch_up()
        folder = self.run / "checkpoints" / f"step-{self.state.step}"
        if self.checkpoint == folder:
            return True
        self.guard.check_warp()
        if self.guard.in_a_row and not last:
            self.reporter.say(f"step {self.state.step}: no checkpoint while updates are skipped")
            return False
        with self.interval.besides():
            problem = save_checkpoint(
                self.state,
                self.config,
                self.run,
                self.world,
                self.data.tokenizer_folder,
                self.data.provenance,
                keep_all=self.guard.in_a_row > 0,
            )
        if problem is None:
            self.checkpoint = folder
            return True
        if last:
            raise ConfigError(
                f"the checkpoint of step {self.state.step} could not be written ({problem}): "
                f"free some space in {self.run} and run the same command again; earlier checkpoints are whole"
            )
        self.reporter.say(f"checkpoint not written ({problem}); the previous one stays, going on")
        return False


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name
