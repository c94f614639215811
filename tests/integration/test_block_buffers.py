"""Buffers that a block's forward changes are changed once a call, though backward runs the block again."""

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from tests.conftest import slow_but
from tests.integration.test_exactness import CHUNK

WIDTH = 32
LR = 2.0**-4
"""A power of two: an update is rounded once, in torch and here."""
TIERS = ["recompute", "device", "host", "storage"]
MEMORY = {"device_memory": "50MB", "host_memory": "50MB"}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.mix(x)))


class NormedTwice(Normed):
    """One norm, called twice."""

    def forward(self, x):
        return super().forward(super().forward(x))


class ByStatistics(Normed):
    """Computes with the statistics that it has just updated."""

    def forward(self, x):
        x = super().forward(x)
        return x * torch.sigmoid(self.mix(x) * self.norm.running_var + self.norm.running_mean)


class Spectral(nn.Module):
    """Forward computes with vectors that it improves each time."""

    def __init__(self):
        super().__init__()
        self.mix = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + torch.tanh(self.mix(x))


class OldSpectral(Spectral):
    """The same by hooks, as torch did it before."""

    def __init__(self):
        nn.Module.__init__(self)
        self.mix = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


class Replaced(nn.Module):
    """A mean that is a new tensor each time, one that `.data` hides the change of, and one that is made on the way."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("hidden", torch.zeros(WIDTH))
        self.register_buffer("later", None)

    def forward(self, x):
        h = self.mix(x)
        if self.training:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
                self.hidden.data.mul_(0.9).add_(h.std(0))
                self.later = h[0].clone() if self.later is None else self.later + h[0]
                if not hasattr(self, "n_calls"):
                    self.register_buffer("n_calls", torch.zeros((), dtype=torch.int64))
                self.n_calls += 1
        return x + torch.tanh(h - self.mean) * self.hidden + self.later / self.n_calls


BLOCKS = [Normed, NormedTwice, ByStatistics, Spectral, OldSpectral, Replaced]


class Model(nn.Module):
    def __init__(self, block, calls=1):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)
        self.calls = calls

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.calls):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


def batches(n_steps, rows=12):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator) for _ in range(n_steps)]


def make(block, **options):
    torch.manual_seed(0)
    model = Model(block, **options).train()
    return model, torch.optim.SGD(model.parameters(), lr=LR)


def train(model, optimizer, n_steps=4):
    """Losses, and what an evaluation gives in the end."""
    losses = []
    for batch in batches(n_steps):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        evaluated = model.eval()(batches(1)[0])
    model.train()
    return losses, evaluated


def wrap(directory, block, calls=1, **settings):
    settings = {**MEMORY, "step_aside": "never", "chunk_elements": CHUNK, **settings}
    return offload.wrap(*make(block, calls=calls), storage=[str(directory)], **settings)


class NormedBehind(Model):
    """The root has a norm as well, which runs after the blocks and before their backward."""

    def __init__(self, block, leads_to_it=False):
        super().__init__(block)
        self.head = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))
        if leads_to_it:
            self.layers[1] = ByStatisticsOfTheHead()
            self.layers[1].beside = [self.head]


class ByStatisticsOfTheHead(Normed):
    def forward(self, x):
        return x + torch.tanh(self.norm(self.mix(x)) + self.beside[0][0].running_mean)


@pytest.mark.parametrize("leads_to_it", [False, True])
def test_statistics_of_the_root_that_change_after_a_block_has_run_are_in_backward_what_its_forward_found(
    tmp_path, leads_to_it
):
    def start():
        torch.manual_seed(0)
        model = NormedBehind(Normed, leads_to_it).train()
        return model, torch.optim.SGD(model.parameters(), lr=LR)

    expected_model, optimizer = start()
    expected = train(expected_model, optimizer)
    settings = {**MEMORY, "step_aside": "never", "chunk_elements": CHUNK}
    model, optimizer = start()
    model, optimizer = offload.wrap(
        model, optimizer, storage=[str(tmp_path)], blocks=model.layers, **settings
    )
    assert train(model, optimizer)[0] == expected[0]
    assert all(torch.equal(b, model.get_buffer(name)) for name, b in expected_model.named_buffers())
    model.offload.close()


def check(directory, block, **settings):
    expected_model, optimizer = make(block)
    expected = train(expected_model, optimizer)
    model, optimizer = wrap(directory, block, **settings)
    got = train(model, optimizer)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(expected_model.named_buffers()).keys()
    for name, buffer in expected_model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])
    model.offload.close()


@pytest.mark.parametrize("tier", slow_but(["recompute", "device"], TIERS))
@pytest.mark.parametrize("block", BLOCKS)
def test_buffers_losses_and_evaluation_have_the_bits_of_plain_torch(tmp_path, block, tier):
    check(tmp_path, block, saved_activations=tier)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_kept_graph_leaves_buffers_as_plain_torch_does(tmp_path, block):
    check(tmp_path, block, activations="keep")


@pytest.mark.parametrize("block", BLOCKS)
def test_on_a_device_of_its_own_too(tmp_path, block):
    check(tmp_path, block, device="emulated")


def after_one_backward(model, parts=1):
    sum(model(part).square().sum() for part in batches(1)[0].chunk(parts)).backward()
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("calls", "micro_batches"), [(2, 1), (1, 2)])
def test_every_call_and_every_micro_batch_updates_buffers_once(tmp_path, block, calls, micro_batches):
    """As often as in plain torch, run over the same micro-batches; later steps add gradients up in another order."""
    expected = after_one_backward(make(block, calls=calls)[0], micro_batches)
    model, _ = wrap(tmp_path, block, calls, micro_batches=micro_batches)
    got = after_one_backward(model)
    model.offload.close()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], buffer) for name, buffer in expected.items())


@pytest.mark.parametrize("compiled", [False, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_batch_norm_counts_its_steps(tmp_path, compiled):
    model, optimizer = wrap(tmp_path, Normed, compile_blocks=compiled)
    train(model, optimizer, n_steps=6)
    assert [int(layer.norm.num_batches_tracked) for layer in model.layers] == [6, 6, 6]
    model.offload.close()


def test_a_norm_that_is_frozen_and_thawed_has_the_bits_of_plain_torch(tmp_path):
    """Each mode finds out for itself what it changes."""
    results = []
    for model, optimizer in (make(Normed), wrap(tmp_path, Normed)):
        for training in (False, True, False, True):
            for layer in model.layers:
                layer.norm.train(training)
            losses, _ = train(model, optimizer, 2)
            results.append((losses, [buffer.clone() for buffer in model.buffers()]))
    for got, expected in zip(results[4:], results[:4], strict=True):
        assert got[0] == expected[0]
        assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))
    model.offload.close()


class Late(Normed):
    """Changes a buffer in place from its second step on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:  # forward and its recomputation
            self.scale.mul_(0.5)
        return super().forward(x) * self.scale


def test_a_buffer_that_is_changed_for_the_first_time_in_a_later_step_is_refused_by_its_name(tmp_path):
    model, optimizer = wrap(tmp_path, Late)
    with pytest.raises(UsageError, match=r"layers\.0\.scale.*activations='keep'"):
        train(model, optimizer)
    model.offload.close()


def test_a_resnet_of_transformers_has_the_buffers_of_plain_torch(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def run(wrapped):
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(config).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        if wrapped:
            settings = {**MEMORY, "step_aside": "never", "chunk_elements": CHUNK}
            model, optimizer = offload.wrap(model, optimizer, storage=[str(tmp_path)], **settings)
        losses = []
        for _ in range(3):
            loss = model(pixel_values=images, labels=torch.tensor([0, 1, 2, 0])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            logits = model.eval()(pixel_values=images).logits
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if wrapped:
            model.offload.close()
        return losses, logits, buffers

    expected, got = run(False), run(True)
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])
    assert all(torch.equal(got[2][name], buffer) for name, buffer in expected[2].items())
