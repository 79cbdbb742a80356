"""The one thread that drives the engine: everything asked of the server shares its slots.

Texts wait in a fair queue; a slot that becomes free, because its text is finished, given up or late, is taken by the
next one before the next step. Whoever asked decides when a text is late or given up (:mod:`ddlm.serve.studio`): a
step may take minutes while it is compiled, and nobody waits for it to be told.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ddlm.sampling.request import make_request
from ddlm.serve.jobs import Failed, Job
from ddlm.serve.limits import Limits, RefusedError, went_down
from ddlm.serve.queue import FairQueue
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from ddlm.lm import DiffusionLM
    from ddlm.sampling.request import Request, Result
    from ddlm.serve.metrics import Metrics

_log = logging.getLogger(__name__)
_LAST_STEP = 5.0  # seconds a server that ends waits for the step that is being made


class Worker:
    """Drives an engine in a thread of its own.

    Args:
        lm: The model.
        slots: Texts advanced together.
        limits: Of the queue.
        metrics: Told about steps and texts.

    Every method may be called from any thread.
    """

    def __init__(self, lm: DiffusionLM, slots: int, limits: Limits, metrics: Metrics) -> None:
        self.lm, self.slots, self.limits, self.metrics = lm, slots, limits, metrics
        self.engine = lm.engine(slots=slots)
        self._queue: FairQueue[Job] = FairQueue(limits.queue, limits.share)
        self._running: dict[int, Job] = {}
        self._wake = threading.Condition()
        self._stopping = self._draining = self._failed = self._warm = False
        self._seconds = 1.0  # a text takes about so long, waiting included
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def drain(self) -> None:
        """Take nothing new; what is queued or at work goes on.

        Takes no lock: a signal may come while this very thread holds it.
        """
        self._draining = True

    def stop(self) -> None:
        """Give everything up and end the thread; one that is in a step for longer than a few seconds is left behind."""
        with self._wake:
            self._stopping = self._draining = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(_LAST_STEP)
            if self._thread.is_alive():
                _log.warning("a step is still being made or compiled: it is left behind")

    @property
    def ready(self) -> bool:
        """Whether new texts are taken, and begun at once: the step is compiled, where it is."""
        return self.alive and self._warm and not self._draining

    @property
    def alive(self) -> bool:
        """Whether the engine's thread works, or waits for work; once it does not, only a new process helps."""
        return self._thread.is_alive() and not self._failed

    @property
    def at_work(self) -> int:
        """Texts in slots."""
        return len(self._running)

    @property
    def held(self) -> int:
        """Texts in slots and in the queue."""
        with self._wake:
            return self._queue.held

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        with self._wake:
            return len(self._queue)

    def check_room(self, client: str, count: int = 1) -> None:
        """Refuse texts of a client for which there is no room, before anything is spent on them.

        Takes no lock, so that a flood cannot hold the engine up; :meth:`submit` decides.

        Raises:
            RefusedError: 429 when they find no room, 503 when the server is going down or its engine has failed.
        """
        if self._failed:
            raise RefusedError(
                503, "engine", "the engine failed and could not be renewed: restart the server"
            )
        if self._draining or not self.alive:
            raise RefusedError(503, "draining", "the server is going down", retry_after=5)
        if not self._queue.room(client, count):
            raise RefusedError(
                429,
                "queue_full",
                f"{self._queue.held} texts are waiting or at work, there is no room for {count} more "
                f"(of {self._queue.size} in all, {self._queue.share} for one client): try again later",
                retry_after=self._patience(),
            )

    def check(self, request: Request) -> None:
        """Refuse what the engine cannot do.

        Raises:
            ConfigError: see :meth:`ddlm.sampling.engine.Engine.check`.
        """
        engine = getattr(self, "engine", None)  # there is none while a fresh one is made
        if engine is not None:
            engine.check(request)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the texts of one request: all of them or none.

        Raises:
            RefusedError: as :meth:`check_room`.
        """
        with self._wake:
            self.check_room(jobs[0].client, len(jobs))
            for job in jobs:
                self._queue.put(job)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job], reason: str = "cancelled") -> None:
        """Give texts up; their slots and places are free before the next step. ``reason`` is what is counted."""
        with self._wake:
            for job in jobs:
                job.given_up = job.given_up or reason
            self._wake.notify()

    def _patience(self) -> int:
        """Seconds until a place is likely to be free."""
        return min(60, max(1, math.ceil(self._seconds / 4)))

    # ---- on the thread

    def _work(self) -> None:
        try:
            self._warm_up()
            self._loop()
        except Exception:  # a thread that ends in silence would leave every client waiting
            _log.exception("the engine is given up: nothing is written until the server restarts")
            self._end()

    def _warm_up(self) -> None:
        """Make the step for the model's own settings, where making it takes long: compiled, or captured."""
        began, engine, lm = time.monotonic(), self.engine, self.lm
        options = lm.options(steps=2, refine=min(1, lm.config.sample.refine))
        # a step has a form for every number of rows, and another one where a text is shorter than the model
        for rows in engine.sizes:
            for length in sorted({max(1, lm.length // 2), lm.length}):
                given, is_noised = torch.zeros(length, dtype=torch.long), torch.ones(length).bool()
                for seed in range(rows):
                    request = make_request(given, is_noised, lm.process, seed=seed, **options)
                    engine.submit(request)
                while engine.busy and not self._stopping:
                    engine.step()
        if engine.sizes:
            _log.info("ready after %.0f seconds of preparing the step", time.monotonic() - began)
        self._warm = True

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (len(self._queue) or self._running or self._stopping):
                    self._wake.wait()
                self._give_up()
                if self._stopping:
                    return
                entering = self._admit()
            for job in entering:
                self._begin(job)
            if self._running and not self._advanced():
                self._renew()

    def _give_up(self) -> None:
        """Drop what nobody waits for any more."""
        self._queue.sweep(self._over)
        for key, job in list(self._running.items()):
            if self._over(job):
                self.engine.cancel(key)
                del self._running[key]
                self._queue.release(job)

    def _over(self, job: Job) -> bool:
        if job.given_up:
            self.metrics.texts.labels(job.given_up).inc()
        elif self._stopping:
            job.tell(Failed(job.number, went_down()))
        return bool(job.given_up) or self._stopping

    def _admit(self) -> list[Job]:
        entering: list[Job] = []
        while len(self._running) + len(entering) < self.slots:
            job = self._queue.take()
            if job is None:
                break
            entering.append(job)
        return entering

    def _begin(self, job: Job, result: Result | None = None) -> None:
        """Give the next window of a text to the engine, or finish the text; ``result`` is its last window."""
        try:
            if result is not None:
                job.take(result)
            request = job.next_request(self.lm)
            if request is not None:
                self._running[self.engine.submit(request)] = job
                return
            done = job.done(self.lm)
        except ConfigError as error:
            self._lose(job, RefusedError(400, "invalid_value", str(error)))
            return
        except Exception:  # a fault of one text must not end the others
            _log.exception("a text failed and is lost; the others go on")
            self._lose(job)
            return
        self._seconds += 0.1 * (done.seconds - self._seconds)
        self.metrics.texts.labels(done.generated.reason).inc()
        self.metrics.tokens.inc(sum(done.generated.is_noised))
        self.metrics.text_steps.observe(done.generated.steps)
        # the place first: who has the answer may ask again at once
        self._leave(job)
        job.tell(done)

    def _advanced(self) -> bool:
        """One step; False when the engine failed, and all its texts are lost and told so."""
        try:
            self._advance()
        except Exception:  # a fault of one step must not end the server
            _log.exception("the engine failed; its texts are lost, a fresh one goes on")
            lost, self._running = list(self._running.values()), {}
            for job in lost:
                self._lose(job)
            return False
        return True

    def _advance(self) -> None:
        """One step of the engine, and what it means for the texts."""
        results = self.engine.step()
        self.metrics.steps.inc()
        for result in results:
            job = self._running.pop(result.id, None)
            if job is not None:  # None: given up before
                self._begin(job, result)
        now = time.monotonic()
        for key, job in self._running.items():
            if job.watched:
                progress = self.engine.poll(key)
                frame = job.look(progress, now) if progress is not None else None
                if frame is not None:
                    job.tell(frame)

    def _renew(self) -> None:
        """A fresh engine after a fault; raises what the device raises when it can make none."""
        del self.engine  # first: the memory it holds may be what the fresh one needs
        self.engine = self.lm.engine(slots=self.slots)

    def _end(self) -> None:
        """Answer whoever waits, for nothing will be written any more."""
        with self._wake:
            # under the lock of submit: what is queued before is answered here, what comes after is refused
            self._failed = True
            lost, self._running = list(self._running.values()), {}
            self._queue.sweep(self._told)
        for job in lost:
            self._lose(job)

    def _lose(self, job: Job, error: RefusedError | None = None) -> None:
        """Tell that a text is lost; without ``error`` by a fault of ours. The place first, as in :meth:`_begin`."""
        self._leave(job)
        if error is None:
            self._told(job)
        else:
            job.tell(Failed(job.number, error))

    def _told(self, job: Job) -> bool:
        self.metrics.texts.labels("failed").inc()
        job.tell(Failed(job.number, RefusedError(500, "engine", "the engine failed: try again")))
        return True

    def _leave(self, job: Job) -> None:
        with self._wake:
            self._queue.release(job)
