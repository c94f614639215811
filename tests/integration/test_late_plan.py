"""Without `batch=`, what backward needs is planned when the first step has shown its batch: same bits, more kept, and
never more on storage."""

import logging

import pytest
import torch
from torch import nn

import offload
from offload.planner.plan import INPUT
from offload.runtime import late_plan
from tests.conftest import batches, build, two_groups

ROOMY = {"device_memory": "8MB", "host_memory": "8MB"}


@pytest.fixture
def worth_it(monkeypatch, tmp_path):
    """Every step is worth a plan, and this machine has no profile."""
    monkeypatch.setattr(late_plan, "STEP_FLOPS_MIN", 0.0)
    monkeypatch.setattr(late_plan, "_PROBE_S", 0.001)
    monkeypatch.setattr(late_plan, "_SUM_NBYTES", 1 << 20)
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "none.json"))


def trained(tmp_path, n_steps=4, dtype=torch.bfloat16, dropout=0.0, shape=None, batch=None, **settings):
    """(parameters by name, engine)."""
    model = build("llama", dtype, **{"layers": 4, "dropout": dropout, **(shape or {})})
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=4096, storage=[str(tmp_path)], step_aside="never",
        **{"device": "cpu", **ROOMY, **settings},
    )  # fmt: skip
    for tokens in batches(n_steps, **(batch or {})):
        tokens = tokens.to(model.offload.device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p.cpu().clone() for block in model.offload.iter_blocks() for name, p in block}
    model.offload.close()
    return found, model.offload


def kept_outcomes(plan):
    return {outcome for block in plan.activations for name, outcome in block.items() if name != INPUT}


CLIPPED = {"max_grad_norm": 0.5, "micro_batches": 2}


@pytest.mark.parametrize(
    ("device", "more"),
    [("cpu", {}), ("emulated", CLIPPED), pytest.param("cuda", CLIPPED, marks=pytest.mark.gpu)],
    indirect=["device"],
)
def test_the_bits_are_those_without_a_plan_and_what_has_room_is_kept(tmp_path, worth_it, device, more):
    plain, before = trained(tmp_path, plan="none", device=device, **more)
    planned, after = trained(tmp_path, device=device, **more)
    assert before.plan is None
    assert all(torch.equal(planned[name], plain[name]) for name in plain)
    assert (after.plan.batch_samples, after.plan.tokens_per_sample) == tuple(batches(1)[0].shape)
    assert "device" in kept_outcomes(after.plan)
    kept = after.activations.nbytes_by_tier, before.activations.nbytes_by_tier
    assert sum(kept[0].values()) > sum(kept[1].values())
    assert kept[0]["storage"] == kept[1]["storage"] == 0


def test_planning_draws_none_of_the_random_numbers_of_training(tmp_path, worth_it):
    plain, _ = trained(tmp_path, plan="none", dropout=0.1)
    planned, engine = trained(tmp_path, dropout=0.1)
    assert engine.plan is not None
    assert all(torch.equal(planned[name], plain[name]) for name in plain)


def test_a_loss_in_chunks_of_tokens_is_planned_for_too(tmp_path, worth_it):
    plain, _ = trained(tmp_path, plan="none", chunked_loss=True)
    planned, engine = trained(tmp_path, chunked_loss=True)
    assert engine.plan is not None
    assert all(torch.equal(planned[name], plain[name]) for name in plain)


def test_the_plan_says_how_state_was_placed(tmp_path, worth_it):
    _, engine = trained(tmp_path, n_steps=1, host_memory="600KB")
    plan, placement = engine.plan, engine.placement
    assert plan.params_on_device == placement.params_on_device
    assert list(plan.params_in_host) == placement.params_in_host
    assert plan.n_slots == placement.n_slots
    assert plan.update == "backward"
    assert 0 < sum(plan.states_in_host) < len(plan.states_in_host)


def test_a_step_of_little_arithmetic_is_left_as_it_is(tmp_path, monkeypatch):
    """The fast tests' models, for one: a trace would take longer than many steps."""
    monkeypatch.setattr(late_plan, "profile_model", lambda *_, **__: pytest.fail("traced"))
    _, engine = trained(tmp_path, n_steps=2)
    assert engine.plan is None


@pytest.mark.parametrize(
    "choice", [{"plan": "none"}, {"saved_activations": "recompute"}, {"activations": "keep"}], ids=str
)
def test_what_the_user_has_fixed_is_not_planned(tmp_path, worth_it, monkeypatch, choice):
    monkeypatch.setattr(late_plan, "profile_model", lambda *_, **__: pytest.fail("traced"))
    _, engine = trained(tmp_path, n_steps=2, **choice)
    assert engine.plan is None


def test_without_room_for_what_computes_training_goes_on_as_it_was_placed(tmp_path, worth_it, caplog):
    """The planner counts working memory in device_memory; what is left of this budget does not hold it."""
    with caplog.at_level(logging.INFO, logger="offload"):
        _, engine = trained(tmp_path, n_steps=2, device_memory="600KB")
    assert engine.plan is None
    assert any("without a plan" in record.message for record in caplog.records)


LARGE = {"batch": {"batch": 16, "length": 64, "vocab": 16}, "micro_batches": 16, "prefetch_blocks": 1}
"""Steps whose activations are many times larger than the blocks."""


def nbytes_of_a_step(engine, n_steps, first=None):
    """Bytes of activations that a step has put into each tier, by the counters of the whole run; `first` are those of
    a first step that was another."""
    total = engine.activations.nbytes_by_tier
    if first is None:
        return {tier: total[tier] // n_steps for tier in total}
    return {tier: (total[tier] - first[tier]) // (n_steps - 1) for tier in total}


def planned_nbytes(engine, tier):
    blocks = zip(engine._planned.workload.blocks, engine.plan.activations, strict=True)
    return engine.plan.batch_samples * sum(
        block.nbytes_by_tensor()[name]
        for block, outcomes in blocks
        for name, outcome in outcomes.items()
        if outcome == tier
    )


@pytest.mark.slow
def test_inputs_that_memory_does_not_hold_are_planned_for_and_no_more_of_them_go_to_storage(
    tmp_path, worth_it
):
    more = {
        **LARGE, "shape": {"layers": 12, "vocab": 16}, "device": "emulated", "device_memory": "2.4MB",
        "host_memory": "900KB",
    }  # fmt: skip
    plain, before = trained(tmp_path, n_steps=3, plan="none", **more)
    found, after = trained(tmp_path, n_steps=3, **more)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    unplanned = nbytes_of_a_step(before, 3)
    kept = nbytes_of_a_step(after, 3, first=unplanned)
    assert unplanned["storage"] > 0
    assert kept["storage"] == planned_nbytes(after, "storage") <= unplanned["storage"]
    assert kept["device"] == planned_nbytes(after, "device") >= unplanned["device"]


def test_a_device_with_memory_of_its_own_gives_activations_all_that_the_plan_has_counted(tmp_path, worth_it):
    """Without a plan they have half of what is free."""
    more = {
        **LARGE, "shape": {"layers": 4, "vocab": 16}, "device": "emulated", "device_memory": "7MB",
        "host_memory": "900KB",
    }  # fmt: skip
    _, before = trained(tmp_path, n_steps=1, plan="none", **more)
    _, engine = trained(tmp_path, n_steps=2, **more)
    kept = nbytes_of_a_step(engine, 2, first=nbytes_of_a_step(before, 1))
    half_nbytes = (7_000_000 - engine.placement.device_nbytes) // 2
    assert half_nbytes < 0.95 * planned_nbytes(engine, "device") <= kept["device"]
    assert kept["storage"] == 0


class Stack(nn.Module):
    """Takes floats of shape (samples, tokens, width), which nobody could guess from its signature."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4))

    def forward(self, x, scale):
        for layer in self.layers:
            x = layer(x)
        return (x * scale).sum()


def test_a_model_that_cannot_be_traced_trains_without_a_plan(tmp_path, worth_it):
    model = Stack()
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), storage=[str(tmp_path)], step_aside="never", device="cpu",
        device_memory="1MB", host_memory="20MB",
    )  # fmt: skip
    losses = []
    for _ in range(3):
        loss = model(torch.ones(2, 3, 32), 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.offload.close()
    assert model.offload.plan is None
    assert losses[2] < losses[0]
