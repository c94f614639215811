"""Loops that do what they should not: refused by name, or harmless; at every level of durability."""

from __future__ import annotations

import resource

import pytest
import torch

import offload
from offload.errors import OffloadError, UsageError
from offload.tiers.host import HostArena
from tests.fault.test_durable_steps import durable
from tests.fault.training import STREAMING, Model, make_run, smallest_budgets, steps
from tests.fault.trajectory import Run

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def ideal(tmp_path_factory):
    run = Run(storage=[str(tmp_path_factory.mktemp("ideal"))])
    losses = run.steps(5)
    run.close()
    return losses


def test_backward_twice_in_a_step_is_refused_and_costs_nothing_committed(tmp_path, ideal):
    run = durable(tmp_path / "d", update="backward")
    run.steps(2)
    run.model(run.data.next()).square().mean().backward()
    with pytest.raises(UsageError, match="no_sync"):
        run.model(run.data.next()).square().mean().backward()
    run.close()
    again = durable(tmp_path / "d", update="backward")
    assert again.resume(tmp_path / "d").step == 2
    assert again.steps(3) == ideal[2:]
    again.model.offload.close(remove=True)


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e9}], ids=["backward", "deferred"])
@pytest.mark.parametrize("level", ["checkpoint", "step"])
def test_step_twice_changes_nothing_the_second_time(tmp_path, ideal, level, settings):
    run = Run(storage=[str(tmp_path / "d")], durability=level, **settings)
    for expected in ideal:
        assert run.step() == expected
        run.optimizer.step()
    run.model.offload.close(remove=True)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_step_twice_leaves_nothing_undone_that_nobody_would_end(tmp_path, device):
    """Updates that wait are made by the second one, and there is nothing left for it to decide."""
    torch.manual_seed(0)
    model = Model(3)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"storage": [str(tmp_path)], "update": "deferred", "device": device, **STREAMING}
    settings |= smallest_budgets(model, made, settings) | {"device_memory": "10MB"}
    model, optimizer = offload.wrap(model, made, **settings)
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.step()
    offload.change(model, lambda name, values: None)
    model.offload.close()


@pytest.mark.parametrize("level", ["checkpoint", "step"])
def test_a_batch_of_another_shape_in_every_step_gives_the_numbers_of_memory(tmp_path, level):
    batches = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 1, 7, 3)]
    model, optimizer = make_run(tmp_path, durability=level)
    torch.manual_seed(0)
    plain = Model(3)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for batch in batches:
        losses = []
        for trained, its in ((model, optimizer), (plain, theirs)):
            loss = trained(batch).square().mean()
            loss.backward()
            its.step()
            its.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model.offload.close(remove=True)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_model_wrapped_where_no_gradients_are_computed_trains_with_the_same_numbers(tmp_path, mode):
    expected = steps(*make_run(tmp_path / "a"), 2)
    torch.manual_seed(0)
    model = Model(3)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {"storage": [str(tmp_path / "b")], **STREAMING, "device_memory": "1MB", "host_memory": "100MB"}
    with mode():
        model, optimizer = offload.wrap(model, made, **settings)
    got = steps(model, optimizer, 2)
    assert all(torch.equal(got[name], values) for name, values in expected.items())
    model.offload.close()


@pytest.mark.parametrize(("n_ranks", "said"), [("1", 0), ("2", 1)])
def test_several_ranks_are_told_that_each_trains_by_itself(tmp_path, monkeypatch, caplog, n_ranks, said):
    monkeypatch.setenv("WORLD_SIZE", n_ranks)
    make_run(tmp_path)[0].offload.close()
    assert caplog.text.count("one of 2 ranks, and offload neither shards nor averages gradients") == said


def test_an_arena_that_cannot_be_had_names_host_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, hard))
    try:
        with pytest.raises((OffloadError, OSError), match="host_memory"):
            HostArena(1 << 42)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
