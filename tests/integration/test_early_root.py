"""An untied head is updated while the blocks' backward goes on, with the numbers of an update after it."""

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from offload.runtime.scheduler import Scheduler
from tests.conftest import batches, build, slow_but, two_groups
from tests.cuda import CUDA

CHUNK = 4096
N_STEPS = 5


@pytest.fixture
def early_updates(monkeypatch):
    """Names of parameters in each early update, in order."""
    made = []
    real = Scheduler.update_early

    def noted(self, final, chunks, hyper_of):
        made.append(
            {s.name for b in self.root.layout.buffers for s in b.segments if id(s.parameter) in final}
        )
        real(self, final, chunks, hyper_of)

    monkeypatch.setattr(Scheduler, "update_early", noted)
    return made


def trained(make, update, tmp_path, device="auto", loss_of=None, n_steps=N_STEPS, accumulate=False):
    torch.manual_seed(3)
    model = make()
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=CHUNK, device_memory="4MB", host_memory="4MB", device=device,
        storage=[str(tmp_path)], step_aside="never", update=update,
    )  # fmt: skip
    for step, batch in enumerate(batches(n_steps)):
        if accumulate:
            with model.offload.no_sync():
                loss_of(model, batch.flip(0), step).backward()
        loss_of(model, batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p.cpu().clone() for block in model.offload.iter_blocks() for name, p in block}
    model.offload.close()
    return found


def causal(model, batch, step):
    batch = batch.to(model.offload.device)
    return model(input_ids=batch, labels=batch).loss


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("device", [*slow_but(["emulated"], ["cpu", "emulated"]), CUDA], indirect=True)
def test_head_updated_during_backward_has_the_bits_of_one_updated_by_step(
    tmp_path, early_updates, device, accumulate
):
    def make():
        return build("llama", torch.bfloat16, tie=False)

    after = trained(make, "deferred", tmp_path, device, causal, accumulate=accumulate)
    assert early_updates == []
    during = trained(make, "backward", tmp_path, device, causal, accumulate=accumulate)
    first = 0 if accumulate else 1  # the first backward is there to learn from
    assert len(early_updates) == N_STEPS - first
    assert all(
        "lm_head.weight" in names and "model.embed_tokens.weight" not in names for names in early_updates
    )
    assert same(during, after)


def test_tied_head_waits_for_the_end_of_backward(tmp_path, early_updates):
    trained(lambda: build("llama", torch.bfloat16, tie=True), "backward", tmp_path, loss_of=causal)
    assert all(names == {"model.norm.weight"} for names in early_updates)


class Shared(nn.Module):
    """A head, and a scale of it that the blocks may use too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(64, 256)
        self.share = False

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.head.weight if self.share else None)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, weight):
        x = x + torch.tanh(self.linear(x))
        return x if weight is None else x + torch.tanh(x @ weight.T) @ weight


def shared_loss(from_step):
    def loss_of(model, batch, step):
        model.share = step >= from_step
        return model(batch).float().pow(2).mean()

    return loss_of


def test_head_that_blocks_use_too_waits_for_the_end_of_backward(tmp_path, early_updates):
    after = trained(Shared, "deferred", tmp_path, loss_of=shared_loss(0))
    during = trained(Shared, "backward", tmp_path, loss_of=shared_loss(0))
    assert not any("head.weight" in names for names in early_updates)
    assert same(during, after)


def test_head_that_blocks_begin_to_use_is_refused_or_right_but_never_wrong(tmp_path):
    """A gradient that arrives after the update of its parameter cannot be added to it any more."""
    after = trained(Shared, "deferred", tmp_path, loss_of=shared_loss(3))
    try:
        during = trained(Shared, "backward", tmp_path, loss_of=shared_loss(3))
    except UsageError as error:
        assert "update='deferred'" in str(error)
    else:
        assert same(during, after)


class Reaching(nn.Module):
    """Its blocks reach for the head's weight by themselves, so that each of their backwards adds to its gradient."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.layers = nn.ModuleList([ReachingBlock([self]) for _ in range(3)])
        self.head = nn.Linear(64, 256)
        self.share = False

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ReachingBlock(nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.owner = owner

    def forward(self, x):
        x = x + torch.tanh(self.linear(x))
        weight = self.owner[0].head.weight
        return x + torch.tanh(x @ weight.T) @ weight if self.owner[0].share else x


def test_gradient_that_comes_after_the_update_of_its_parameter_is_refused(tmp_path, early_updates):
    with pytest.raises(UsageError, match="update='deferred'"):
        trained(Reaching, "backward", tmp_path, loss_of=shared_loss(3))
    assert any("head.weight" in names for names in early_updates)
    trained(Reaching, "deferred", tmp_path, loss_of=shared_loss(3))


@pytest.mark.parametrize("update", ["backward", "deferred"])
def test_after_an_interrupted_backward_training_goes_on_as_in_memory_or_is_refused_with_the_way_to(
    tmp_path, update
):
    """An untied head has been updated by then, where updates do not wait."""
    interrupts = []

    def trained_steps(model, optimizer):
        def interrupt(grad):
            if interrupts:
                interrupts.pop()
                raise KeyboardInterrupt

        model.model.layers[1].mlp.down_proj.weight.register_hook(interrupt)
        losses = []
        for step, batch in enumerate(batches(4)):
            if step == 2:
                interrupts.append(True)
                with pytest.raises(KeyboardInterrupt):
                    causal_in(model, batch).backward()
                optimizer.zero_grad()
            loss = causal_in(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def causal_in(model, batch):
        return model(input_ids=batch, labels=batch).loss

    model = build("llama", tie=False)
    plain = trained_steps(model, two_groups(model))
    model = build("llama", tie=False)
    model, optimizer = offload.wrap(
        model, two_groups(model), chunk_elements=CHUNK, device_memory="8MB", host_memory="8MB", device="emulated",
        storage=[str(tmp_path)], step_aside="never", update=update,
    )  # fmt: skip
    if update == "deferred":
        assert trained_steps(model, optimizer) == pytest.approx(plain, abs=5e-6)
    else:
        with pytest.raises(UsageError, match=r"failed midway.*no_sync.*update='deferred'"):
            trained_steps(model, optimizer)
    model.offload.close()
