"""Counting what the device waits for, by cause; spans of work on a resource."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One piece of work on one resource, measured or simulated. Seconds since the beginning of the record."""

    resource: str
    name: str
    start_s: float
    end_s: float


class Stalls:
    """Seconds waited since the last `reset`, per cause: `fetch`, `update`, `slot`, `gradient`, `activation`."""

    def __init__(self) -> None:
        self.seconds_by_cause: dict[str, float] = defaultdict(float)

    @contextmanager
    def waiting(self, cause: str) -> Iterator[None]:
        """Charge the time spent inside to `cause`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_by_cause[cause] += time.perf_counter() - start

    def reset(self) -> dict[str, float]:
        """Return the seconds by cause and start again from zero."""
        seconds = dict(self.seconds_by_cause)
        self.seconds_by_cause.clear()
        return seconds
