"""State that stays on a device with memory of its own: updated there, with the same bits, and nothing of it moves."""

import logging
import re

import pytest
import torch

import offload
from offload.deepspeed import zero
from offload.errors import BudgetError, ConfigError
from offload.planner.placement import BlockBytes
from offload.planner.states_on_device import OnDevice, fill_device, most_to_ask_for, scratch_nbytes
from offload.tiers.emulated_device import EmulatedDevice
from offload.transfer.copies import Copies
from tests.conftest import batches, build, slow_but, two_groups
from tests.cuda import CUDA, ready
from tests.device_memory import allocations, held_at_allocations
from tests.integration.test_exactness import assert_same_bits, in_memory_on, stored, train, train_in_memory
from tests.integration.test_run_ahead import (
    accumulating_from_third,
    failing_midway,
    once,
    same,
    trained,
    two_forwards_from_third,
)

ROOMY = {"device_memory": "30MB", "host_memory": "4MB"}
MORE_HOST = {"device_memory": "30MB", "host_memory": "30MB"}
ALL_BUT_TWO = {**ROOMY, "states_on_device": "20MB"}


@pytest.fixture(params=["emulated", CUDA])
def device(request, monkeypatch):
    with ready(request.param, monkeypatch) as name:
        yield name


# ---- the same bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", slow_but(["20MB"], ["1200KB", "20MB"]))
@pytest.mark.parametrize("update", ["backward", "deferred"])
@pytest.mark.parametrize("step_of", [once, accumulating_from_third, failing_midway])
def test_a_step_that_is_made_on_the_device_has_the_bits_of_one_that_is_streamed(
    tmp_path, device, step_of, update, states
):
    if (step_of, update) == (failing_midway, "backward"):
        step_of = two_forwards_from_third  # a failed backward has updated blocks already
    streamed, _ = trained(tmp_path, update, step_of, device=device, **ROOMY, states_on_device=0)
    stays, _ = trained(tmp_path, update, step_of, device=device, **ROOMY, states_on_device=states)
    assert same(stays, streamed)


LOOPS = {
    "clipping": ({}, {"max_grad_norm": 0.5}),
    "accumulating and clipping": ({"accumulate": 2}, {"max_grad_norm": 0.5}),
    "frozen": ({"freeze": "layers.1."}, {}),
    "frozen root": ({"freeze": "embed"}, {"update": "deferred"}),
    "tied": ({"tie": True}, {}),
    "micro-batches": ({}, {"micro_batches": 4, "activations": "storage"}),
}


@pytest.mark.parametrize("loop", slow_but(["clipping", "tied", "micro-batches"], list(LOOPS)))
@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.bfloat16, torch.float32]))
def test_every_loop_has_the_bits_of_training_in_memory(tmp_path, device, loop, dtype):
    options, settings = LOOPS[loop]
    alike = {key: settings[key] for key in ("micro_batches", "max_grad_norm", "update") if key in settings}
    expected = train_in_memory(
        "llama", {**in_memory_on(device, step_aside="never"), **alike}, dtype, n_steps=5, **options
    )
    found = train(
        "llama", stored(tmp_path, device=device, **ALL_BUT_TWO, **settings), dtype, n_steps=5, **options
    )
    assert_same_bits(found, expected)


def by_states(device, steps, kind="llama", make=two_groups):
    """Parameters after `steps(model, optimizer)`, without state on the device and with."""
    found = []
    for states in (0, "20MB"):
        model = build(kind, torch.bfloat16)
        model, optimizer = offload.wrap(
            model, make(model), device=device, step_aside="never", states_on_device=states, **MORE_HOST
        )
        steps(model, optimizer)
        found.append({n: p.cpu().clone() for block in model.offload.iter_blocks() for n, p in block})
        model.offload.close()
    return found


def backward_of(model, batch):
    batch = batch.to(model.offload.device)
    model(input_ids=batch, labels=batch).loss.backward()


def take_steps(model, optimizer, n_steps=4):
    for batch in batches(n_steps):
        backward_of(model, batch)
        optimizer.step()
        optimizer.zero_grad()


MADE = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", slow_but(["sgd"], list(MADE)))
def test_every_optimizer_has_the_same_bits(device, name):
    assert same(*by_states(device, take_steps, "gpt2", MADE[name]))


def test_a_step_without_a_last_backward_uses_what_was_accumulated(device):
    def steps(model, optimizer):
        for batch in batches(2):
            with model.offload.no_sync():
                backward_of(model, batch)
            optimizer.step()

    assert same(*by_states(device, steps))


def test_steps_inside_gathered_parameters_compute_with_what_was_updated(device):
    """Copies are shown of what stays where it is computed with; an update does not change them."""

    def steps(model, optimizer):
        zero.remember(model.offload, stage=3)
        with zero.GatheredParameters(list(model.parameters())):
            take_steps(model, optimizer, 3)

    assert same(*by_states(device, steps))


# ---- nothing moves, within the budget ------------------------------------------------------------------------


def test_nothing_of_it_crosses_the_bus(tmp_path, monkeypatch):
    names = set()

    def noting(way):
        copy = getattr(Copies, way)

        def noted(self, *args, **kwargs):
            names.add(next(arg for arg in args if isinstance(arg, str)))
            return copy(self, *args, **kwargs)

        monkeypatch.setattr(Copies, way, noted)

    for way in ("h2d", "d2h", "h2d_when", "h2d_in_parts"):
        noting(way)
    trained(tmp_path, "backward", once, device="emulated", **ALL_BUT_TWO)
    moved = {name for name in names if name.startswith(("load", "grad_out"))}
    assert moved == {f"{what} {block}" for what in ("load", "grad_out") for block in (4, 5)}


@pytest.mark.parametrize("update", ["backward", "deferred"])
@pytest.mark.parametrize("states", ["1200KB", "20MB"])
def test_device_memory_taken_is_what_the_placement_says_and_the_budget_allows(monkeypatch, update, states):
    taken = allocations(monkeypatch)
    model = build("llama", torch.bfloat16, layers=6)
    model, _ = offload.wrap(
        model, two_groups(model), device="emulated", update=update, step_aside="never", chunk_elements=4096,
        states_on_device=states, **MORE_HOST,
    )  # fmt: skip
    placed = model.offload.placement
    model.offload.close()
    assert placed.on_device_root
    assert sum(taken) <= placed.device_nbytes <= 30_000_000
    assert placed.device_nbytes - sum(taken) <= 8 * 4096  # planes in whole pages


@pytest.mark.parametrize("states", ["1200KB", "20MB"])
def test_a_model_that_is_on_the_device_leaves_as_fast_as_its_memory_is_taken(monkeypatch, states):
    monkeypatch.setattr(
        "offload.planner.states_on_device.PIECE_ELEMENTS", 4096
    )  # little, as of a large model
    model = build("llama", torch.bfloat16, layers=6, vocab=4096)
    held = held_at_allocations(monkeypatch, model)
    model, _ = offload.wrap(
        model, two_groups(model), device="emulated", step_aside="never", states_on_device=states, **MORE_HOST
    )
    placed = model.offload.placement
    model.offload.close()
    assert placed.on_device_root == (states == "20MB")
    assert max(held) <= placed.device_nbytes


def test_slots_are_as_large_as_what_is_streamed_needs(monkeypatch):
    taken, allocate = [], EmulatedDevice.allocate
    monkeypatch.setattr(
        EmulatedDevice, "allocate", lambda self, nbytes: (taken.append(nbytes), allocate(self, nbytes))[1]
    )
    model = build("llama", torch.bfloat16, layers=5)
    large = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    model.model.layers[0].mlp.large = large
    model, _ = offload.wrap(
        model, two_groups(model), device="emulated", step_aside="never", states_on_device="20MB", **MORE_HOST
    )
    placed = model.offload.placement
    model.offload.close()
    assert placed.on_device_blocks > 0
    assert sum(taken) <= placed.device_nbytes


def test_host_memory_has_no_copy_of_it():
    taken = {}
    for states in (0, "20MB"):
        model = build("llama", torch.bfloat16, layers=6)
        model, _ = offload.wrap(
            model, two_groups(model), device="emulated", step_aside="never", states_on_device=states,
            **MORE_HOST,
        )  # fmt: skip
        parts = model.offload.parts
        stays = [block for block in [*parts.blocks, parts.root] if block.on_device]
        taken[states] = parts.placement.host_nbytes - 4 * sum(b.plane.numel() for b in parts.out_buffers)
        saved = sum(b.layout.slot_nbytes + b.layout.state_nbytes for b in stays)
        saved += 4 * parts.root.layout.grad_elements * parts.root.on_device
        model.offload.close()
    assert taken[0] - taken["20MB"] == saved > 0


@pytest.mark.parametrize("room", range(0, 4000, 250))
@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_the_roots_state_comes_first_then_that_of_the_first_blocks(room, keeps_gradients):
    blocks, root = [BlockBytes(20, (100,), 40)] * 6, BlockBytes(50, (300, 200), 100)
    stays = fill_device(blocks, root, room, keeps_gradients=keeps_gradients)
    left = room - scratch_nbytes(100)
    assert stays.root == (left >= 500)
    left -= 500 * stays.root
    each = 120 + 40 * keeps_gradients
    assert stays.n_blocks == max(0, min(4, left // each))
    if stays:
        nbytes = stays.nbytes(blocks, root, keeps_gradients=keeps_gradients)
        assert nbytes <= room + (150 if stays.root else 0)


def test_blocks_whose_gradients_need_the_largest_buffers_are_streamed():
    blocks = [BlockBytes(20, (100,), 40), BlockBytes(20, (100,), 80)] + [BlockBytes(20, (100,), 40)] * 4
    assert fill_device(blocks, BlockBytes(0, (), 0), 10**6, keeps_gradients=False) == OnDevice(False, 1)


def test_parameters_are_read_in_host_memory_wherever_they_are(device):
    """Adapters that stay are merged with weights that are streamed, and GatheredParameters shows host memory."""
    model = build("llama", torch.bfloat16)
    model, _ = offload.wrap(
        model, two_groups(model), device=device, step_aside="never", states_on_device="20MB", **MORE_HOST
    )
    assert model.offload.root.on_device
    assert model.offload.blocks[0].on_device
    kinds = {p.device.type for block in model.offload.iter_blocks() for _, p in block}
    model.offload.close()
    assert kinds == {"cpu"}


# ---- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"device": "cpu"}, "computes in host memory"),
        ({"optimizer_state": "bf16"}, "bfloat16"),
        ({"durability": "step"}, "durability='step'"),
    ],
)
def test_what_cannot_stay_is_refused_where_it_is_asked_for_and_streamed_where_not(tmp_path, settings, why):
    alike = {"device": "emulated", "step_aside": "never", "storage": [str(tmp_path)], **MORE_HOST, **settings}
    model = build("llama", torch.bfloat16)
    with pytest.raises(ConfigError, match=why):
        offload.wrap(model, two_groups(model), states_on_device="1MB", **alike)
    model, _ = offload.wrap(model, two_groups(model), **alike)
    assert not model.offload.placement.on_device_root
    model.offload.close()


@pytest.mark.parametrize(("device_memory", "layers"), [("2MB", 4), ("2MB", 12), ("250KB", 4)])
def test_more_than_the_device_holds_is_refused_with_figures_that_do(device_memory, layers):
    def placed(**settings):
        model = build("llama", torch.bfloat16, layers=layers)
        settings = {"device_memory": device_memory, "states_on_device": "10MB", **settings}
        model, _ = offload.wrap(model, two_groups(model), device="emulated", step_aside="never", **settings)
        model.offload.close()
        return model.offload.placement

    with pytest.raises(BudgetError) as refused:
        placed()
    said = str(refused.value)
    assert "device_memory=-" not in said
    assert "for optimizer state that stays there" in said
    device_nbytes = int(re.search(r"Smallest that would do: device_memory='(\d+)'", said)[1])
    assert placed(device_memory=device_nbytes).device_nbytes <= device_nbytes
    with pytest.raises(BudgetError):
        placed(device_memory=device_nbytes - 1)
    instead = re.search(r"; or states_on_device='?(\d+)'?", said)
    also = re.search(r" and device_memory='(\d+)'$", said)
    found = placed(states_on_device=int(instead[1]), **({"device_memory": int(also[1])} if also else {}))
    assert found.on_device_root == (device_memory == "2MB")


@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("root_state_nbytes", [0, 5, 40])
def test_what_is_named_instead_is_the_most_that_fits(root_state_nbytes, keeps_gradients):
    blocks = [BlockBytes(2, (6,), 4), BlockBytes(1, (3,), 2), *[BlockBytes(2, (6,), 4)] * 4]
    root = BlockBytes(3, (root_state_nbytes,), 6)

    def of(asked_nbytes):
        return fill_device(blocks, root, asked_nbytes, keeps_gradients=keeps_gradients)

    def fits(stays, device_nbytes):
        """Two slots and a gradient buffer beside it, and the root's where that is streamed."""
        streamed_root = 0 if stays.root else root.slot_nbytes + root.grad_nbytes
        taken = stays.nbytes(blocks, root, keeps_gradients=keeps_gradients)
        return taken + streamed_root + 2 * 2 + 4 <= device_nbytes

    for device_nbytes in range(17, 140):
        fitting = [of(n) for n in range(200) if fits(of(n), device_nbytes)]
        most = most_to_ask_for(blocks, root, device_nbytes, keeps_gradients=keeps_gradients)
        assert of(most) == fitting[-1]


def test_by_itself_a_device_of_fast_memory_keeps_what_half_of_it_holds_beside_four_slots(monkeypatch, caplog):
    monkeypatch.setattr(EmulatedDevice, "updates_faster", True)
    caplog.set_level(logging.INFO, logger="offload")
    model = build("llama", torch.bfloat16, layers=6)
    settings = {"device": "emulated", "step_aside": "never", "device_memory": "12MB", "host_memory": "30MB"}
    model, _ = offload.wrap(model, two_groups(model), **settings)
    placed, root = model.offload.placement, model.offload.root.layout
    slot, state, grad = (
        max(getattr(block.layout, name) for block in model.offload.blocks)
        for name in ("slot_nbytes", "state_nbytes", "grad_elements")
    )
    model.offload.close()
    room = 6_000_000 - root.slot_nbytes - 4 * root.grad_elements - 4 * slot - 2 * 4 * grad
    room -= scratch_nbytes(4 * max(grad, root.grad_elements)) + root.state_nbytes
    assert placed.on_device_root
    assert placed.on_device_blocks == min(4, room // (slot + state)) > 0
    assert "updated there: the root's state and that of the first" in caplog.text


@pytest.mark.parametrize("prefetch_blocks", [None, 5])
def test_by_itself_it_leaves_half_of_the_device_to_what_computes(monkeypatch, prefetch_blocks):
    monkeypatch.setattr(EmulatedDevice, "updates_faster", True)
    model = build("llama", torch.bfloat16, layers=24)
    model, _ = offload.wrap(
        model, two_groups(model), device="emulated", step_aside="never", device_memory="10MB", host_memory="30MB",
        prefetch_blocks=prefetch_blocks,
    )  # fmt: skip
    placed = model.offload.placement
    model.offload.close()
    assert placed.on_device_blocks > 0
    assert placed.n_slots >= 3
    assert placed.device_nbytes <= 5_000_000


# ---- planned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["backward", "deferred"])
def test_a_planned_run_keeps_and_moves_what_its_plan_says(tmp_path, monkeypatch, traced_once, update):
    taken, allocate = [], EmulatedDevice.allocate
    monkeypatch.setattr(
        EmulatedDevice, "allocate", lambda self, nbytes: (taken.append(nbytes), allocate(self, nbytes))[1]
    )
    model = build("llama", layers=6)
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=2048, device="emulated", step_aside="never", update=update,
        device_memory="6MB", host_memory="8MB", storage=[str(tmp_path)], batch=(4, 16), hardware="laptop-8gb",
        states_on_device="3MB",
    )  # fmt: skip
    engine = model.offload
    plan, placed = engine.plan, engine.placement
    assert plan.on_device_root or plan.on_device_blocks
    assert (placed.on_device_root, placed.on_device_blocks) == (plan.on_device_root, plan.on_device_blocks)
    assert [block.on_device for block in engine.blocks] == [i < plan.on_device_blocks for i in range(6)]
    assert sum(taken) <= 6_000_000
    counted = []
    for batch in batches(6):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        for block in [*engine.blocks, engine.root]:
            engine._scheduler.wait_resident(block)
        copies = engine.parts.resources.copies
        counted.append([*engine.counters().values(), copies.h2d_bytes, copies.d2h_bytes])
    read, written, h2d, d2h = (
        (now - before) / 3 for now, before in zip(counted[-1], counted[-4], strict=True)
    )
    predicted = plan.predicted.bytes
    one_block = max(block.layout.slot_nbytes for block in engine.blocks)
    engine.close()
    assert predicted["written"] == pytest.approx(written, rel=0.02)
    assert predicted["read"] == pytest.approx(read, rel=0.02, abs=one_block)
    assert predicted["h2d"] == pytest.approx(h2d, rel=0.02, abs=one_block)
    assert predicted["d2h"] == pytest.approx(d2h, rel=0.02, abs=one_block)


def test_a_plan_for_such_state_is_refused_where_it_cannot_stay(tmp_path, traced_once):
    model = build("llama", layers=6)
    settings = {
        "chunk_elements": 2048, "device": "emulated", "step_aside": "never", "device_memory": "6MB",
        "host_memory": "8MB", "storage": [str(tmp_path)],
    }  # fmt: skip
    wrapped, _ = offload.wrap(
        model, two_groups(model), **settings, batch=(4, 16), hardware="laptop-8gb", states_on_device="3MB"
    )
    made = wrapped.offload.plan
    plan = made.to_json()
    wrapped.offload.close()
    model = build("llama", layers=6)
    with pytest.raises(ConfigError, match="states_on_device=0 and plan="):
        offload.wrap(model, two_groups(model), **settings, plan=plan, states_on_device=0)
    with pytest.raises(ConfigError, match="keeps optimizer state in device memory"):
        offload.wrap(model, two_groups(model), **{**settings, "device": "cpu"}, plan=plan)
    too_many = made.model_copy(update={"on_device_blocks": 5}).to_json()
    with pytest.raises(ConfigError, match="at most 4 can"):
        offload.wrap(model, two_groups(model), **settings, plan=too_many)


def test_a_saved_plan_whose_updates_wait_counts_the_gradients_that_stay(tmp_path, monkeypatch, traced_once):
    taken, allocate = [], EmulatedDevice.allocate
    monkeypatch.setattr(
        EmulatedDevice, "allocate", lambda self, nbytes: (taken.append(nbytes), allocate(self, nbytes))[1]
    )
    settings = {
        "chunk_elements": 2048, "device": "emulated", "step_aside": "never", "device_memory": "6MB",
        "host_memory": "8MB", "storage": [str(tmp_path)],
    }  # fmt: skip
    asked = {"batch": (4, 16), "hardware": "laptop-8gb", "states_on_device": "3MB", "update": "deferred"}
    model = build("llama", layers=6)
    model, _ = offload.wrap(model, two_groups(model), **settings, **asked)
    plan, first = model.offload.plan, model.offload.placement
    model.offload.close()
    assert plan.on_device_blocks > 0
    taken.clear()
    model = build("llama", layers=6)
    model, _ = offload.wrap(model, two_groups(model), **settings, plan=plan.to_json())
    again = model.offload.placement
    model.offload.close()
    assert sum(taken) <= again.device_nbytes == first.device_nbytes


def test_a_plan_after_the_first_step_counts_it(monkeypatch, caplog):
    """What stays takes nothing of what backward keeps, and the plan's step is that of what is streamed."""
    caplog.set_level(logging.INFO, logger="offload")
    monkeypatch.setattr("offload.runtime.late_plan.STEP_FLOPS_MIN", 0.0)
    model = build("llama", torch.bfloat16, layers=6)
    model, optimizer = offload.wrap(
        model, two_groups(model), device="emulated", step_aside="never", states_on_device="3MB", **MORE_HOST
    )
    for batch in batches(2):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    plan, placed = model.offload.plan, model.offload.placement
    model.offload.close()
    assert plan is not None
    assert (plan.on_device_root, plan.on_device_blocks) == (placed.on_device_root, placed.on_device_blocks)
    streamed = 6 - plan.on_device_blocks
    numel = sum(
        s.numel for b in model.offload.blocks[plan.on_device_blocks :] for s in b.layout.trainable_segments
    )
    assert streamed > 0
    assert plan.predicted.bytes["d2h"] >= 2 * numel
    assert plan.predicted.peak_nbytes["device"] <= 30_000_000
