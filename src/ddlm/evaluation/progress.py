"""What an evaluation says while it works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ddlm.evaluation.measure import Progress

EVERY = 30.0  # seconds between lines


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Follows (what, done, in all) on stderr: a bar that goes away at the end, or lines in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines(lambda text: print(text, file=sys.stderr, flush=True))
        return
    with Bar(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell


def lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Progress:
    """Says how far the work is, and for how long this part of it goes on, every :data:`EVERY` seconds.

    Args:
        say: Takes a line.
        clock: Seconds.
    """
    began = said = clock()
    part, first = "", 0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal began, said, part, first
        now = clock()
        if what != part:
            part, first, began = what, done, now
        if now - said < EVERY:
            return
        said = now
        left = ""
        if done > first:
            seconds = round((now - began) * (total - done) / (done - first))
            left = f", {seconds // 60}:{seconds % 60:02} left"
        say(f"{what}: {done:,} of {total:,}{left}")

    return tell
