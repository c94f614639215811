"""Backward runs a block again in what its forward ran in: modes, settings, generators and arguments."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import offload
from offload.errors import UsageError
from tests.conftest import slow_but
from tests.integration.test_exactness import CHUNK

WIDTH = 16
LR = 2.0**-4
MEMORY = {"device_memory": "50MB", "host_memory": "50MB", "step_aside": "never", "chunk_elements": CHUNK}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.mix(x)) * self.mask(x)


class Dropping(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.drop(self.mix(x))))


class Attending(Base):
    """Dropout inside attention, which each backend draws in its own way."""

    def forward(self, x):
        q = self.mix(x).view(1, 2, -1, WIDTH // 2)
        return x + F.scaled_dot_product_attention(q, q, q, dropout_p=0.3).reshape(x.shape)


class Making(Base):
    """Makes a tensor of the default dtype."""

    def forward(self, x):
        return x + (torch.tanh(self.mix(x)).double() * torch.full((WIDTH,), 1 / 3).double()).float()


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def start(block, directory=None, model=Model, **settings):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = model(block).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if directory is None:
        return model, optimizer
    return offload.wrap(model, optimizer, storage=[str(directory)], **MEMORY, **settings)


def batch():
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def train(model, optimizer, around=None, between=None, n_steps=3):
    """Losses, and a number of each generator in the end."""
    losses = []
    for _ in range(n_steps):
        if around is None:
            loss = model(batch()).float().square().mean()
        else:
            with around():
                loss = model(batch()).float().square().mean()
        if between is not None:
            between(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.train()
    return [
        *losses,
        torch.rand(()).item(),
        random.random(),
        float(np.random.randn()),
        float(np.random.rand()),
    ]


def both(block, directory, **options):
    settings = options.pop("settings", {})
    model = options.pop("model", Model)
    expected = train(*start(block, model=model), **options)
    wrapped, optimizer = start(block, directory, model, **settings)
    got = train(wrapped, optimizer, **options)
    wrapped.offload.close()
    return got, expected


def everything(model):
    model.eval()


def only_the_dropout(model):
    for layer in model.layers:
        layer.drop.eval()


def frozen_norms(model):
    """Set by themselves, as who overrides train() does."""
    for layer in model.layers:
        layer.norm.training = False


@pytest.mark.parametrize("settings", slow_but([{}], [{}, {"saved_activations": "device"}]), ids=str)
@pytest.mark.parametrize("between", [everything, only_the_dropout, frozen_norms])
def test_a_mode_set_between_forward_and_backward_does_not_reach_the_block(tmp_path, between, settings):
    got, expected = both(Dropping, tmp_path, between=between, settings=settings)
    assert got == expected


def test_a_block_runs_again_in_eval_when_its_forward_did(tmp_path):
    def losses(model, optimizer):
        found = []
        for _ in range(2):
            loss = model.eval()(batch()).square().mean()
            model.train()
            loss.backward()
            assert all(module.training for module in model.modules())
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            found += [layer.norm.running_mean.sum().item() for layer in model.layers]
        return found

    expected = losses(*start(Dropping))
    model, optimizer = start(Dropping, tmp_path)
    assert losses(model, optimizer) == expected
    model.offload.close()


class Float64Default:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("block", "around"),
    [
        (Attending, lambda: sdpa_kernel(SDPBackend.MATH)),
        (Making, Float64Default),
        (Dropping, lambda: torch.autocast("cpu", torch.bfloat16)),
    ],
    ids=["sdpa_kernel", "default_dtype", "autocast"],
)
def test_settings_around_forward_alone_hold_for_the_block_in_backward(tmp_path, block, around):
    """Autocast: the same arithmetic in memory and streamed, where torch's SGD rounds otherwise at times."""
    got, expected = both(block, tmp_path, around=around)
    assert got == expected
    assert torch.get_default_dtype() == torch.float32


class DeterministicAlgorithms:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_hold_again_and_no_longer_than_that(tmp_path):
    found = set()

    class Asking(Base):
        def forward(self, x):
            tell(torch.are_deterministic_algorithms_enabled())
            return x + torch.tanh(self.mix(x))

    notes = open(tmp_path / "notes", "w+")  # noqa: SIM115  # a list would be as the first run has left it

    def tell(value):
        notes.write(f"{value}\n")

    model, optimizer = start(Asking, tmp_path)
    train(model, optimizer, around=DeterministicAlgorithms, n_steps=1)
    model.offload.close()
    notes.seek(0)
    found = notes.read().splitlines()
    notes.close()
    assert found == ["True"] * 6
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_default_device_around_forward_holds_again(tmp_path):
    got, expected = both(Making, tmp_path, around=lambda: torch.device("cpu"))
    assert got == expected


# ---- generators ----------------------------------------------------------------------------------------------------


class ByPython(Base):
    def mask(self, x):
        return random.random() + random.gauss(0, 1)


class ByNumPy(Base):
    """One normal number: NumPy makes two and holds the second back."""

    def mask(self, x):
        return torch.from_numpy(np.random.rand(WIDTH)).float() + float(np.random.randn())


class ByNumPyOneNormal(Base):
    def mask(self, x):
        return float(np.random.randn())


class ByItsOwn(Base):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.more = {
            "python": random.Random(4),
            "numpy": [np.random.default_rng(5), np.random.RandomState(6)],
        }

    def mask(self, x):
        modern, old = self.more["numpy"]
        numbers = self.more["python"].random() + modern.standard_normal() + old.randn()
        return torch.rand(x.shape, generator=self.generator) + numbers


SHARED = torch.Generator()


class ByAGlobalOne(Base):
    def __init__(self):
        super().__init__()
        SHARED.manual_seed(7)

    def mask(self, x):
        return torch.rand(x.shape, generator=SHARED)


class ByAll(ByItsOwn):
    def mask(self, x):
        return super().mask(x) * torch.rand(x.shape) + random.random() + float(np.random.randn())


GENERATORS = [ByPython, ByNumPy, ByNumPyOneNormal, ByItsOwn, ByAGlobalOne, ByAll]


@pytest.mark.parametrize(
    "settings", slow_but([{}], [{}, {"saved_activations": "device"}, {"activations": "keep"}]), ids=str
)
@pytest.mark.parametrize("block", GENERATORS)
def test_a_block_draws_again_what_it_drew_and_generators_go_on_as_in_plain_torch(tmp_path, block, settings):
    got, expected = both(block, tmp_path, settings=settings)
    assert got == expected


class GivenOne(Model):
    def forward(self, x):
        x = self.first(x)
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(3)
        for layer in self.layers:
            x = layer(x, self.generator)
        return self.head(x)


class ByTheGivenOne(Base):
    def forward(self, x, generator):
        return x + torch.tanh(self.mix(x)) * torch.rand(x.shape, generator=generator)


def test_a_generator_that_is_an_argument_gives_the_same_numbers_again(tmp_path):
    got, expected = both(ByTheGivenOne, tmp_path, model=GivenOne)
    assert got == expected


class NoisyGradients(Base):
    """Draws in backward, from a hook on a tensor."""

    def forward(self, x):
        h = self.mix(F.dropout(x, 0.5, self.training))
        if h.requires_grad:
            h.register_hook(lambda grad: grad + torch.randn_like(grad) * random.random())
        return x + torch.tanh(h)


def test_what_hooks_of_backward_draw_comes_from_where_plain_torch_draws_it(tmp_path):
    got, expected = both(NoisyGradients, tmp_path)
    assert got == expected


# ---- arguments -----------------------------------------------------------------------------------------------------


class Changing(Model):
    """Changes what a block was given, after it."""

    def __init__(self, block, change=None, first=False):
        super().__init__(block)
        self.change = change

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            given = x
            x = layer(x)
            if self.change is not None:
                with torch.no_grad():
                    self.change(given)
        return self.head(x)


class Linear(Base):
    """Plain torch does not need this one's input."""

    def forward(self, x):
        return x * 3 + self.mix.bias


@pytest.mark.parametrize(
    "activations", slow_but(["device", "storage"], ["auto", "device", "host", "storage"])
)
@pytest.mark.parametrize("block", [Dropping, Linear])
def test_an_argument_changed_in_place_after_the_block_is_refused_wherever_it_waits(
    tmp_path, block, activations
):
    model, _ = start(
        block, tmp_path, lambda b: Changing(b, lambda given: given.mul_(2)), activations=activations
    )
    with pytest.raises(
        UsageError, match=r"block layers\.2: a tensor that it was given .*between its forward and back"
    ):
        model(batch()).square().mean().backward()
    model.offload.close()


class SecondArgument(Changing):
    def forward(self, x):
        x, counts = self.first(x), torch.ones(1)
        for layer in self.layers:
            x = layer(x, counts)
            counts += 1
        return self.head(x)


class Scaled(Base):
    def forward(self, x, counts):
        return x + torch.tanh(self.mix(x)) * counts


def test_a_small_argument_counted_up_in_place_is_refused_too(tmp_path):
    model, _ = start(Scaled, tmp_path, SecondArgument)
    with pytest.raises(UsageError, match=r"number 1, of shape \(1,\).*x = x \+ 1"):
        model(batch()).square().mean().backward()
    model.offload.close()


class InPlace(Base):
    def forward(self, x):
        return self.mix(x.mul_(2)) + x


def test_a_block_that_changes_its_argument_in_place_is_refused_in_forward(tmp_path):
    model, _ = start(InPlace, tmp_path)
    with pytest.raises(UsageError, match=r"block layers\.0: .*by the block itself.*clone"):
        model(batch())
    model.offload.close()


class ChangedResult(Model):
    """Changes each result in place, which belongs to nobody else."""

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
            x += 1
        return self.head(x)


class EndsInTanh(Base):
    """Backward needs its result."""

    def forward(self, x):
        return torch.tanh(self.mix(x))


@pytest.mark.parametrize("settings", [{}, {"saved_activations": "device"}], ids=str)
def test_a_result_that_is_changed_in_place_is_handled_or_refused_never_wrong(tmp_path, settings):
    """Plain torch refuses this one, whose backward needs the result; a recomputed block has it again."""
    model, optimizer = start(EndsInTanh, tmp_path, ChangedResult, **settings)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        start(EndsInTanh, model=ChangedResult)[0](batch()).square().mean().backward()
    clean, expected_optimizer = start(EndsInTanh, model=lambda b: Added(b))
    expected = train(clean, expected_optimizer)
    try:
        assert train(model, optimizer)[:3] == expected[:3]
    except UsageError as error:
        assert "changed in place" in str(error)
    model.offload.close()


class Added(ChangedResult):
    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
            x = x + 1
        return self.head(x)
