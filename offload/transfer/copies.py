"""Copies between host and device, and the gates that let storage work follow a copy."""

from __future__ import annotations

import copy
import functools
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from offload.errors import OffloadError
from offload.telemetry import SpanLog, Times
from offload.threads import JoinableThread
from offload.tiers.device import PAST, DeviceTier, Event
from offload.transfer.io_engine import Ticket


class _Promised:
    """The event of a copy that will be issued when something else has happened."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._event: Event | None = None
        self._failure: BaseException | None = None
        self._before: Sequence[Event] = ()

    def keep(self, event: Event) -> None:
        self._event = event
        self._known.set()

    def fail(self, failure: BaseException, before: Sequence[Event]) -> None:
        """`before`: what it should have come after, of which some may still be going on in the same memory."""
        self._failure, self._before = failure, before
        self._known.set()

    def issued(self) -> Event:
        self._known.wait()
        if self._event is not None:
            return self._event
        # A copy of it: its traceback is the waiting thread's, and would keep all that this one uses.
        raise copy.copy(self._failure) if self._failure else OffloadError("a copy has been given up")

    def done(self) -> bool:
        """Whether it has ended, well or not: a failure is raised by `wait`."""
        ends = self._before if self._event is None else [self._event]
        return self._known.is_set() and all(event.done() for event in ends)

    def wait(self) -> None:
        self.issued().wait()

    def times(self) -> Times:
        return self.issued().times()


class _Keeper:
    """One thread that works off what it is given, in order, so that the user's thread never has to wait for it."""

    def __init__(self, name: str, begin: Callable[[], None]) -> None:
        self._name = name
        self._begin = begin
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: JoinableThread | None = None

    def give(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = JoinableThread(self._run, name=self._name, daemon=True)
            self._thread.start()
        self._work.put(work)

    def _run(self) -> None:
        self._begin()
        while (work := self._work.get()) is not None:
            work()

    def close(self) -> None:
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None


class Copies:
    """Issues H2D and D2H copies. Counts their bytes: `h2d_bytes`, `d2h_bytes`."""

    def __init__(self, device: DeviceTier, spans: SpanLog) -> None:
        self._device = device
        self._spans = spans
        self.h2d_bytes = 0
        self.d2h_bytes = 0
        self._gates = _Keeper("offload-gates", device.enter_thread)
        self._loads = _Keeper("offload-loads", device.enter_thread)
        self._returns = _Keeper("offload-returns", device.enter_thread)
        self._parts = _Keeper("offload-parts", device.enter_thread)

    def h2d(
        self, name: str, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()
    ) -> Event:
        """Start a copy to the device; `name` is its span's."""
        nbytes = source.numel() * source.element_size()
        self.h2d_bytes += nbytes  # several threads do: no call in between
        event = self._device.copy_in(target, source, [earlier.issued() for earlier in after])
        self._spans.add_work("h2d", name, event)
        return event

    def h2d_when(
        self,
        tickets: Sequence[Ticket],
        name: str,
        target: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Event] = (),
        *,
        returns: bool = False,
    ) -> Event:
        """The same, started when `tickets` have completed, by another thread where that is still to come.

        Copies of activations that return (`returns`) start in the order of the calls. A failure, of a ticket or of what
        `after` has, is raised by whoever waits for the event.
        """
        if not returns and all(ticket.done() for ticket in tickets):
            for ticket in tickets:
                ticket.wait()
            return self.h2d(name, target, source, after)
        promised, waiting = _Promised(), list(tickets)

        def start() -> None:
            try:
                for ticket in waiting:
                    ticket.wait()
                promised.keep(self.h2d(name, target, source, after))
            except BaseException as failure:  # handed to whoever waits
                promised.fail(failure, after)

        (self._returns if returns else self._loads).give(start)
        return promised

    def h2d_in_parts(
        self,
        parts: Sequence[tuple[int, int, Ticket]],
        name: str,
        target: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[Event] = (),
    ) -> Event:
        """The same for bytes of which parts become ready one by one: (first byte, byte after the last, ticket), sorted.
        What is in none goes first, each part when its ticket has completed. The event is the end of all.

        Loads that wait for other tickets do not hold it up."""
        promised = _Promised()
        ends = [0, *(end for _, end, _ in parts)]
        begins = [*(begin for begin, _, _ in parts), target.numel()]
        others: list[tuple[int, int, list[Ticket]]] = [
            (a, b, []) for a, b in zip(ends, begins, strict=True) if a < b
        ]
        waiting = [*others, *((begin, end, [ticket]) for begin, end, ticket in parts)]

        def start() -> None:
            event: Event = PAST
            try:
                for begin, end, tickets in waiting:
                    for ticket in tickets:
                        ticket.wait()
                    event = self.h2d(name, target[begin:end], source[begin:end], after)
                promised.keep(event)
            except BaseException as failure:  # handed to whoever waits
                promised.fail(failure, [event])

        self._parts.give(start)
        return promised

    def d2h(
        self, name: str, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()
    ) -> Event:
        """Start a copy to the host; `source` is complete at the compute given so far."""
        self.d2h_bytes += source.numel() * source.element_size()
        event = self._device.copy_out(target, source, [self._device.mark(), *after])
        self._spans.add_work("d2h", name, event)
        return event

    def gate(self, event: Event) -> Ticket:
        """A ticket that completes when `event` is done: the engine and the update pipeline start work after it.

        Events are waited for in the order of the calls, by one thread, so that the user's thread never has to be.
        """
        gate = Ticket()
        if event.done():
            self._open(event, gate)
            return gate
        self._gates.give(functools.partial(self._open, event, gate))
        return gate

    @staticmethod
    def _open(event: Event, gate: Ticket) -> None:
        try:
            event.wait()
        except Exception as error:  # a device error: whoever waits for the bytes has to be told
            gate.complete(f"copy from the device failed: {error}")
        else:
            gate.complete()

    def close(self) -> None:
        """Start every copy and open every gate that is still waiting, then end the threads."""
        self._loads.close()
        self._parts.close()
        self._returns.close()
        self._gates.close()
