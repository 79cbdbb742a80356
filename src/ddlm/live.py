"""Text condensing out of noise, in the terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from ddlm.data.tokenizer import Tokenizer
    from ddlm.sampling.request import Progress

SETTLED = 10
"""Steps without a switch after which a token is shown as settled."""
_FRAME = 1 / 20  # seconds between frames at least: more is drawn than seen


class LiveView:
    """Shows sequences while they are generated: given tokens, settled tokens, and what is still in flux.

    Use as a context manager and hand :meth:`update` to ``on_progress`` of
    :meth:`ddlm.lm.DiffusionLM.generate`; what is printed meanwhile goes through :meth:`say`.

    Args:
        tokenizer: Of the model.
        console: Where to draw; None is the terminal.
        settled: Steps without a switch after which a token counts as settled.
        rows: Sequences shown at once, the latest that are under way.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        console: Console | None = None,
        settled: int = SETTLED,
        rows: int = 4,
    ) -> None:
        self.tokenizer, self.settled, self.rows = tokenizer, settled, rows
        self.console = console or Console()
        self._live = self._fresh()
        self._shown: dict[int, Progress] = {}
        self._pieces: dict[int, str] = {}
        self._drawn = 0.0

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, traceback)

    def _fresh(self) -> Live:
        # standard output stays what it is: rich would lead it to this console, past a file or a pipe
        return Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=False)

    def say(self, line: str) -> None:
        """Print a line to standard output as it is; on a terminal above what is shown."""
        if not sys.stdout.isatty():
            print(line, flush=True)
            return
        self._live.stop()  # takes what is shown away, so that the line is not written into it
        print(line, flush=True)
        self._live = self._fresh()
        self._live.start()

    def update(self, number: int, progress: Progress) -> None:
        """Show the state of a sequence; drops frames that come too fast."""
        self._shown[number] = progress
        now = time.monotonic()
        if now - self._drawn >= _FRAME:
            self._drawn = now
            recent = sorted(self._shown)[-self.rows :]
            self._live.update(Group(*(self.frame(self._shown[k]) for k in recent)), refresh=True)
            self._shown.clear()  # what is under way is reported at every step, what has ended is not

    def frame(self, progress: Progress) -> Text:
        """One sequence: given text plain, settled tokens bold, the others dim, and a line of figures."""
        text = Text()
        stable = progress.stable.tolist()
        open_, counts = progress.is_noised.tolist(), 0
        for i, token in enumerate(progress.tokens.tolist()):
            done = stable[i] >= self.settled
            style = "" if not open_[i] else ("bold green" if done else "dim")
            counts += int(open_[i] and not done)
            text.append(self._piece(token), style=style)
        entropy = float(progress.entropy.sum()) / max(sum(open_), 1)
        text.append(
            f"\nstep {progress.step} of {progress.steps}, {counts} tokens in flux, {entropy:.2f} nats a token\n",
            style="cyan",
        )
        return text

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.tokenizer.pieces([token])[0].replace("\n", "⏎")
        return self._pieces[token]
