"""Mixtures of experts: what has no gradient costs nothing and stands still, and the router learns from its own loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offload
from offload.errors import UsageError
from tests.families import FAMILIES
from tests.fault.training import smallest_budgets

WIDTH, N_EXPERTS, CHUNK = 64, 4, 2048


class Experts(nn.Module):
    """Every expert has a matrix of its own and is called only when its number is among `active`."""

    active = (0,)

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(N_EXPERTS))

    def forward(self, x):
        for number in Experts.active:
            x = x + torch.tanh(self.experts[number](x))
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def start(directory=None, deferred=False):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if directory is None:
        return model, optimizer
    settings = {
        "step_aside": "never", "storage": [str(directory)], "chunk_elements": CHUNK,
        "update": "deferred" if deferred else "backward", "prefetch_blocks": 1,
    }  # fmt: skip
    budgets = smallest_budgets(model, optimizer, settings)
    budgets["device_memory"] += 2**20  # for block inputs, so that what is written is training state alone
    return offload.wrap(model, optimizer, **budgets, **settings)


def train(model, optimizer, actives):
    generator = torch.Generator().manual_seed(1)
    for active in actives:
        Experts.active = active
        model(torch.randn(8, WIDTH, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("deferred", [False, True])
def test_an_expert_without_gradient_stands_still_as_in_torch(tmp_path, deferred):
    """Another set of experts each step; moments, decay and step counts of the others wait."""
    actives = [(0, 1), (2,), (0, 3), (1, 2), (0,)]
    plain = start()
    train(*plain, actives)
    model, optimizer = start(tmp_path, deferred)
    train(model, optimizer, actives)
    got = {name: tensor.clone() for block in model.offload.iter_blocks() for name, tensor in block}
    model.offload.close()
    for name, expected in plain[0].named_parameters():
        torch.testing.assert_close(got[name], expected.detach(), rtol=2e-6, atol=2e-7)


def written_nbytes(directory, active, n_steps=3):
    model, optimizer = start(directory)
    before = model.offload.counters()["written_bytes"]
    train(model, optimizer, [active] * n_steps)
    model.offload.flush()
    written = model.offload.counters()["written_bytes"] - before
    model.offload.close()
    return written


def test_experts_without_gradient_cost_no_optimizer_traffic(tmp_path):
    """fp32: 12 bytes a parameter and step are written for what has a gradient, and none for the rest."""
    one = WIDTH * WIDTH
    assert written_nbytes(tmp_path / "one", (1,)) == 3 * 3 * one * 12
    assert written_nbytes(tmp_path / "all", (0, 1, 2, 3)) == 3 * 3 * N_EXPERTS * one * 12


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_router_learns_from_the_auxiliary_loss(tmp_path, micro_batches):
    """With a loss that is the auxiliary one alone, routers get the gradient that they get in memory."""
    pytest.importorskip("transformers")
    family = FAMILIES["Mixtral"]
    batch = family.batch(torch.Generator().manual_seed(1))
    plain = family.build()
    plain(**batch).aux_loss.backward()
    expected = plain.model.layers[1].mlp.gate.weight.grad
    assert expected.abs().max() > 0

    model = family.build()
    model, _ = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", device_memory="20MB",
        host_memory="4MB", storage=[str(tmp_path)], micro_batches=micro_batches, update="deferred", chunk_elements=4096,
    )  # fmt: skip
    seen = {}
    model.model.layers[1].mlp.gate.weight.register_hook(
        lambda grad: seen.__setitem__("grad", seen.get("grad", 0) + grad.clone())
    )
    model(**batch).aux_loss.backward()
    model.offload.close()
    torch.testing.assert_close(seen["grad"], expected, rtol=1e-5, atol=1e-8)


def test_training_with_a_filled_cache_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    family = FAMILIES["Llama"]
    model = family.build()
    model, _ = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", device_memory="20MB",
        host_memory="4MB", storage=[str(tmp_path)], chunk_elements=4096,
    )  # fmt: skip
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 4, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 4
    with pytest.raises(UsageError, match="cache of 4 tokens"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), past_key_values=cache, use_cache=True)
    model.offload.close()
