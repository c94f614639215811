"""Page-locking is exact and in bounded pieces; copies and gates keep their order and pass failures on."""

import contextlib
import itertools
import logging
import os
import threading
import time
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offload
from offload._C import Ticket
from offload.telemetry import SpanLog
from offload.tiers.device import (
    PAGE_LOCK_PIECE_NBYTES,
    PAST,
    CudaDevice,
    allocator_hint,
    cuts_at_pieces,
    register_pages,
    with_edges,
)
from offload.tiers.emulated_device import EmulatedDevice
from offload.transfer.copies import Copies


class Driver:
    def __init__(self, refuse_at=None):
        self.calls, self.refuse_at, self.registered = [], refuse_at, set()

    def register(self, address, nbytes, flags):
        self.calls.append((address, nbytes, flags))
        if len(self.calls) == self.refuse_at:
            return 2
        self.registered.add(address)
        return 0

    def unregister(self, address):
        self.registered.remove(address)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_allocator_that_wastes_device_memory_is_named_until_another_is_set(name):
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in allocator_hint({})
    assert allocator_hint({name: "max_split_size_mb:64"}) is not None
    assert allocator_hint({name: "expandable_segments:True"}) is None


@pytest.fixture
def cuda(monkeypatch):
    """Makes a CudaDevice on a driver, without a GPU. `launches` lists the devices of tensors of zeros, `current` the
    devices that have been made the current one and are, the last one first."""
    launches, current = [], [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(torch_device):
        current.insert(0, torch_device)
        try:
            yield
        finally:
            current.pop(0)

    def make(driver, index=0, memory_nbytes=500):
        cudart = types.SimpleNamespace(cudaHostRegister=driver.register, cudaHostUnregister=driver.unregister)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        return CudaDevice(torch.device("cuda", index), memory_nbytes)

    def zeros(n, device):
        launches.append(device)
        raise RuntimeError("CUDA error: out of memory")

    make.launches, make.current = launches, current
    properties = types.SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", device)
    return make


@pytest.mark.parametrize("nbytes", [4096, PAGE_LOCK_PIECE_NBYTES, 3 * PAGE_LOCK_PIECE_NBYTES + 8192])
def test_exactly_the_bytes_asked_for_are_locked_in_bounded_pieces(nbytes):
    driver = Driver()
    locked, code = register_pages(driver.register, driver.unregister, 4096, nbytes, "always")
    assert code == 0
    assert locked == [(start, start + n) for start, n, _ in driver.calls]
    assert sum(n for _, n, _ in driver.calls) == nbytes
    assert all(n <= PAGE_LOCK_PIECE_NBYTES for _, n, _ in driver.calls)
    ends = [start + n for start, n, _ in driver.calls]
    assert [start for start, _, _ in driver.calls] == [4096, *ends[:-1]]


def test_pin_auto_asks_no_more_after_a_refusal_and_warns_once_in_all(cuda, caplog):
    driver = Driver(refuse_at=2)
    device = cuda(driver)
    with caplog.at_level(logging.WARNING, logger="offload"):
        locked = [device.page_lock(n * 8192, 4096, "auto") for n in range(5)]
    assert locked == [True, False, False, False, False]
    assert len(driver.calls) == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert len(cuda.launches) == 1
    assert device.page_lock(1 << 20, 4096, "always")  # who insists may ask again
    device.close()


def test_pin_auto_goes_without_the_rest_of_what_is_refused_and_says_so(caplog):
    driver = Driver(refuse_at=2)
    with caplog.at_level(logging.WARNING, logger="offload"):
        locked, code = register_pages(
            driver.register, driver.unregister, 0, 4 * PAGE_LOCK_PIECE_NBYTES, "auto"
        )
    assert (locked, code) == ([(0, PAGE_LOCK_PIECE_NBYTES)], 2)
    assert len(driver.calls) == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_pin_always_refuses_and_pin_never_asks_for_nothing():
    driver = Driver(refuse_at=1)
    with pytest.raises(offload.BudgetError, match="pin='auto'"):
        register_pages(driver.register, driver.unregister, 0, 4096, "always")
    driver = Driver()
    assert register_pages(driver.register, driver.unregister, 0, 4096, "never") == ([], 0)
    assert driver.calls == []


def test_pages_are_present_before_the_driver_takes_them_one_by_one(cuda, monkeypatch):
    done, driver = [], Driver()
    monkeypatch.setattr(
        "offload.tiers.device.make_present", lambda *given: done.append((*given, len(driver.calls)))
    )
    device = cuda(driver)
    for number, pin in enumerate(("always", "auto", "never")):
        device.page_lock(8192 * number, 4096, pin)
    assert done == [(0, 4096, 0), (8192, 4096, 1)]


def test_what_pin_always_registered_before_a_refusal_is_unregistered_at_once_and_the_refusal_forgotten(cuda):
    """The memory is unmapped when the refusal reaches the caller, and the next launch is not to fail for it."""
    driver = Driver(refuse_at=4)
    device = cuda(driver)
    assert device.page_lock(0, 4096, "always")
    with pytest.raises(offload.BudgetError, match="pin='auto'"):
        device.page_lock(PAGE_LOCK_PIECE_NBYTES, 4 * PAGE_LOCK_PIECE_NBYTES, "always")
    assert len(driver.calls) == 4
    assert driver.registered == {0}
    assert cuda.launches == [device.torch_device]
    device.close()
    assert driver.registered == set()


@pytest.mark.parametrize(
    ("address", "nbytes", "cuts"),
    [(0, 100, []), (0, 101, [100]), (100, 100, []), (50, 400, [50, 150, 250]), (350, 100, []), (120, 10, [])],
)
def test_no_copy_has_both_registered_and_other_memory_in_it(address, nbytes, cuts):
    pieces = [(0, 100), (100, 200), (200, 300)]
    assert cuts_at_pieces(address, nbytes, sorted({edge for piece in pieces for edge in piece})) == cuts
    edges = [address, *(address + cut for cut in cuts), address + nbytes]
    for first, last in itertools.pairwise(edges):
        homes = {next((p for p in pieces if p[0] <= byte < p[1]), None) for byte in range(first, last)}
        assert len(homes) == 1


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=20))
def test_edges_of_pieces_stay_ascending_and_single_in_whatever_order_they_come(pieces):
    edges = []
    for start, n in pieces:
        before = edges
        edges = with_edges(edges, [(start, start + n)])
        assert edges is not before
    assert edges == sorted({edge for start, n in pieces for edge in (start, start + n)})


class Compared(int):
    """An edge that counts how often it is looked at."""

    n = 0

    def __lt__(self, other):
        Compared.n += 1
        return int(self) < int(other)


def test_one_more_piece_is_put_in_its_place_without_a_look_at_every_other(cuda):
    device = cuda(Driver())
    device._edges = [Compared(n * 8192) for n in range(4096)]
    device.page_lock(1000 * 8192 + 4096, 4096, "auto")
    assert Compared.n <= 2 * 13
    assert device._edges == sorted([*range(0, 4096 * 8192, 8192), 1000 * 8192 + 4096])


def test_a_copy_across_pieces_is_made_in_parts_that_are_all_of_it(monkeypatch):
    host, device, parts = torch.zeros(1000), torch.arange(1000, dtype=torch.float32), []
    edge = host.data_ptr() + 400
    tier = CudaDevice.__new__(CudaDevice)  # without a GPU
    tier.torch_device = torch.device("cuda", 0)
    tier.timing, tier._edges = False, [host.data_ptr() - 4096, edge, edge + 1200]
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("offload.tiers.device._record", lambda stream: PAST)
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, *args, **more: (parts.append(self.numel()), copy(self, *args, **more))[1]
    )  # fmt: skip
    tier._copy(None, host, device, [])
    assert torch.equal(host, device)
    assert parts == [400, 1200, 2400]


def test_closing_a_device_leaves_the_limit_that_another_has_set_since(cuda, monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, _: limits.append(f))
    first = cuda(Driver(), memory_nbytes=500)
    second = cuda(Driver(), memory_nbytes=250)
    first.close()
    assert limits == [0.5, 0.25]
    second.close()
    assert limits == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("pin", ["auto", "always"])
def test_on_the_second_gpu_nothing_is_registered_copied_or_unregistered_while_the_first_is_current(
    cuda, monkeypatch, pin
):
    """It would get a context there, some hundred MB of it; and leaving a stream makes current what was before."""
    seen = []

    class Noting(Driver):
        def register(self, *given):
            seen.append(("register", cuda.current[0].index))
            return super().register(*given)

        def unregister(self, address):
            seen.append(("unregister", cuda.current[0].index))
            super().unregister(address)

    @contextlib.contextmanager
    def stream(_):
        seen.append(("enter", cuda.current[0].index))
        yield
        seen.append(("leave", cuda.current[0].index))

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr("offload.tiers.device._record", lambda stream: PAST)
    driver = Noting(refuse_at=3)
    device = cuda(driver, index=1)
    device.page_lock(0, 4096, pin)
    with contextlib.suppress(offload.BudgetError):
        device.page_lock(4096, 2 * PAGE_LOCK_PIECE_NBYTES, pin)
    device.copy_in(torch.ones(4), torch.ones(4))
    device.copy_out(torch.ones(4), torch.ones(4))
    device.close()
    assert {what for what, _ in seen} == {"register", "unregister", "enter", "leave"}
    assert {index for _, index in seen} == {1}
    assert driver.registered == set()
    assert [d.index for d in cuda.current] == [0]


def test_every_thread_of_copies_makes_the_device_its_current_one_before_it_does_anything(cuda, monkeypatch):
    current = {}
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: current.setdefault(threading.current_thread().name, d.index)
    )
    seen = []

    def note(self, target, source, after=()):
        name = threading.current_thread().name
        seen.append((name, current.get(name)))
        return types.SimpleNamespace(done=lambda: False, wait=lambda: note(self, target, source), times=None)

    monkeypatch.setattr(CudaDevice, "copy_in", note)
    device = cuda(Driver(), index=1)
    copies, ticket = Copies(device, SpanLog()), Ticket()
    both = torch.ones(4), torch.ones(4)
    copies.h2d_when([ticket], "x", *both)
    copies.h2d_when([ticket], "x", *both, returns=True)
    copies.h2d_in_parts([(0, 4, ticket)], "x", *both)
    copies.gate(note(device, *both))
    ticket.complete()
    copies.close()
    names = ("offload-gates", "offload-loads", "offload-parts", "offload-returns")
    assert {name: index for name, index in seen if name in names} == dict.fromkeys(names, 1)


class TimedEvent:
    """An event of a device whose clock is `now_s`. Differences are what CUDA gives: milliseconds in float32."""

    now_s = 0.0

    def __init__(self, **kinds):
        pass

    def record(self, stream):
        self.at_s = TimedEvent.now_s

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return torch.tensor((later.at_s - self.at_s) * 1e3, dtype=torch.float32).item()


def test_a_record_hours_after_the_first_has_its_times_as_precisely(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", TimedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(time, "perf_counter", lambda: TimedEvent.now_s)
    device = cuda(Driver())
    for begin_s in (0.0, 1e5):
        TimedEvent.now_s = begin_s
        device.timing = True
        first = device.stamp()
        TimedEvent.now_s = begin_s + 1e-4
        second = device.stamp()
        device.timing = False
        assert first() == pytest.approx(begin_s, abs=1e-9)
        assert second() - first() == pytest.approx(1e-4, rel=1e-3)


def test_whichever_test_is_the_first_on_a_gpu_cublas_gives_it_the_same_bits_every_time():
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")


@pytest.fixture
def bus():
    device = EmulatedDevice(bus_bytes_per_s=1e8)
    copies = Copies(device, SpanLog())
    yield device, copies
    copies.close()
    device.close()


def test_a_copy_out_is_done_only_when_its_bytes_are_there_and_the_gate_opens_then(bus):
    _, copies = bus
    source, target = torch.arange(1_000_000, dtype=torch.float32), torch.zeros(1_000_000)
    event = copies.d2h("x", target, source)
    gate = copies.gate(event)
    assert not gate.done()
    gate.wait()
    assert event.done()
    assert torch.equal(source, target)
    assert copies.d2h_bytes == 4_000_000


def test_a_copy_in_waits_for_its_tickets_without_the_caller_waiting(bus):
    device, copies = bus
    ticket, source, target = Ticket(), torch.zeros(10), torch.full((10,), -1.0)
    event = copies.h2d_when([ticket], "x", target, source)
    assert not event.done()
    source.fill_(7.0)  # storage has written it meanwhile
    ticket.complete()
    device.compute_waits(event)
    assert torch.equal(target, torch.full((10,), 7.0))


def test_parts_of_what_returns_are_copied_in_the_order_of_the_calls_whichever_was_read_first(bus):
    """Compute waits for the last part alone."""
    device, copies = bus
    late, read = Ticket(), Ticket()
    read.complete()
    targets = [torch.zeros(10), torch.zeros(10)]
    first = copies.h2d_when([late], "x", targets[0], torch.ones(10), returns=True)
    last = copies.h2d_when([read], "x", targets[1], torch.ones(10), returns=True)
    time.sleep(0.05)
    overtook = last.done()
    late.complete()
    device.compute_waits(last)
    assert not overtook
    assert first.done()
    assert all(torch.equal(target, torch.ones(10)) for target in targets)


def test_a_failed_ticket_fails_whoever_waits_for_the_copy(bus):
    device, copies = bus
    ticket = Ticket()
    event = copies.h2d_when([ticket], "x", torch.zeros(4), torch.zeros(4))
    ticket.complete("the drive is gone")
    with pytest.raises(OSError, match="the drive is gone"):
        device.compute_waits(event)


def test_what_comes_after_a_copy_that_failed_fails_too(bus):
    """The last part of a tensor that returns comes after the others: whoever waits for it hears of all."""
    device, copies = bus
    ticket, read = Ticket(), Ticket()
    read.complete()
    ticket.complete("the drive is gone")
    first = copies.h2d_when([ticket], "x", torch.zeros(4), torch.zeros(4), returns=True)
    last = copies.h2d_when([read], "x", torch.zeros(4), torch.zeros(4), [first], returns=True)
    for _ in range(2):
        with pytest.raises(OSError, match="the drive is gone"):
            device.compute_waits(last)
    assert first.done()
    assert last.done()


def test_parts_come_as_they_are_ready_and_what_is_in_none_before_them(bus):
    """Whatever other loads wait for."""
    device, copies = bus
    tickets = other, first, second = Ticket(), Ticket(), Ticket()
    try:
        held_up = copies.h2d_when([other], "x", torch.zeros(4), torch.zeros(4))
        target, source = torch.zeros(10), torch.ones(10)
        event = copies.h2d_in_parts([(2, 5, first), (5, 8, second)], "x", target, source)
        for expected, ticket in (
            ((1, 1, 0, 0, 0, 0, 0, 0, 1, 1), first),
            ((1, 1, 1, 1, 1, 0, 0, 0, 1, 1), second),
        ):
            end = time.monotonic() + 5
            while target.tolist() != list(expected) and time.monotonic() < end:
                time.sleep(0.001)
            assert target.tolist() == list(expected)
            assert not event.done()
            ticket.complete()
        device.compute_waits(event)
        assert torch.equal(target, source)
        assert not held_up.done()
    finally:
        for ticket in tickets:  # what waits for them ends when the test fails, too
            if not ticket.done():
                ticket.complete()


def test_a_failed_part_fails_whoever_waits_for_all(bus):
    device, copies = bus
    read, failed = Ticket(), Ticket()
    read.complete()
    failed.complete("the drive is gone")
    event = copies.h2d_in_parts([(0, 5, read), (5, 10, failed)], "x", torch.zeros(10), torch.ones(10))
    with pytest.raises(OSError, match="the drive is gone"):
        device.compute_waits(event)


def test_a_copy_that_failed_has_ended_when_what_it_came_after_has(bus):
    """Until then its memory may still be written to."""
    _, copies = bus
    read, failed = Ticket(), Ticket()
    read.complete()
    failed.complete("the drive is gone")
    slow = torch.zeros(5_000_000), torch.zeros(5_000_000)  # 200 ms
    before = copies.h2d_when([read], "x", *slow, returns=True)
    event = copies.h2d_when([failed], "x", torch.zeros(4), torch.zeros(4), [before], returns=True)
    with pytest.raises(OSError, match="the drive is gone"):
        event.wait()
    had_ended = event.done()
    assert before.done() or not had_ended
    before.wait()
    assert event.done()


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_failed_copy_fails_whoever_waits_at_its_gate(bus, has_ended):
    _, copies = bus

    class Broken:
        def done(self):
            return has_ended

        def wait(self):
            raise RuntimeError("illegal address")

    with pytest.raises(OSError, match="illegal address"):
        copies.gate(Broken()).wait()


def test_closing_ends_every_thread_and_opens_every_gate():
    before = threading.active_count()
    device = EmulatedDevice(bus_bytes_per_s=1e7)
    copies = Copies(device, SpanLog())
    gates = [copies.gate(copies.d2h("x", torch.zeros(10_000), torch.ones(10_000))) for _ in range(5)]
    copies.close()
    device.close()
    assert all(gate.done() for gate in gates)
    assert threading.active_count() == before


def test_what_lies_in_the_past_needs_no_thread():
    copies = Copies(EmulatedDevice(), SpanLog())
    before = threading.active_count()
    assert copies.gate(PAST).done()
    assert threading.active_count() == before
