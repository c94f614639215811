"""Bytes and seconds of a step against closed formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.planner.cost_model import CostModel, Load
from offload.planner.hardware import Drive
from offload.planner.plan import FP32, FULL_MASTER, SPLIT_MASTER
from offload.planner.rates import rates_of, storage_rates
from tests.planning import gpt, lohan_machine

LAYERS = 10


def load(**changes) -> Load:
    """Nothing in host memory but the block inputs, updates during backward."""
    values = dict(
        deferred_fraction=0.0,
        params_host_nbytes=0.0,
        states_host_nbytes=0.0,
        root_states_host_nbytes=0.0,
        grads_spilled_nbytes=0.0,
        swapped_host_nbytes=0.0,
        swapped_storage_nbytes=0.0,
        recompute_flops=0.0,
        micro_batches=1,
        n_slots=2,
        n_grad_buffers=2,
        boundary_on_device=True,
    )
    return Load(**{**values, **changes})


def model(state, batch=4, shares_host=False, width=2) -> CostModel:
    machine = lohan_machine(2).model_copy(update={"shares_host": shares_host})
    return CostModel(gpt("small", LAYERS, 256, tokens=64, vocab=1000, width=width), machine, state, batch)


@pytest.mark.parametrize(
    ("state", "width", "deferred", "read", "written"),
    [
        (SPLIT_MASTER, 2, 0.0, 14, 12),
        (SPLIT_MASTER, 2, 1.0, 14, 12),
        (FULL_MASTER, 2, 0.0, 16, 14),
        (FP32, 4, 0.0, 16, 12),
    ],
)
def test_bytes_a_parameter_are_those_of_the_format(state, width, deferred, read, written) -> None:
    """A parameter of a block; what stays in host slots at the turns saves its share of two reads."""
    cost = model(state, width=width)
    forward, backward, _ = cost.traffic(load(deferred_fraction=deferred))
    turns = 2 * width * 3 / LAYERS
    assert (forward.read + backward.read) / cost.trainable == pytest.approx(read - turns)
    assert (forward.written + backward.written) / cost.trainable == pytest.approx(written)


def test_what_returns_to_a_device_of_its_own_from_the_update_is_read_for_the_next_update_alone() -> None:
    cost = model(SPLIT_MASTER)
    forward, backward, _ = cost.traffic(load(n_slots=LAYERS))
    assert forward.read == 0
    assert backward.read / cost.trainable == pytest.approx(12)
    assert backward.h2d == 0


def test_on_a_cpu_nothing_crosses_a_bus_and_both_turns_save_reads() -> None:
    cost = model(SPLIT_MASTER, shares_host=True)
    forward, backward, _ = cost.traffic(load())
    assert forward.h2d == backward.h2d == backward.d2h == 0
    assert (forward.read + backward.read) / cost.trainable == pytest.approx(14 - 2 * 2 * 2 / LAYERS)


def test_a_gigabyte_in_host_memory_saves_what_placement_says() -> None:
    """A parameter plane three times its bytes (less what the slots at the turns save anyway), state twice."""
    cost = model(SPLIT_MASTER)

    def moved(**changes) -> float:
        forward, backward, tail = cost.traffic(load(**changes))
        return sum(t.read + t.written for t in (forward, backward, tail))

    params = float(sum(cost.slot_nbytes))
    states = float(sum(cost.state_nbytes))
    assert moved() - moved(params_host_nbytes=params) == pytest.approx((3 - 2 * 3 / LAYERS) * params)
    assert moved() - moved(states_host_nbytes=states) == pytest.approx(2 * states)


def test_backward_takes_as_long_as_its_busiest_resource() -> None:
    cost = model(FULL_MASTER)
    found = cost.cost(load())
    p, rates = cost.trainable, cost.rates
    read = 12 * p + 2 * p * (1 - 3 / LAYERS)
    storage_s = read / (2 * 6.5e9) + 14 * p / (2 * 3.4e9)
    assert found.backward["storage"] == pytest.approx(storage_s)
    assert found.backward["compute"] == pytest.approx(cost.backward_flops / 148.68e12)
    assert found.backward["cpu"] == pytest.approx(p / rates.update_params_per_s)
    update_s = p / LAYERS * 2 / 24.8e9 + max(12 * p / LAYERS / 13e9, p / LAYERS / rates.update_params_per_s)
    compute_s = found.backward["compute"] + LAYERS * 2e-4 + update_s
    busy = {**found.backward, "compute": compute_s}
    assert found.backward_s == pytest.approx(sum(s**8 for s in busy.values()) ** (1 / 8))
    assert found.step_s >= found.lower_bound_s


def test_updates_that_do_not_overlap_with_their_reads_add_up() -> None:
    cost = CostModel(gpt("wide", LAYERS, 512, tokens=16), lohan_machine(1), FULL_MASTER, 1, float("inf"))
    found = cost.cost(load(serial_update=True))
    assert found.backward_s == pytest.approx(found.backward["storage"] + found.backward["cpu"])


def test_flops_are_six_a_parameter_and_token_plus_attention() -> None:
    cost = model(SPLIT_MASTER)
    tokens, hidden = 4 * 64, 256
    matmuls = 6.0 * tokens * (12 * hidden * hidden * LAYERS + hidden * 1000)
    attention = 3 * 4.0 * tokens * 64 * hidden * LAYERS
    assert cost.forward_flops + cost.backward_flops == pytest.approx(matmuls + attention)


def test_frozen_blocks_write_nothing_and_skip_the_gradient_of_their_weights() -> None:
    work = gpt("small", LAYERS, 256, tokens=64, vocab=1000)
    frozen = tuple(
        type(b)(**{**vars(b), "trainable_numel": 0, "frozen_numel": b.trainable_numel}) for b in work.blocks
    )
    cost = CostModel(type(work)(**{**vars(work), "blocks": frozen}), lohan_machine(2), SPLIT_MASTER, 4)
    forward, backward, _ = cost.traffic(load())
    assert forward.written == backward.written == 0
    block_flops = 4 * sum(b.flops_per_sample for b in work.blocks)
    assert backward.flops == pytest.approx(block_flops + 4 * 2 * work.root_flops_per_sample)


@pytest.mark.parametrize(("state", "late"), [(SPLIT_MASTER, 0.0), (SPLIT_MASTER, 1.0), (FULL_MASTER, 1.0)])
def test_frozen_parameters_in_host_memory_save_reads_and_trained_ones_writes_too(state, late) -> None:
    """Every second block is frozen; half of the parameters are in host memory, those of the ones or of the others. With
    a full master updates do not read the trained ones, which are then only read in backward."""
    work = gpt("small", LAYERS, 256, tokens=64, vocab=1000)
    blocks = list(work.blocks)
    for i in range(0, LAYERS, 2):
        blocks[i] = replace(blocks[i], trainable_numel=0, frozen_numel=blocks[i].trainable_numel)
    cost = CostModel(replace(work, blocks=tuple(blocks)), lohan_machine(2), state, 4)
    half = 2.0 * cost.trainable
    turns = 1 - 3 / (LAYERS / 2)  # of five blocks on storage three stay in host memory
    for frozen_in_host in (True, False):
        forward, backward, _ = cost.traffic(
            load(deferred_fraction=late, params_host_nbytes=half, frozen_host_nbytes=half * frozen_in_host)
        )
        states = state.state_nbytes * cost.trainable
        assert forward.written + backward.written == pytest.approx(states + half * frozen_in_host)
        reads = 1 if frozen_in_host and not state.update_reads_param else 2
        assert forward.read + backward.read == pytest.approx(states + reads * half * turns)


@pytest.mark.parametrize(("mixed", "capacity"), [(None, 1.0), (4.0, 1.5), (2.0, 0.75), (1e3, 2.0)])
def test_a_drive_mixes_as_its_profile_says(mixed, capacity) -> None:
    """Equal parts at M together: each half M, which takes M/2R + M/2W drive seconds a second."""
    machine = lohan_machine(1)
    drive = Drive(read_bytes_per_s=4.0, write_bytes_per_s=2.0, mixed_bytes_per_s=mixed)
    found = storage_rates(machine.model_copy(update={"drives": (drive,)}))
    assert found is not None
    assert found.capacity == pytest.approx(capacity)
    if mixed == 4.0:
        assert found.seconds(2.0, 2.0) == pytest.approx(1.0)


def test_a_shared_link_caps_the_drives_together() -> None:
    machine = lohan_machine(12).model_copy(update={"storage_read_bytes_per_s": 20e9})
    found = rates_of(machine, 2).storage
    assert found is not None
    assert found.seconds(20e9, 0.0) == pytest.approx(1.0)
    assert found.seconds(0.0, 12 * 3.4e9) == pytest.approx(1.0)
