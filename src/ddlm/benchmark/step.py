"""The training step that is measured: :func:`ddlm.training.loop.train_step` on invented tokens, one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ddlm.config import Config
from ddlm.device import missing_compiler
from ddlm.training.distributed import World, wrap
from ddlm.training.draws import (
    MicroBatch,
    draw_noise,
    draw_step,
    is_self_conditioned,
    micro_batches,
)
from ddlm.training.flops import step_flops
from ddlm.training.loop import train_step
from ddlm.training.speed import compile_denoiser
from ddlm.training.state import StepOutcome, TrainState

NO_COMPILER = "no {} was found: measuring without compiling"


@dataclass(frozen=True)
class Trainee:
    """What is trained: one for all batches that are measured, so that a list of them needs no more memory.

    Attributes:
        state: Weights, optimiser, averages.
        objective: The loss, wrapped where several processes share the work.
        compiled: Whether the blocks are.
    """

    state: TrainState
    objective: nn.Module
    compiled: bool

    @classmethod
    def create(cls, config: Config, world: World, say: Callable[[str], None] = print) -> Trainee:
        """Put together as :func:`ddlm.training.loop.train` does.

        Args:
            config: What to train; compiled where ``train.compile`` says so and torch can.
            world: Who shares the work.
            say: Is told when it cannot.
        """
        state = TrainState.create(config, world.device)
        objective = wrap(state.model, config, world)
        missing = missing_compiler(world.device)
        compiled = config.train.compile and missing is None
        if compiled:
            compile_denoiser(state.model)
        elif config.train.compile:
            say(NO_COMPILER.format(missing))
        return cls(state, objective, compiled)


@dataclass(frozen=True)
class OwnStep:
    """One DDLM step as in training.

    Attributes:
        run: Makes the step.
        parts: Makes the micro-batches that it goes through.
        noised: Noised positions of the global batch.
        conditioned: Those of its self-conditioned sequences.
        flops: Model operations.
    """

    run: Callable[[], StepOutcome]
    parts: Callable[[], Iterator[MicroBatch]]
    noised: int
    conditioned: int
    flops: int


def own_step(trainee: Trainee, config: Config, world: World) -> OwnStep:
    """This process's share of a step at ``train.batch``; any number of processes gets the same invented tokens."""
    model, batch = config.model, config.train.batch
    rows = world.rows(batch)
    draw = draw_step(0, 0, batch, model.length, config.mask)
    noise = draw_noise(0, 0, rows, model.length, model.embedding_width, world.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (batch, model.length), generator=generator)
    tokens = tokens[rows.start : rows.stop]
    chosen = is_self_conditioned(range(batch), config.train.self_condition)
    conditioned = int(draw.is_noised[chosen].sum()) if model.self_conditioning else 0
    times = trainee.state.times

    def parts() -> Iterator[MicroBatch]:
        return micro_batches(config, tokens, draw, noise, times, rows.start, world.device)

    def run() -> StepOutcome:
        return train_step(trainee.state, trainee.objective, list(parts()), config, world)

    flops = step_flops(config, draw.total_noised, conditioned)
    return OwnStep(run, parts, draw.total_noised, conditioned, flops)
