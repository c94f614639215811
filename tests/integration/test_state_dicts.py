"""`state_dict` of a wrapped model gives what plain torch gives, wherever the parameters are, and owns what it gives."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import offload
from offload.errors import BudgetError, UsageError
from offload.runtime import state_dicts
from tests.conftest import llama
from tests.fault.training import IN_MEMORY, Model, make_run
from tests.integration.stack import UpDown

PLACES = {
    "nothing streamed": {"step_aside": "auto", "storage": [], "device_memory": "1GB", "host_memory": "1GB"},
    "nothing streamed, a device of its own": {
        "step_aside": "always",
        "device": "emulated",
        "device_memory": "1GB",
        "host_memory": "1MB",
        "storage": [],
    },
    "slots for all": {"storage": [], "device_memory": "1GB", "host_memory": "1GB"},
    "storage": {},
    "clipped": {"max_grad_norm": 1e9},
    "durable": {"durability": "step"},
    "a device of its own": {"device": "emulated", "bus_bytes_per_s": None},
    "storage and a small device": {"storage": None, "device": "emulated", "max_grad_norm": 1e9},
}


def wrapped(place, tmp_path, layers=5):
    settings = PLACES[place]
    if "device_memory" in settings:
        torch.manual_seed(0)
        model = Model(layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return offload.wrap(model, optimizer, **{"step_aside": "never", **settings})
    rest = {name: value for name, value in settings.items() if value is not None}
    return make_run(tmp_path, layers, **rest)


def take_steps(model, optimizer, n_steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def in_memory(n_steps, layers=5):
    torch.manual_seed(0)
    plain = Model(layers)
    take_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), n_steps)
    return plain.state_dict()


def same(found, expected, **bounds):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **bounds, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("place", PLACES)
def test_the_state_after_a_step_is_that_of_training_in_memory(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    for n_steps in (1, 2, 3):
        take_steps(model, optimizer, 1, seed=n_steps)
        found = model.state_dict()
    torch.manual_seed(0)
    plain = Model(5)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for n_steps in (1, 2, 3):
        take_steps(plain, theirs, 1, seed=n_steps)
    same(found, plain.state_dict(), rtol=1e-4, atol=1e-5)  # a step moves by 1e-2
    read = {n: t.clone() for block in model.offload.iter_blocks() for n, t in block}
    assert all(torch.equal(found[name], tensor) for name, tensor in read.items())
    model.offload.close(remove=True)


def test_an_update_that_is_under_way_is_waited_for():
    """Nothing is streamed, and the tensors are large enough for the update to be seen half made."""
    torch.manual_seed(0)
    model = nn.Sequential(*[UpDown(512) for _ in range(4)])
    x = torch.randn(2, 512)
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0), **IN_MEMORY)
    assert model.offload.aside
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: grad.clone()}))
    for _ in range(5):
        before = model.state_dict()
        model(x).square().mean().backward()
        optimizer.step()
        found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer.zero_grad()
        same(found, {name: tensor - gradients[name] for name, tensor in before.items()}, rtol=1e-6, atol=1e-7)
    model.offload.close()


@pytest.mark.parametrize("place", ["nothing streamed", "storage"])
def test_it_is_a_copy_that_training_does_not_change_and_takes_the_models_size_in_a_file(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 1)
    state = model.state_dict()
    before = copy.deepcopy(state)
    take_steps(model, optimizer, 2)
    same(state, before, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 1.2 * sum(t.nbytes for t in state.values()) + 1000 * len(state)
    file.seek(0)
    same(torch.load(file), before, rtol=0, atol=0)
    fresh = Model(5)
    fresh.load_state_dict(state)
    model.offload.close()


@pytest.mark.parametrize("place", ["nothing streamed", "storage", "a device of its own"])
def test_a_part_of_the_model_says_its_own_and_a_module_around_it_says_all(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 2)
    expected = in_memory(2)
    bounds = {"rtol": 1e-4, "atol": 1e-5}
    for path in ("layers.3", "layers.3.linear", "layers", "head", "layers.0"):
        inside = {n.removeprefix(path + "."): t for n, t in expected.items() if n.startswith(path + ".")}
        same(model.get_submodule(path).state_dict(), inside, **bounds)
    same(model.state_dict(prefix="my."), {"my." + n: t for n, t in expected.items()}, **bounds)
    around = nn.ModuleDict({"model": model, "mine": nn.Linear(2, 2)})
    found = around.state_dict()
    assert found.pop("mine.weight").data_ptr() == around["mine"].weight.data_ptr()
    del found["mine.bias"]
    same(found, {"model." + n: t for n, t in expected.items()}, **bounds)
    model.offload.close()


def test_each_block_is_read_once(tmp_path):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    model.offload.flush()
    before = model.offload.counters()["read_bytes"]
    model.state_dict()
    read_nbytes = model.offload.counters()["read_bytes"] - before
    slots_nbytes = sum(block.layout.slot_nbytes for block in model.offload.blocks)
    assert 0 < read_nbytes <= slots_nbytes
    model.offload.close()


@pytest.mark.parametrize("settings", [IN_MEMORY, {"step_aside": "never"}], ids=["in memory", "storage"])
def test_tied_weights_share_under_both_names_and_transformers_writes_the_model(tmp_path, settings):
    torch.manual_seed(0)
    plain, model = llama(tie=True), llama(tie=True)
    model.load_state_dict(plain.state_dict())
    storage = {} if settings is IN_MEMORY else {"device_memory": "20MB", "host_memory": "40MB"}
    storage |= {} if settings is IN_MEMORY else {"storage": [str(tmp_path / "store")]}
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), chunk_elements=4096, **settings, **storage
    )
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    batch = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(1))
    for trained, steps in ((plain, theirs), (model, optimizer)):
        trained(input_ids=batch, labels=batch).loss.backward()
        steps.step()
        steps.zero_grad()
    state = model.state_dict()
    same(state, plain.state_dict(), rtol=1e-4, atol=1e-5)
    tied = ["lm_head.weight", "model.embed_tokens.weight"]
    assert state[tied[0]].data_ptr() == state[tied[1]].data_ptr()
    places = {t.untyped_storage().data_ptr() for t in state.values()}
    assert len(places) == len(state) - 1
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    model.save_pretrained(tmp_path / "theirs")
    same(
        dict(sorted(load_file(tmp_path / "theirs" / "model.safetensors").items())),
        {n: t for n, t in sorted(state.items()) if n != "lm_head.weight"}, rtol=0, atol=0,
    )  # fmt: skip
    model.offload.close()


def test_what_does_not_fit_in_memory_is_refused_with_the_ways_to_go(tmp_path, monkeypatch):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    monkeypatch.setattr(state_dicts, "host_available_nbytes", lambda: 20_000)
    model.offload.flush()  # what the next forward needs is being read
    before = model.offload.counters()["read_bytes"]
    with pytest.raises(
        BudgetError, match=r"state_dict of Model takes .*offload\.export.*offload\.save.*iter_blocks"
    ):
        model.state_dict()
    assert model.offload.counters()["read_bytes"] == before
    assert model.layers[1].state_dict().keys() == {"linear.weight", "linear.bias"}
    model.offload.close()


@pytest.mark.parametrize("take", ["torch.export.export", "torch.jit.trace"])
def test_a_graph_of_a_streamed_model_which_would_have_no_parameters_is_refused_and_training_goes_on(
    tmp_path, take
):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    before = model.state_dict()
    x = torch.ones(4, 8)
    with torch.no_grad(), pytest.raises(UsageError, match=r"state_dict.*offload\.export"):
        torch.jit.trace(model, x) if take == "torch.jit.trace" else torch.export.export(model, (x,))
    same(model.state_dict(), before, rtol=0, atol=0)
    take_steps(model, optimizer, 1)
    model.offload.close()


def test_keep_vars_gives_the_parameters_that_stay_and_refuses_those_that_do_not(tmp_path):
    model, optimizer = wrapped("nothing streamed", tmp_path)
    take_steps(model, optimizer, 1)
    found = model.state_dict(keep_vars=True)
    assert all(found[name] is parameter for name, parameter in model.named_parameters())
    model.offload.close()
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    assert model.head.state_dict(keep_vars=True)["weight"] is model.head.weight
    same({n: t.detach() for n, t in model.head.state_dict(keep_vars=True).items()}, model.head.state_dict())
    with pytest.raises(UsageError, match="keep_vars"):
        model.state_dict(keep_vars=True)
    model.offload.close()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("place", ["nothing streamed", "storage"])
def test_loading_is_refused_before_anything_is_changed(tmp_path, place, assign):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 1)
    before = model.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    around = nn.ModuleDict({"mine": nn.Linear(2, 2), "model": model})
    inside = {f"model.{name}": tensor for name, tensor in other.items()}
    attempts = [
        (model, other, {}),
        (model, {"head.bias": other["head.bias"]}, {"strict": False}),
        (model.layers[3], {"linear.weight": other["layers.3.linear.weight"]}, {"strict": False}),
        (model.head, {"weight": other["head.weight"], "bias": other["head.bias"]}, {}),
        (around, inside, {"strict": False}),
    ]
    for module, state, settings in attempts:
        with pytest.raises(UsageError, match=r"before offload\.wrap.*offload\.resume.*offload\.load"):
            module.load_state_dict(state, assign=assign, **settings)
        same(model.state_dict(), before, rtol=0, atol=0)
    mine = {"mine.weight": torch.ones(2, 2), "mine.bias": torch.ones(2)}
    around.load_state_dict(mine, strict=False)
    assert torch.equal(around["mine"].weight, mine["mine.weight"])
    take_steps(model, optimizer, 1, seed=2)
    model.offload.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_closed_model_says_so_wherever_its_parameters_were(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 1)
    device = model.offload.device
    loss = model(torch.ones(4, 8, device=device)).square().mean()
    state = model.state_dict()
    model.offload.close(remove=True)
    x, wide = torch.ones(4, 8, device=device), torch.ones(4, 64, device=device)
    again = torch.optim.AdamW(model.parameters())
    uses = [
        lambda: model(x), lambda: model.eval()(x), lambda: model.head(wide), lambda: model.layers[2](wide),
        lambda: optimizer.step(), model.state_dict, model.layers[1].state_dict, lambda: model.load_state_dict(state),
        lambda: next(model.offload.iter_blocks()), lambda: offload.export(model, str(tmp_path / "out")),
        lambda: offload.save(model, str(tmp_path / "saved")), lambda: offload.resume(model, str(tmp_path / "saved")),
        lambda: offload.export(model, str(tmp_path / "out"), dtype=torch.float32),
        lambda: offload.wrap(model, again, **IN_MEMORY),
    ]  # fmt: skip
    for use in uses:
        with (
            torch.no_grad(),
            pytest.raises(UsageError, match=r"closed.*load the model again.*before close\(\)"),
        ):
            use()
    assert not (tmp_path / "out").exists()
    if not model.offload.aside:
        with pytest.raises(UsageError, match="closed"):
            loss.backward()
    model.offload.close()
    same(state, in_memory(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("place", ["nothing streamed", "storage"])
def test_copying_and_pickling_name_what_to_do(tmp_path, place, closed):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 1)
    if closed:
        model.offload.close()
    attempts = [
        lambda: copy.deepcopy(model), lambda: copy.deepcopy(model.layers[1]), lambda: copy.deepcopy(model.offload),
        lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(model.layers[1]), lambda: AveragedModel(model),
        lambda: copy.deepcopy({"mine": nn.ModuleList([model])}),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"before offload\.wrap.*model\.state_dict\(\).*offload\.export"):
            attempt()
    model.offload.close()


@pytest.mark.parametrize("place", ["nothing streamed", "storage"])
def test_copying_and_pickling_the_optimizer_names_what_to_do(tmp_path, place):
    """A copy would have hyperparameters alone, and step a model that is trained already."""
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    attempts = [
        lambda: copy.copy(optimizer), lambda: copy.deepcopy(optimizer), lambda: pickle.dumps(optimizer),
        lambda: torch.save(optimizer, io.BytesIO()), lambda: copy.deepcopy(schedule),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(
            UsageError, match=r"offload\.save.*offload\.resume.*state_dict\(\).*offload\.export"
        ):
            attempt()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, io.BytesIO())
    model.offload.close()


@pytest.mark.parametrize("place", ["nothing streamed", "storage"])
def test_a_copy_of_a_parameter_is_one_of_its_own_or_refused_never_nan(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 1)
    true = model.state_dict()
    copies = [
        lambda: copy.deepcopy(list(model.parameters())), lambda: copy.deepcopy(model.layers[2].linear.weight),
        lambda: pickle.loads(pickle.dumps(list(model.parameters()))),
    ]  # fmt: skip
    for make in copies:
        if place == "storage":
            with pytest.raises(UsageError, match=r"weight of a wrapped model.*model\.state_dict\(\)"):
                make()
            continue
        copied = make()
        if isinstance(copied, list):
            assert all(torch.equal(c, t) for c, t in zip(copied, true.values(), strict=True))
            copied = copied[0]
        assert type(copied) is nn.Parameter
        copied.data = torch.zeros(3)  # it is nobody else's
    model.offload.close()


def test_an_average_is_made_from_state_dicts(tmp_path):
    model, optimizer = wrapped("storage", tmp_path)
    average = AveragedModel(Model(5))
    fresh = Model(5)
    states = []
    for seed in (1, 2):
        take_steps(model, optimizer, 1, seed=seed)
        states.append(model.state_dict())
        fresh.load_state_dict(states[-1])
        average.update_parameters(fresh)
    expected = {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items()}
    same(average.module.state_dict(), expected)
    model.offload.close()


def test_moments_given_to_the_optimizer_are_refused_and_hyperparameters_are_taken(tmp_path):
    theirs = Model(5)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.2)
    take_steps(theirs, their_optimizer, 1)
    state = their_optimizer.state_dict()
    model, optimizer = wrapped("storage", tmp_path)
    with pytest.raises(UsageError, match=r"of 14 parameters.*offload\.resume.*offload\.from_deepspeed"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    optimizer.load_state_dict({**state, "state": {}})
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2

    plain = Model(5)
    plain.load_state_dict(model.state_dict())
    take_steps(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.2), 2)
    take_steps(model, optimizer, 2)
    same(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    model.offload.close()


def test_the_optimizers_own_state_says_once_what_it_lacks_and_can_be_loaded(tmp_path, caplog):
    model, optimizer = wrapped("storage", tmp_path)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with caplog.at_level("WARNING", "offload"):
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does at first
        assert not caplog.records
        take_steps(model, optimizer, 1)
        schedule.step()
        state = copy.deepcopy(optimizer.state_dict())
        assert [optimizer.state_dict()["state"], len(caplog.records)] == [{}, 1]
    assert "offload.save" in caplog.text
    schedule.step()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 5e-3
    model.offload.close()


def test_a_model_is_wrapped_once(tmp_path):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    before = model.state_dict()
    with pytest.raises(UsageError, match="wrapped already"):
        offload.wrap(model, torch.optim.AdamW(model.parameters()), **IN_MEMORY)
    same(model.state_dict(), before, rtol=0, atol=0)
    model.offload.close()


def test_inside_a_step_that_has_updated_some_blocks_it_is_refused(tmp_path):
    model, optimizer = wrapped("storage", tmp_path)
    model(torch.ones(4, 8)).square().mean().backward()
    with pytest.raises(UsageError, match=r"after optimizer\.step"):
        model.state_dict()
    optimizer.step()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    model.offload.close()


def test_accumulated_gradients_do_not_change_it(tmp_path):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    before = model.state_dict()
    with model.offload.no_sync():
        model(torch.ones(4, 8)).square().mean().backward()
    same(model.state_dict(), before, rtol=0, atol=0)
    optimizer.zero_grad()
    model.offload.close()


def test_hooks_of_the_users_see_real_values(tmp_path):
    model, _ = wrapped("storage", tmp_path)
    seen = {}
    model.layers[0].register_state_dict_post_hook(
        lambda module, state, prefix, metadata: seen.update({n: t.clone() for n, t in state.items()})
    )
    model.layers[2].linear.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update(
            {prefix + "weight": state[prefix + "weight"].half()}
        )
    )
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in seen.items())
    assert state["layers.2.linear.weight"].dtype == torch.float16
    assert state["layers.2.linear.weight"].isfinite().all()
    model.offload.close()


def test_forwards_that_follow_are_those_of_a_run_without_it(tmp_path):
    losses = []
    for asked in (False, True):
        model, optimizer = wrapped("storage", tmp_path / str(asked))
        found = []
        for seed in range(4):
            if asked:
                model.state_dict()
            loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))).square().mean()
            found.append(loss.item())
            if asked:
                model.layers[4].state_dict()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(found)
        model.offload.close()
    assert losses[0] == losses[1]
