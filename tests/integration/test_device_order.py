"""Every hand-over between compute and the copies is ordered by an event, and each deleted one is caught.

Without a GPU a device that checks the order finds what is not ordered (tests/device_order.py); on a CUDA device the
same deletions, with sleeps inserted before every copy and in every block, change the numbers.
"""

import contextlib
import gc

import pytest
import torch
from torch import nn

import offload
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.recompute.first_results import Samples
from offload.runtime import chosen_device
from offload.runtime.device_residency import CopiedResidency
from offload.runtime.gradients import Gradients
from offload.runtime.scheduler import Scheduler
from offload.stores.activations import ActivationStore
from offload.telemetry import SpanLog, Stalls
from offload.tiers.device import PAST, CudaDevice
from offload.tiers.host import Spare
from offload.transfer.copies import Copies
from tests.cuda import CUDA, ready, sleepy_copies
from tests.device_order import OrderedDevice, watching
from tests.integration.stack import UpDown, parameters_of
from tests.storage_order import follow_storage

WIDTH, ROWS = 64, 64
BLOCK_CYCLES = 4_000_000
"""A device sleep of about 2 ms in each block."""


class Block(UpDown):
    """On a CUDA device it computes late, so that what does not wait for it comes too early."""

    cycles = BLOCK_CYCLES

    def forward(self, x):
        if x.is_cuda:
            torch.cuda._sleep(self.cycles)
        return super().forward(x)


def nothing(model):
    pass


def train(
    device,
    directory,
    n_steps=3,
    then=nothing,
    after_step=nothing,
    evaluates=False,
    forgets=False,
    rule=torch.optim.AdamW,
    **settings,
):
    """(parameters by name, conflicts found by the ordered device); `then` is called with the trained model, and
    `after_step` with it after each step. `evaluates`: before every step comes a forward without gradients, of which the
    results are returned too. `forgets`: every step begins with gradients that wait and are discarded."""
    chunk = 4096
    settings = {
        "device_memory": "400KB", "storage": [str(directory)], "prefetch_blocks": 1,
        "host_memory": 8 * chunk * 14 + ACTIVATION_STAGING_NBYTES_MIN + 1_200_000, **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(WIDTH) for _ in range(5)])
    model, optimizer = offload.wrap(
        model, rule(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=chunk,
        chunk_buffers=2, update_threads=2, device="cuda" if device == "cuda" else "emulated", **settings,
    )  # fmt: skip
    try:
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(model.offload.device)
        with watching() if device == "ordered" else contextlib.nullcontext() as conflicts:
            results = {}
            for number in range(n_steps):
                if forgets:
                    with model.offload.no_sync():
                        model(x).square().mean().backward()
                    optimizer.zero_grad()
                model(x).square().mean().backward()
                if evaluates:
                    with torch.no_grad():
                        results[f"evaluated {number}"] = model(x)
                optimizer.step()
                optimizer.zero_grad()
                after_step(model)
        then(model)
        found = {name: result.cpu() for name, result in results.items()}
        return {**parameters_of(model), **found}, conflicts
    finally:
        model.offload.close()


@pytest.fixture(params=["ordered", CUDA])
def device(request, monkeypatch):
    monkeypatch.setattr("offload.runtime.gradients.LEAVES_ALONE_NBYTES", 0)
    monkeypatch.setattr(chosen_device, "EmulatedDevice", OrderedDevice)
    with ready(request.param, monkeypatch) as name:
        yield name


def races(device, directory, without=None, **settings):
    """Whether training shows a race: conflicts of the ordered device, or other numbers on a CUDA device."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "ordered":
            follow_storage(patch)
            if without:
                without(patch)
            return train(device, directory, **settings)[1]
        patch.setattr(
            Samples, "check", lambda self, block_name, results: None
        )  # it would refuse what is looked for
        expected, _ = train(device, directory, **settings)
        if without in EARLY_COPIES:
            patch.setattr(Block, "cycles", 10 * BLOCK_CYCLES)
        else:
            sleepy_copies(patch)
        if without:
            without(patch)
        try:
            got, _ = train(device, directory, **settings)
        except RuntimeError as noticed:  # the copy came after autograd had saved the tensor
            assert "modified by an inplace operation" in str(noticed)
            return [str(noticed)]
        return [name for name in expected if not torch.equal(got[name], expected[name])]


ONLY_BUFFER = {"device_memory": "270KB"}
PLACEMENTS = {
    "storage": {},
    "host": {"storage": [], "host_memory": "20MB"},
    "deferred": {"update": "deferred"},
    "deferred, evaluated before the step": {"update": "deferred", "evaluates": True},
    "in host memory, evaluated before the step": {
        "update": "deferred",
        "evaluates": True,
        "storage": [],
        "host_memory": "20MB",
    },
    "clipping": {"max_grad_norm": 0.05},
    "inputs in host memory": {"activations": "host", "host_memory": "20MB"},
    "inputs on storage": {"activations": "storage"},
    "saved in host memory": {"saved_activations": "host", "micro_batches": 2, "host_memory": "20MB"},
    "saved on storage": {"saved_activations": "storage", "micro_batches": 2},
    "graphs kept": {"activations": "keep", "device_memory": "4MB"},
    "the only gradient buffer": ONLY_BUFFER,
    "the only gradient buffer, micro-batches": {**ONLY_BUFFER, "micro_batches": 2},
    "the only gradient buffer, deferred": {**ONLY_BUFFER, "update": "deferred"},
    "gradients that wait are discarded": {"forgets": True},
    "gradients on storage are looked at as a whole": {
        "rule": torch.optim.Adafactor,
        "update": "deferred",
        "host_memory": "900KB",
    },
    "state on the device": {"device_memory": "1300KB", "states_on_device": "800KB"},
    "deferred, state on the device": {
        "update": "deferred",
        "device_memory": "1500KB",
        "states_on_device": "1MB",
    },
}


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda name: name.replace(" ", "-"))
def test_every_hand_over_is_ordered(tmp_path, device, placement):
    assert races(device, tmp_path, **PLACEMENTS[placement]) == []


# ---- one hand-over less --------------------------------------------------------------------------------------


def without_waits_in(owner, method):
    """Inside `method` compute waits for nothing."""

    def delete(patch):
        inside = getattr(owner, method)

        def hurried(self, *args, **kwargs):
            with pytest.MonkeyPatch.context() as inner:
                for kind in (OrderedDevice, CudaDevice):
                    inner.setattr(kind, "compute_waits", lambda self, event: None)
                return inside(self, *args, **kwargs)

        patch.setattr(owner, method, hurried)

    return delete


EARLY_COPIES = []
"""Deletions after which a copy comes before the compute that it should have waited for: copies are not to be late then,
compute is."""


def copies_without(way, prefix, keep=lambda device, after: ()):
    """Copies of that name start after nothing but what `keep` leaves."""

    def delete(patch):
        copy = getattr(Copies, way)

        def hurried(self, name, target, source, after=()):
            if not name.startswith(prefix):
                return copy(self, name, target, source, after)
            device = self._device
            start = device.copy_in if way == "h2d" else device.copy_out
            return start(target, source, [event.issued() for event in keep(device, after)])

        patch.setattr(Copies, way, hurried)

    EARLY_COPIES.append(delete)
    return delete


def drop_what_leaves_at_once(patch):
    def forget(self, but_of=None):
        for held in self._order:
            held.source = None

    patch.setattr(ActivationStore, "order_after_left", forget)


def without_wait_for_loads(patch):
    """Updates of what waits start at once."""
    submit = Scheduler._submit_update

    def hurried(self, block, **how):
        loaded, block.loaded = block.loaded, PAST
        submit(self, block, **how)
        block.loaded = loaded

    patch.setattr(Scheduler, "_submit_update", hurried)


IN_HOST = PLACEMENTS["inputs in host memory"]
SAVED = PLACEMENTS["saved in host memory"]
EVALUATED = PLACEMENTS["in host memory, evaluated before the step"]
DELETED = {
    "compute before the parameters have arrived": ({}, without_waits_in(CopiedResidency, "begin_use")),
    "load into a slot that is computed with": ({}, copies_without("h2d", "load")),
    "take gradients that are not computed yet": ({}, copies_without("d2h", "grad_out")),
    "fill a gradient buffer that is still being copied": ({}, without_waits_in(Gradients, "begin")),
    "fill a part of the only gradient buffer that is still being copied": (
        ONLY_BUFFER, without_waits_in(Gradients, "accumulate"),
    ),
    "take a part of the gradients that is not computed yet": (ONLY_BUFFER, copies_without("d2h", "grad_out")),
    "take a block's input that is not computed yet": (IN_HOST, copies_without("d2h", "swap_out")),
    "compute with an input that has not come back": (IN_HOST, without_waits_in(ActivationStore, "swap_in")),
    "bring an input back that has not left": (
        {**IN_HOST, "device_memory": "600KB"},
        copies_without("h2d", "swap_in", lambda device, after: after[1:]),
    ),
    "bring an input back to memory that is computed with": (
        IN_HOST, copies_without("h2d", "swap_in", lambda device, after: after[:1]),
    ),
    "bring an input back from storage to memory that is computed with": (
        {"activations": "storage"}, copies_without("h2d", "swap_in", lambda device, after: after[1:]),
    ),
    "use the memory of what is still leaving": (SAVED, drop_what_leaves_at_once),
    "update parameters that an evaluation still loads": (EVALUATED, without_wait_for_loads),
}  # fmt: skip


@pytest.mark.parametrize("deleted", DELETED, ids=lambda name: name.replace(" ", "-"))
def test_without_one_hand_over_there_is_a_race(tmp_path, device, deleted):
    settings, without = DELETED[deleted]
    assert races(device, tmp_path, without, **settings)


def forwards_without_backward(device):
    """What comes out after graphs were dropped, and conflicts found by the ordered device."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(WIDTH) for _ in range(5)])
    model, _ = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), step_aside="never", storage=[], device_memory="4MB",
        device="cuda" if device == "cuda" else "emulated", activations="host", host_memory="200MB",
    )  # fmt: skip
    x = torch.randn(ROWS, WIDTH).to(model.offload.device)
    with watching() if device == "ordered" else contextlib.nullcontext() as conflicts:
        for _ in range(3):
            x = x + model(x).detach() * 0.1
            gc.collect()
    model.offload.close()
    return x.cpu(), conflicts


def test_a_graph_that_is_dropped_leaves_no_copy_of_memory_that_is_used_again(device, monkeypatch):
    expected, conflicts = forwards_without_backward(device)
    assert not conflicts
    if device == "cuda":
        sleepy_copies(monkeypatch)
        assert torch.equal(forwards_without_backward(device)[0], expected)


def store_in_host_memory():
    """Where activations go to host memory, and its copies."""
    device = OrderedDevice()
    copies = Copies(device, SpanLog())
    return copies, ActivationStore(
        device, copies, None, Stalls(), SpanLog(), tier="host", device_nbytes=0, spare_host=Spare(1 << 20),
        staging=torch.empty(0, dtype=torch.uint8),
    )  # fmt: skip


def test_a_flush_waits_for_the_updates_that_the_device_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(chosen_device, "EmulatedDevice", OrderedDevice)
    known = []

    def flushed(model):
        known.append(OrderedDevice.made.mark().done())
        model.offload.flush()
        known.append(OrderedDevice.made.mark().done())

    train("ordered", tmp_path, then=flushed, **PLACEMENTS["state on the device"])
    assert known == [False, True]


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_memory_of_a_dropped_activation_is_used_again_only_after_its_copy(monkeypatch, is_waited_for):
    _, store = store_in_host_memory()
    if not is_waited_for:
        without_waits_in(ActivationStore, "_reap")(monkeypatch)
    with watching() as conflicts:
        tensor = torch.ones(1000)
        activation = store.swap_out(tensor)
        del activation
        gc.collect()
        store.order_after_left()
        tensor.add_(1)  # as whoever is given its memory
    assert bool(conflicts) != is_waited_for


@pytest.mark.parametrize("left_block", [False, True])
def test_until_backward_takes_the_next_block_two_micro_batches_come_back(left_block):
    """They are on the bus before the parameters that are loaded when a block has been left."""
    copies, store = store_in_host_memory()
    micro_batches = [[store.swap_out(torch.ones(1000)) for _ in range(2)] for _ in range(5)]
    store.swap_in(micro_batches.pop())
    if left_block:
        store.left_block()
    ahead = 2 if left_block else 1
    assert copies.h2d_bytes == (1 + ahead) * 2 * 4000
    for pair in reversed(micro_batches):
        assert all(torch.equal(tensor, torch.ones(1000)) for tensor in store.swap_in(pair))


def test_swapped_tensors_are_asked_back_before_the_next_parameters_when_a_block_is_left(monkeypatch):
    done = []
    left_block, end = ActivationStore.left_block, Scheduler.end

    def leave(self):
        done.append("left")
        left_block(self)

    def ended(self, block, phase):
        done.append(phase)
        end(self, block, phase)

    monkeypatch.setattr(ActivationStore, "left_block", leave)
    monkeypatch.setattr(Scheduler, "end", ended)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), device="emulated", storage=[], step_aside="never",
        device_memory="1MB", host_memory="20MB", micro_batches=2,
    )  # fmt: skip
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    model.offload.close()
    assert done == ["forward"] * 3 + ["left", "backward"] * 3
