"""Block inputs wait for backward where the budgets have room, in the order device, host, storage."""

import time

import pytest
import torch
from torch import nn

import offload
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN

WIDTH, LAYERS, BATCH = 64, 6, 256
INPUT_NBYTES = 4 * WIDTH * BATCH
CHUNK = 4096
DEVICES = ["cpu", "emulated"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.line(x))


def wrap(directory, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)])
    return offload.wrap(
        model, torch.optim.AdamW(model.parameters()), step_aside="never", chunk_elements=CHUNK, chunk_buffers=2,
        storage=[str(directory)] if directory else [], **settings,
    )  # fmt: skip


def least(device, directory):
    """The smallest budgets, as the refusal states them."""
    with pytest.raises(offload.BudgetError) as refused:
        wrap(directory, device=device, device_memory=1, host_memory=1)
    text = str(refused.value)
    return [int(text.split(f"{name}='")[1].split("'")[0]) for name in ("device_memory", "host_memory")]


def train(model, optimizer, n_steps=2):
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(n_steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = {n: t.clone() for block in model.offload.iter_blocks() for n, t in block}
    return parameters, dict(model.offload.activations.nbytes_by_tier)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_device_has_no_room_for_goes_to_host_memory_and_then_to_storage(tmp_path, device):
    device_nbytes, host_nbytes = least(
        device, None
    )  # no storage: host memory has room for all state, no more
    everywhere = {}
    for tier, budgets in {
        "device": {"device_memory": device_nbytes + 100 * INPUT_NBYTES, "host_memory": host_nbytes},
        "host": {"device_memory": device_nbytes, "host_memory": host_nbytes + 100 * INPUT_NBYTES},
    }.items():
        model, optimizer = wrap(None, device=device, prefetch_blocks=1, **budgets)
        everywhere[tier], used = train(model, optimizer)
        model.offload.close()
        assert used[tier] == 2 * LAYERS * INPUT_NBYTES
    device_nbytes, host_nbytes = least(device, tmp_path)
    model, optimizer = wrap(
        tmp_path, device=device, prefetch_blocks=1, device_memory=device_nbytes, host_memory=host_nbytes
    )
    everywhere["storage"], used = train(model, optimizer)
    model.offload.close()
    assert used["storage"] == 2 * LAYERS * INPUT_NBYTES
    for name, expected in everywhere["device"].items():
        assert torch.equal(everywhere["host"][name], expected)
        assert torch.equal(everywhere["storage"][name], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_whose_block_inputs_fit_nowhere_is_refused_with_the_numbers(device):
    device_nbytes, host_nbytes = least(device, None)
    model, _ = wrap(None, device=device, device_memory=device_nbytes, host_memory=host_nbytes)
    with pytest.raises(offload.BudgetError, match=f"{INPUT_NBYTES} bytes.*smaller batch"):
        model(torch.randn(BATCH, WIDTH))
    model.offload.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_whose_backward_never_comes_keeps_no_room(device):
    device_nbytes, host_nbytes = least(device, None)
    room = (LAYERS + 1) * INPUT_NBYTES * (1 if device == "cpu" else 2)
    model, optimizer = wrap(
        None,
        device=device,
        device_memory=device_nbytes + room + 100_000,
        host_memory=host_nbytes,
        prefetch_blocks=1,
    )
    for _ in range(5):
        model(torch.randn(BATCH, WIDTH))
    train(model, optimizer)
    model.offload.close()


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_larger_than_the_staging_pass_through_it_in_pieces(tmp_path, device):
    """2 pieces of 64 KiB for an input of 1 MiB; the bytes come back as they went."""
    device_nbytes, host_nbytes = least(device, tmp_path)
    model, _ = wrap(
        tmp_path, device=device, device_memory=device_nbytes, host_memory=host_nbytes, activations="storage"
    )
    store = model.offload.activations
    tensors = [torch.randn(1 << 18) for _ in range(3)]
    held = [store.swap_out(tensor.clone()) for tensor in tensors]
    assert tensors[0].numel() * 4 == 8 * ACTIVATION_STAGING_NBYTES_MIN
    for activation, tensor in zip(reversed(held), reversed(tensors), strict=True):
        assert torch.equal(store.swap_in([activation])[0], tensor)
    with pytest.raises(offload.UsageError, match="backward ran twice"):
        store.swap_in([held[0]])
    model.offload.close()


class SleepyBlock(Block):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)


def test_what_returns_from_storage_is_on_the_device_while_the_block_after_it_still_computes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[SleepyBlock() for _ in range(LAYERS)])
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters()), device="emulated", step_aside="never", storage=[str(tmp_path)],
        chunk_elements=CHUNK, activations="storage", device_memory="2MB", host_memory="20MB",
    )  # fmt: skip
    train(model, optimizer, n_steps=1)
    with model.offload.record() as spans:
        train(model, optimizer, n_steps=1)
    model.offload.close()
    returned = {span.name: span.end_s for span in spans if span.name.startswith("swap_in")}
    computed = {span.name: span.end_s for span in spans if span.name.startswith("recompute")}
    for block in range(1, LAYERS):
        assert returned[f"swap_in {block - 1}"] < computed[f"recompute {block}"]
