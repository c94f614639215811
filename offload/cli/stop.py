"""Ctrl-C, SIGTERM and a closed terminal end a run in order: with a sentence, and no store left behind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """The command was stopped; the message says after what."""


class StopSignals:
    """While entered, the first of `STOPPING` raises KeyboardInterrupt in the main thread, wherever it is.

    After `finish_step`, the first only sets `requested`, so that a step can end and be saved; the next one raises.

    `check` raises it again where the first one was lost (Python drops an exception raised inside a destructor). Once
    `cleaning_up` is called further signals are ignored, so that a second Ctrl-C does not cut the cleaning short.
    Signals that were ignored before (nohup) stay ignored. Outside the main thread it does nothing: Python allows no
    handlers there.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self.requested = False
        self._tell: Callable[[], None] | None = None
        self._cleaning = False

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            try:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if self._tell is not None and first and not self._cleaning:
            self._tell()
        elif not self._cleaning:
            raise KeyboardInterrupt

    def finish_step(self, tell: Callable[[], None]) -> None:
        """From now on the first signal calls `tell` and waits for the end of the step; see `requested`."""
        self._tell = tell

    def cleaning_up(self) -> None:
        """From now on signals are ignored."""
        self._cleaning = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.requested and not self._cleaning:
            raise KeyboardInterrupt
