"""Gradients have the same bits whether an activation is kept, swapped to host or storage, or recomputed."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.recompute import by_recipe
from tests.conftest import slow_but
from tests.cuda import CUDA
from tests.integration.test_exactness import (
    CHUNK,
    assert_same_bits,
    in_memory_on,
    stored,
    train,
    train_in_memory,
)

pytestmark = pytest.mark.usefixtures("poison")

TIERS = ["recompute", "device", "host", "storage"]
ROOMY = {"host_memory": "50MB"}


@pytest.mark.parametrize("device", ["cpu", "emulated", CUDA], indirect=True)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", slow_but(["gpt2"], ["llama", "gpt2", "qwen2", "bert"]))
def test_with_dropout_every_tier_has_the_bits_of_a_graph_kept_whole(tmp_path, kind, tier, device):
    expected = train_in_memory(kind, in_memory_on(device, activations="keep"), n_steps=4, dropout=0.1)
    settings = stored(tmp_path, device=device, saved_activations=tier, **ROOMY)
    assert_same_bits(train(kind, settings, n_steps=4, dropout=0.1), expected)


@pytest.mark.parametrize("device", ["cpu", "emulated", CUDA], indirect=True)
@pytest.mark.parametrize("host_memory", ["1MB", "50MB"])
def test_inputs_and_results_on_storage_together_are_all_read_back(tmp_path, device, host_memory):
    """What is read ahead for the block before fills the staging while this block still needs it."""
    expected = train_in_memory("llama", in_memory_on(device, activations="keep"), n_steps=4)
    settings = stored(
        tmp_path, device=device, saved_activations="storage", activations="storage", host_memory=host_memory
    )
    assert_same_bits(train("llama", settings, n_steps=4), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_with_micro_batches_clipping_and_deferred_updates_too(tmp_path, tier, device):
    same = {"micro_batches": 3, "max_grad_norm": 0.5, "step_aside": "never"}
    expected = train_in_memory("llama", in_memory_on(device, activations="keep", **same), n_steps=4)
    settings = stored(tmp_path, device=device, saved_activations=tier, **ROOMY, **same)
    if device == "emulated":
        settings["bus_bytes_per_s"] = 2e8
    assert_same_bits(train("llama", settings, n_steps=4), expected)


class Block(nn.Module):
    """One matrix product whose result backward needs, one whose result it does not."""

    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def wrap(block, directory, n_blocks=4, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(*[block() for _ in range(n_blocks)])
    return offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=CHUNK,
        device_memory="50MB", host_memory="50MB", storage=[str(directory)], **settings,
    )  # fmt: skip


def step(model, optimizer, x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def parameters_after(block, directory, n_steps=4, before_step=lambda number: None, **settings):
    model, optimizer = wrap(block, directory, **settings)
    torch.manual_seed(1)
    x = torch.randn(8, 64)
    losses = []
    for number in range(n_steps):
        before_step(number)
        losses.append(step(model, optimizer, x))
    parameters = {n: t.clone() for blocks in model.offload.iter_blocks() for n, t in blocks}
    why = [recipe.why_not for record in model.offload.blocks for recipe in record.recipes.values()]
    model.offload.close()
    return parameters, losses, why


class ProductCounter(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tier", "again"), [("recompute", 1), ("device", 0), ("host", 0), ("storage", 0)])
def test_recomputation_runs_only_the_products_that_backward_needs(tmp_path, tier, again):
    """Per block 2 products forward, 4 backward (3 in the first, whose input needs no gradient), and of the 2 of forward
    again only what is needed and not kept."""
    model, optimizer = wrap(Block, tmp_path, saved_activations=tier)
    x = torch.randn(8, 64)
    step(model, optimizer, x)  # writes the recipe
    with ProductCounter() as counter:
        step(model, optimizer, x)
    model.offload.close()
    assert counter.products == 4 * (2 + 4 + again) - 1


class InPlace(Block):
    def forward(self, x):
        h = self.up(x)
        h.mul_(2.0)
        h = torch.relu_(h + 0.1)
        return self.down(h) + x


class Drawing(Block):
    def forward(self, x):
        h = torch.nn.functional.dropout(self.up(x), 0.3)
        h = h * torch.rand_like(h)
        return x + self.down(torch.nn.functional.dropout(h, 0.3))


class Asking(Block):
    """The result of an operation decides what is done next; another one each step."""

    calls = 0

    def forward(self, x):
        Asking.calls += 1
        h = self.up(x)
        if h.sum().item() > 0:
            h = torch.tanh(h)
        return x + self.down(torch.relu(h))


class Unseen(Block):
    """numpy writes where dispatch does not see it."""

    def forward(self, x):
        h = self.up(x)
        scale = torch.empty(1)
        np.copyto(scale.numpy(), 1 + abs(float(h.detach().double().mean())))
        return x + self.down(torch.tanh(h * scale))


class Square(nn.Module):
    """One product, three times."""

    def __init__(self, width=64):
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, x):
        for _ in range(3):  # the result of the last is not needed again
            x = x + self.mix(torch.tanh(x))
        return x


class Watched(TorchDispatchMode):
    """A mode of the user's own, which has to see what it saw in forward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watching(Block):
    def forward(self, x):
        h = torch.nn.functional.silu(self.up(x))
        with Watched():
            h = self.down(h)
        return x + h


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("block", [Block, Square, Watching, InPlace, Drawing, Asking, Unseen])
def test_awkward_blocks_have_the_bits_of_a_graph_kept_whole(tmp_path, block, tier):
    expected = parameters_after(block, tmp_path / "whole", activations="keep")
    got = parameters_after(block, tmp_path / "selective", saved_activations=tier)
    assert got[1] == expected[1]
    assert all(torch.equal(got[0][name], expected[0][name]) for name in expected[0])
    if block in (Block, Square, Watching, InPlace, Drawing):
        assert all(why == "" for why in got[2])
    if block is Unseen:
        assert all("memory of a result" in why for why in got[2])


@pytest.fixture
def seen(monkeypatch):
    """Operations that recomputation has looked at."""
    found, look = [], by_recipe.Replayer._next
    monkeypatch.setattr(
        by_recipe.Replayer, "_next", lambda self, func: (found.append(func), look(self, func))[1]
    )
    return found


@pytest.mark.parametrize(
    ("block", "tier", "looks"),
    [
        (Block, "recompute", ["t", "mm", "add"]),  # from where it enters `down` on
        (Block, "host", ["t", "mm", "silu", "t", "mm", "add"]),
        (Square, "recompute", ["t", "mm", "add"]),  # the third time that it enters `mix`
        (Watching, "recompute", ["t", "mm", "silu", "t", "mm", "add"]),
    ],
)
def test_recomputation_looks_at_operations_only_from_the_first_that_it_changes(
    tmp_path, seen, block, tier, looks
):
    model, optimizer = wrap(block, tmp_path, saved_activations=tier)
    x = torch.randn(8, 64)
    for _ in range(2):  # the first writes the recipe
        step(model, optimizer, x)
    model.offload.close()
    counted = [name for f in seen if (name := f._overloadpacket.__name__) not in ("detach", "alias")]
    assert counted == 4 * looks


class Fickle(Block):
    """Does other operations in every second step."""

    odd = False

    def forward(self, x):
        h = self.up(x)
        return self.out(x, self.down(torch.tanh(h) if self.odd else torch.sigmoid(h)))

    def out(self, x, h):
        return x + h


class FickleInTheEnd(Fickle):
    """Backward needs the last product's result every second time."""

    def out(self, x, h):
        return x + torch.sigmoid(h) if self.odd else x + h


@pytest.mark.parametrize("block", [Fickle, FickleInTheEnd])
@pytest.mark.parametrize("tier", TIERS)
def test_a_block_that_changes_its_operations_has_the_bits_of_a_graph_kept_whole(tmp_path, block, tier):
    def turn(number):
        Fickle.odd = bool(number % 2)

    same = {"n_steps": 6, "before_step": turn}
    expected = parameters_after(block, tmp_path / "whole", activations="keep", **same)
    got = parameters_after(block, tmp_path / tier, saved_activations=tier, **same)
    assert got[1] == expected[1]
    assert all(torch.equal(got[0][name], expected[0][name]) for name in expected[0])
    if block is FickleInTheEnd:
        assert all("same operations" in why for why in got[2])


def test_what_has_no_room_is_recomputed(tmp_path):
    roomy = parameters_after(Block, tmp_path / "roomy", saved_activations="device")
    model, optimizer = wrap(Block, tmp_path / "tight", saved_activations="host")
    model.offload.activations._left["host"].nbytes = 3 * 8 * 256 * 4
    torch.manual_seed(1)
    x = torch.randn(8, 64)
    losses = [step(model, optimizer, x) for _ in range(4)]
    assert model.offload.activations.nbytes_by_tier["host"] == 3 * 3 * 8 * 256 * 4  # 3 tensors in 3 steps
    assert losses == roomy[1]
    model.offload.close()
