"""Copies between host and device, and the gates that let storage work follow a copy."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import torch

from offload.telemetry import SpanLog
from offload.tiers.device import DeviceTier, Event
from offload.transfer.io_engine import Ticket


class Copies:
    """Issues H2D and D2H copies. Counts their bytes: `h2d_bytes`, `d2h_bytes`."""

    def __init__(self, device: DeviceTier, spans: SpanLog) -> None:
        self._device = device
        self._spans = spans
        self.h2d_bytes = 0
        self.d2h_bytes = 0
        self._gates: queue.SimpleQueue[tuple[Event, Ticket] | None] = queue.SimpleQueue()
        self._keeper: threading.Thread | None = None

    def h2d(
        self, name: str, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()
    ) -> Event:
        """Start a copy to the device; `name` is its span's."""
        self.h2d_bytes += source.numel() * source.element_size()
        event = self._device.copy_in(target, source, after)
        self._spans.add("h2d", name, event.times)
        return event

    def d2h(
        self, name: str, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()
    ) -> Event:
        """Start a copy to the host; `source` is complete at the compute given so far."""
        self.d2h_bytes += source.numel() * source.element_size()
        event = self._device.copy_out(target, source, [self._device.mark(), *after])
        self._spans.add("d2h", name, event.times)
        return event

    def gate(self, event: Event) -> Ticket:
        """A ticket that completes when `event` is done: the engine and the update pipeline start work after it.

        Events are waited for in the order of the calls, by one thread, so that the user's thread never has to be.
        """
        gate = Ticket()
        if event.done():
            gate.complete()
            return gate
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep_gates, name="offload-gates", daemon=True)
            self._keeper.start()
        self._gates.put((event, gate))
        return gate

    def _keep_gates(self) -> None:
        while (item := self._gates.get()) is not None:
            event, gate = item
            try:
                event.wait()
            except Exception as error:  # a device error: whoever waits for the bytes has to be told
                gate.complete(f"copy from the device failed: {error}")
            else:
                gate.complete()

    def close(self) -> None:
        """Open every gate that is still shut, then end the thread."""
        if self._keeper is not None:
            self._gates.put(None)
            self._keeper.join()
            self._keeper = None
