"""Counting what the device waits for, by cause; spans of work on a resource."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from offload.cut_short import leavable


@dataclass(frozen=True)
class Span:
    """One piece of work on one resource, measured or simulated. Seconds since the beginning of the record."""

    resource: str
    name: str
    start_s: float
    end_s: float


Times = tuple[float, float]
"""Start and end of something, in seconds of `time.perf_counter`."""


class Waitable(Protocol):
    """A copy's event, or the ticket of a transfer."""

    def wait(self) -> object:
        """Block until it has ended. Raises its failure."""
        ...

    def times(self) -> Times:
        """When it ran, once it has ended."""
        ...


def _times_once_done(work: Waitable) -> Times:
    work.wait()
    return work.times()


class SpanLog:
    """Spans of a run while it is recorded. While it is not, a call costs one comparison.

    Work that is still going on hands in a function that says its times once it has ended, or is waited for.
    """

    def __init__(self) -> None:
        self.recording = False
        self._origin_s = 0.0
        self._later: list[tuple[str, str, Callable[[], Times]]] = []

    def start(self) -> None:
        """Forget what was recorded, and record from now on."""
        self._later.clear()
        self._origin_s = time.perf_counter()
        self.recording = True

    def add(self, resource: str, name: str, times: Callable[[], Times]) -> None:
        """Record one piece of work."""
        if self.recording:
            self._later.append((resource, name, times))

    def add_work(self, resource: str, name: str, work: Waitable) -> None:
        """Record work that nothing else may have waited for when the record ends: parked gradients on their way."""
        if self.recording:
            self._later.append((resource, name, partial(_times_once_done, work)))

    def stop(self) -> list[Span]:
        """End the record, when all work in it has ended. Overlapping spans of one name and resource become one."""
        self.recording = False
        found = [(resource, name, *times()) for resource, name, times in self._later]
        self._later.clear()
        merged: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for resource, name, start_s, end_s in sorted(found, key=lambda item: item[2]):
            runs = merged[resource, name]
            if runs and start_s <= runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], end_s)
            else:
                runs.append([start_s, end_s])
        spans = [
            Span(resource, name, max(0.0, start_s - self._origin_s), end_s - self._origin_s)
            for (resource, name), runs in merged.items()
            for start_s, end_s in runs
        ]
        return sorted(spans, key=lambda span: (span.start_s, span.resource))


class Stalls:
    """Seconds waited since the last `reset`, per cause: `fetch`, `update`, `slot`, `gradient`, `activation`.

    Each wait is made inside `annotate(cause)`, which names it to a profiler.
    """

    def __init__(self, annotate: Callable[[str], AbstractContextManager[object]] = nullcontext) -> None:
        self.seconds_by_cause: dict[str, float] = defaultdict(float)
        self._annotate = annotate

    @contextmanager
    def waiting(self, cause: str) -> Iterator[None]:
        """Charge the time spent inside to `cause`."""
        start = time.perf_counter()
        try:
            with self._annotate(cause), leavable():
                yield
        finally:
            self.seconds_by_cause[cause] += time.perf_counter() - start

    def reset(self) -> dict[str, float]:
        """Return the seconds by cause and start again from zero."""
        seconds = dict(self.seconds_by_cause)
        self.seconds_by_cause.clear()
        return seconds
