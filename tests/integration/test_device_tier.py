"""A device with memory of its own gives the same bits, within its budget.

The emulated device runs everywhere; the same tests run on a CUDA device where there is one (marker `gpu`). That every
hand-over is waited for: test_device_waits.py and test_device_order.py.
"""

import json
import logging
import os
import pathlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile, record_function

import offload
from offload.model.on_device import stays_nbytes
from offload.tiers.device import CudaDevice
from offload.tiers.emulated_device import EmulatedDevice
from offload.tiers.host import HostArena
from offload.tiers.storage import Store
from tests.conftest import Around, batches, build, one_thread, slow_but, two_groups
from tests.device_memory import allocations
from tests.integration.test_exactness import (
    CHUNK,
    assert_same_bits,
    in_memory_on,
    stored,
    train,
    train_in_memory,
)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

from llama_shaped import LlamaShaped, Shape
from trace_analysis import STEP, analyse


def reference(device):
    """Everything in host memory, on the same device: its arithmetic is the standard."""
    return in_memory_on(device, step_aside="never")


def on(device, directory, **more):
    budgets = {"device_memory": "8MB", "host_memory": "3MB"}
    return stored(directory, device=device, **{**budgets, **more})


PLACEMENTS = {
    "all on storage": {"prefetch_blocks": 1},
    "half in host memory": {"host_memory": "5MB"},
    "all in host memory": {"host_memory": "100MB", "storage": []},
    "block inputs in host memory": {"activations": "host", "host_memory": "100MB"},
    "block inputs on storage": {"activations": "storage"},
    "graphs kept": {"activations": "keep"},
    "posix backend": {"backend": "posix"},
    "pageable copies": {"pin": "never"},
    "state on the device": {"states_on_device": "4MB"},
}


@pytest.mark.parametrize("update", slow_but(["backward"], ["backward", "deferred"]))
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda name: name.replace(" ", "-"))
def test_any_placement_has_the_bits_of_host_memory(tmp_path, device, placement, update):
    expected = train_in_memory("llama", {**reference(device), "update": update}, n_steps=6)
    assert_same_bits(
        train("llama", on(device, tmp_path, update=update, **PLACEMENTS[placement]), n_steps=6), expected
    )


@pytest.mark.parametrize("kind", slow_but(["gpt2"], ["gpt2", "qwen2", "bert"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_shape_and_dtype_has_the_same_bits(tmp_path, device, kind, dtype):
    expected = train_in_memory(kind, reference(device), dtype, n_steps=5, dropout=0.1)
    assert_same_bits(train(kind, on(device, tmp_path), dtype, n_steps=5, dropout=0.1), expected)


@pytest.mark.parametrize(
    ("loop", "settings"),
    slow_but(
        [
            ({"accumulate": 3}, {}),
            ({"freeze": "layers.1."}, {}),
            ({}, {"micro_batches": 4, "activations": "storage", "max_grad_norm": 0.5}),
        ],
        [
            ({"accumulate": 3}, {}),
            ({"accumulate": 3}, {"update": "deferred"}),
            ({}, {"max_grad_norm": 0.5}),
            ({"accumulate": 2}, {"max_grad_norm": 0.5}),
            ({"freeze": "layers.1."}, {}),
            ({"freeze": "embed"}, {"update": "deferred"}),
            ({"tie": True}, {}),
            ({}, {"micro_batches": 2}),
            ({}, {"micro_batches": 4, "activations": "storage", "max_grad_norm": 0.5}),
        ],
    ),
    ids=str,
)
def test_loop_features_have_the_same_bits(tmp_path, device, loop, settings):
    same = {key: settings[key] for key in ("micro_batches", "max_grad_norm", "update") if key in settings}
    expected = train_in_memory("llama", {**reference(device), **same}, n_steps=5, **loop)
    assert_same_bits(train("llama", on(device, tmp_path, **settings), n_steps=5, **loop), expected)


def test_a_slow_bus_changes_no_number(tmp_path):
    expected = train_in_memory("llama", reference("emulated"), n_steps=4)
    for update in ("backward", "deferred"):
        settings = on("emulated", tmp_path, update=update, bus_bytes_per_s=5e7)
        assert_same_bits(train("llama", settings, n_steps=4), expected)


def test_device_memory_taken_stays_within_device_memory_allowed(tmp_path, monkeypatch):
    taken = allocations(monkeypatch)
    model = build("llama", torch.bfloat16, layers=12)
    with pytest.raises(offload.BudgetError) as refused:
        offload.wrap(
            model,
            two_groups(model),
            **{**on("emulated", tmp_path), "device_memory": "1KB"},
            chunk_elements=CHUNK,
        )
    least_nbytes = int(str(refused.value).split("device_memory='")[1].split("'")[0])
    for allowed_nbytes in (least_nbytes, 2 * least_nbytes):
        taken.clear()
        settings = on("emulated", tmp_path, device_memory=allowed_nbytes)
        wrapped, _ = offload.wrap(model, two_groups(model), chunk_elements=CHUNK, **settings)
        wrapped.offload.close()
        taken.append(stays_nbytes(model))  # its buffers
        assert 0.5 * allowed_nbytes <= sum(taken) <= allowed_nbytes  # half is for what it computes with
        model = build("llama", torch.bfloat16, layers=12)


@pytest.mark.parametrize("more", [{}, {"storage": []}], ids=["on storage", "in host memory"])
def test_a_model_leaves_the_device_before_the_device_memory_is_taken(tmp_path, monkeypatch, more):
    model = build("llama")
    left = []
    allocations(
        monkeypatch, lambda _: left.append(max(p.untyped_storage().nbytes() for p in model.parameters()))
    )
    wrapped, _ = offload.wrap(
        model, two_groups(model), **{**on("emulated", tmp_path), "host_memory": "50MB", **more}
    )
    assert left
    assert max(left) <= 16  # one element in place of what is elsewhere
    wrapped.offload.close()


@pytest.mark.gpu
def test_a_model_larger_than_device_memory_may_be_on_the_gpu_when_it_is_wrapped(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    allowed_nbytes = 400_000_000
    model = build("llama", torch.bfloat16, layers=24, hidden=1024).cuda()
    assert sum(p.nbytes for p in model.parameters()) > allowed_nbytes
    model, _ = offload.wrap(
        model, two_groups(model), **on("cuda", tmp_path, device_memory=allowed_nbytes, host_memory="2GB")
    )
    assert torch.cuda.memory_reserved() <= allowed_nbytes
    model.offload.close()


@pytest.mark.gpu
def test_the_allocators_reserve_on_a_gpu_stays_within_device_memory(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allowed_nbytes = 400_000_000
    model = build("llama", torch.bfloat16, layers=24, hidden=512)
    model, optimizer = offload.wrap(
        model, two_groups(model), device="cuda", device_memory=allowed_nbytes, host_memory="200MB",
        storage=[str(tmp_path)], micro_batches=4, step_aside="never",
    )  # fmt: skip
    for batch in batches(3, batch=16, length=64):
        model(input_ids=batch.cuda(), labels=batch.cuda()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_reserved() <= allowed_nbytes
    model.offload.close()


@pytest.mark.gpu
def test_a_steady_step_on_a_gpu_asks_the_driver_for_nothing_and_its_launching_threads_wait_for_nothing(
    tmp_path,
):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = LlamaShaped(Shape(512, 8, 1024, 8, 256)).to(
        torch.bfloat16
    )  # transformers looks at the mask's values
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), device="cuda", device_memory="600MB", host_memory="4GB",
        storage=[], micro_batches=2, step_aside="never", prefetch_blocks=2,
    )  # fmt: skip
    batch = batches(1, batch=8, length=256)[0].cuda()

    def step():
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(3):
            with record_function(STEP):
                step()
        torch.cuda.synchronize()
    record.export_chrome_trace(str(tmp_path / "trace.json"))
    found = analyse(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    model.offload.close()
    assert found["calls"] == {}
    assert found["pageable_copies"] == 0
    assert found["h2d_bytes"] > 0
    assert found["d2h_bytes"] > 0


@pytest.mark.parametrize(
    "more",
    [
        *slow_but(
            [PLACEMENTS[name] for name in ("half in host memory", "block inputs on storage")],
            PLACEMENTS.values(),
        ),
        {"saved_activations": "host", "host_memory": "100MB"},
        {"saved_activations": "storage", "activations": "storage", "host_memory": "100MB"},
        {"saved_activations": "device", "max_grad_norm": 0.5},
    ],
    ids=str,
)
def test_a_steady_step_takes_no_memory_of_host_device_or_storage(tmp_path, device, monkeypatch, more):
    taken = []

    def counted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (taken.append(name), real(*given))[1])

    counted(HostArena, "__init__")
    counted(HostArena, "take")
    counted(Store, "grow")
    for kind in (EmulatedDevice, CudaDevice):
        counted(kind, "allocate")
        counted(kind, "page_lock")
    model = build("llama", torch.bfloat16, layers=6)
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=CHUNK, micro_batches=2, **on(device, tmp_path, **more)
    )
    assert "__init__" in taken
    assert "allocate" in taken
    for n, batch in enumerate(batches(5)):
        if n == 3:  # one writes recipes, one uses them first
            taken.clear()
        batch = batch.to(model.offload.device)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.offload.close()
    assert taken == []


# ---- stepping aside ------------------------------------------------------------------------------------------


def test_what_fits_on_the_device_is_not_streamed_and_has_the_same_bits(tmp_path, caplog):
    expected = train("llama", stored(tmp_path), n_steps=6)
    with caplog.at_level(logging.INFO, logger="offload"):
        got = train(
            "llama", {"device_memory": "50MB", "host_memory": "1MB", "storage": [str(tmp_path)]}, n_steps=6
        )
    assert_same_bits(got, expected)
    assert len([r for r in caplog.records if "nothing is streamed" in r.message]) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "loop", [{}, {"accumulate": 2}, {"freeze": "layers.1."}, {"freeze": "embed"}, {"tie": True}], ids=str
)
def test_what_fits_on_a_device_of_its_own_is_updated_there_with_the_bits_of_what_is_streamed(
    device, dtype, loop
):
    all_there = {
        "device": device,
        "device_memory": "1GB",
        "host_memory": "10MB",
        "storage": [],
        "max_grad_norm": 0.5,
    }
    got = train("llama", all_there, dtype, n_steps=5, **loop)
    expected = train_in_memory("llama", {**reference(device), "max_grad_norm": 0.5}, dtype, n_steps=5, **loop)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("step_aside", ["always", "never"])
def test_a_model_keeps_its_own_gradient_checkpointing_where_nothing_is_streamed(step_aside):
    model = build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (layer, *_) = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    before = layer._gradient_checkpointing_func
    model, _ = offload.wrap(
        model, two_groups(model), storage=[], device_memory="1GB", host_memory="1GB", step_aside=step_aside
    )
    model.offload.close()
    assert layer.gradient_checkpointing == (step_aside == "always")
    assert step_aside == "never" or layer._gradient_checkpointing_func is before


def test_gradient_checkpointing_is_off_in_a_model_inside_of_a_module_too():
    model = build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = Around(model)
    model, _ = offload.wrap(
        model, two_groups(model), storage=[], device_memory="1GB", host_memory="1GB", step_aside="never"
    )
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    model.offload.close()


@pytest.mark.parametrize("kind", ["streamed", "on the device"])
def test_a_default_device_of_the_users_moves_nothing_that_belongs_in_host_memory(tmp_path, kind):
    model = build("llama")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"step_aside": "never" if kind == "streamed" else "always", "storage": [str(tmp_path)]}
    with torch.device("meta"):
        model, _ = offload.wrap(
            model, two_groups(model), device="emulated", device_memory="50MB", host_memory="50MB", **settings
        )
        offload.export(model, tmp_path / "exported")
    model.offload.close()
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(found[name].dtype)) for name in found)


def test_what_does_not_fit_in_half_of_the_device_is_streamed(tmp_path):
    model = build("llama", torch.bfloat16)
    state_nbytes = 16 * sum(p.numel() for p in model.parameters())
    wrapped, _ = offload.wrap(
        model,
        two_groups(model),
        device_memory=int(1.9 * state_nbytes),
        host_memory="50MB",
        storage=[str(tmp_path)],
    )
    assert not wrapped.offload.aside
    assert len(os.listdir(tmp_path)) == 1
    wrapped.offload.close()


@pytest.fixture(scope="module")
def expected_by_update():
    with one_thread():
        return {
            update: train("llama", {**reference("emulated"), "update": update}, n_steps=3, layers=6)
            for update in ("backward", "deferred")
        }


@pytest.mark.slow
@examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_budgets_and_speeds_have_the_same_bits(tmp_path_factory, expected_by_update, data):
    update = data.draw(st.sampled_from(["backward", "deferred"]))
    drawn = {
        "device": data.draw(st.sampled_from(["emulated", "cpu"])),
        "device_memory": data.draw(st.integers(500_000, 1_500_000)),
        "host_memory": data.draw(st.integers(850_000, 4_000_000)),
        "prefetch_blocks": data.draw(st.sampled_from([None, 1, 2, 5])),
        "activations": data.draw(st.sampled_from(["auto", "storage", "keep"])),
        "io_queue_depth": data.draw(st.sampled_from([1, 32])),
        "update": update,
    }
    if drawn["device"] == "emulated":
        drawn["bus_bytes_per_s"] = data.draw(st.sampled_from([None, 2e7, 2e8]))
    directory = tmp_path_factory.mktemp("any")
    try:
        got = train("llama", stored(directory, **drawn), n_steps=3, layers=6)
    except offload.BudgetError as refused:
        assert "Smallest that would do" in str(refused)  # refused up front, never in the middle
        return
    assert_same_bits(got, expected_by_update[update])
