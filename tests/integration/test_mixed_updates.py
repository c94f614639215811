"""Updates of some blocks wait for the next forward, those of the others are made during backward."""

from __future__ import annotations

import pytest

import offload
from offload.planner.hardware import save_hardware
from offload.runtime import planning
from tests.conftest import batches, slow_but
from tests.integration.test_exactness import assert_same_bits, train, train_in_memory
from tests.integration.test_planned_runs import in_memory, planned, wrap
from tests.planning import small_machine

pytestmark = pytest.mark.usefixtures("traced_once")

PLACES = {
    "budgets": {},
    "storage": {"params_host_fraction": 0.0, "states_host_fraction": 0.0, "grads_host_fraction": 0.0},
    "gradients in host memory": {"states_host_fraction": 0.0, "grads_host_fraction": 1.0},
    "parameters in host memory": {"params_host_fraction": 1.0, "grads_host_fraction": 0.0},
}


def some_wait(monkeypatch, **where):
    chosen = planning.fixed_choices
    monkeypatch.setattr(
        planning, "fixed_choices", lambda config: {**chosen(config), "deferred_fraction": 0.5, **where}
    )


@pytest.mark.parametrize("place", slow_but(["budgets", "storage"], PLACES))
@pytest.mark.parametrize(
    "more",
    slow_but(
        [{"micro_batches": 1}, {"micro_batches": 2, "durability": "step"}],
        [
            {"micro_batches": 1},
            {"micro_batches": 4},
            {"micro_batches": 1, "durability": "step"},
            {"micro_batches": 2, "durability": "step"},
        ],
    ),
    ids=str,
)
@pytest.mark.parametrize("device", ["emulated", pytest.param("cpu", marks=pytest.mark.slow)])
def test_a_plan_in_which_some_blocks_wait_has_the_bits_of_training_in_memory(
    tmp_path, monkeypatch, place, more, device
):
    expected = train_in_memory("llama", in_memory(micro_batches=more["micro_batches"]), n_steps=4, layers=6)
    some_wait(monkeypatch, **PLACES[place])
    room = {"device_memory": "2MB", "host_memory": "6MB"}
    if device == "cpu":
        room = {"device_memory": "6MB", "host_memory": "6MB", "hardware": shared_machine(tmp_path)}
    settings = planned(tmp_path / "store", device=device, **{**room, **more})
    assert_same_bits(train("llama", settings, n_steps=4, layers=6), expected)


def shared_machine(directory):
    """The file of a profile whose device computes in host memory."""
    path = str(directory / "machine.json")
    save_hardware(small_machine(1, True), path)
    return path


@pytest.mark.parametrize("place", slow_but(["budgets"], PLACES))
def test_gradients_that_wait_are_added_up_over_backwards(tmp_path, monkeypatch, place):
    same = {"micro_batches": 1}
    expected = train_in_memory("llama", in_memory(**same), n_steps=3, layers=6, accumulate=3)
    some_wait(monkeypatch, **PLACES[place])
    settings = planned(tmp_path, host_memory="6MB", **same)
    assert_same_bits(train("llama", settings, n_steps=3, layers=6, accumulate=3), expected)


@pytest.mark.parametrize("place", slow_but(["storage"], PLACES))
def test_those_that_wait_are_updated_after_step_and_move_the_bytes_of_the_plan(tmp_path, monkeypatch, place):
    some_wait(monkeypatch, **PLACES[place])
    model, optimizer = wrap(tmp_path, device_memory="2MB", host_memory="6MB", micro_batches=1)
    engine, counted = model.offload, []
    plan, one_block = engine.plan, engine.blocks[0].layout.slot_nbytes
    assert plan.update == "mixed"
    assert len(plan.deferred_blocks) == 3
    for ids in batches(7):
        model(input_ids=ids, labels=ids).loss.backward()
        assert [b.updated_since_step for b in engine.blocks] == [
            i not in plan.deferred_blocks for i in range(6)
        ]
        optimizer.step()
        optimizer.zero_grad()
        for block in [*engine.blocks, engine.root]:
            engine._scheduler.wait_resident(block)  # without beginning updates that wait for the next forward
        counted.append([*engine.counters().values(), engine.parts.resources.copies.h2d_bytes])
    engine.close()
    moved = [(last - before) / 4 for before, last in zip(counted[-5], counted[-1], strict=True)]
    for name, nbytes in zip(("read", "written", "h2d"), moved, strict=True):
        assert plan.predicted.bytes[name] == pytest.approx(nbytes, rel=0.01, abs=one_block), name


@pytest.mark.parametrize("durability", ["checkpoint", "step"])
def test_a_save_beside_training_holds_its_step_and_is_gone_on_from(tmp_path, monkeypatch, durability):
    some_wait(monkeypatch, **PLACES["storage"])
    room = {"device_memory": "2MB", "host_memory": "6MB", "micro_batches": 1, "durability": durability}

    def steps(model, optimizer, numbers):
        losses = []
        for number in numbers:
            ids = batches(6)[number]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def parameters(model):
        return {name: t.clone() for block in model.offload.iter_blocks() for name, t in block}

    model, optimizer = wrap(tmp_path / "first", **room)
    losses = steps(model, optimizer, range(3))
    at_save = parameters(model)
    saved = offload.save(model, str(tmp_path / "saved"), wait=False)
    losses += steps(model, optimizer, range(3, 6))
    model.offload.wait_saved()
    expected = parameters(model)
    model.offload.close(remove=True)
    again, optimizer = wrap(tmp_path / "second", **room)
    assert offload.resume(again, saved).step == 3
    assert_same_bits((parameters(again), []), (at_save, []))
    assert steps(again, optimizer, range(3, 6)) == losses[3:]
    assert_same_bits((parameters(again), []), (expected, []))
    again.offload.close(remove=True)
