"""With a batch given, the planner's choice runs: same bits, within the budgets, and every choice can be fixed."""

import json
import logging

import pytest

import offload
from offload.planner.plan import Plan
from tests.conftest import build, two_groups
from tests.integration.test_exactness import CHUNK, assert_same_bits, train

BATCH = (4, 16)
MACHINE = "laptop-8gb"


def planned(directory, **more):
    return {
        "device": "emulated", "step_aside": "never", "device_memory": "2MB", "host_memory": "4MB",
        "storage": [str(directory)], "batch": BATCH, "hardware": MACHINE, **more,
    }  # fmt: skip


def wrap(directory, **more):
    model = build("llama", layers=6)
    return offload.wrap(model, two_groups(model), chunk_elements=CHUNK, **planned(directory, **more))


def in_memory(**same):
    return {
        "device": "cpu", "step_aside": "never", "device_memory": "1GB", "host_memory": "1GB", "storage": [],
        "activations": "keep", **same,
    }  # fmt: skip


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"max_grad_norm": 0.5},
        {"update": "deferred"},
        {"micro_batches": 2},
        {"micro_batches": 4, "max_grad_norm": 0.5},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("memory", [{}, {"device_memory": "1MB"}, {"host_memory": "2500KB"}], ids=str)
def test_what_the_planner_chooses_has_the_bits_of_training_in_memory(tmp_path, same, memory):
    """Micro-batches, activation swapping, clipping and updates into the next forward, together and one by one."""
    settings = planned(tmp_path, **{"micro_batches": 1, **memory, **same})
    expected = train("llama", in_memory(**{"micro_batches": 1, **same}), n_steps=4, layers=6)
    assert_same_bits(train("llama", settings, n_steps=4, layers=6), expected)


def test_the_plan_is_printed_saved_and_runs_again_from_its_file(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="offload"):
        model, _ = wrap(tmp_path / "store")
    engine = model.offload
    engine.close()
    assert any("activations" in record.message for record in caplog.records)
    saved = tmp_path / "plan.json"
    saved.write_text(engine.plan.to_json())
    assert json.loads(saved.read_text())["micro_batches"] == engine.micro_batches
    for source in (str(saved), engine.plan.to_json()):
        again, _ = wrap(tmp_path / "store", plan=source, batch=None, hardware=None)
        assert again.offload.plan == engine.plan
        assert again.offload.placement == engine.placement
        again.offload.close()


def outcomes_of(plan):
    return {outcome for block in plan.activations for name, outcome in block.items() if name != "input"}


@pytest.mark.parametrize(
    ("choice", "holds"),
    [
        ({"micro_batches": 2}, lambda e: e.micro_batches == 2),
        ({"prefetch_blocks": 3}, lambda e: e.placement.n_slots == 4),
        ({"update": "deferred"}, lambda e: e.plan.update == "deferred"),
        ({"update": "backward"}, lambda e: e.plan.update == "backward"),
        *(
            ({"saved_activations": tier}, lambda e, tier=tier: outcomes_of(e.plan) == {tier})
            for tier in ("recompute", "host", "storage")
        ),
        (
            {"saved_activations": "device", "device_memory": "10MB"},
            lambda e: outcomes_of(e.plan) == {"device"},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_user_fixes_stays(tmp_path, choice, holds):
    model, _ = wrap(tmp_path, **choice)
    model.offload.close()
    assert holds(model.offload)


def test_planned_placement_stays_within_both_budgets(tmp_path):
    for device_kb, host_kb in ((1000, 1800), (1200, 3000), (4000, 9000)):
        model, _ = wrap(tmp_path, device_memory=device_kb * 1000, host_memory=host_kb * 1000)
        placement = model.offload.placement
        model.offload.close()
        assert placement.device_nbytes <= device_kb * 1000
        assert placement.host_nbytes <= host_kb * 1000


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"device_memory": "100KB"}, offload.BudgetError, "Any one of these would do|No plan exists below"),
        ({"device": "cpu"}, offload.ConfigError, "device with memory of its own"),
        ({"hardware": "pdp-11"}, offload.ConfigError, "pdp-11"),
        ({"plan": "/nowhere/plan.json"}, offload.ConfigError, "/nowhere/plan.json"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_planned_is_refused_before_anything_is_written(tmp_path, settings, error, words):
    directory = tmp_path / "store"
    with pytest.raises(error, match=words):
        wrap(directory, **settings)
    assert not directory.exists()


def test_a_plan_of_another_model_is_refused(tmp_path):
    model, _ = wrap(tmp_path)
    text = model.offload.plan.to_json()
    model.offload.close()
    other = build("llama", layers=4)
    with pytest.raises(offload.ConfigError, match="6 blocks, this one has 4"):
        offload.wrap(other, two_groups(other), **planned(tmp_path, plan=text))


def test_without_a_profile_of_the_machine_the_way_to_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "none.json"))
    with pytest.raises(offload.ConfigError, match="offload probe"):
        wrap(tmp_path, hardware=None)


def test_a_saved_plan_reads_back_equal(tmp_path):
    model, _ = wrap(tmp_path)
    model.offload.close()
    assert Plan.from_json(model.offload.plan.to_json()) == model.offload.plan
