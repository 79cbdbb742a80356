"""Ctrl-C and SIGTERM ask the loop to stop at the next step; a second Ctrl-C stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Context manager that notes SIGINT and SIGTERM instead of dying from them (in the main thread only).

    Args:
        tell: Say on standard error that the signal has arrived: a step of a large model takes minutes.

    Attributes:
        signal: Number of the signal that was received, 0 for none.
    """

    def __init__(self, tell: bool = False) -> None:
        self.signal, self._tell = 0, tell
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._tell and not self.signal:
            text = (
                f"\n{signal.Signals(number).name}: stopping after this step; Ctrl-C stops at once\n"
            )
            # Not through sys.stderr: the signal may have come in the middle of a write to it.
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        self.signal = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
