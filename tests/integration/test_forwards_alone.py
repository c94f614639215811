"""Where forwards follow each other without a backward, slots keep blocks from one to the next."""

import pytest
import torch
from torch import nn

import offload

WIDTH, N_BLOCKS = 64, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


BLOCK_NBYTES = 4 * (2 * 4 * WIDTH * WIDTH + 5 * WIDTH)


class Model(nn.Module):
    """`encoder` blocks come once, the others as often as asked."""

    def __init__(self, n_encoder=0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(N_BLOCKS))
        self.n_encoder = n_encoder

    def forward(self, x, n_rounds=1):
        x = self.first(x)
        for layer in self.layers[: self.n_encoder]:
            x = layer(x)
        for _ in range(n_rounds):
            for layer in self.layers[self.n_encoder :]:
                x = layer(x)
        return x


def frozen(model, **settings):
    model.requires_grad_(False)
    return offload.wrap(model, None, step_aside="never", chunk_elements=4096, **settings)[0]


def inputs(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, WIDTH, generator=generator) for _ in range(n)]


def loads_of(model, run):
    """What crossed the bus inside, by name."""
    with model.offload.record() as spans:
        run()
    return [span.name for span in spans if span.resource == "h2d" and span.name.startswith("load")]


def over_a_bus(model, n_slots):
    return frozen(
        model, device="emulated", storage=[], host_memory="20MB", device_memory=(N_BLOCKS + 8) * BLOCK_NBYTES,
        prefetch_blocks=n_slots - 1,
    )  # fmt: skip


@pytest.mark.parametrize("n_slots", [2, 3, 5, 7, 8])
def test_all_slots_but_two_save_a_load_in_every_forward(n_slots):
    expected, model = Model(), over_a_bus(Model(), n_slots)
    with torch.no_grad():
        for x in inputs(3):
            assert torch.equal(model(x), expected(x))
        loads = loads_of(model, lambda: [model(x) for x in inputs(4)])
    assert len(loads) == 4 * (0 if n_slots == N_BLOCKS else N_BLOCKS - (n_slots - 2))
    model.offload.close()


def test_the_first_blocks_are_on_their_way_before_the_next_forward_begins():
    model = over_a_bus(Model(), 4)
    with torch.no_grad():
        for x in inputs(3):
            model(x)
    model.offload.flush()
    assert model.offload._scheduler._residency.holds(model.offload.blocks[0])
    model.offload.close()


@pytest.mark.parametrize("n_slots", [2, 5])
def test_of_what_is_on_storage_as_much_is_not_read_again(tmp_path, n_slots):
    expected = Model()
    model = frozen(
        Model(), storage=[str(tmp_path)], host_memory="400KB", device_memory=(n_slots + 2) * BLOCK_NBYTES,
        prefetch_blocks=n_slots - 1, activations="device",
    )  # fmt: skip
    assert len(model.offload._scheduler.host) == n_slots
    assert all(block.param_offset >= 0 for block in model.offload.blocks)
    with torch.no_grad():
        for x in inputs(3):
            assert torch.equal(model(x), expected(x))
        model.offload.flush()
        before = model.offload.counters()["read_bytes"]
        for x in inputs(4):
            model(x)
        model.offload.flush()
        read = model.offload.counters()["read_bytes"] - before
    slot_nbytes = model.offload.blocks[0].layout.slot_nbytes
    assert read == 4 * (N_BLOCKS - (n_slots - 2)) * slot_nbytes
    model.offload.close()


def test_a_decoder_that_goes_round_does_not_bring_its_encoder():
    expected, model = Model(n_encoder=3), over_a_bus(Model(n_encoder=3), 3)
    with torch.no_grad():
        for x in inputs(2):
            assert torch.equal(model(x, 4), expected(x, 4))
        once = loads_of(model, lambda: model(inputs(1)[0], 1))
        often = loads_of(model, lambda: model(inputs(1)[0], 21))
    of_encoder = {f"load {number}" for number in range(3)}
    assert sum(name in of_encoder for name in often) <= sum(name in of_encoder for name in once) + 3
    assert len(often) <= len(once) + 20 * (N_BLOCKS - 3) + 3
    model.offload.close()


def test_training_goes_on_with_the_same_bits_after_forwards_alone(tmp_path):
    found = []
    for evaluates in (False, True):
        model = Model()
        model, optimizer = offload.wrap(
            model, torch.optim.AdamW(model.parameters(), lr=1e-2), device="emulated", step_aside="never",
            storage=[str(tmp_path)], host_memory="2MB", device_memory=14 * BLOCK_NBYTES, chunk_elements=4096,
            prefetch_blocks=3,
        )  # fmt: skip
        losses = []
        for x in inputs(4):
            if evaluates:
                with torch.no_grad():
                    model(x), model(x)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
        model.offload.close()
    assert found[0] == found[1]
