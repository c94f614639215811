"""An emulated device that finds races without luck: is every access ordered after what it conflicts with?

On a GPU compute, copies to the device and copies from it run by themselves, ordered by events alone. Here everything
happens at once, in the order in which it is given, so numbers are always right; what is checked is whether events would
have kept the order on a GPU. Each stream has a vector clock: how far into every stream what it does now is known to
come after. A copy conflicts with compute, or with a copy of the other direction, that touches the same bytes, unless
both only read. Compute is what torch dispatches in the thread that trains, below `watching()`; where it touches host
memory, that thread waits for it.

Reads and writes of the store, updates and saves beside training are each a stream of their own, which touch host memory
and storage (storage_order.py).
"""

import contextlib
import itertools
import threading
import weakref
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from offload.tiers.device import PAST

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
        known = self.device.now_known()
        return all(known.get(key, 0) >= n for key, n in self.clock.items())

    def wait(self):
        self.device.has_seen(self.clock)

    def times(self):
        return 0.0, 0.0


@dataclass(eq=False)
class Work:
    """A copy, or what storage, an update or a save does with some bytes of host memory or of the store."""

    stream: str
    number: int
    clock: dict
    reads: tuple
    writes: tuple

    def __str__(self):
        return f"{self.stream} {self.number}"


class OrderedDevice:
    """See the module. `conflicts` lists what was found, in words."""

    shares_host = False
    own_nbytes = 0
    updates_faster = False
    timing = False
    made = None
    """The last one made."""
    watched = ()
    """Those made since `watching` began, and the one of then."""

    def __init__(self, _bus_bytes_per_s=None):
        self.torch_device = torch.device("cpu")
        self.launcher = threading.get_ident()
        self.closed = False
        self.conflicts = []
        self._known = {}
        """By thread: what it has waited for, as a clock."""
        self._clock = {stream: {} for stream in ("compute", "h2d", "d2h")}
        self._lock = threading.Lock()
        self._touched = {}
        """By range: the last compute that read it, and that wrote it."""
        self._open = []
        """Copies and work of storage that compute has not been ordered after."""
        self._others = []
        """Those that others may not have been ordered after."""
        self._host = []
        """Ranges of host memory."""
        self._numbers = itertools.count()
        self._unfinished = {}
        """By thread, and by piece of work that a thread has been given: what it had waited for at least."""
        OrderedDevice.made = self
        OrderedDevice.watched = [*OrderedDevice.watched, self]

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
        self.closed = True

    # ---- what threads have waited for ------------------------------------------------------------------------

    def now_known(self):
        return self._known.get(threading.get_ident(), {})

    def has_seen(self, clock):
        """The calling thread has waited for this."""
        self._known[threading.get_ident()] = known = join(self.now_known(), clock)
        if threading.get_ident() in self._unfinished:
            self._unfinished[threading.get_ident()] = known

    def forgets(self):
        """The calling thread ends, and another may have its number."""
        if threading.get_ident() != self.launcher:
            del self._known[threading.get_ident()]

    def begins(self, key, clock):
        """Work has been given to another thread that comes after no more than `clock`, and if `key` is that thread,
        after what it waits for."""
        with self._lock:
            self._unfinished[key] = clock

    def ended(self, key):
        with self._lock:
            del self._unfinished[key]

    def has_host_memory(self, memory, address, nbytes):
        """`memory`, which has just been taken, is of the host for as long as it lives. Compute there was of before."""
        place = address, address + nbytes
        with self._lock:
            self._host.append(place)
            self._touched = {
                touched: at for touched, at in self._touched.items() if not overlap(touched, place)
            }
        weakref.finalize(memory, self._host.remove, place)

    # ---- what is checked -------------------------------------------------------------------------------------

    def _copy(self, stream, target, source, after):
        clocks = [event.clock for event in (e.issued() for e in after) if event is not PAST]
        with self._lock:
            clock = join(self._clock[stream], self.now_known(), *clocks)
            clock[stream] = number = clock.get(stream, 0) + 1
            self._clock[stream] = clock
            copy = Work(stream, number, clock, extent(source), extent(target))
            self._check(copy)
            self._others = [
                c
                for c in self._others
                if c.stream != stream or (c.reads, c.writes) != (copy.reads, copy.writes)
            ] + [copy]
            self._open.append(copy)
        with _disable_current_modes():
            target.copy_(source)
        return OrderedEvent(self, dict(clock))

    def _check(self, work):
        """Whether `work` comes after all that has been given before it and touches the same bytes."""
        clock = work.clock
        for touched, (read, written) in self._touched.items():
            last = max(
                written if overlap(touched, work.reads) else 0,
                max(read, written) if overlap(touched, work.writes) else 0,
            )
            if last > clock.get("compute", 0):
                self.conflicts.append(f"{work} and compute {last} that it does not wait for")
        for other in self._others:
            is_ordered = other.stream == work.stream or clock.get(other.stream, 0) >= other.number
            if not is_ordered and clash(work, other):
                self.conflicts.append(f"{work} and {other}, unordered")

    def moves(self, name, accesses):
        """Storage or an update is told to touch host memory: for each part (clock of what it comes after besides what
        the calling thread has waited for, range read, range written). The clock of its end."""
        with self._lock:
            stream = f"{name} {next(self._numbers)}"
            end = {stream: 1}
            works = [Work(stream, 1, join(self.now_known(), after), *ranges) for after, *ranges in accesses]
            for work in works:
                self._check(work)
                end = join(end, work.clock)
            known = [self._known.get(self.launcher, {}), *self._unfinished.values()]
            self._others = [
                o for o in self._others if any(clock.get(o.stream, 0) < o.number for clock in known)
            ] + works
            self._open += works
        return end

    def computed(self, reads, writes, name):
        """The thread that launches has given compute that touches these ranges."""
        with self._lock:
            clock = self._clock["compute"] = join(self._clock["compute"], self.now_known())
            clock["compute"] = number = clock.get("compute", 0) + 1
            for ranges, is_write in ((reads, False), (writes, True)):
                for touched in ranges:
                    for work in self._open:
                        conflict = overlap(touched, work.writes) or (
                            is_write and overlap(touched, work.reads)
                        )
                        if conflict and clock.get(work.stream, 0) < work.number:
                            self.conflicts.append(f"compute {number} ({name}) and {work}, unordered")
                    read, written = self._touched.get(touched, (0, 0))
                    self._touched[touched] = (read, number) if is_write else (number, written)
            in_host = any(overlap(touched, host) for host in self._host for touched in {*reads, *writes})
        if in_host:
            self.has_seen(dict(clock))


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
        if device is None or device.closed or name.startswith(ALLOCATIONS):
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
    """Check what is given to the ordered device made last, and to those made inside; the list that is given holds the
    conflicts afterwards.

    Only for training: when a model is taken over, torch fills host memory in the same thread.
    """
    conflicts = []
    made = OrderedDevice.made
    OrderedDevice.watched = [] if made is None or made.closed else [made]
    with Watch():
        yield conflicts
    for device in OrderedDevice.watched:
        conflicts += device.conflicts
