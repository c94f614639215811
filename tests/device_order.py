"""An emulated device that finds races without luck: is every access ordered after what it conflicts with?

On a GPU compute, copies to the device and copies from it run by themselves, ordered by events alone. Here everything
happens at once, in the order in which it is given, so numbers are always right; what is checked is whether events would
have kept the order on a GPU. Each stream has a vector clock: how far into every stream what it does now is known to
come after. A copy conflicts with compute, or with a copy of the other direction, that touches the same bytes, unless
both only read. Compute is what torch dispatches in the thread that trains, below `watching()`.

What is not seen: reads and writes of host memory by storage and by the update, but for what follows from having waited
for a write of activations. Those are provoked with a slow bus.
"""

import contextlib
import threading
import types
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from offload.stores.activations import ActivationStore
from offload.tiers.device import PAST
from offload.transfer.copies import Copies

ALLOCATIONS = ("empty", "new_empty", "resize_")


def join(*clocks):
    return {key: max(clock.get(key, 0) for clock in clocks) for key in {k for c in clocks for k in c}}


def extent(tensor):
    """(first byte, byte after the last) that a tensor covers."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlap(one, other):
    return one[0] < other[1] and other[0] < one[1]


@dataclass(eq=False)
class OrderedEvent:
    """A point on a stream; done as late as the launching thread cannot deny it."""

    device: "OrderedDevice"
    clock: dict

    def issued(self):
        return self

    def done(self):
        return all(self.device.known.get(key, 0) >= n for key, n in self.clock.items())

    def wait(self):
        if threading.get_ident() == self.device.launcher:
            self.device.known = join(self.device.known, self.clock)

    def times(self):
        return 0.0, 0.0


@dataclass(eq=False)
class Copy:
    stream: str
    number: int
    clock: dict
    reads: tuple
    writes: tuple


class OrderedDevice:
    """See the module. `conflicts` lists what was found, in words."""

    shares_host = False
    own_nbytes = 0
    updates_faster = False
    timing = False
    made = None
    """The last one made."""

    def __init__(self, _bus_bytes_per_s=None):
        self.torch_device = torch.device("cpu")
        self.launcher = threading.get_ident()
        self.conflicts = []
        self.known = {}
        self._clock = {stream: {} for stream in ("compute", "h2d", "d2h")}
        self._lock = threading.Lock()
        self._touched = {}
        """By range: the last compute that read it, and that wrote it."""
        self._open = []
        """Copies that compute has not been ordered after."""
        self._copies = []
        OrderedDevice.made = self

    # ---- what the runtime calls ------------------------------------------------------------------------------

    def stamp(self):
        return lambda: 0.0

    def allocate(self, nbytes):
        memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self.computed((), (extent(memory),), "allocate")  # which may fill it
        return memory

    def trim(self):
        pass

    def mark(self):
        with self._lock:
            return OrderedEvent(self, dict(self._clock["compute"]))

    def compute_waits(self, event):
        event = event.issued()
        if event is PAST:
            return
        with self._lock:
            clock = self._clock["compute"] = join(self._clock["compute"], event.clock)
            self._open = [copy for copy in self._open if clock.get(copy.stream, 0) < copy.number]

    def copy_in(self, target, source, after=()):
        return self._copy("h2d", target, source, after)

    def copy_out(self, target, source, after=()):
        return self._copy("d2h", target, source, after)

    def page_lock(self, address, nbytes, pin):
        return False

    def enter_thread(self):
        pass

    def close(self):
        pass

    # ---- what is checked -------------------------------------------------------------------------------------

    def _copy(self, stream, target, source, after):
        clocks = [event.clock for event in (e.issued() for e in after) if event is not PAST]
        if threading.get_ident() == self.launcher:
            clocks.append(self.known)
        with self._lock:
            clock = join(self._clock[stream], *clocks)
            clock[stream] = number = clock.get(stream, 0) + 1
            self._clock[stream] = clock
            copy = Copy(stream, number, clock, extent(source), extent(target))
            for touched, (read, written) in self._touched.items():
                last = max(
                    written if overlap(touched, copy.reads) else 0,
                    max(read, written) if overlap(touched, copy.writes) else 0,
                )
                if last > clock.get("compute", 0):
                    self.conflicts.append(
                        f"{stream} copy {number} and compute {last} that it does not wait for"
                    )
            for other in self._copies:
                if (
                    other.stream != stream
                    and clock.get(other.stream, 0) < other.number
                    and clash(copy, other)
                ):
                    self.conflicts.append(
                        f"{stream} copy {number} and {other.stream} copy {other.number}, unordered"
                    )
            self._copies = [
                c
                for c in self._copies
                if c.stream != stream or (c.reads, c.writes) != (copy.reads, copy.writes)
            ] + [copy]
            self._open.append(copy)
        with _disable_current_modes():
            target.copy_(source)
        return OrderedEvent(self, dict(clock))

    def computed(self, reads, writes, name):
        """The thread that launches has given compute that touches these ranges."""
        with self._lock:
            clock = self._clock["compute"] = join(self._clock["compute"], self.known)
            clock["compute"] = number = clock.get("compute", 0) + 1
            for ranges, is_write in ((reads, False), (writes, True)):
                for touched in ranges:
                    for copy in self._open:
                        conflict = overlap(touched, copy.writes) or (
                            is_write and overlap(touched, copy.reads)
                        )
                        if conflict and clock.get(copy.stream, 0) < copy.number:
                            self.conflicts.append(
                                f"compute {number} ({name}) and {copy.stream} copy {copy.number}, unordered"
                            )
                    read, written = self._touched.get(touched, (0, 0))
                    self._touched[touched] = (read, number) if is_write else (number, written)


def clash(one, other):
    return (
        overlap(one.writes, other.writes)
        or overlap(one.writes, other.reads)
        or overlap(one.reads, other.writes)
    )


class Watch(TorchDispatchMode):
    """Tells the device made last what torch computes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        device = OrderedDevice.made
        name = func._overloadpacket.__name__
        if device is None or name.startswith(ALLOCATIONS):
            return result
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel()]
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.numel()]
        changed = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else (kwargs or {}).get(argument.name)
                changed += [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.numel()]
        storages = {t.untyped_storage().data_ptr() for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in storages]
        if not changed and not fresh:
            return result  # a view
        reads = {extent(t) for t in inputs if not any(t is c for c in changed)}
        device.computed(reads, {extent(t) for t in [*changed, *fresh]}, name)
        return result


@contextlib.contextmanager
def watching():
    """Check what is given to the ordered device made last; the list that is given holds the conflicts afterwards.

    Only for training: when a model is taken over, torch fills host memory in the same thread.
    """
    conflicts = []
    with Watch():
        yield conflicts
    conflicts += OrderedDevice.made.conflicts


class FollowedTicket:
    """A write behind a gate: who has seen it completed knows that the copy before the gate has ended."""

    def __init__(self, ticket, device, clock):
        self._ticket, self._device, self._clock = ticket, device, clock
        self.times = ticket.times

    def _seen(self):
        if threading.get_ident() == self._device.launcher:
            self._device.known = join(self._device.known, self._clock)

    def wait(self):
        self._ticket.wait()
        self._seen()

    def done(self):
        if self._ticket.done():
            self._seen()
            return True
        return False


class _FollowedEngine:
    def __init__(self, engine, device, clocks):
        self.read, self._engine, self._device, self._clocks = engine.read, engine, device, clocks

    def write(self, address, nbytes, offset, after=None):
        ticket = self._engine.write(address, nbytes, offset, after=after)
        return FollowedTicket(ticket, self._device, self._clocks.get(after, {}))


def follow_writes_of_activations(patch):
    """Let waiting for what an activation store has written count as waiting for the copies it was written after."""
    clocks, gate_of, storage_of, when = {}, Copies.gate, ActivationStore._storage, Copies.h2d_when

    def gate(self, event):
        made = gate_of(self, event)
        clocks[made] = getattr(event.issued(), "clock", {})
        return made

    def storage(self):
        store, staging = storage_of(self)
        engine = _FollowedEngine(store.engine, self._device, clocks)
        return types.SimpleNamespace(engine=engine, grow=store.grow, allocate=store.allocate), staging

    def h2d_when(self, tickets, name, target, source, after=(), **more):
        """What the thread that trains has waited for before it asks for a copy has happened when another starts it."""
        seen = OrderedEvent(self._device, dict(self._device.known))
        return when(self, tickets, name, target, source, [*after, seen], **more)

    patch.setattr(Copies, "gate", gate)
    patch.setattr(Copies, "h2d_when", h2d_when)
    patch.setattr(ActivationStore, "_storage", storage)
