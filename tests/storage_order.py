"""What storage, updates and saves touch, told to the ordered device (device_order.py), and who has waited for which.

A range is in host memory or in the store, whose bytes are given addresses that memory does not have. An update touches
its block's parameters, gradients and chunk records, wherever each of them is; a save what it copies.
"""

import itertools
import threading
import types

from offload import _C
from offload.checkpoint import beside
from offload.checkpoint.copying import StreamingCopy
from offload.runtime import adafactor, scheduler
from offload.threads import JoinableThread
from offload.tiers.host import HostArena
from offload.transfer import copies
from offload.transfer.copies import Copies
from tests.device_order import OrderedDevice, extent, join

NOTHING = (0, 0)
ENGINES = itertools.count(1)


def follow_storage(patch):
    """Tell the ordered device made last what is done besides copies and compute."""
    followed = Followed()
    followed.engines(patch)
    followed.tickets(patch)
    followed.updates(patch)
    followed.threads(patch)
    follow_saves(patch)
    follow_memory(patch)


def follow_memory(patch):
    """What is of the host."""
    init = HostArena.__init__

    def made(self, nbytes):
        init(self, nbytes)
        if OrderedDevice.made is not None:
            OrderedDevice.made.has_host_memory(self._arena, self.address, self.nbytes)

    patch.setattr(HostArena, "__init__", made)


class Told(threading.Event):
    """Who has waited for it has waited for what the thread that set it had waited for."""

    clock = None

    def set(self):
        if self.clock is None:
            self.clock = dict(OrderedDevice.made.now_known())
        super().set()

    def is_set(self):
        found = super().is_set()
        if found:
            OrderedDevice.made.has_seen(self.clock)
        return found

    def wait(self, timeout=None):
        super().wait(timeout)
        return self.is_set()


class InTurn:
    """A lock. Who takes it comes after what those who had it before had waited for."""

    def __init__(self):
        self.lock, self.clock = threading.Lock(), {}

    def __enter__(self):
        self.lock.acquire()
        OrderedDevice.made.has_seen(self.clock)

    def __exit__(self, *raised):
        self.clock = dict(OrderedDevice.made.now_known())
        self.lock.release()


def follow_saves(patch):
    """A thread copies what lies in memory, and training waits for it block by block."""
    add = StreamingCopy.add

    def added(self, item):
        if item.piece.memory is not None:
            device = OrderedDevice.made
            device.has_seen(device.moves("save", [({}, extent(item.piece.memory), NOTHING)]))
        add(self, item)

    patch.setattr(StreamingCopy, "add", added)
    patch.setattr(beside, "threading", types.SimpleNamespace(Event=Told))


def chunk_runs(told, chunk_elements):
    """Elements, from the first to before the second, of the chunks that an update moves; neighbours are one run."""
    everything, only = told.get("state_out_offset", -1) >= 0, told["only"]
    runs = []
    for start in range(0, told["n_elements"], chunk_elements):
        stop = min(start + chunk_elements, told["n_elements"])
        is_touched = any(first < stop and start < first + n for first, n, _ in told["segments"])
        if (is_touched or everything) and (not only or any(a <= start < b for a, b in only)):
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
    return runs


def update_accesses(told, buffer, place, gate, write_gate):
    """(clock of what it comes after, range read, range written) of each part of an update. `place(offset, nbytes)` is a
    range of the store."""
    itemsize, grad_nbytes = buffer.dtype.itemsize, 4 if told["grad_dtype"] == "float32" else 2
    at, param_offset, n = told["param_address"], told["param_offset"], told["n_elements"]

    def param(start, stop, offset=None):
        if offset is None:
            return at + start * itemsize, at + stop * itemsize
        return place(offset + start * itemsize, (stop - start) * itemsize)

    accesses = []
    if told["read_param"]:
        accesses.append(({}, param(0, n, param_offset), param(0, n)))
    for start, numel, _ in told["segments"]:
        accesses.append((gate, NOTHING, param(start, start + numel)))
        nbytes, element = numel * grad_nbytes, start * grad_nbytes
        grad = told["grad_address"] + element, told["grad_address"] + element + nbytes
        accesses.append(
            (
                gate,
                place(told["grad_offset"] + element, nbytes) if told["grad_offset"] >= 0 else grad,
                NOTHING,
            )
        )
    size, in_host = buffer.chunk_elements, told["host_chunks"]
    param_out, state_out = told.get("param_out_offset", -1), told.get("state_out_offset", -1)
    behind = join(gate, write_gate)
    for start, stop in chunk_runs(told, size):
        first, last = start // size, -(-stop // size)
        target = param_out if param_out >= 0 else param_offset
        if target >= 0:
            accesses.append((behind, param(start, stop), param(start, stop, target)))
        for a, b, is_held in ((first, min(last, in_host), True), (max(first, in_host), last, False)):
            begin, end = buffer.record_begin(a), buffer.first_records_nbytes(b)
            if begin >= end:
                continue
            if is_held:
                held = told["state_host_address"] + begin, told["state_host_address"] + end
                accesses.append((gate, held, held))
            else:
                stored = told["state_offset"] + begin - buffer.record_begin(in_host)
                accesses.append(({}, place(stored, end - begin), NOTHING))
                if state_out < 0:
                    accesses.append((behind, NOTHING, place(stored, end - begin)))
            if state_out >= 0:
                accesses.append((behind, NOTHING, place(state_out + begin, end - begin)))
    return accesses


class FollowedCallback:
    """The update of a piece in Python, in whatever thread: it comes after the gradients, and reads them from the store
    where a rule looks at all of them; the job ends after that."""

    def __init__(self, call):
        self.call = call

    def begins_after(self, clock, end):
        """`end`: that of the job, which grows."""
        self.clock, self.end = clock, end

    def __call__(self, *args):
        OrderedDevice.made.has_seen(self.clock)
        self.call(*args)
        self.end.update(join(self.end, OrderedDevice.made.now_known()))


class Followed:
    """By ticket: what has happened when it has completed, as a clock."""

    def __init__(self):
        self.clocks = {}
        self.jobs = {}
        self.bases = {}

    def place(self, engine):
        """Ranges of what an engine reads and writes."""
        base = self.bases.setdefault(engine, next(ENGINES) << 50)
        return lambda offset, nbytes: ((1 << 62) + base + offset, (1 << 62) + base + offset + nbytes)

    def of(self, ticket):
        return {} if ticket is None else self.clocks.get(ticket, {})

    def seen(self, ticket):
        if ticket in self.clocks:
            OrderedDevice.made.has_seen(self.clocks[ticket])

    def engines(self, patch):
        engine = _C.Engine
        read, write = engine.read, engine.write

        def reads(this, address, nbytes, offset, *args, after=None, **kwargs):
            ranges = self.place(this)(offset, nbytes), (address, address + nbytes)
            end = OrderedDevice.made.moves("read", [(self.of(after), *ranges)])
            ticket = read(this, address, nbytes, offset, *args, after=after, **kwargs)
            self.clocks[ticket] = end
            return ticket

        def writes(this, address, nbytes, offset, *, after=None):
            ranges = (address, address + nbytes), self.place(this)(offset, nbytes)
            end = OrderedDevice.made.moves("write", [(self.of(after), *ranges)])
            ticket = write(this, address, nbytes, offset, after=after)
            self.clocks[ticket] = end
            return ticket

        patch.setattr(engine, "read", reads)
        patch.setattr(engine, "write", writes)

    def tickets(self, patch):
        wait, done, complete, gate_of = _C.Ticket.wait, _C.Ticket.done, _C.Ticket.complete, Copies.gate

        def waited(this, *args, **kwargs):
            wait(this, *args, **kwargs)
            self.seen(this)

        def is_done(this):
            ended = done(this)
            if ended:
                self.seen(this)
            return ended

        def completed(this, *args):
            self.clocks.setdefault(this, dict(OrderedDevice.made.now_known()))
            complete(this, *args)

        def gate(this, event):
            ticket = gate_of(this, event)
            self.clocks[ticket] = getattr(event.issued(), "clock", {})
            return ticket

        patch.setattr(_C.Ticket, "wait", waited)
        patch.setattr(_C.Ticket, "done", is_done)
        patch.setattr(_C.Ticket, "complete", completed)
        patch.setattr(Copies, "gate", gate)

    def updates(self, patch):
        made_of, init, ticket_of = scheduler.make_job, _C.UpdateJob.__init__, _C.UpdatePipeline.submit
        told_last = {}

        def job(this, **settings):
            if settings["callback"] is not None:
                settings["callback"] = FollowedCallback(settings["callback"])
            told_last.clear()
            told_last.update(settings)
            init(this, **settings)

        def make_job(block, part, *, store, **how):
            made = made_of(block, part, store=store, **how)
            place = None if store is None else self.place(store.engine)
            self.jobs[made] = dict(told_last), block.layout.buffers[part.position], place
            return made

        def submit(this, job):
            told, buffer, place = self.jobs.pop(job)
            gates = self.of(told["grad_gate"]), self.of(told["write_gate"])
            end = OrderedDevice.made.moves("update", update_accesses(told, buffer, place, *gates))
            end = join(end, gates[1])
            if told["callback"] is not None:
                told["callback"].begins_after(join(gates[0], OrderedDevice.made.now_known()), end)
            ticket = ticket_of(this, job)
            self.clocks[ticket] = end
            return ticket

        patch.setattr(adafactor, "threading", types.SimpleNamespace(Lock=InTurn))
        patch.setattr(_C.UpdateJob, "__init__", job)
        patch.setattr(scheduler, "make_job", make_job)
        patch.setattr(_C.UpdatePipeline, "submit", submit)

    def threads(self, patch):
        give, start, run, joined = (
            copies._Keeper.give,
            JoinableThread.start,
            JoinableThread.run,
            JoinableThread.join,
        )
        begins, ends = {}, {}

        def given(keeper, work):
            device, known, key = OrderedDevice.made, dict(OrderedDevice.made.now_known()), object()
            device.begins(key, known)

            def works():
                device.has_seen(known)
                try:
                    work()
                finally:
                    device.ended(key)

            give(keeper, works)

        def starts(thread):
            begins[thread] = dict(OrderedDevice.made.now_known())
            start(thread)

        def runs(thread):
            if thread._claim.locked():
                return  # another has begun it
            device, goes_on = OrderedDevice.made, thread.name in ("offload-save", "offload-commit")
            device.has_seen(begins.get(thread, {}))
            if goes_on:
                device.begins(threading.get_ident(), device.now_known())
            run(thread)
            if goes_on:
                device.ended(threading.get_ident())
            ends[thread] = dict(device.now_known())
            device.forgets()

        def joins(thread, timeout=None):
            joined(thread, timeout)
            OrderedDevice.made.has_seen(ends.get(thread, {}))

        patch.setattr(copies._Keeper, "give", given)
        patch.setattr(JoinableThread, "start", starts)
        patch.setattr(JoinableThread, "run", runs)
        patch.setattr(JoinableThread, "join", joins)
