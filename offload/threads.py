"""Threads that others wait for, whatever Ctrl-C does while they are being started."""

from __future__ import annotations

import threading
from collections.abc import Callable


class JoinableThread(threading.Thread):
    """A thread whose work is done exactly once when `join` returns, even where `start` was cut short.

    [Note: cut while starting] `Thread.start` waits until the new thread runs. Ctrl-C in that wait leaves a thread that
    is yet to come, and before it one that never will; `Thread.join` refuses both. Here whoever comes first does the
    work: the thread, or the one that joins it. So let what joins hold the thread before `start` is called.
    """

    def __init__(self, work: Callable[[], None], *, name: str, daemon: bool = False) -> None:
        super().__init__(target=work, name=name, daemon=daemon)
        self._claim = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        """The work, unless another has begun it."""
        if self._claim.acquire(blocking=False):
            try:
                super().run()
            finally:
                self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether `join` would return at once."""
        return self._ended.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Until the work is done: by this thread where no other has begun it. See [Note: cut while starting]."""
        if self.is_alive():
            super().join(timeout)
        else:
            self.run()
            self._ended.wait(timeout)
