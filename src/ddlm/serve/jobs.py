"""A text on its way through the server, and what is told about it.

T positions of the whole text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddlm.sampling.request import Progress, Request, Result, make_request
from ddlm.sampling.windows import LongText, windows
from ddlm.serve.limits import RefusedError

if TYPE_CHECKING:
    from ddlm.lm import DiffusionLM
    from ddlm.sampling.template import Template
    from ddlm.sampling.text import Generated

Curve = list[tuple[int, int, float]]
"""Step, tokens that switched in it, mean entropy in nats a generated token."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A look at a text that is being written.

    Attributes:
        number: Which text of its request.
        step: Steps made so far, of all windows together.
        steps: Steps allowed.
        tokens: ``(T,)`` int64; what has not been begun holds -1.
        settled: ``(T,)`` bool.
        open: ``(T,)`` bool, False where the token is final: given, frozen, or of a finished window.
        entropy: Nats, ``(T,)``; 0 where given.
        curve: Every step since the last frame.
    """

    number: int
    step: int
    steps: int
    tokens: Tensor
    settled: Tensor
    open: Tensor
    entropy: Tensor
    curve: Curve


@dataclass(frozen=True, eq=False)
class Done:
    """A finished text: what was written, the last entropy of each token ``(T,)`` and the end of the curve."""

    number: int
    generated: Generated
    steps: int
    entropy: Tensor
    curve: Curve
    seconds: float


@dataclass(frozen=True, eq=False)
class Failed:
    """A text that was given up."""

    number: int
    error: RefusedError


Event = Frame | Done | Failed


@dataclass(eq=False)
class Job:
    """One text: where it belongs, what is asked for, how far it is.

    Attributes:
        client: Whose turn it takes in the queue.
        number: Which text of its request.
        text: Its windows.
        options: Of :func:`ddlm.sampling.make_request`.
        tell: Called on the engine's thread with every event; must not block.
        watched: Whether frames are wanted.
        pause: Seconds between frames at least.
        patience: Steps without a switch after which a token counts as settled.
        given_up: Why nobody waits for it any more, once that is so.
    """

    client: str
    number: int
    text: LongText
    options: dict[str, Any]
    tell: Callable[[Event], None]
    watched: bool = False
    pause: float = 0.05
    patience: int = 10
    given_up: str = ""
    born: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        t = self.text
        self.entropy = torch.zeros(len(t.tokens))
        self.seen = 0  # steps told of, in this window
        self.last: Tensor | None = None  # tokens at the last step seen
        self.curve: Curve = []
        self.shown = 0.0
        self._first: Request | None = None
        # a window whose open positions another one has written makes no step
        busy, still_open = 0, t.open.clone()
        for a, b in t.stretches:
            busy += bool(still_open[a:b].any())
            still_open[a:b] = False
        self.steps = max(1, busy) * self.allowed

    @property
    def allowed(self) -> int:
        """Steps allowed for one window."""
        grid = self.options["grid_name"]
        steps = len(grid) if isinstance(grid, Tensor) else int(self.options["steps"])
        return steps + int(self.options["refine"])

    @property
    def window(self) -> tuple[int, int]:
        """Positions of the window begun last."""
        return self.text.stretches[max(0, self.text.at - 1)]

    def check(self, lm: DiffusionLM) -> Request | None:
        """Lay out the first window ahead of its turn, so that a mistake is told before anything is queued.

        Raises:
            ConfigError: for an option out of range.
        """
        self._first = self.next_request(lm)
        return self._first

    def next_request(self, lm: DiffusionLM) -> Request | None:
        """The next window to write, or None when the text is complete."""
        if self._first is not None:
            request, self._first = self._first, None
            return request
        window = self.text.next_window()
        if window is None:
            return None
        start, end = window
        self.seen, self.last = 0, None
        return make_request(
            self.text.tokens[start:end],
            self.text.open[start:end],
            lm.process,
            seed=self.text.window_seed,
            **self.options,
        )

    def take(self, result: Result) -> None:
        """Keep what a window has written."""
        start, end = self.window
        fresh = self.text.open[start:end].clone()
        self.entropy[start:end] = torch.where(fresh, result.entropy, self.entropy[start:end])
        if self.watched and result.steps > self.seen:
            self._note(result.steps, result.tokens, result.entropy, fresh)
        self.text.take(result)

    def look(self, progress: Progress, now: float) -> Frame | None:
        """Note a step; a frame when one is due."""
        if progress.step <= self.seen:
            return None
        start, end = self.window
        fresh = self.text.open[start:end]
        self._note(progress.step, progress.tokens, progress.entropy, fresh)
        if now - self.shown < self.pause:
            return None
        self.shown = now
        tokens = torch.where(self.text.open, -1, self.text.tokens)
        tokens[start:end] = progress.tokens
        settled = ~self.text.open
        settled[start:end] |= (progress.stable >= self.patience) | ~progress.is_noised
        still_open = self.text.open.clone()
        still_open[start:end] &= progress.is_noised
        entropy = self.entropy.clone()
        entropy[start:end] = torch.where(fresh, progress.entropy, entropy[start:end])
        curve, self.curve = self.curve, []
        step = self.text.steps + progress.step
        return Frame(self.number, step, self.steps, tokens, settled, still_open, entropy, curve)

    def done(self, lm: DiffusionLM) -> Done:
        """The finished text."""
        t = self.text
        written = lm.text(t.template, t.tokens, t.steps, t.reason, t.seed)
        seconds = time.monotonic() - self.born
        return Done(self.number, written, self.steps, self.entropy, self.curve, seconds)

    def _note(self, step: int, tokens: Tensor, entropy: Tensor, fresh: Tensor) -> None:
        """One point of the curve; at its first step a text has switched nowhere yet."""
        switched = 0 if self.last is None else int(((tokens != self.last) & fresh).sum())
        mean = float(entropy[fresh].mean()) if bool(fresh.any()) else 0.0
        self.curve.append((self.text.steps + step, switched, round(mean, 4)))
        self.seen, self.last = step, tokens


def long_text(number: int, template: Template, seed: int, length: int, overlap: int) -> LongText:
    """A text cut into windows as :meth:`ddlm.lm.DiffusionLM.iterate` cuts it."""
    return LongText(number, template, seed, list(windows(len(template), length, overlap)))
