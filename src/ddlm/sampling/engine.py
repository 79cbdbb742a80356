"""The only sampling loop: slots of sequences, each at its own time, finished ones leave at once.

A request (:class:`ddlm.sampling.request.Request`) takes a slot, advances by one network evaluation a tick together
with all others, whatever their solver, grid or criterion, and leaves as soon as it halts; the next one of the queue
enters in its place. When the queue is empty the slots shrink, so the last sequences do not drag idle ones along:
early exit saves seconds, not only steps.

Same bits whatever the batch: every draw comes from the request's own generator, every operation works on rows of
its own, and matrix products give each row the same bits for any number of rows above a small minimum on the CPU
(``least_rows``, measured). On a GPU the library picks kernels by the number of rows, so there ``exact`` fixes the
number of slots, how many rows are computed for guidance and for KL, and which kernels are taken; without it, as under
``compile``, results agree to rounding: float32 within about 1e-5, bf16 1e-2, and near ties may fall the other way.

S slots, T positions, D embedding width.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ddlm.diffusion.process import NoiseProcess
from ddlm.sampling.graphs import CudaCapture, Graphs, sizes
from ddlm.sampling.jobs import STEP, TIME, Job, Schedule, Watching, enter
from ddlm.sampling.request import Progress, Request, Result
from ddlm.sampling.safe import least_rows, safe_length
from ddlm.sampling.slots import Look, Slots, advance, compiled
from ddlm.sampling.trace import Recorder, Trace
from ddlm.sampling.values import shown, whole
from ddlm.types import ComparesPosteriors, ConfigError, Denoiser


class Engine:
    """Continuous batching of diffusion sequences over a fixed number of slots.

    Args:
        denoiser: Any :class:`ddlm.types.Denoiser`.
        process: Its noise process.
        slots: Sequences advanced together.
        length: Positions of a slot; shorter requests are padded. Requests of several lengths keep their bits in
            engines of any :func:`safe_length`.
        look_every: Ticks between looks of the host at the device. It changes when a finished sequence is noticed, never
            its result. None: 1 on the CPU, 4 elsewhere, where a look is a wait.
        exact: Keep the number of rows of every matrix product fixed. None: where bits depend on it (not on the CPU).
        compile: Compile the step with torch.compile; the number of rows is then quartered rather than fitted when the
            queue runs empty, so few shapes occur. Results agree to rounding, as on a GPU.
        graphs: On a CUDA device launch a step as one (:mod:`ddlm.sampling.graphs`); rows then have a few sizes too.

    One thread at a time may drive :meth:`step`; :meth:`submit` and :meth:`cancel` may be called from any.

    Raises:
        ConfigError: for a number of slots, positions or ticks below one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: NoiseProcess,
        slots: int = 16,
        length: int = 64,
        *,
        look_every: int | None = None,
        exact: bool | None = None,
        compile: bool = False,
        graphs: bool = True,
    ) -> None:
        with torch.no_grad():
            table = denoiser.embeddings()
        self.device = table.device
        on_cpu = self.device.type == "cpu"
        look_every = (1 if on_cpu else 4) if look_every is None else look_every
        for name, value in (("slots", slots), ("length", length), ("look_every", look_every)):
            if whole(name, value) < 1:
                raise ConfigError(f"{name}={value} was given, an engine needs at least 1")
        self.denoiser, self.process = denoiser, process
        self.slots, self.length, self.look_every = map(int, (slots, length, look_every))
        self.dtype = torch.promote_types(table.dtype, torch.float32)  # of the solver's arithmetic
        self._table = table.to(self.dtype)
        self.exact = exact if exact is not None else not on_cpu
        self._advance: Any = compiled() if compile else advance
        if graphs := graphs and self.device.type == "cuda":
            self._advance = Graphs(self._advance, CudaCapture(self.device))
        # numbers of rows it may have when it is not exact; none: any
        self.sizes = sizes(slots, compile=compile) if compile or graphs else ()
        self._state = self._empty(self._rows(0))
        self._jobs: list[Job | None] = [None] * self._state.x.shape[0]
        self._schedule: Schedule | None = None  # made anew when a slot is taken or left
        self._queue: deque[Job] = deque()
        self._finished: list[Result] = []  # not handed out yet
        self._claimed: set[int] = set()  # ids of runs and streams under way
        self._cancelled: set[int] = set()
        self._unread: set[int] = set()  # cancelled, and nobody waits for what becomes of them
        self._lock = threading.RLock()  # whoever holds it may collect a run that was left early
        self._next_id = self._since_look = 0
        self._recorder: Recorder | None = None
        self._watching = Watching(
            device=self.device,
            fixed=self.exact or compile,
            comparable=isinstance(denoiser, ComparesPosteriors),
            uniform=self.exact and not on_cpu,
        )
        self.ticks = 0
        """Evaluations of the whole batch so far."""

    # ---- the step-wise interface (a server drives this)

    def check(self, request: Request) -> Job:
        """Lay a request out without queueing it, so that a mistake is told ahead of its turn.

        Raises:
            ConfigError: for a request longer than the engine's slots, one that combines too many criteria, or
                KL halting with a denoiser that cannot compare posteriors.
        """
        if not isinstance(request, Request):
            raise ConfigError(f"{shown('request', request)} was given, make one with make_request")
        job = Job.make(-1, request, self.dtype, self.look_every)
        job.check(self.length, len(self._table), self._watching.comparable)
        return job

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            ConfigError: see :meth:`check`.
        """
        job = self.check(request)
        with self._lock:
            job.id = key = self._next_id
            self._next_id += 1
            if bool(request.is_noised.any()):
                self._queue.append(job)
            else:
                self._finished.append(job.unstarted("completed", self._table))
        return key

    def cancel(self, key: int) -> None:
        """Give up a request; its slot is free at the next step, its result says ``cancelled``."""
        with self._lock:
            self._cancelled.add(key)

    @property
    def busy(self) -> bool:
        """Whether anything is queued, at work or waiting to be handed out by :meth:`step`."""
        waiting = any(r.id not in self._claimed for r in self._finished)
        return bool(self._queue or waiting or self._working())

    def step(self) -> list[Result]:
        """Advance every slot by one evaluation; returns the requests that ended, in the order of their ids.

        Requests of a :meth:`run` or a :meth:`stream` under way advance too; their results are kept for those.
        """
        self._evaluate()
        return self._hand_out()

    @torch.inference_mode(False)  # the slots are written into by whoever comes, in that mode or not
    @torch.no_grad()
    def _evaluate(self) -> None:
        """Advance every slot by one evaluation."""
        self._drop_cancelled()
        self._admit()
        if self._working():
            schedule = self._tick()
            self._since_look += 1
            if self._since_look >= self.look_every or self.ticks >= schedule.first_end:
                self._since_look = 0
                self._harvest()

    def _hand_out(self, keys: Collection[int] | None = None) -> list[Result]:
        """Results of the requests ``keys`` (None: of those that nobody has claimed), in the order of their ids."""
        with self._lock:
            wanted = (lambda k: k not in self._claimed) if keys is None else keys.__contains__
            out = [r for r in self._finished if wanted(r.id)]
            self._finished = [r for r in self._finished if r not in out]
        return sorted(out, key=lambda r: r.id)

    def poll(self, key: int) -> Progress | None:
        """Where a request at work stands; None when it is queued, ended or unknown."""
        for i, job in enumerate(self._jobs):
            if job is not None and job.id == key:
                return job.progress(self._state, i, self.ticks)
        return None

    # ---- whole runs

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Generate any number of requests; yields results in submission order.

        Requests are drawn from the iterable as slots become free, so it may be endless. Left early, they are given up.
        """
        source, exhausted = iter(requests), False
        order: deque[int] = deque()
        waiting: dict[int, Result] = {}
        try:
            while True:
                working = len(self._working())
                room = 2 * self.slots - len(self._queue) - working
                # laying out takes time: after a look the device waits, so it gets its next step first
                if self._since_look == 0 and self.look_every > 1:
                    room = min(room, max(0, self.slots - working - len(self._queue)))
                for request in (drawn := list(islice(source, max(0, room)))):
                    order.append(self.submit(request))
                    self._claimed.add(order[-1])
                exhausted = exhausted or len(drawn) < room
                self._evaluate()
                waiting.update((result.id, result) for result in self._hand_out(order))
                while order and order[0] in waiting:
                    self._claimed.discard(order[0])
                    yield waiting.pop(order.popleft())
                if exhausted and not order:
                    return
        finally:
            self._drop(order)

    def stream(self, request: Request) -> Iterator[Progress | Result]:
        """Generate one request, yielding its :class:`Progress` after every step and its :class:`Result` last.

        Streams may take turns: each goes on from where the others have brought the engine. Left early, it is given up.
        """
        key = self.submit(request)
        self._claimed.add(key)
        seen, ticks = 0, self.ticks
        try:
            while True:
                if self.ticks == ticks:  # else another one has advanced it since
                    self._evaluate()
                ticks = self.ticks
                if results := self._hand_out((key,)):
                    self._claimed.discard(key)
                    yield results[0]
                    return
                progress = self.poll(key)
                if progress is not None and progress.step > seen:
                    seen = progress.step
                    yield progress
        finally:
            self._drop((key,))

    # ---- inside

    def _empty(self, rows: int) -> Slots:
        return Slots.empty(rows, self.length, self._table.shape[1], self.device, self.dtype)

    def _rows(self, wanted: int) -> int:
        """Rows to hold for ``wanted`` sequences: all slots, the next of few sizes, or as many as needed."""
        floor = least_rows(self.length, self.device)
        if self.exact:
            return max(self.slots, floor)
        wanted = max(1, min(self.slots, wanted))
        return max(min((n for n in self.sizes if n >= wanted), default=wanted), floor)

    def _drop(self, keys: Iterable[int]) -> None:
        """Give up those of ``keys`` that are still claimed; nobody will ask for their results."""
        with self._lock:
            unread = self._claimed.intersection(keys)
            self._claimed -= unread
            self._cancelled |= unread
            self._unread |= unread

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            unread, self._unread = self._unread, set()
            for job in [j for j in self._queue if j.id in cancelled]:
                self._queue.remove(job)
                self._finished.append(job.unstarted("cancelled", self._table))
        for i, at_work in self._working():
            if at_work.id in cancelled:
                row = [part[0] for part in self._state.read(self._index([i]))]
                looks = int(row[1]) or at_work.looks(self.ticks)  # it may have ended unnoticed
                self._finished.append(at_work.result(row, self._trace(at_work, looks), self.ticks))
                self._jobs[i], self._schedule = None, None
                self._state.active[i] = False
        with self._lock:  # another thread may add to it
            self._finished = [r for r in self._finished if r.id not in unread]

    def _admit(self) -> None:
        """Fit the number of rows to what there is to do, then fill free slots from the queue."""
        with self._lock:
            rows = self._rows(len(self._working()) + len(self._queue))
        if rows != len(self._jobs):
            self._resize(rows)
        free = [i for i, job in enumerate(self._jobs) if job is None]
        free = free[: max(0, self.slots - len(self._working()))]  # rows may exceed the slots
        with self._lock:
            entering = [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))]
        if entering:
            taken = free[: len(entering)]
            self._state.put(self._index(taken), self._starting(entering))
            for i, job in zip(taken, entering, strict=True):
                self._jobs[i] = job
                job.started = self.ticks
            self._schedule = None

    def _resize(self, rows: int) -> None:
        """Move the sequences at work to the front and hold ``rows`` rows."""
        working = [i for i, _ in self._working()]
        state = self._empty(rows)
        for name in ("hidden", "kept_noise", "x0_free"):
            old = getattr(self._state, name)
            if old is not None:
                setattr(state, name, old.new_zeros(rows, *old.shape[1:]))
        if working:
            first = self._index(list(range(len(working))))
            state.put(first, self._state.take(self._index(working)))
        self._state = state
        self._jobs = [self._jobs[i] for i in working] + [None] * (rows - len(working))
        self._schedule = None

    def _starting(self, jobs: list[Job]) -> Slots:
        """State of new sequences; makes room for guidance when the first guided one comes."""
        fresh = enter(jobs, self.length, self._table)
        if fresh.kept_noise is not None and self._state.kept_noise is None:
            self._state.kept_noise = torch.zeros_like(self._state.x)
            self._state.x0_free = torch.zeros_like(self._state.x)
        return fresh

    def _tick(self) -> Schedule:
        """One evaluation for all slots."""
        if self._schedule is None:
            self._schedule = Schedule(
                self._jobs, self.length, self.process.t_max, self.dtype, self._watching
            )
            if not self._schedule.guided:
                self._state.kept_noise = self._state.x0_free = None
        schedule, before = self._schedule, self._state
        plan = schedule.rows(self.ticks)
        noise, draw_at = schedule.drawn(before.x)
        on_device = plan.to(self.device, non_blocking=True)
        needs = schedule.needs(on_device)
        self._state, look = self._advance(
            self.denoiser, self._table, before, on_device, noise, needs, draw_at
        )
        if schedule.traced:
            self._record(schedule, plan, before, look)
        self.ticks += 1
        return schedule

    def _working(self) -> list[tuple[int, Job]]:
        """Slots at work and their requests."""
        return [(i, job) for i, job in enumerate(self._jobs) if job is not None]

    def _record(self, schedule: Schedule, plan: Tensor, before: Slots, look: Look) -> None:
        """Hand this look of the traced requests to the recorder."""
        looking = [
            (i, job)
            for i, job in schedule.traced
            if plan[i, STEP] > 0 and self.ticks - job.started < len(job.plan)
        ]
        if not looking:
            return
        if self._recorder is None:
            self._recorder = Recorder(self._table.shape[1], self.device, self.dtype)
        self._recorder.record(
            rows=self._index([i for i, _ in looking]),
            ids=[job.id for _, job in looking],
            times=[float(plan[i, TIME]) for i, _ in looking],
            x=look.x,
            x0_hat=look.x0_hat,
            kl=look.kl,
            tokens=self._state.tokens,
            entropy=self._state.entropy,
            is_noised=before.is_noised,
        )

    def _harvest(self) -> None:
        """Look at the device: take out what has ended."""
        active = self._state.active.tolist()
        ended = [(i, job) for i, job in self._working() if not active[i]]
        if ended:
            rows = self._state.read(self._index([i for i, _ in ended]))
            again: dict[int, Job] = {}
            for (i, job), *row in zip(ended, *rows, strict=True):
                result = job.result(row, self._trace(job, int(row[1])))
                self._jobs[i] = following = job.following(result, self.ticks)
                if following is not None:
                    again[i] = following
                else:
                    self._finished.append(result)
            if again:
                self._state.put(self._index(list(again)), self._starting(list(again.values())))
            self._schedule = None

    def _trace(self, job: Job, steps: int) -> Trace | None:
        """The trajectory of a request that has ended after ``steps`` looks, if it asked for one."""
        if self._recorder is None or not job.request.trace:
            return None
        r = job.request
        return self._recorder.finish(job.id, len(r.tokens), r.is_noised, steps)

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True)


__all__ = ["Engine", "Progress", "Request", "Result", "least_rows", "safe_length"]
