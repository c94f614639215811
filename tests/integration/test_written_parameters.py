"""What a loop writes to parameters of a running model counts as in memory, or is refused by name: it is never lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offload
from offload.errors import ConfigError, UsageError
from tests.fault.training import IN_MEMORY, Block, Model
from tests.integration.test_state_dicts import same, take_steps, wrapped

BOUNDS = {"rtol": 1e-4, "atol": 1e-5}
STREAMED = [
    "storage",
    "a device of its own",
    *(pytest.param(place, marks=pytest.mark.slow) for place in ("slots for all", "clipped", "durable")),
]
UNSTREAMED = ["nothing streamed", "nothing streamed, a device of its own"]
NAMES = ["head.weight", "layers.2.linear.weight", "head.bias"]


def clamp(parameter):
    parameter.data.clamp_(-0.01, 0.01)


def halve(parameter):
    with torch.no_grad():
        parameter.mul_(0.5)


def fill(parameter):
    nn.init.constant_(parameter, 0.5)


def average_in(parameter):
    with torch.inference_mode():
        parameter.lerp_(torch.ones_like(parameter), 0.5)


WRITES = [clamp, halve, *(pytest.param(write, marks=pytest.mark.slow) for write in (fill, average_in))]


def plain_run(write):
    """Parameters of training in memory that writes between its second and its third step."""
    torch.manual_seed(0)
    model = Model(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    take_steps(model, optimizer, 2)
    write(model)
    take_steps(model, optimizer, 2, seed=2)
    return model.state_dict()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", UNSTREAMED)
def test_where_nothing_is_streamed_a_write_between_steps_counts_as_in_memory(tmp_path, place, write, name):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 2)
    write(model.get_parameter(name))
    take_steps(model, optimizer, 2, seed=2)
    same(model.state_dict(), plain_run(lambda m: write(m.get_parameter(name))), **BOUNDS)
    model.offload.close()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", STREAMED)
def test_where_blocks_move_a_write_between_steps_is_refused_by_name(tmp_path, place, name, write):
    """One element seen at the shape of one cannot be told from a parameter: that is refused at the next use of it."""
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 2)
    before = model.state_dict()
    refused = pytest.raises(UsageError, match=rf"{name}.*offload\.change")
    if name == "head.bias":
        write(model.get_parameter(name))
        with refused:
            take_steps(model, optimizer, 1)
    else:
        with refused:
            write(model.get_parameter(name))
    if name != "head.bias":  # nothing was written: the run goes on
        same(model.state_dict(), before, rtol=0, atol=0)
        take_steps(model, optimizer, 2, seed=2)
        same(model.state_dict(), plain_run(lambda m: None), **BOUNDS)
    model.offload.close(remove=True)


@pytest.mark.parametrize("use", ["forward", "state_dict", "export", "step"])
def test_a_lost_write_is_told_by_whatever_comes_next(tmp_path, use):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    nn.init.zeros_(model.head.bias)
    uses = {
        "forward": lambda: model(torch.ones(4, 8)),
        "state_dict": model.state_dict,
        "export": lambda: offload.export(model, str(tmp_path / "out")),
        "step": optimizer.step,
    }
    with pytest.raises(UsageError, match=r"head\.bias was written to in place"):
        uses[use]()
    model.offload.close()


@pytest.mark.parametrize("place", [*UNSTREAMED, "storage", "a device of its own"])
def test_other_data_under_a_parameter_is_refused_before_anything_changes(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 2)
    before = model.state_dict()

    def assign():
        model.layers[1].linear.weight.data = torch.zeros(64, 64)

    vector = nn.utils.parameters_to_vector(Model(5).parameters())
    attempts = [
        assign, model.half, lambda: model.to(torch.float64), model.share_memory, model.layers[3].bfloat16,
        lambda: nn.utils.vector_to_parameters(vector, model.parameters()),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"\.(weight|bias): .*offload\.(change|export)"):
            attempt()
    same(model.state_dict(), before, rtol=0, atol=0)
    model.to("cpu").float().to(model.head.weight.device, torch.float32)  # changes nothing, as loops do
    take_steps(model, optimizer, 2, seed=2)
    same(model.state_dict(), plain_run(lambda m: None), **BOUNDS)
    model.offload.close()


class Renormalised(nn.Module):
    """`where`: the embedding that its own forward renormalises is in the root, or in a block."""

    def __init__(self, where, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(16, 64, max_norm=1.0 if where == "root" else None)
        self.layers = nn.ModuleList(Lookup(1.0 if where == "block" else None) for _ in range(4))
        self.head = nn.Linear(64, 1)
        self.to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, ids)
        return self.head(x)


class Lookup(Block):
    def __init__(self, max_norm):
        super().__init__()
        self.table = nn.Embedding(16, 64, max_norm=max_norm)

    def forward(self, x, ids):
        return super().forward(x + self.table(ids))


def renormalised_run(settings, where, dtype=torch.float32, n_steps=4):
    torch.manual_seed(0)
    model = Renormalised(where, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if settings is not None:
        model, optimizer = offload.wrap(model, optimizer, **settings)
    try:
        for seed in range(n_steps):
            ids = torch.randint(0, 16, (4, 3), generator=torch.Generator().manual_seed(seed))
            model(ids).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()
    finally:
        if settings is not None:
            model.offload.close()


@pytest.mark.parametrize(
    ("where", "device", "settings"),
    [
        ("root", "cpu", {"step_aside": "always"}),
        ("root", "cpu", {"step_aside": "never"}),
        ("block", "cpu", {"step_aside": "always"}),
        ("root", "emulated", {"step_aside": "always"}),
        ("block", "emulated", {"step_aside": "always"}),
        ("root", "emulated", {"step_aside": "never", "states_on_device": "100MB"}),
    ],
    ids=str,
)
def test_an_embedding_that_renormalises_its_master_trains_as_in_memory(where, device, settings):
    """Where all of it is computed with in place: on the CPU without storage, on a device of its own what stays there.
    But a block that is streamed runs twice."""
    found = renormalised_run({**IN_MEMORY, **settings, "device": device}, where)
    same(found, renormalised_run(None, where), **BOUNDS)


@pytest.mark.parametrize(
    ("where", "dtype", "settings"),
    [
        ("root", torch.float32, {"device": "emulated", "step_aside": "never"}),
        ("root", torch.bfloat16, {"device": "cpu", "step_aside": "always"}),
    ],
    ids=["root of a device of its own", "bf16, whose master is elsewhere"],
)
def test_an_embedding_that_renormalises_a_copy_is_refused_by_name(where, dtype, settings):
    with pytest.raises(UsageError, match=r"embed\.weight was written to in place.*renormalises"):
        renormalised_run({**IN_MEMORY, **settings}, where, dtype)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_embedding_of_a_streamed_block_that_renormalises_is_refused_by_name(device):
    with pytest.raises(
        UsageError, match=r"table\.weight.*(was written to in place|the change would be lost)"
    ):
        renormalised_run({**IN_MEMORY, "device": device, "step_aside": "never"}, "block")


@pytest.mark.parametrize("place", [*UNSTREAMED, *STREAMED])
def test_a_parameter_read_between_steps_is_what_it_is_or_nan_and_never_of_another_step(tmp_path, place):
    model, optimizer = wrapped(place, tmp_path)
    for seed in range(3):
        take_steps(model, optimizer, 1, seed=seed)
        read = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        through_data = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
        true = model.state_dict()
        for found in (read, through_data):
            wrong = [n for n, t in found.items() if not t.isnan().all() and not torch.equal(t, true[n])]
            assert not wrong
        if place in UNSTREAMED:
            assert not any(t.isnan().any() for t in read.values())
    model.offload.close()


@pytest.mark.parametrize("replace", ["another parameter", "a parametrization"])
def test_a_parameter_that_leaves_its_module_after_wrap_is_refused(tmp_path, replace):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 1)
    with torch.no_grad(), pytest.raises(UsageError, match=r"head\.weight: its data cannot be set"):
        model.head.weight.set_(torch.zeros(1, 64))
    if replace == "another parameter":
        model.head.weight = nn.Parameter(torch.zeros(1, 64))
    else:
        nn.utils.parametrize.register_parametrization(model.layers[2].linear, "weight", Twice(), unsafe=True)
    with pytest.raises(UsageError, match=r"weight was taken out of the model.*before offload\.wrap"):
        model.state_dict()
    with pytest.raises(UsageError, match="was taken out of the model"):
        optimizer.step()
    model.offload.close()


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def normalise(model):
    """Weight norm, spectral norm and a parametrization, in the root and in blocks."""
    nn.utils.parametrizations.weight_norm(model.layers[1].linear)
    nn.utils.parametrizations.spectral_norm(model.layers[2].linear)
    nn.utils.parametrize.register_parametrization(model.head, "weight", Twice())
    nn.utils.weight_norm(model.embed)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("settings", [{}, {"device": "emulated"}], ids=["cpu", "emulated"])
def test_parametrizations_made_before_wrap_train_as_in_memory(settings):
    runs = []
    for streamed in (False, True):
        torch.manual_seed(0)
        model = normalise(Model(5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if streamed:
            settings = {**IN_MEMORY, "step_aside": "never", "blocks": list(model.layers), **settings}
            model, optimizer = offload.wrap(model, optimizer, **settings)
        take_steps(model, optimizer, 3)
        runs.append(model.state_dict())
        if streamed:
            model.offload.close()
    same(runs[1], runs[0], **BOUNDS)


def scale_and_shift(name, values):
    if "weight" in name:
        values.clamp_(-0.05, 0.05)
    else:
        values.add_(0.1)


@pytest.mark.parametrize("place", [*UNSTREAMED, *STREAMED])
def test_change_between_steps_is_what_a_write_in_memory_is(tmp_path, place):
    def write(plain):
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                scale_and_shift(name, parameter)

    model, optimizer = wrapped(place, tmp_path)
    take_steps(model, optimizer, 2)
    offload.change(model, scale_and_shift)
    take_steps(model, optimizer, 2, seed=2)
    same(model.state_dict(), plain_run(write), **BOUNDS)
    model.offload.close(remove=True)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("step_aside", ["always", "never"])
def test_change_gives_the_exact_masters_of_bf16_and_keeps_what_it_is_left_with(tmp_path, device, step_aside):
    torch.manual_seed(0)
    model = Model(3)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"device": device, "step_aside": step_aside, "compute_dtype": torch.bfloat16}
    model, _ = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=0.0), **{**IN_MEMORY, **settings})
    seen = {}

    def double(name, values):
        seen[name] = values.clone()
        values.mul_(1.0 + 2**-20)

    offload.change(model, double)
    same(seen, {name: start[name] for name in seen}, rtol=0, atol=0)
    assert seen.keys() == start.keys()
    doubled, seen = seen, {}
    offload.change(model, double)
    same(seen, {name: doubled[name] * (1.0 + 2**-20) for name in seen}, rtol=0, atol=0)
    model.offload.close()


def test_change_that_changes_nothing_writes_nothing(tmp_path):
    model, optimizer = wrapped("storage", tmp_path)
    take_steps(model, optimizer, 2)
    state = model.state_dict()
    before = model.offload.counters()["written_bytes"]
    offload.change(model, lambda name, values: None)
    assert model.offload.counters()["written_bytes"] == before
    same(model.state_dict(), state, rtol=0, atol=0)
    take_steps(model, optimizer, 2, seed=2)
    same(model.state_dict(), plain_run(lambda m: None), **BOUNDS)
    model.offload.close()


@pytest.mark.parametrize("where", [{}, {"storage": None}], ids=["memory", "storage"])
def test_change_finds_parameters_whose_optimizer_keeps_nothing(tmp_path, where):
    torch.manual_seed(0)
    model = Model(3)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {**IN_MEMORY, "step_aside": "never"}
    if where:
        settings |= {"storage": [str(tmp_path)], "host_memory": "30MB"}
    model, _ = offload.wrap(model, optimizer, **settings)
    offload.change(model, lambda name, values: values.add_(1.0))
    same(model.state_dict(), {name: value + 1.0 for name, value in start.items()}, rtol=0, atol=0)
    model.offload.close()


def test_change_is_refused_inside_a_step_and_for_adafactor(tmp_path):
    model, _ = wrapped("clipped", tmp_path)
    model(torch.ones(4, 8)).square().mean().backward()
    with pytest.raises(UsageError, match="change: block"):
        offload.change(model, scale_and_shift)
    model.offload.close()
    other = Model(3)
    other, _ = offload.wrap(other, torch.optim.Adafactor(other.parameters()), **IN_MEMORY)
    with pytest.raises(ConfigError, match="Adafactor"):
        offload.change(other, scale_and_shift)
    other.offload.close()


def test_what_change_leaves_is_committed_with_durable_steps(tmp_path):
    model, optimizer = wrapped("durable", tmp_path)
    take_steps(model, optimizer, 2)
    offload.change(model, scale_and_shift)
    expected = model.state_dict()
    model.offload.close()
    again, _ = wrapped("durable", tmp_path / "other")
    assert offload.resume(again, str(tmp_path)).step == 2
    same(again.state_dict(), expected, rtol=0, atol=0)
    again.offload.close(remove=True)
