"""Copies between a device with memory of its own and the host overlap computing, and every wait between them is needed.

On an emulated device with a slow bus, and on a CUDA device with late copies (marker `gpu`).
"""

import time

import pytest
import torch
from torch import nn

import offload
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.recompute.first_results import Samples
from offload.runtime.device_residency import CopiedResidency
from offload.runtime.scheduler import Scheduler
from offload.stores.activations import ActivationStore
from offload.tiers.device import PAST
from offload.tiers.emulated_device import EmulatedDevice
from offload.transfer.copies import Copies
from offload.transfer.io_engine import Ticket
from tests.conftest import one_thread
from tests.cuda import deterministic_cuda, sleepy_copies
from tests.fault.training import make_run
from tests.integration.stack import differs, train_stack

WIDTH = 128


def train_blocks(settings):
    return train_stack(WIDTH, 64, settings)


def slow_bus(directory, **more):
    chunk = 4096
    return {
        "device": "emulated", "bus_bytes_per_s": 2e7, "step_aside": "never", "device_memory": "1MB",
        "host_memory": 2 * chunk * 14 + ACTIVATION_STAGING_NBYTES_MIN + 1_100_000, "storage": [str(directory)],
        "chunk_elements": chunk, "chunk_buffers": 2, "prefetch_blocks": 1, **more,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def numbers_alone(monkeypatch):
    """What a missing wait does is to show in the numbers; a block's first recomputation would be compared before."""
    monkeypatch.setattr(Samples, "check", lambda self, block_name, results: None)


@pytest.fixture(scope="module")
def expected_blocks():
    with one_thread():
        return train_blocks(
            {
                "step_aside": "never",
                "device_memory": "1GB",
                "host_memory": "1GB",
                "storage": [],
                "chunk_elements": 4096,
            }
        )


@pytest.mark.parametrize("more", [{}, {"update": "deferred"}, {"activations": "storage"}], ids=str)
def test_with_every_wait_in_place_the_slow_bus_gives_the_same_bits(tmp_path, expected_blocks, more):
    got = train_blocks(slow_bus(tmp_path, **more))
    assert not differs(got, expected_blocks)


def compute_before_the_parameters_have_arrived(monkeypatch):
    monkeypatch.setattr(CopiedResidency, "begin_use", lambda self, block: None)


def rewrite_the_host_slot_before_it_has_been_copied(monkeypatch):
    monkeypatch.setattr(CopiedResidency, "host_slot_leaves", lambda self, block: PAST)


def update_before_the_gradients_have_arrived(monkeypatch):
    def open_gate(self, event):
        gate = Ticket()
        gate.complete()
        return gate

    monkeypatch.setattr(Copies, "gate", open_gate)


def fill_the_gradient_buffer_before_it_has_been_copied_out(monkeypatch):
    wait = EmulatedDevice.compute_waits

    def hurried(self, event):
        if not getattr(event, "out", False):
            wait(self, event)

    copy_out = EmulatedDevice.copy_out

    def marked(self, target, source, after=()):
        event = copy_out(self, target, source, after)
        event.out = True
        return event

    monkeypatch.setattr(EmulatedDevice, "compute_waits", hurried)
    monkeypatch.setattr(EmulatedDevice, "copy_out", marked)


@pytest.mark.parametrize(
    "without",
    [
        compute_before_the_parameters_have_arrived,
        rewrite_the_host_slot_before_it_has_been_copied,
        update_before_the_gradients_have_arrived,
        fill_the_gradient_buffer_before_it_has_been_copied_out,
    ],
    ids=lambda f: f.__name__,
)
def test_without_one_wait_the_numbers_change(tmp_path, expected_blocks, monkeypatch, without):
    without(monkeypatch)
    got = train_blocks(slow_bus(tmp_path))
    assert differs(got, expected_blocks)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "without",
    [
        None,
        compute_before_the_parameters_have_arrived,
        rewrite_the_host_slot_before_it_has_been_copied,
        update_before_the_gradients_have_arrived,
    ],
    ids=lambda f: "nothing" if f is None else f.__name__,
)
def test_with_late_copies_on_a_gpu_the_numbers_change_exactly_where_a_wait_is_missing(
    tmp_path, monkeypatch, without
):
    """What storage and the update do with host memory; tests/integration/test_device_order.py has the rest."""
    settings = {**slow_bus(tmp_path), "device": "cuda"}
    del settings["bus_bytes_per_s"]
    with deterministic_cuda(monkeypatch):
        expected = train_blocks(settings)
        sleepy_copies(monkeypatch)
        if without is not None:
            without(monkeypatch)
        got = train_blocks(settings)
    assert differs(got, expected) == (without is not None)


def test_backward_with_an_activation_that_has_not_arrived_shows(tmp_path, expected_blocks, monkeypatch):
    """In other numbers, or in autograd's own refusal where the copy lands between saving and use."""
    swap_in = ActivationStore.swap_in

    def hurried(self, activation):
        with monkeypatch.context() as patch:
            patch.setattr(EmulatedDevice, "compute_waits", lambda self, event: None)
            return swap_in(self, activation)

    monkeypatch.setattr(ActivationStore, "swap_in", hurried)
    try:
        got = train_blocks(slow_bus(tmp_path, activations="host", host_memory="20MB"))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert differs(got, expected_blocks)


# ---- overlap -------------------------------------------------------------------------------------------------


class SleepyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(512, 512))

    def forward(self, x):
        time.sleep(0.02)
        return x + x @ self.weight


def test_copies_and_computing_overlap():
    """A block's copy takes about as long as its compute: hidden copies save a good part of the step."""
    seconds = {}
    for name, slots in (("overlapped", 4), ("serial", 1)):
        model = nn.Sequential(*[SleepyBlock() for _ in range(8)])
        model, optimizer = offload.wrap(
            model, torch.optim.AdamW(model.parameters()), device="emulated", bus_bytes_per_s=5e7, storage=[],
            device_memory="10MB", host_memory="100MB", step_aside="never", prefetch_blocks=slots,
        )  # fmt: skip
        if name == "serial":
            scheduler = model.offload._scheduler
            scheduler.prefetch = lambda: None
        steps = []
        for _ in range(3):
            start_s = time.perf_counter()
            model(torch.ones(2, 512)).sum().backward()
            optimizer.step()
            model.offload.flush()
            steps.append(time.perf_counter() - start_s)
        model.offload.close()
        seconds[name] = min(steps[1:])
    assert seconds["overlapped"] < 0.85 * seconds["serial"], seconds


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_next_block_goes_backward_while_the_gradients_of_the_last_leave_the_device(micro_batches):
    """On a bus so slow that their copy takes longer than to launch the next block; gradients that come once (one
    micro-batch, bf16) and such as are added up."""
    blocks = [nn.Linear(128, 128, dtype=torch.bfloat16) for _ in range(4)]
    model = nn.Sequential(*blocks)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), device="emulated", bus_bytes_per_s=1e6, storage=[],
        device_memory="1MB", host_memory="20MB", step_aside="never", chunk_elements=4096,
        micro_batches=micro_batches,
    )  # fmt: skip
    model(torch.ones(2, 128, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    with model.offload.record() as spans:
        model(torch.ones(2, 128, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        model.offload.flush()
    model.offload.close()
    began = {span.name: span.start_s for span in reversed(spans) if span.name.startswith("backward")}
    left = {span.name: span.end_s for span in spans if span.name.startswith("grad_out")}
    for index in (1, 2, 3):
        assert began[f"backward {index - 1}"] < left[f"grad_out {index}"]


class Reads:
    """A store's engine that notes the reads into memory from which a copy to the device has not ended."""

    def __init__(self, engine, copies):
        self._engine, self._copies = engine, copies
        self.early, self.n_after_copies = [], 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def read(self, address, nbytes, *args, **kwargs):
        from_there = [
            event for start, end, event in self._copies if start < address + nbytes and address < end
        ]
        self.n_after_copies += bool(from_there)
        if not kwargs.get("after") and not all(event.done() for event in from_there):
            self.early.append((address, nbytes))
        return self._engine.read(address, nbytes, *args, **kwargs)


def test_storage_is_read_into_no_host_memory_that_is_still_being_copied(tmp_path, monkeypatch):
    """As on a GPU, where compute does not hold up the thread that gives it. Gradients wait on storage and come back."""
    copies, copy_in = [], EmulatedDevice.copy_in

    def noted(self, target, source, after=()):
        event = copy_in(self, target, source, after)
        copies.append((source.data_ptr(), source.data_ptr() + source.nbytes, event))
        return event

    monkeypatch.setattr(EmulatedDevice, "copy_in", noted)
    monkeypatch.setattr(EmulatedDevice, "compute_waits", lambda self, event: None)
    model, optimizer = make_run(
        tmp_path, layers=4, device="emulated", bus_bytes_per_s=2e6, update="deferred", activations="keep"
    )
    store = model.offload.parts.resources.store
    store.engine = reads = Reads(store.engine, copies)
    for _ in range(2):
        for _ in range(2):
            with model.offload.no_sync():
                model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.offload.close()
    assert reads.n_after_copies > 0
    assert reads.early == []


def test_an_update_reads_parameters_into_no_slot_that_is_still_being_copied(tmp_path, monkeypatch):
    submit, free = Scheduler._submit_update, []

    def noted(self, block, *, read_param, **more):
        if read_param:
            free.append(block.slot.free_after.done())
        submit(self, block, read_param=read_param, **more)

    monkeypatch.setattr(Scheduler, "_submit_update", noted)
    train_blocks(slow_bus(tmp_path, update="deferred"))
    assert free
    assert all(free)
