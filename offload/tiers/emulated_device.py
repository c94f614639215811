"""A device with memory of its own in DRAM, reached over a bus of stated speed: the CUDA path's logic without a GPU.

It computes at once, in the thread that asks, as a CPU does; copies run on two threads, one a direction, in order and
as late as the bus allows. What reads bytes before their copy has ended, or changes them before, gets wrong numbers here
as it would on a GPU; the memory starts as NaN, so that nothing unwritten goes unseen.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from offload.telemetry import Times
from offload.tiers.device import PAST, Event, Pin

_IDLE_S = 2e-4
"""A bus without work for so long has nothing to make up for."""


class _ThreadEvent:
    """Of one copy. A lock that is held until it has ended: made in a tenth of the time of a `threading.Event`, which
    nobody would wait for on a GPU either."""

    def __init__(self) -> None:
        self._pending = threading.Lock()
        self._pending.acquire()
        self._happened = False
        self._times = (0.0, 0.0)

    def issued(self) -> Event:
        return self

    def times(self) -> Times:
        return self._times

    def done(self) -> bool:
        return self._happened

    def wait(self) -> None:
        if not self._happened:
            with self._pending:  # one waiter after the other, each for a moment
                pass

    def set(self, start_s: float) -> None:
        self._times = (start_s, time.perf_counter())
        self._happened = True
        self._pending.release()


class _CopyStream:
    """One direction of the bus: copies in order, each as long as its bytes take at `bytes_per_s` (None: no limit)."""

    def __init__(self, name: str, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._late_s = 0.0
        """By how much copies have taken longer than the bus says; those that follow at once make up for it."""
        self._end_s = 0.0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event]) -> Event:
        event, issued_s = _ThreadEvent(), time.perf_counter()

        def work() -> None:
            for earlier in after:
                earlier.wait()
            start_s = time.perf_counter()
            if self._bytes_per_s is None:
                target.copy_(source)
            else:  # sleep first: what must not be touched meanwhile is touched last
                if issued_s > self._end_s or start_s - self._end_s > _IDLE_S:
                    self._late_s = 0.0
                end_s = start_s + source.numel() * source.element_size() / self._bytes_per_s - self._late_s
                time.sleep(max(0.0, end_s - start_s))
                target.copy_(source)
                self._end_s = time.perf_counter()
                self._late_s = max(0.0, self._end_s - end_s)
            event.set(start_s)

        self._work.put(work)
        return event

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()


class EmulatedDevice:
    """See the module. `bus_bytes_per_s` applies to each direction."""

    shares_host = False
    own_nbytes = 0
    updates_faster = False
    timing = False

    def __init__(self, bus_bytes_per_s: float | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self._h2d = _CopyStream("offload-emulated-h2d", bus_bytes_per_s)
        self._d2h = _CopyStream("offload-emulated-d2h", bus_bytes_per_s)

    def stamp(self) -> Callable[[], float]:
        """Now: compute has happened when the call returns."""
        now_s = time.perf_counter()
        return lambda: now_s

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Every float in it is NaN."""
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=self.torch_device)

    def trim(self) -> None:
        """Nothing is kept."""

    def mark(self) -> Event:
        """Compute has happened when the call that computes returns."""
        return PAST

    def compute_waits(self, event: Event) -> None:
        """The thread that computes waits itself."""
        event.wait()

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """Over the bus, in order."""
        return self._h2d.copy(target, source, after)

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """Over the bus, in order."""
        return self._d2h.copy(target, source, after)

    def page_lock(self, address: int, nbytes: int, pin: Pin) -> bool:
        """DRAM needs no locking for DRAM."""
        return False

    def enter_thread(self) -> None:
        """All threads are alike."""

    def close(self) -> None:
        """Finish all copies and end the threads."""
        self._h2d.close()
        self._d2h.close()
