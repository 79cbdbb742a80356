"""The engine's step as CUDA graphs: what takes hundreds of launches is launched as one.

At few rows a GPU is done with a kernel before the host has launched the next one, so a step takes as long as its
launches. A graph repeats them by itself, on the same addresses. The state therefore lives in tensors of its own (one
set for each number of rows) that every graph reads and overwrites. What a graph cannot repeat, because it changes from
look to look or is rare, runs step by step as without graphs: KL, guidance, traces. If the device refuses a graph, a
warning says so and everything does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ddlm.sampling.slots import Look, Needs, Slots
from ddlm.types import Denoiser

EAGER = 2  # steps of a kind before it is worth a graph: they also load kernels, which a capture must not
MOST = 24  # graphs kept; kinds beyond run step by step
_OPTIONAL = ("hidden", "kept_noise", "x0_free")  # of what runs step by step
_FIELDS = tuple(f.name for f in fields(Slots) if f.name not in _OPTIONAL)


def sizes(slots: int, *, compile: bool = False) -> tuple[int, ...]:
    """Numbers of rows worth a step of their own while a queue runs empty, largest first.

    A graph costs as much as dozens of steps, so sequences are not followed one by one: three quarters of the slots,
    where a queue's end is spent longest, then halves down to an eighth, below which a GPU waits for weights, not for
    rows. Compiling costs minutes: quarters of quarters, down to one.
    """
    found = [slots, slots * 3 // 4, slots // 2, slots // 4, slots // 8]
    if compile:
        found = [slots]
        while found[-1] // 4:
            found.append(found[-1] // 4)
    return tuple(sorted({max(1, n) for n in found}, reverse=True))


Step = Callable[..., tuple[Slots, Look]]
"""As :func:`ddlm.sampling.slots.advance`."""
Capture = Callable[[Callable[[], object], Callable[[], None]], Callable[[], None]]
"""Takes a rehearsal, which it does, and work on tensors that stay where they are; returns what does the work."""


class CudaCapture:
    """Records work as a CUDA graph; all graphs of one object share their scratch memory.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, rehearse: Callable[[], object], work: Callable[[], None]
    ) -> Callable[[], None]:
        """See :data:`Capture`; the work is recorded, not done.

        Raises:
            RuntimeError: when it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        usual = torch.cuda.current_stream(self._device)
        try:
            self._stream.wait_stream(usual)
            with torch.cuda.stream(self._stream):
                rehearse()  # libraries set themselves up on this stream
            torch.cuda.synchronize(self._device)
            # thread_local: other threads may go on allocating memory meanwhile
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except RuntimeError:
            # what a capture that fails leaves behind: its stream as the current one, allocations into its pool
            torch.cuda.set_stream(usual)
            with suppress(RuntimeError, AttributeError):
                now = "_cuda_endAllocateToPool"
                before = "_cuda_endAllocateCurrentStreamToPool"  # torch 2.7
                end = getattr(torch._C, now, None) or getattr(torch._C, before)
                end(self._stream.device_index, self._pool)
            raise
        return graph.replay


@dataclass(frozen=True)
class _Recorded:
    """A graph, and where it reads what changes from step to step."""

    replay: Callable[[], None]
    given: tuple[Tensor | None, ...]  # plan, noise, draw_at

    def __call__(self, *given: Tensor | None) -> None:
        for mine, new in zip(self.given, given, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new, non_blocking=True)
        self.replay()


class Graphs:
    """:func:`ddlm.sampling.slots.advance` by graphs; the same call, but no :class:`Look` where a graph was used.

    Args:
        step: The step, compiled or not.
        capture: What records it.

    Attributes:
        failed: Why graphs were given up, or None.
    """

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._homes: dict[int, Slots] = {}  # the state that graphs read and write, by its rows
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self.failed: str | None = None

    def __call__(
        self,
        denoiser: Denoiser,
        table: Tensor,
        state: Slots,
        plan: Tensor,
        noise: Tensor | None,
        needs: Needs,
        draw_at: Tensor | None = None,
    ) -> tuple[Slots, Look | None]:
        """One evaluation for every slot; the state it returns is overwritten by the next one."""
        rows = state.x.shape[0]
        kind = (
            rows, noise is None, draw_at is None,
            needs.padding, needs.temperature, needs.top_k, needs.freeze,
        )  # fmt: skip
        if not self._worth_it(kind, needs):
            return self._step(denoiser, table, state, plan, noise, needs, draw_at)
        home = self._move_in(state)
        if kind not in self._recorded:
            given = tuple(None if x is None else x.clone() for x in (plan, noise, draw_at))

            def advanced() -> Slots:
                return self._step(denoiser, table, home, given[0], given[1], needs, given[2])[0]

            try:
                replay = self._capture(advanced, lambda: _overwrite(home, advanced()))
            except RuntimeError as error:
                self._give_up(error)
                return self._step(denoiser, table, home, plan, noise, needs, draw_at)
            self._recorded[kind] = _Recorded(replay, given)
        self._recorded[kind](plan, noise, draw_at)
        return replace(home), None

    def _worth_it(self, kind: tuple[Any, ...], needs: Needs) -> bool:
        """Whether a step of this kind is to be a graph."""
        if self.failed is not None or needs.kl or needs.guided is not None or needs.trace:
            return False
        if kind in self._recorded:
            return True
        self._seen[kind] += 1
        return self._seen[kind] > EAGER and len(self._recorded) < MOST

    def _move_in(self, state: Slots) -> Slots:
        """The state in the tensors that graphs know, copied there as far as it is elsewhere."""
        rows = state.x.shape[0]
        home = self._homes.get(rows)
        if home is None:
            plain = replace(state, hidden=None, kept_noise=None, x0_free=None)
            home = self._homes[rows] = plain.clone()
        else:
            _overwrite(home, state)
        return home

    def _give_up(self, error: RuntimeError) -> None:
        self.failed = str(error).strip().split("\n")[0][:200] or type(error).__name__
        self._recorded.clear()
        warnings.warn(
            f"no CUDA graph could be made ({self.failed}): sampling goes on without, which is slower",
            RuntimeWarning,
            stacklevel=2,
        )


def _overwrite(home: Slots, state: Slots) -> None:
    """Copy into ``home`` what of ``state`` lies elsewhere."""
    for name in _FIELDS:
        mine, new = getattr(home, name), getattr(state, name)
        if mine is not new:
            mine.copy_(new)
