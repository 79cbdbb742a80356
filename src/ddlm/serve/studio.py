"""From a request's body to texts at work, and from their events to what is sent."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ddlm.sampling.template import parse, split
from ddlm.serve.jobs import Done, Event, Failed, Frame, Job, long_text
from ddlm.serve.limits import Limits, RefusedError, went_down
from ddlm.serve.schema import Sampling

if TYPE_CHECKING:
    from ddlm.lm import DiffusionLM
    from ddlm.sampling.template import Template
    from ddlm.serve.worker import Worker

_SPANNED = 512  # tokens up to which every beginning of a text is decoded
_OPTIONS = (
    "steps",
    "solver",
    "halt",
    "noise_scale",
    "grid",
    "temperature",
    "top_k",
    "guidance",
    "refine",
)


class Channel:
    """Events of one request on their way from the engine's thread to its reader.

    Bounded whatever the reader does: of each text only the latest frame is kept, with the points of the curve since
    the last one that was read.

    Args:
        count: Texts of the request.
    """

    def __init__(self, count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: dict[int, Frame] = {}
        self._ended: deque[Event] = deque()
        self._some = asyncio.Event()
        self._open = dict.fromkeys(range(count))  # numbers of the texts that have not ended

    def tell(self, event: Event) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._push, event)

    def give_up(self, error: RefusedError) -> None:
        """End every text that has not ended; called on the loop, and whatever the engine tells later is dropped."""
        for number in list(self._open):
            self._push(Failed(number, error))

    def _push(self, event: Event) -> None:
        if event.number not in self._open:
            return
        before = self._frames.pop(event.number, None)
        curve = before.curve if before is not None else []
        if isinstance(event, Frame):
            self._frames[event.number] = replace(event, curve=[*curve, *event.curve])
        else:
            del self._open[event.number]
            if isinstance(event, Done):
                event = replace(event, curve=[*curve, *event.curve])
            self._ended.append(event)
        self._some.set()

    async def events(self) -> AsyncIterator[Event]:
        """Every event until all texts have ended."""
        while self._open or self._ended:
            await self._some.wait()
            self._some.clear()
            frames, self._frames = self._frames, {}
            ended, self._ended = self._ended, deque()
            for event in [*frames.values(), *ended]:
                yield event


class Studio:
    """Checks requests, turns them into texts at work and tells what became of them.

    Args:
        lm: The model.
        worker: Drives the engine.
        limits: Of one request.

    Attributes:
        at_work: What somebody waits for.
    """

    def __init__(self, lm: DiffusionLM, worker: Worker, limits: Limits) -> None:
        self.lm, self.worker, self.limits = lm, worker, limits
        self.at_work: set[Writing] = set()
        self._pieces: dict[int, str] = {}

    def parse(self, text: str) -> Template:
        """Tokens of a template within the limit.

        Raises:
            RefusedError: for one that is too long.
            ConfigError: for one that is malformed.
        """
        # slots are counted before they are laid out: a few bytes can ask for millions of tokens
        asked = sum(part for part in split(text) if isinstance(part, int))
        if asked <= self.limits.tokens:
            template = parse(text, self.lm.tokenizer)
            asked = len(template)
        self.check_length(asked, "template")
        return template

    def check_length(self, tokens: int, param: str) -> None:
        """Refuse a text that is too long, naming the field that made it so."""
        if tokens > self.limits.tokens:
            raise RefusedError(
                400,
                "too_long",
                f"the text has {tokens} tokens or more, this server takes at most {self.limits.tokens}",
                param=param,
            )

    def submit(
        self,
        client: str,
        templates: list[Template],
        body: Sampling,
        samples: int,
        *,
        overlap: int | None = None,
        watched: bool = False,
        patience: int = 10,
    ) -> Writing:
        """Queue the texts of a request.

        Raises:
            RefusedError: over a limit, or when there is no room.
            ConfigError: for an option out of range.
        """
        count = samples * len(templates)
        if count > self.limits.texts:
            raise RefusedError(
                400,
                "too_many_samples",
                f"{count} texts were asked for, this server writes at most {self.limits.texts} a request: "
                "ask for fewer",
            )
        options = self.lm.options(**{name: getattr(body, name) for name in _OPTIONS})
        steps = options["steps"] + options["refine"]
        if steps > self.limits.steps:
            raise RefusedError(
                400,
                "too_many_steps",
                f"{steps} steps (rounds of refinement among them) were asked for, this server makes at most "
                f"{self.limits.steps}",
                param="steps",
            )
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        if seed + count > 2**63:  # the last text's seed could not be asked for again
            raise RefusedError(
                400,
                "invalid_value",
                f"seeds from {seed} to {seed + count - 1} were asked for, they must be below 2^63: lower seed",
                param="seed",
            )
        channel = Channel(count)
        shared = self.lm.length // 2 if overlap is None else overlap
        jobs = [
            Job(
                client=client,
                number=i,
                text=long_text(i, templates[i // samples], seed + i, self.lm.length, shared),
                options=options,
                tell=channel.tell,
                watched=watched,
                pause=1 / self.limits.frames,
                patience=patience,
            )
            for i in range(count)
        ]
        # what is out of range is told before anything is queued, what no engine can do too
        first = jobs[0].check(self.lm)
        if first is not None:
            self.worker.check(first)
        self.worker.submit(jobs)
        writing = Writing(self, jobs, channel)
        writing.end_after(self.limits.deadline)
        return writing

    def end(self) -> None:
        """Give up whatever is being written, and say that the server went down; called on the loop."""
        for writing in list(self.at_work):
            writing.give_up(went_down(), "drained")

    def pieces(self, ids: list[int]) -> list[str | None]:
        """What each token looks like; None for one that is not there yet."""
        fresh = [i for i in set(ids) if i >= 0 and i not in self._pieces]
        self._pieces.update(zip(fresh, self.lm.tokenizer.pieces(fresh), strict=True))
        return [self._pieces.get(i) for i in ids]

    def _spans(self, ids: list[int], text: str) -> list[str]:
        """What each token adds to ``text``: they join to it, also where a character takes several tokens."""
        spans = [piece or "" for piece in self.pieces(ids)]
        if "".join(spans) == text or len(ids) > _SPANNED:
            return spans
        decode, edges = self.lm.tokenizer.decode, [0]
        for i in range(1, len(ids)):
            whole = len(decode(ids[:i]).rstrip("\N{REPLACEMENT CHARACTER}"))
            edges.append(min(len(text), max(edges[-1], whole)))
        return [text[a:b] for a, b in pairwise([*edges, len(text)])]

    def frame(self, event: Frame) -> dict[str, Any]:
        """A frame as JSON."""
        return {
            "sample": event.number,
            "step": event.step,
            "steps": event.steps,
            "tokens": self.pieces(event.tokens.tolist()),
            "settled": event.settled.int().tolist(),
            "entropy": _short(event.entropy.tolist()),
            "curve": event.curve,
        }

    def done(self, event: Done) -> dict[str, Any]:
        """A finished text as JSON."""
        row = event.generated.to_row()
        ids = row.pop("tokens")
        spans = self._spans(ids, event.generated.text)
        return row | {
            "sample": event.number,
            "allowed": event.steps,
            "tokens": spans,
            "ids": ids,
            "is_noised": [int(x) for x in row["is_noised"]],
            "entropy": _short(event.entropy.tolist()),
            "curve": event.curve,
            "seconds": round(event.seconds, 4),
        }


class Writing:
    """The texts of one request at work.

    Use as a context manager: what is unfinished when it is left is given up.

    Args:
        studio: Of whose requests it is one.
        jobs: The texts, queued.
        channel: Where their events come.
    """

    def __init__(self, studio: Studio, jobs: list[Job], channel: Channel) -> None:
        self.studio, self.jobs, self._channel = studio, jobs, channel
        self._late: asyncio.TimerHandle | None = None
        studio.at_work.add(self)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave("cancelled")

    def end_after(self, seconds: float) -> None:
        """Give up what is not finished by then, whatever the engine's thread is doing."""
        late = RefusedError(
            504, "deadline", f"the text was not finished within {seconds:g} seconds"
        )
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(seconds, self.give_up, late, "deadline")

    def give_up(self, error: RefusedError, reason: str) -> None:
        """Tell the reader that what is unfinished is given up; called on the loop. ``reason`` is what is counted."""
        self._channel.give_up(error)
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        if self._late is not None:
            self._late.cancel()
        self.studio.at_work.discard(self)
        self.studio.worker.cancel(self.jobs, reason)

    def events(self) -> AsyncIterator[Event]:
        """Every event until all texts have ended."""
        return self._channel.events()

    async def all(self) -> list[Done]:
        """All finished texts, in order.

        Raises:
            RefusedError: when one was given up.
        """
        finished: list[Done] = []
        async for event in self.events():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                finished.append(event)
        return sorted(finished, key=lambda d: d.number)


def _short(values: list[float]) -> list[float]:
    return [round(v, 3) for v in values]
