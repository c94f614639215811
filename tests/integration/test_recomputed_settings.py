"""A block runs again with the device's random numbers and autocast of its first run, wherever its inputs are."""

import io

import pytest
import torch
from torch import nn

import offload
from tests.integration.test_exactness import CHUNK

CUDA = torch.device("cuda", 0)
WIDTH, BLOCKS = 32, 3


class Block(nn.Module):
    """Its first tensor is on the CPU, as the step of a diffusion model; its mask comes from the device's generator."""

    def __init__(self, draw):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.draw = draw

    def forward(self, step, x):
        return x + self.down(torch.tanh(self.up(x)) * self.draw(x)) / step


class Model(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.layers = nn.ModuleList([Block(draw) for _ in range(BLOCKS)])

    def forward(self, x):
        step = torch.tensor(2.0)
        for layer in self.layers:
            x = layer(step, x)
        return x


def train(directory, draw, autocast=None, **settings):
    """Parameters by name after three steps of a model that is told that its blocks compute on CUDA."""
    torch.manual_seed(0)
    model = Model(draw)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=CHUNK,
        device="emulated", device_memory="20MB", host_memory="20MB", storage=[str(directory)], **settings,
    )  # fmt: skip
    model.offload.device = CUDA
    x = torch.randn(4, WIDTH)
    for _ in range(3):
        with autocast() if autocast else torch.enable_grad():
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = {n: t.clone() for block in model.offload.iter_blocks() for n, t in block}
    model.offload.close()
    return parameters


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_block_whose_first_tensor_is_on_the_cpu_has_the_devices_dropout_mask_again(
    tmp_path, monkeypatch, micro_batches
):
    generator = torch.Generator()

    def state_of(device):
        assert device == CUDA
        return generator

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state_of(device).get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: state_of(device).set_state(state))

    def mask(x):
        return torch.rand(x.shape, generator=generator).round() * torch.rand(x.shape)  # and one of the CPU's

    found = {}
    for activations in ("keep", "host"):
        generator.manual_seed(1)
        settings = {"activations": activations, "micro_batches": micro_batches}
        found[activations] = train(tmp_path / activations, mask, **settings)
    assert all(torch.equal(found["host"][name], kept) for name, kept in found["keep"].items())


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_a_block_runs_again_under_the_autocast_of_the_device_and_of_the_cpu(
    tmp_path, monkeypatch, device_type
):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    notes = io.StringIO()  # a list would be as the first run has left it

    def note(x):
        notes.write(f"{torch.is_autocast_enabled(device_type)} {torch.get_autocast_dtype(device_type)}\n")
        return torch.ones_like(x)

    train(tmp_path, note, lambda: torch.autocast(device_type, torch.float16))
    seen = notes.getvalue().splitlines()
    assert len(seen) == 3 * 2 * BLOCKS
    assert set(seen) == {"True torch.float16"}
