"""Who writes the samples of a protocol: a diffusion model through the engine, or an autoregressive baseline.

Axes: N sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ddlm.evaluation.autoregressive import sample_autoregressive
from ddlm.sampling import halting
from ddlm.sampling.engine import Engine
from ddlm.sampling.request import make_request

if TYPE_CHECKING:
    from ddlm.diffusion.process import NoiseProcess


@dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
        steps: Solver steps (diffusion only).
        solver: Solver (diffusion only).
        halt: Halting criterion as text, such as ``patience:25``, or None (diffusion only).
        noise_scale: Initial noise relative to t_max (diffusion only; DDLM, Table 8).
        temperature: Divides the logits.
        refine: Rounds after the last step that draw a part of the tokens anew (diffusion only).
        grid_name: Time grid, uniform as in the paper whatever the model's own is (diffusion only).
    """

    steps: int = 50
    solver: str = "euler"
    halt: str | None = None
    noise_scale: float = 1.0
    temperature: float = 1.0
    refine: int = 0
    grid_name: str = "uniform"

    def departures(self) -> dict[str, Any]:
        """What sample files are known by: all of it, the grid only where it is another than the paper's."""
        found = asdict(self)
        if self.grid_name == "uniform":
            del found["grid_name"]
        return found


@dataclass(frozen=True)
class Written:
    """One sequence: its tokens, solver steps and why it ended."""

    tokens: list[int]
    steps: int | None = None
    reason: str | None = None


class Generator(Protocol):
    """Writes where ``is_noised`` is True."""

    fingerprint: str
    """Changes when the model does."""
    fills: bool
    """Whether it can write in the middle of a text."""
    diffusion: bool
    """Whether steps and noise scale mean anything to it."""

    def write(
        self, tokens: Tensor, is_noised: Tensor, seeds: Sequence[int], settings: Settings
    ) -> Iterator[Written]:
        """Yield one sequence for each row of ``tokens (N, T)``, in order."""
        ...


class DiffusionGenerator:
    """Samples through :class:`ddlm.sampling.engine.Engine`.

    Args:
        engine: Makes an engine for a number of slots.
        process: Noise process of the model.
        fingerprint: Changes when the model does.
        time_warp: For the grid ``warp``.
        slots: Sequences advanced together.
    """

    fills = True
    diffusion = True

    def __init__(
        self,
        engine: Callable[[int], Engine],
        process: NoiseProcess,
        fingerprint: str,
        *,
        time_warp: Any = None,
        slots: int = 64,
    ) -> None:
        self._engine, self._process, self.fingerprint = engine, process, fingerprint
        self._time_warp = time_warp
        self._slots = slots

    def write(
        self, tokens: Tensor, is_noised: Tensor, seeds: Sequence[int], settings: Settings
    ) -> Iterator[Written]:
        """See :class:`Generator`."""
        halt = halting.parse(settings.halt) if settings.halt else None
        requests = (
            make_request(
                tokens[i],
                is_noised[i],
                self._process,
                steps=settings.steps,
                solver=settings.solver,
                halt=halt,
                noise_scale=settings.noise_scale,
                temperature=settings.temperature,
                refine=settings.refine,
                seed=seeds[i],
                time_warp=self._time_warp,
                grid_name=settings.grid_name,
            )
            for i in range(len(tokens))
        )
        for result in self._engine(min(self._slots, len(tokens))).run(requests):
            yield Written(result.tokens.tolist(), result.steps, result.reason)


class AutoregressiveGenerator:
    """Samples from a causal language model that shares the tokenizer of the data.

    Args:
        model: Of transformers.
        start: Token before the first one.
        fingerprint: Changes when the model does.
        batch: Sequences written together.
    """

    fills = False
    diffusion = False

    def __init__(self, model: Any, start: int, fingerprint: str, batch: int = 64) -> None:
        self._model, self._start, self.fingerprint, self._batch = model, start, fingerprint, batch

    def write(
        self, tokens: Tensor, is_noised: Tensor, seeds: Sequence[int], settings: Settings
    ) -> Iterator[Written]:
        """See :class:`Generator`."""
        for first in range(0, len(tokens), self._batch):
            part = slice(first, first + self._batch)
            out = sample_autoregressive(
                self._model,
                tokens[part],
                is_noised[part],
                list(seeds[part]),
                start=self._start,
                temperature=settings.temperature,
            )
            for row in out.tolist():
                yield Written(row)
