"""One gradient buffer on a device with memory of its own: gradients leave as they come, with the bits of always."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.runtime import chosen_device
from offload.runtime.gradients import Gradients
from offload.transfer.copies import Copies
from tests.conftest import slow_but
from tests.device_order import OrderedDevice, watching

WIDTHS = (48, 32, 48, 16, 48, 32)


@pytest.fixture(autouse=True)
def every_part_leaves_alone(monkeypatch):
    monkeypatch.setattr("offload.runtime.gradients.LEAVES_ALONE_NBYTES", 0)


def _fail(_grad):
    raise RuntimeError("as the test asks")


class Block(nn.Module):
    """Blocks of several sizes; `sometimes` is used by samples that ask for it; `twice` gets two gradients of one
    backward, the second from a backward inside."""

    def __init__(self, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(32, hidden), nn.Linear(hidden, 32)
        self.sometimes, self.twice = nn.Linear(32, 32), nn.Linear(32, 32)

        self.fails = False

    def _inside(self, x):
        return torch.tanh(self.twice(x))

    def forward(self, x):
        x = x + self.down(torch.tanh(self.up(x)))
        if self.fails and x.requires_grad:
            x.register_hook(_fail)
        if x[0, 0] > 0:
            x = x + self.sometimes(x)
        return x + self.twice(checkpoint(self._inside, x, use_reentrant=True))


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(hidden) for hidden in WIDTHS]).to(dtype)


def trained(dtype, n_steps=4, accumulate=1, **settings):
    """(parameters by name, how many gradient buffers there are)."""
    model = model_of(dtype)
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=2048,
        chunk_buffers=2, update_threads=1, **settings,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        for number in range(accumulate):
            x = torch.randn(6, 32, generator=generator).to(dtype)
            if number < accumulate - 1:
                with model.offload.no_sync():
                    model(x).float().square().mean().backward()
            else:
                model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {name: t.clone() for part in model.offload.iter_blocks() for name, t in part}
    n_buffers = len(model.offload._gradients._buffers)
    model.offload.close()
    return found, n_buffers


SMALL = {"device_memory": "150KB", "host_memory": "2MB"}
SMALLER = {**SMALL, "device_memory": "95KB"}
ON_DEVICE = {"states_on_device": 300_000, "device_memory": "450KB"}
"""The state of first blocks, whose gradients are used where they are."""
CASES = {
    "in backward": {},
    "in backward, first blocks on the device": ON_DEVICE,
    "deferred, first blocks on the device": {"update": "deferred", **ON_DEVICE},
    "accumulated, first blocks on the device": {"accumulate": 2, **ON_DEVICE},
    "in backward, micro-batches": {"micro_batches": 3},
    "accumulated": {"accumulate": 2},
    "deferred": {"update": "deferred", "micro_batches": 2},
    "deferred, waiting in host memory": {"update": "deferred", "host_memory": "20MB"},
    "clipped": {"max_grad_norm": 0.01, "micro_batches": 2},
    "all in host memory": {"storage": [], "host_memory": "20MB", "micro_batches": 2},
    "graphs kept": {"activations": "keep", "micro_batches": 2},
}


SAME = ("micro_batches", "accumulate", "max_grad_norm", "update")


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16]))
def test_with_one_gradient_buffer_the_bits_are_those_of_host_memory(tmp_path, monkeypatch, dtype, case):
    same = {name: CASES[case][name] for name in SAME if name in CASES[case]}
    if dtype == torch.bfloat16 and not same:
        pytest.skip("gradients that come once are bf16, of which the one buffer holds two blocks'")
    if dtype == torch.bfloat16 and "states_on_device" in CASES[case]:
        pytest.skip("these sizes leave room for a second buffer")
    monkeypatch.setattr(chosen_device, "EmulatedDevice", OrderedDevice)
    expected, _ = trained(dtype, device="cpu", device_memory="1GB", host_memory="1GB", storage=[], **same)
    with watching() as conflicts:
        small = SMALL if dtype == torch.float32 else SMALLER
        got, n_buffers = trained(
            dtype, device="emulated", **{**small, "storage": [str(tmp_path)], **CASES[case]}
        )
    assert n_buffers == 1
    assert conflicts == []
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_gradients_leave_while_their_block_is_in_backward(tmp_path, monkeypatch):
    """But for the smallest, whose copy is worth less than its launch: those leave at its end."""
    monkeypatch.setattr("offload.runtime.gradients.LEAVES_ALONE_NBYTES", 4 * 32 * 16)
    leaves, before_end, blocks = [], [], []
    d2h, hand_over = Copies.d2h, Gradients.hand_over

    def copied(self, name, target, source, after=()):
        leaves.append(source.numel())
        return d2h(self, name, target, source, after)

    def ended(self, block, segments_of):
        before_end.append(list(leaves))
        parts = hand_over(self, block, segments_of)
        blocks.append((block.layout.grad_elements, sum(leaves)))
        leaves.clear()
        return parts

    monkeypatch.setattr(Copies, "d2h", copied)
    monkeypatch.setattr(Gradients, "hand_over", ended)
    trained(torch.float32, n_steps=1, device="emulated", **{**SMALL, "storage": [str(tmp_path)]})
    for early, hidden in zip(before_end, reversed(WIDTHS), strict=False):
        assert early.count(32 * hidden) >= 2  # up and down
        assert min(early) >= 32 * 16
    assert [n + 32 * 32 for n, _ in blocks] == [n for _, n in blocks]  # what comes twice leaves twice


@pytest.mark.parametrize("host_memory", ["2MB", "20MB"], ids=["spilled", "in host memory"])
def test_a_backward_that_fails_among_gradients_that_have_left_changes_nothing(
    tmp_path, monkeypatch, host_memory
):
    def steps(n_failures):
        model = model_of(torch.float32)
        settings = {**SMALL, "host_memory": host_memory, "storage": [str(tmp_path)]}
        model, optimizer = offload.wrap(
            model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=2048,
            chunk_buffers=2, update_threads=1, device="emulated", update="deferred", **settings,
        )  # fmt: skip
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
        for number in range(3):
            if number == 1:
                for _ in range(n_failures):
                    model[2].fails = True
                    with pytest.raises(RuntimeError, match="as the test asks"):
                        (3 * model(x)).square().mean().backward()
                    model[2].fails = False
                    optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {name: t.clone() for part in model.offload.iter_blocks() for name, t in part}
        model.offload.close()
        return found

    expected, got = steps(0), steps(2)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("host_memory", ["2MB", "20MB"], ids=["spilled", "in host memory"])
def test_a_step_between_a_forward_and_its_backward_loses_no_gradient(tmp_path, host_memory):
    def parameters(**settings):
        model = model_of(torch.float32)
        model, optimizer = offload.wrap(
            model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=2048,
            chunk_buffers=2, update_threads=1, **settings,
        )  # fmt: skip
        for seed in range(2):
            result = model(torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)))
            optimizer.step()  # of nothing
            result.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {name: t.clone() for part in model.offload.iter_blocks() for name, t in part}
        model.offload.close()
        return found

    expected = parameters(device="cpu", device_memory="1GB", host_memory="1GB", storage=[])
    storage = [] if host_memory == "20MB" else [str(tmp_path)]
    got = parameters(device="emulated", **{**SMALL, "host_memory": host_memory, "storage": storage})
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
