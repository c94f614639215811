"""A model that is wholly on a device with memory of its own: within its budget, with nothing in host memory."""

import re

import pytest
import torch

import offload
from offload.errors import BudgetError
from offload.model.on_device import stays_nbytes
from offload.planner.states_on_device import scratch_nbytes
from offload.transfer.copies import Copies
from offload.types import PAGE_NBYTES
from tests.conftest import batches, build, two_groups
from tests.device_memory import allocations, held_at_allocations

ROOMY = {"device": "emulated", "device_memory": "50MB", "host_memory": "50MB", "storage": []}
MAKE = {
    "adamw": two_groups,
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
    "lion": lambda model: offload.Lion(model.parameters(), lr=1e-3),
}
STATE_NBYTES = {"adamw": 8, "sgd": 4, "plain sgd": 0, "lion": 4}
"""A parameter, beside the four of its master."""


@pytest.fixture
def taken(monkeypatch):
    """What has been allocated on the device, in bytes."""
    return allocations(monkeypatch)


def take_steps(model, optimizer, n_steps=2):
    for batch in batches(n_steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MAKE)
def test_device_memory_is_a_master_its_state_and_a_gradient_each_and_what_updates_need(taken, name, dtype):
    model = build("llama", dtype, vocab=2048)
    numel = sum(p.numel() for p in model.parameters())
    model, optimizer = offload.wrap(model, MAKE[name](model), step_aside="always", **ROOMY)
    take_steps(model, optimizer)
    placed, (buffer,) = model.offload.placement, model.offload.root.layout.buffers
    model.offload.close()
    assert sum(taken) == placed.device_nbytes
    least = (4 + STATE_NBYTES[name] + 4) * numel + scratch_nbytes(4 * numel)
    n_chunks = -(-buffer.n_elements // buffer.chunk_elements)
    padding = (8 + STATE_NBYTES[name]) * (buffer.n_elements - numel)
    padding += scratch_nbytes(4 * buffer.n_elements) - scratch_nbytes(4 * numel)
    assert least <= placed.device_nbytes <= least + padding + (1 + n_chunks) * PAGE_NBYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MAKE)
def test_nothing_is_streamed_where_twice_what_is_taken_fits_and_not_in_a_byte_less(
    tmp_path, taken, name, dtype
):
    def aside(**settings):
        taken.clear()
        model = build("llama", dtype)
        settings = {**ROOMY, "storage": [str(tmp_path)], "chunk_elements": 4096, **settings}
        model, _ = offload.wrap(model, MAKE[name](model), **settings)
        model.offload.close()
        return model.offload.aside

    assert aside(step_aside="always")
    nbytes = 2 * sum(taken) + stays_nbytes(build("llama", dtype))
    assert aside(device_memory=nbytes)
    assert not aside(device_memory=nbytes - 1)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_a_model_that_is_on_the_device_leaves_as_fast_as_its_memory_is_taken(
    monkeypatch, dtype, compute_dtype
):
    monkeypatch.setattr(
        "offload.planner.states_on_device.PIECE_ELEMENTS", 4096
    )  # little, as of a large model
    model = build("llama", dtype, vocab=4096)
    held = held_at_allocations(monkeypatch, model)
    model, _ = offload.wrap(
        model, two_groups(model), step_aside="always", compute_dtype=compute_dtype, **ROOMY
    )
    placed = model.offload.placement
    model.offload.close()
    assert max(held) <= placed.device_nbytes


def test_more_than_the_device_holds_is_refused_with_the_smallest_that_would_do(taken):
    def wrapped(device_memory, **settings):
        model = build("llama", torch.bfloat16)
        settings = {**ROOMY, "step_aside": "always", "device_memory": device_memory, **settings}
        return offload.wrap(model, two_groups(model), **settings)[0]

    with pytest.raises(BudgetError, match="leave step_aside at 'auto'") as refused:
        wrapped(100_000)
    assert taken == []
    least = int(re.search(r"device_memory='(\d+)'", str(refused.value))[1])
    wrapped(least).offload.close()
    assert sum(taken) <= least
    with pytest.raises(BudgetError, match="does not fit"):
        wrapped(least - 1)
    with pytest.raises(BudgetError, match="name blocks to stream"):
        wrapped(least - 1, step_aside="auto", blocks=[])


def test_nothing_crosses_the_bus_and_host_memory_has_the_pipelines_buffers_alone(monkeypatch):
    names = []
    for way in ("h2d", "d2h", "h2d_when", "h2d_in_parts"):
        monkeypatch.setattr(Copies, way, lambda self, *args, **kwargs: names.append(args))
    model = build("llama", torch.bfloat16)
    model, optimizer = offload.wrap(model, two_groups(model), step_aside="always", **ROOMY)
    take_steps(model, optimizer)
    parts = model.offload.parts
    assert parts.placement.host_nbytes == parts.resources.staging.numel()
    model.offload.close()
    assert names == []
