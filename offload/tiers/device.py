"""The device tier: its memory, its two copy streams, and the events that order copies and compute.

[Note: order on a device] Compute is what the user's thread gives the device, in that order. Copies to the device and
from it run on a stream of their own each, made once. Nothing here blocks the user's thread but `Event.wait`: a copy
names the events it comes after, and `compute_waits` orders compute given from then on after an event. Memory that a
copy touches must stay as it is until the copy's event is done; who frees or rewrites it holds that event.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch

from offload.errors import BudgetError
from offload.telemetry import Times
from offload.tiers.pages import make_present

logger = logging.getLogger("offload")

Pin = Literal["auto", "always", "never"]

PAGE_LOCK_PIECE_NBYTES = 1 << 30
"""Host memory is registered in pieces: drivers refuse single registrations of many GB."""


CUDA_OWN_NBYTES = 192 << 20
"""What torch's allocator gives to cuBLAS (32 MiB for each thread that launches, the one that trains and autograd's, and
as much again for cuBLASLt) and loses to rounding: it takes 2 and 20 MiB at once."""


def allocator_hint(environment: Mapping[str, str]) -> str | None:
    """What to set before training, so that tensors of many sizes fit into `device_memory` to its last part; None where
    it is set. Torch's allocator otherwise cannot join what is free in two segments."""
    settings = environment.get("PYTORCH_CUDA_ALLOC_CONF", "") + environment.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments" in settings:
        return None
    return (
        "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: device memory is lost to fragments otherwise"
    )


class Event(Protocol):
    """A point in the work given to a device."""

    def done(self) -> bool:
        """Whether everything up to the point has happened."""
        ...

    def wait(self) -> None:
        """Block the calling thread until it has."""
        ...

    def issued(self) -> Event:
        """The event itself, as soon as its work has been given to the device; waits for that."""
        ...

    def times(self) -> Times:
        """When the copy that this is the end of ran; to be asked once it has ended. Only for copies made while
        `DeviceTier.timing` was set."""
        ...


class Past:
    """An event that lies in the past."""

    def done(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Returns at once."""

    def issued(self) -> Event:
        """Itself."""
        return self

    def times(self) -> Times:
        """Nothing was copied."""
        return 0.0, 0.0


PAST = Past()


class DeviceTier(Protocol):
    """What the runtime needs of a device. See [Note: order on a device]."""

    torch_device: torch.device
    shares_host: bool
    """The device computes on host memory itself: slots and gradients are never copied over."""
    own_nbytes: int
    """Of its memory, what its libraries take for themselves, and what of the model stays there beside the slots."""
    updates_faster: bool
    """Whether its memory is so much faster than the host's that what is updated there should be."""
    timing: bool
    """Whether copies and stamps are to be timed."""

    def stamp(self) -> Callable[[], float]:
        """The moment when the compute given so far has ended: a function that gives its seconds once it has."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory as a 1-D uint8 tensor. Raises BudgetError when the device has less."""
        ...

    def trim(self) -> None:
        """Give the device back what its allocator keeps for nobody."""
        ...

    def mark(self) -> Event:
        """The end of all compute given so far."""
        ...

    def compute_waits(self, event: Event) -> None:
        """Compute given from now on comes after `event`."""
        ...

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """Start copying host bytes to the device; returns the event of its end."""
        ...

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """Start copying device bytes to the host; returns the event of its end."""
        ...

    def page_lock(self, address: int, nbytes: int, pin: Pin) -> bool:
        """Lock host memory for fast copies. False when the device does without."""
        ...

    def enter_thread(self) -> None:
        """The calling thread begins: it will give the device copies and wait for them, and do nothing else."""
        ...

    def close(self) -> None:
        """Finish all copies, unlock host memory."""
        ...


class SharedDevice:
    """A machine without accelerator: the device tier is a bounded part of DRAM and nothing is copied to it."""

    shares_host = True
    own_nbytes = 0
    updates_faster = False
    timing = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def stamp(self) -> Callable[[], float]:
        """Now: compute has happened when the call returns."""
        now_s = time.perf_counter()
        return lambda: now_s

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Plain memory; the arena of the runtime is used instead wherever pages matter."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def trim(self) -> None:
        """Nothing is kept."""

    def mark(self) -> Event:
        """Compute has happened when the call returns."""
        return PAST

    def compute_waits(self, event: Event) -> None:
        """The thread that computes waits itself."""
        event.wait()

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """A plain copy."""
        for event in after:
            event.wait()
        target.copy_(source)
        return PAST

    copy_out = copy_in

    def page_lock(self, address: int, nbytes: int, pin: Pin) -> bool:
        """Nothing to lock for."""
        return False

    def enter_thread(self) -> None:
        """All threads are alike."""

    def close(self) -> None:
        """Nothing to finish."""


_limits: dict[int, object] = {}
"""By index of a CUDA device: who has set the limit of torch's allocator last."""


class CudaDevice:
    """One NVIDIA (or ROCm) GPU through torch.cuda. `memory_nbytes` becomes the limit of torch's allocator there.

    It is the current device around calls that would else make a context, some hundred MB, on the one that is.
    """

    shares_host = False
    own_nbytes = CUDA_OWN_NBYTES
    updates_faster = True

    def __init__(self, torch_device: torch.device, memory_nbytes: int) -> None:
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        self.torch_device = torch.device("cuda", index)
        total_nbytes = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_nbytes / total_nbytes), index)
        _limits[index] = self._limit = object()
        hint = allocator_hint(os.environ)
        if hint is not None:
            logger.info("%s", hint)
        self._h2d = torch.cuda.Stream(self.torch_device)
        self._d2h = torch.cuda.Stream(self.torch_device)
        self._locked: list[tuple[int, int]] = []
        self._edges: list[int] = []
        """Where registered pieces begin and end, ascending, each once. A new list each time: other threads read it."""
        self._was_refused = False
        self._timing = False
        self._clock: tuple[torch.cuda.Event, float] | None = None

    @property
    def timing(self) -> bool:
        """Whether copies and stamps are to be timed."""
        return self._timing

    @timing.setter
    def timing(self, timing: bool) -> None:
        """Also begins a new clock: events give float32 milliseconds, which hours after the first are coarse."""
        self._timing = timing
        self._clock = None

    def stamp(self) -> Callable[[], float]:
        """By a timing event on the stream that the calling thread computes on."""
        return self._stamp(torch.cuda.current_stream(self.torch_device))

    def _stamp(self, stream: torch.cuda.Stream) -> Callable[[], float]:
        if self._clock is None:
            torch.cuda.synchronize(self.torch_device)
            first = torch.cuda.Event(enable_timing=True)
            first.record(stream)
            first.synchronize()
            self._clock = (first, time.perf_counter())
        zero, zero_s = self._clock
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return lambda: zero_s + zero.elapsed_time(event) / 1e3

    def allocate(self, nbytes: int) -> torch.Tensor:
        """From torch's allocator, so that its figures count everything."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"{self.torch_device}: {nbytes} bytes of device memory are not to be had: lower device_memory or "
                "end the other processes on this device (nvidia-smi)"
            ) from error

    def trim(self) -> None:
        """Its cached segments count against the limit only when a new one is made, but they are device memory."""
        torch.cuda.empty_cache()

    def mark(self) -> Event:
        """An event on the stream that the calling thread computes on."""
        return _record(torch.cuda.current_stream(self.torch_device))

    def compute_waits(self, event: Event) -> None:
        """The device waits; the calling thread does not."""
        _order(torch.cuda.current_stream(self.torch_device), event)

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """On the host-to-device stream."""
        return self._copy(self._h2d, target, source, after)

    def copy_out(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event] = ()) -> Event:
        """On the device-to-host stream."""
        return self._copy(self._d2h, target, source, after)

    def _copy(
        self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event]
    ) -> Event:
        for event in after:
            _order(stream, event)
        start = self._stamp(stream) if self.timing else None
        host = target if target.device.type == "cpu" else source
        nbytes = host.numel() * host.element_size()
        with torch.cuda.device(self.torch_device), torch.cuda.stream(stream):
            cuts = cuts_at_pieces(host.data_ptr(), nbytes, self._edges)
            if cuts:
                to, of = target.view(torch.uint8), source.view(torch.uint8)
                for first, last in itertools.pairwise([0, *cuts, nbytes]):
                    to[first:last].copy_(of[first:last], non_blocking=True)
            else:
                target.copy_(source, non_blocking=True)
        end = self._stamp(stream) if self.timing else None
        done = _record(stream)  # after the stamps: once it has happened they can be read
        if start is not None and end is not None:
            done.stamps = (start, end)
        return done

    def page_lock(self, address: int, nbytes: int, pin: Pin) -> bool:
        """Register exactly these pages, in bounded pieces, and no power of two around them.

        A refusal is remembered: "auto" then goes without, and neither asks nor warns again.
        """
        if pin == "auto" and self._was_refused:
            return False
        cudart = torch.cuda.cudart()
        if pin != "never":
            make_present(address, nbytes)
        try:
            with torch.cuda.device(self.torch_device):
                locked, code = register_pages(
                    cudart.cudaHostRegister, cudart.cudaHostUnregister, address, nbytes, pin
                )
        except BudgetError:
            self._forget_refusal()
            raise
        self._locked += locked
        self._edges = with_edges(self._edges, locked)
        if code:
            self._was_refused = True
            self._forget_refusal()
        return bool(locked) and not code

    def enter_thread(self) -> None:
        """A new thread's current device is the first, and would get a context by the thread's waiting for events."""
        torch.cuda.set_device(self.torch_device)

    def _forget_refusal(self) -> None:
        """The next launch would report it as its own failure: let one do so that nobody needs."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device)

    def close(self) -> None:
        """Also gives the allocator its whole device back, unless another has limited it since."""
        torch.cuda.synchronize(self.torch_device)
        cudart = torch.cuda.cudart()
        with torch.cuda.device(self.torch_device):
            for start, _ in self._locked:
                cudart.cudaHostUnregister(start)
        self._locked.clear()
        self._edges = []
        if _limits.get(self.torch_device.index) is self._limit:
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device.index)


def register_pages(
    register: Callable[[int, int, int], object],
    unregister: Callable[[int], object],
    address: int,
    nbytes: int,
    pin: Pin,
) -> tuple[list[tuple[int, int]], int]:
    """Page-lock host memory in pieces with `register(address, nbytes, flags)`: ((start, end) of the pieces, CUDA error
    or 0).

    Raises BudgetError where `pin` is "always" and the driver refuses, with no piece left registered: the memory may be
    unmapped then. "auto" says so and goes without the rest.
    """
    locked: list[tuple[int, int]] = []
    if pin == "never":
        return locked, 0
    for start in range(address, address + nbytes, PAGE_LOCK_PIECE_NBYTES):
        piece_nbytes = min(PAGE_LOCK_PIECE_NBYTES, address + nbytes - start)
        code = int(register(start, piece_nbytes, 0))  # type: ignore[call-overload]  # an enum of the driver
        if code != 0:
            what = f"page-locking {nbytes} bytes of host memory failed (CUDA error {code})"
            if pin == "always":
                for earlier, _ in locked:
                    unregister(earlier)
                raise BudgetError(f"{what}: raise the limit of locked memory, or use pin='auto'")
            logger.warning(
                "%s: copies go through pageable memory, which is several times slower and holds up "
                "the thread that launches",
                what,
            )
            return locked, code
        locked.append((start, start + piece_nbytes))
    return locked, 0


def with_edges(edges: Sequence[int], pieces: Sequence[tuple[int, int]]) -> list[int]:
    """The ascending `edges` and those of `pieces`, each once."""
    found = list(edges)
    for edge in itertools.chain.from_iterable(pieces):
        position = bisect.bisect_left(found, edge)
        if position == len(found) or found[position] != edge:
            found.insert(position, edge)
    return found


def cuts_at_pieces(address: int, nbytes: int, edges: Sequence[int]) -> list[int]:
    """Where to cut a copy of `nbytes` host bytes from `address` on, in bytes from there: at every one of the `edges` of
    registered pieces (ascending) inside it. CUDA refuses one copy of memory that is registered in part."""
    first = bisect.bisect_right(edges, address)
    last = bisect.bisect_left(edges, address + nbytes, first)
    return [edge - address for edge in edges[first:last]]


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event
        self.stamps: tuple[Callable[[], float], Callable[[], float]] | None = None

    def issued(self) -> Event:
        return self

    def times(self) -> Times:
        if self.stamps is None:
            return 0.0, 0.0
        return self.stamps[0](), self.stamps[1]()

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


def _record(stream: torch.cuda.Stream) -> _CudaEvent:
    event = torch.cuda.Event(blocking=True)  # a waiting thread sleeps, it does not spin
    event.record(stream)
    return _CudaEvent(event)


def _order(stream: torch.cuda.Stream, event: Event) -> None:
    event = event.issued()
    if isinstance(event, _CudaEvent):
        stream.wait_event(event.event)
    else:
        event.wait()
