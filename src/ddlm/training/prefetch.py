"""The next steps' tokens, masks and noise, made in a background thread while the current step computes."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ddlm.config import Config
from ddlm.training.distributed import World
from ddlm.training.draws import Draw, draw_noise, draw_step
from ddlm.training.validation import BatchSource
from ddlm.types import ConfigError


@dataclass(frozen=True)
class Inputs:
    """What a step needs that does not depend on the weights.

    Attributes:
        step: The step.
        tokens: This process's rows ``(b, T)``.
        draw: Masks and time quantiles of the global batch.
        noise: This process's noise ``(b, T, D)``, or None when the device draws it itself.
    """

    step: int
    tokens: Tensor
    draw: Draw
    noise: Tensor | None


def make_inputs(config: Config, source: BatchSource, world: World, step: int) -> Inputs:
    """The inputs of one step: a pure function of the configuration, the data and the step."""
    train, model = config.train, config.model
    tokens = source.batch(step)
    needed = (len(world.rows(train.batch)), model.length)
    if tokens.shape != needed:
        raise ConfigError(
            f"the batch of step {step} has the shape {tuple(tokens.shape)}, this process needs {needed}: "
            f"train.batch {train.batch} divided by the processes, model.length {model.length}"
        )
    draw = draw_step(train.seed, step, train.batch, model.length, config.mask)
    noise = None
    if world.device.type == "cpu":
        rows = world.rows(train.batch)
        noise = draw_noise(train.seed, step, rows, model.length, model.embedding_width)
    return Inputs(step, tokens, draw, noise)


class Prefetcher:
    """Iterates over the inputs of the steps from ``start`` on; at most ``ahead`` of them wait.

    Use it as a context manager; leaving it ends the thread. An error of the thread is raised where its step is asked
    for.
    """

    def __init__(
        self, config: Config, source: BatchSource, world: World, start: int, ahead: int = 2
    ) -> None:
        self._make = lambda step: make_inputs(config, source, world, step)
        self._queue: queue.Queue[Inputs | BaseException] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), daemon=True)

    def _work(self, step: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Inputs | BaseException = self._make(step)
            except BaseException as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def next(self) -> Inputs:
        """Inputs of the next step, waiting for them if need be."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def noise_of(inputs: Inputs, config: Config, world: World) -> Tensor:
    """The process's noise ``(b, T, D)`` on its device."""
    if inputs.noise is not None:
        return inputs.noise
    with torch.no_grad():
        return draw_noise(
            config.train.seed,
            inputs.step,
            world.rows(config.train.batch),
            config.model.length,
            config.model.embedding_width,
            world.device,
        )
