"""Things that loops over plain torch do give the numbers of training in memory, or a UsageError: never others."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from offload.runtime import gradients
from tests.fault.training import IN_MEMORY, Block, Model, wrap_small
from tests.integration.test_state_dicts import same, take_steps, wrapped

BOUNDS = {"rtol": 1e-4, "atol": 1e-5}
OTHERS = ("storage", "nothing streamed", "slots for all", "clipped")
PLACES = ["a device of its own", *(pytest.param(place, marks=pytest.mark.slow) for place in OTHERS)]
WAITING = "clipped"
"""Where updates wait for `step()`."""


def rows(seed, n=4):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def steps(model, optimizer, seeds, after=None):
    for seed in seeds:
        model(rows(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(seed)


def plateau(model, optimizer, engine):
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    steps(model, optimizer, range(6), lambda seed: schedule.step(1.0))


def one_cycle(model, optimizer, engine):
    """It cycles beta1 too."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=10)
    betas = {optimizer.param_groups[0]["betas"][0]}
    steps(
        model, optimizer, range(8), lambda s: (schedule.step(), betas.add(optimizer.param_groups[0]["betas"]))
    )
    assert len(betas) > 3


def learning_rate_in_a_tensor(model, optimizer, engine):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(5e-3)
    steps(model, optimizer, range(3))


def evaluation_in_inference_mode(model, optimizer, engine):
    """Before training, between steps, and between backward and step()."""

    def evaluate(seed):
        model.eval()
        with torch.inference_mode():
            model(rows(50 + seed))
        model.train()

    evaluate(0)
    steps(model, optimizer, range(3), evaluate)
    for seed in range(3):
        model(rows(seed)).square().mean().backward()
        evaluate(seed)
        optimizer.step()
        optimizer.zero_grad()


def accumulation_of_unequal_micro_batches(model, optimizer, engine):
    for seed in range(3):
        for number, n in enumerate((5, 2, 1)):
            with engine.no_sync() if engine is not None and number < 2 else contextlib.nullcontext():
                (model(rows(10 * seed + number, n)).square().sum() / 8).backward()
        optimizer.step()
        optimizer.zero_grad()


def a_penalty_on_weights_of_the_root(model, optimizer, engine):
    for seed in range(3):
        loss = model(rows(seed)).square().mean() + 0.1 * model.head.weight.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def norms_in_a_log(model, optimizer, engine):
    steps(model, optimizer, range(4), lambda seed: [p.norm().item() for p in model.parameters()])


def freezing_after_wrap_and_training_again(model, optimizer, engine):
    steps(model, optimizer, range(2))
    some = [*model.layers[1].parameters(), model.head.bias]
    for parameter in some:
        parameter.requires_grad_(False)
    steps(model, optimizer, range(2, 4))
    for parameter in some:
        parameter.requires_grad_(True)
    steps(model, optimizer, range(4, 6))


def a_module_added_after_wrap(model, optimizer, engine):
    """It is in no group of the optimizer, and not trained by either."""
    steps(model, optimizer, range(2))
    model.extra = nn.Linear(1, 1)
    for seed in range(2):
        model.extra(model(rows(seed))).square().mean().backward()
        assert model.extra.weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        model.extra.zero_grad()
    del model.extra


def the_whole_model_compiled_after_wrap(model, optimizer, engine):
    steps(torch.compile(model, backend="eager"), optimizer, range(3))


def a_closure(model, optimizer, engine):
    for seed in range(3):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = model(rows(seed)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def a_functional_call_with_other_parameters(model, optimizer, engine):
    steps(model, optimizer, range(2))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    assert torch.func.functional_call(model, zeros, (rows(0),)).eq(0).all()
    steps(model, optimizer, range(2))


def groups_changed_between_steps(model, optimizer, engine):
    steps(model, optimizer, range(2))
    optimizer.param_groups[0] |= {"weight_decay": 0.5, "betas": (0.5, 0.9)}
    steps(model, optimizer, range(3))


def blocks_called_twice(model, optimizer, engine):
    for seed in range(3):
        x = model.embed(rows(seed))
        for layer in [*model.layers, *model.layers]:
            x = layer(x)
        model.head(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def a_part_of_the_model(model, optimizer, engine):
    for seed in range(3):
        x = model.embed(rows(seed))
        for layer in list(model.layers)[:3]:
            x = layer(x)
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


EXACT = [
    plateau, one_cycle, learning_rate_in_a_tensor, evaluation_in_inference_mode, accumulation_of_unequal_micro_batches,
    a_penalty_on_weights_of_the_root, norms_in_a_log, freezing_after_wrap_and_training_again, a_module_added_after_wrap,
    pytest.param(the_whole_model_compiled_after_wrap, marks=pytest.mark.slow), a_closure,
    a_functional_call_with_other_parameters, groups_changed_between_steps, blocks_called_twice, a_part_of_the_model,
]  # fmt: skip


def in_memory(loop, model=None):
    torch.manual_seed(0)
    model = Model(5) if model is None else model
    loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2), None)
    return model.state_dict()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loop", EXACT)
def test_a_loop_has_the_parameters_of_training_in_memory(tmp_path, place, loop):
    model, optimizer = wrapped(place, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(model, optimizer, model.offload)
    same(model.state_dict(), in_memory(loop), **BOUNDS)
    model.offload.close()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_schedule_made_before_wrap_is_followed(tmp_path, device):
    """It knows the optimizer that was given to wrap, and would change the rates of that one alone."""
    found = []
    for streams in (False, True):
        torch.manual_seed(0)
        model = Model(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if streams:
            model, optimizer = offload.wrap(
                model, optimizer, device=device, storage=[str(tmp_path)], step_aside="never"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps(model, optimizer, range(4), lambda seed, schedule=schedule: schedule.step())
        assert optimizer.param_groups[0]["lr"] == 1e-2 / 16
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        if streams:
            model.offload.close()
    same(*found, **BOUNDS)


@pytest.mark.parametrize("place", PLACES)
def test_a_schedule_that_steps_before_the_optimizer_has_its_numbers_or_is_refused(tmp_path, place):
    def loop(model, optimizer, engine):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for seed in range(4):
            model(rows(seed)).square().mean().backward()
            schedule.step()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = wrapped(place, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if place == WAITING:
            loop(model, optimizer, model.offload)
            same(model.state_dict(), in_memory(loop), **BOUNDS)
        else:
            with pytest.raises(UsageError, match="hyperparameters were changed between backward and"):
                loop(model, optimizer, model.offload)
    model.offload.close()


@pytest.mark.parametrize("place", ["storage", "a device of its own", "slots for all"])
@pytest.mark.parametrize("read", ["all", "one of a block"])
def test_a_penalty_on_weights_of_blocks_is_refused_by_name(tmp_path, place, read):
    model, _ = wrapped(place, tmp_path)
    weights = model.parameters() if read == "all" else [model.layers[2].linear.weight]
    loss = model(rows(0)).square().mean() + sum(w.square().sum() for w in weights)
    with pytest.raises(
        UsageError,
        match=r"layers\.\d\.linear\.\w+ has received a gradient outside.*weight_decay.*blocks=\[modules\]",
    ):
        loss.backward()
    model.offload.close()


def test_a_step_without_zero_grad_says_once_that_gradients_do_not_add_up(tmp_path, caplog):
    model, optimizer = wrapped("storage", tmp_path)
    with caplog.at_level("WARNING", "offload"):
        take_steps(model, optimizer, 2)
        assert not caplog.records
        for seed in range(3):
            model(rows(seed)).square().mean().backward()
            optimizer.step()
    assert [r.getMessage() for r in caplog.records if "without optimizer.zero_grad()" in r.getMessage()] != []
    assert len(caplog.records) == 1
    model.offload.close()


@pytest.mark.parametrize("change", ["taken out", "put in another group", "another list of groups"])
def test_groups_that_are_changed_by_hand_are_refused_at_the_step(tmp_path, change):
    """In torch, what is in no group is not trained, and what is in another has its hyperparameters."""
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    first = optimizer.param_groups[0]
    if change == "another list of groups":
        optimizer.param_groups = [{**first, "lr": 0.5}]
    else:
        last = first["params"].pop()
        if change == "put in another group":
            optimizer.param_groups.append({**first, "params": [last], "lr": 0.5})
    model(rows(0)).square().mean().backward()
    with pytest.raises(UsageError, match=r"by hand.*add_param_group.*requires_grad_\(False\)"):
        optimizer.step()
    model.offload.close()


@pytest.mark.parametrize("change", ["replaced", "removed", "in another order"])
def test_what_would_be_written_under_another_modules_name_is_refused(tmp_path, change):
    """A state_dict is that of the modules that are there; files are of the parameters that were given to wrap."""
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    if change == "replaced":
        model.layers[1] = Block()
    elif change == "removed":
        del model.layers[3]
    else:
        model.layers = nn.ModuleList(reversed(model.layers))
    writes = [
        lambda: offload.export(model, str(tmp_path / "out")), lambda: offload.save(model, str(tmp_path / "saved")),
        lambda: offload.change(model, lambda name, values: None), lambda: next(model.offload.iter_blocks()),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(UsageError, match=r"layers\.\d\.linear\.weight was taken out of the model"):
            write()
    model.offload.close()


def sharing_model(where):
    model = Model(5)
    if where == "two blocks":
        model.layers[3].linear.weight = model.layers[1].linear.weight
    elif where == "block and root":
        model.inner = nn.Linear(64, 64)
        model.layers[2].linear.weight = model.inner.weight
    else:
        model.layers[4] = model.layers[0]
    return model


@pytest.mark.parametrize("where", ["two blocks", "block and root", "one module twice"])
@pytest.mark.parametrize(
    "settings", [{"device": "cpu"}, {"device": "emulated"}, {"max_grad_norm": 1e9}], ids=str
)
def test_weights_that_blocks_share_train_as_in_memory(where, settings):
    def loop(model, optimizer, engine):
        steps(model, optimizer, range(4))

    torch.manual_seed(0)
    plain = sharing_model(where)
    expected = in_memory(loop, plain)
    torch.manual_seed(0)
    model = sharing_model(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = offload.wrap(
        model,
        optimizer,
        **{**IN_MEMORY, "step_aside": "never", **settings},
        blocks=list(dict.fromkeys(model.layers)),
    )
    loop(model, optimizer, None)
    same(model.state_dict(), expected, **BOUNDS)
    model.offload.close()


@pytest.mark.parametrize("place", ["storage", "nothing streamed"])
def test_what_only_a_second_optimizer_would_train_is_refused_with_the_way_to_train_it(tmp_path, place):
    torch.manual_seed(0)
    model = Model(3)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.layers.parameters()), storage=[str(tmp_path)], device_memory="50MB",
        host_memory="50MB", step_aside="never" if place == "storage" else "always",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"in no group of the optimizer .*in place of several optimizers"):
        steps(model, optimizer, [0])
    model.offload.close()


def test_a_forward_between_backward_and_step_is_told_of_once(tmp_path, caplog):
    """It computes with what this step has updated already, where updates are made during backward."""
    gradients._tell_of_forward_before_step.cache_clear()
    for update, n_told in (("deferred", 0), ("backward", 1)):
        torch.manual_seed(0)
        model = Model(5)
        model, optimizer = wrap_small(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            update=update,
            storage=[str(tmp_path / update)],
        )
        for _ in range(2):
            model(rows(0)).square().mean().backward()
            with torch.no_grad():
                model(rows(1))
            optimizer.step()
            optimizer.zero_grad()
        model.offload.close()
        assert sum("between backward and optimizer.step()" in r.message for r in caplog.records) == n_told
