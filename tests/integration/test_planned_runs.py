"""With a batch given, the planner's choice runs: same bits, within the budgets, and every choice can be fixed."""

import json
import logging

import pytest
import torch

import offload
from offload.planner.plan import INPUT, Plan
from offload.runtime import planning
from offload.stores.record_size import RECORD_NBYTES_FIXED
from tests.conftest import batches, build, slow_but, two_groups
from tests.integration.test_exactness import CHUNK, assert_same_bits, train, train_in_memory

pytestmark = pytest.mark.usefixtures("traced_once")

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
        pytest.param({"max_grad_norm": 0.5}, marks=pytest.mark.slow),
        pytest.param({"update": "deferred"}, marks=pytest.mark.slow),
        pytest.param({"micro_batches": 2}, marks=pytest.mark.slow),
        {"micro_batches": 4, "max_grad_norm": 0.5},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "memory",
    slow_but([{}, {"host_memory": "2500KB"}], [{}, {"device_memory": "1MB"}, {"host_memory": "2500KB"}]),
    ids=str,
)
def test_what_the_planner_chooses_has_the_bits_of_training_in_memory(tmp_path, same, memory):
    """Micro-batches, activation swapping, clipping and updates into the next forward, together and one by one."""
    settings = planned(tmp_path, **{"micro_batches": 1, **memory, **same})
    expected = train_in_memory("llama", in_memory(**{"micro_batches": 1, **same}), n_steps=4, layers=6)
    assert_same_bits(train("llama", settings, n_steps=4, layers=6), expected)


@pytest.mark.slow
def test_all_at_once_has_the_bits_of_training_in_memory(tmp_path):
    """Micro-batches, inputs and saved tensors swapped to host memory and storage, clipping that clips, updates while
    the next forward computes: each of them is seen to happen."""
    same = {"micro_batches": 2, "max_grad_norm": 0.5}
    settings = planned(tmp_path, saved_activations="storage", activations="host", **same)
    expected = train_in_memory("llama", in_memory(**same), n_steps=6, layers=6)
    assert_same_bits(train("llama", settings, n_steps=6, layers=6), expected)
    model, stepper = wrap(
        tmp_path, saved_activations="storage", activations="host", prefetch_blocks=1, **same
    )
    engine, ids, overlapped = model.offload, batches(24), False
    for number in range(
        0, 24, 2
    ):  # updates of so few parameters are soon done: until one is seen beside compute
        with engine.record() as spans:
            for part in ids[number : number + 2]:
                model(input_ids=part, labels=part).loss.backward()
                stepper.step()
                stepper.zero_grad()
        assert number > 4 or stepper.grad_norm > 0.5
        forwards = [s for s in spans if s.name.startswith("forward")]
        updates = [s for s in spans if s.name.startswith("update") and "root" not in s.name]
        again = forwards[len(engine.blocks) * engine.micro_batches :]
        overlapped = any(u.start_s < again[-1].end_s and u.end_s > again[0].start_s for u in updates)
        if overlapped and number >= 4:
            break
    assert overlapped
    assert engine.activations.nbytes_by_tier["host"] > 0
    assert engine.activations.nbytes_by_tier["storage"] > 0
    assert engine.plan.update == "deferred"
    engine.close()


@pytest.mark.parametrize(
    "memory", slow_but([{"host_memory": "2500KB"}], [{}, {"host_memory": "2500KB"}]), ids=str
)
def test_a_model_in_fp32_is_planned_as_it_is_computed(tmp_path, memory):
    """Two bytes a parameter to fetch and ten of state, in bf16; and the plan's bytes are those that move."""
    settings = planned(tmp_path, compute_dtype=torch.bfloat16, **memory)
    expected = train_in_memory(
        "llama", in_memory(compute_dtype=torch.bfloat16), torch.float32, n_steps=4, layers=6
    )
    assert_same_bits(train("llama", settings, torch.float32, n_steps=4, layers=6), expected)
    plans = {}
    for dtype, compute_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        model = build("llama", dtype, layers=6)
        model, _ = offload.wrap(
            model,
            two_groups(model),
            chunk_elements=CHUNK,
            **planned(tmp_path, compute_dtype=compute_dtype, **memory),
        )
        model.offload.close()
        plans[dtype] = model.offload.plan
    assert plans[torch.float32].state_format.param_nbytes == 2
    assert plans[torch.float32] == plans[torch.bfloat16]


def test_a_plan_for_another_dtype_is_refused(tmp_path):
    model, _ = wrap(tmp_path)
    text = model.offload.plan.to_json()
    model.offload.close()
    other = build("llama", torch.bfloat16, layers=6)
    with pytest.raises(offload.ConfigError, match="parameters of 4 bytes, this run computes with 2"):
        offload.wrap(other, two_groups(other), **planned(tmp_path, plan=text))


def written_per_step(directory, **more):
    """Counted bytes of one steady step, and the plan."""
    model, stepper = wrap(directory, **more)
    engine, counted = model.offload, []
    for ids in batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        stepper.step()
        stepper.zero_grad()
        engine.flush()
        counted.append(engine.counters()["written_bytes"])
    engine.close()
    return counted[-1] - counted[-2], engine.plan


@pytest.mark.parametrize("share", slow_but([0.4], [0.9, 0.4]))
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_a_limit_on_written_bytes_is_kept_by_the_run(tmp_path, share, more):
    free, plan = written_per_step(tmp_path, host_memory="3500KB", saved_activations="storage", **more)
    assert free == pytest.approx(plan.predicted.bytes["written"], rel=0.05)
    limit = int(share * free)
    kept, _ = written_per_step(tmp_path, host_memory="12MB", written_per_step=limit, **more)
    assert kept <= limit
    with pytest.raises(offload.BudgetError, match="written a step"):
        wrap(tmp_path, host_memory="1800KB", written_per_step=limit // 10, **more)


@pytest.mark.parametrize("host_memory", ["2500KB", "12MB"])
def test_a_durable_step_writes_what_its_plan_says(tmp_path, host_memory):
    """All state whatever host memory holds, and a commit record."""
    written, plan = written_per_step(tmp_path, durability="step", host_memory=host_memory)
    assert plan.durable_steps
    assert plan.predicted.bytes["written"] <= written <= plan.predicted.bytes["written"] + RECORD_NBYTES_FIXED


@pytest.mark.parametrize("prefetch", slow_but([1, 5], [1, 2, 5]))
@pytest.mark.parametrize("update", ["backward", "deferred"])
def test_what_a_device_of_its_own_moves_is_what_the_plan_and_the_formula_say(
    tmp_path, monkeypatch, prefetch, update
):
    """All on storage. State is read and written once, parameters written once; each turn finds those of three blocks in
    host memory, give or take one, as updates end early or late. With a slot for every block forward reads none, where
    updates are made in backward, and they read all.
    """
    chosen = planning.fixed_choices
    where = {"params_host_fraction": 0.0, "states_host_fraction": 0.0, "grads_host_fraction": 1.0}
    monkeypatch.setattr(planning, "fixed_choices", lambda config: {**chosen(config), **where})
    model, optimizer = wrap(
        tmp_path, device_memory="8MB", host_memory="8MB", prefetch_blocks=prefetch, update=update
    )
    engine = model.offload
    assert engine.placement.n_host_slots == 3
    counted = []
    for batch in batches(7):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        for block in [*engine.blocks, engine.root]:
            engine._scheduler.wait_resident(block)  # without beginning updates that wait for the next forward
        counted.append([*engine.counters().values(), engine.parts.resources.copies.h2d_bytes])
    n_steps = 4
    read, written, h2d = (
        (now - before) / n_steps for now, before in zip(counted[-1], counted[-1 - n_steps], strict=True)
    )
    layouts = [block.layout for block in engine.blocks]
    states, (one_block,) = sum(layout.state_nbytes for layout in layouts), {b.slot_nbytes for b in layouts}
    returns = prefetch == 5 and update == "backward"
    assert written == states + engine.root.layout.state_nbytes + 6 * one_block
    fetched = (6 if returns else 2 * 3) * one_block
    loaded = (6 + max(0, 6 - (prefetch + 1))) * one_block
    assert read == pytest.approx(states + engine.root.layout.state_nbytes + fetched, abs=one_block)
    assert h2d == pytest.approx(engine.root.layout.slot_nbytes + loaded, abs=one_block)
    predicted = engine.plan.predicted.bytes
    engine.close()
    assert predicted["written"] == pytest.approx(written, rel=0.01)
    assert predicted["read"] == pytest.approx(read, rel=0.01, abs=one_block)
    assert predicted["h2d"] == pytest.approx(h2d, rel=0.01, abs=one_block)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.Adafactor])
def test_a_durable_run_takes_the_storage_that_its_plan_says(tmp_path, rule):
    """With the record of each step, in which Adafactor's statistics of 366 tensors are."""
    model = build("llama", layers=40)
    model, _ = offload.wrap(
        model, rule(model.parameters(), lr=1e-3), **planned(tmp_path, host_memory="40MB"), durability="step"
    )
    taken = model.offload.parts.resources.store._end_nbytes
    assert taken <= model.offload.plan.predicted.peak_nbytes["storage"] <= 1.01 * taken
    model.offload.close(remove=True)


def test_durable_steps_that_the_free_bytes_cannot_hold_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    numel = sum(p.numel() for p in build("llama", layers=6).parameters())
    monkeypatch.setattr(planning, "free_nbytes", lambda directories: 18 * numel)
    wrap(tmp_path / "once")[0].offload.close()
    with pytest.raises(offload.BudgetError, match="of storage"):
        wrap(tmp_path / "twice", durability="step")
    assert not (tmp_path / "twice").exists()


def test_a_plan_for_another_durability_is_refused(tmp_path):
    model, _ = wrap(tmp_path)
    text = model.offload.plan.to_json()
    model.offload.close()
    with pytest.raises(offload.ConfigError, match="another durability"):
        wrap(tmp_path, plan=text, durability="step")


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
        *(
            ({"activations": tier}, lambda e, tier=tier: {b[INPUT] for b in e.plan.activations} == {tier})
            for tier in ("device", "host", "storage")
        ),
        (
            {"activations": "keep", "device_memory": "10MB"},
            lambda e: {o for b in e.plan.activations for o in b.values()} == {"device"},
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
        (
            {"activations": "keep", "device_memory": "2MB", "batch": (64, 64)},
            offload.BudgetError,
            "device_memory",
        ),
        ({"batch": None, "written_per_step": "1MB"}, offload.ConfigError, "written_per_step"),
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


@pytest.mark.parametrize(
    "choice",
    [{"micro_batches": 2}, {"activations": "host"}, {"update": "deferred"}, {"prefetch_blocks": 1}],
    ids=str,
)
def test_a_choice_beside_a_saved_plan_is_refused(tmp_path, choice):
    model, _ = wrap(tmp_path)
    text = model.offload.plan.to_json()
    model.offload.close()
    with pytest.raises(offload.ConfigError, match="a saved plan has its own choice"):
        wrap(tmp_path, plan=text, **choice)


def test_without_a_profile_of_the_machine_the_way_to_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "none.json"))
    with pytest.raises(offload.ConfigError, match="offload probe"):
        wrap(tmp_path, hardware=None)


def test_a_saved_plan_reads_back_equal(tmp_path):
    model, _ = wrap(tmp_path)
    model.offload.close()
    assert Plan.from_json(model.offload.plan.to_json()) == model.offload.plan
