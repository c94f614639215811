"""Single tensors that are swapped out: any policy has the bits of the graph kept whole, and every wait on their way is
needed."""

import collections
import random
import threading
import time
import types

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.runtime.engine import OffloadEngine
from offload.stores.activations import ActivationStore
from offload.tiers.emulated_device import EmulatedDevice
from offload.tiers.host import Lease
from offload.transfer.copies import Copies
from offload.transfer.io_engine import Ticket
from tests.conftest import one_thread, slow_but
from tests.cuda import CUDA, cudnn_attention, deterministic_cuda
from tests.integration.test_exactness import (
    CHUNK,
    assert_same_bits,
    in_memory_on,
    stored,
    train,
    train_in_memory,
)

pytestmark = pytest.mark.usefixtures("poison")

WIDTH, ROWS, BLOCKS = 64, 256, 4
SAVED_NBYTES = 4 * ROWS * 4 * WIDTH
SLOW_BUS = 2e7
"""A saved tensor takes 13 ms, several times its block's computing."""


# ---- any policy ----------------------------------------------------------------------------------------------


ANY_POLICY = {
    "kind": st.sampled_from(["llama", "gpt2", "bert"]),
    "micro_batches": st.sampled_from([1, 2, 4]),
    "host_memory": st.sampled_from([2_000_000, 50_000_000]),
    "outcomes": st.sets(st.sampled_from(["device", "host", "storage", "recompute"]), min_size=1),
    "seed": st.integers(0, 2**32),
}


@pytest.mark.slow
@examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    device=st.sampled_from(["cpu", "emulated"]), bus_bytes_per_s=st.sampled_from([None, 2e8]), **ANY_POLICY
)
def test_any_policy_for_each_tensor_has_the_bits_of_a_graph_kept_whole(
    tmp_path_factory, device, bus_bytes_per_s, **drawn
):
    settings = {"device": device}
    if device == "emulated":
        settings["bus_bytes_per_s"] = bus_bytes_per_s
    assert_has_the_bits_of_a_graph_kept_whole(tmp_path_factory.mktemp("any"), settings, **drawn)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
@examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(**ANY_POLICY)
def test_any_policy_has_those_bits_on_a_gpu_with_fused_attention_too(tmp_path_factory, attention, **drawn):
    with pytest.MonkeyPatch.context() as patch, deterministic_cuda(patch, attention):
        assert_has_the_bits_of_a_graph_kept_whole(tmp_path_factory.mktemp("any"), {"device": "cuda"}, **drawn)


def assert_has_the_bits_of_a_graph_kept_whole(
    directory, device_settings, kind, micro_batches, host_memory, outcomes, seed
):
    def policy(engine, block, recipe):
        draw = random.Random(f"{seed} {block.index}")
        drawn = {value.op: draw.choice(sorted(outcomes)) for value in recipe.keepable()}
        return {op: outcome for op, outcome in drawn.items() if outcome != "recompute"}

    kept_whole = in_memory_on(
        device_settings["device"], activations="keep", step_aside="never", micro_batches=micro_batches
    )
    expected = train_in_memory(kind, kept_whole, n_steps=3, layers=3, dropout=0.1)
    settings = stored(directory, **device_settings, micro_batches=micro_batches, host_memory=host_memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadEngine, "tiers_of_saved", policy)
        assert_same_bits(train(kind, settings, n_steps=3, layers=3, dropout=0.1), expected)


# ---- attention that is not reproducible ----------------------------------------------------------------------


HEADS, LENGTH = 2, 128
GRADIENT_TOLERANCE = 2e-2
"""Of a parameter's largest gradient: a few roundings to bf16 (2^-8) on either side."""


class Attention(nn.Module):
    """Heads of 64, as every fused kernel takes them."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64 * HEADS, 3 * 64 * HEADS)
        self.out = nn.Linear(64 * HEADS, 64 * HEADS)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, 64)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class AttentionCounter(TorchDispatchMode):
    """Calls of fused attention in forward, by operation."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "attention" in name and "backward" not in name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def gradients_of(model, optimizer, device, parameters):
    """Of the second step, which has recipes: a step of SGD by 1 is the gradient. And the calls of attention in it."""
    x = torch.randn(2, LENGTH, 64 * HEADS, generator=torch.Generator().manual_seed(1)).to(device)
    for lr in (0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        before = parameters()
        with AttentionCounter() as counter:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = parameters()
    return {name: before[name] - after[name] for name in before}, counter.calls


def attention_blocks():
    torch.manual_seed(0)
    return nn.Sequential(*[Attention() for _ in range(BLOCKS)])


@pytest.mark.parametrize("device", ["emulated", CUDA])
@pytest.mark.parametrize(
    ("policy", "again"),
    [
        ({"activations": "keep"}, 0),
        ({"saved_activations": "recompute"}, 1),
        ({"saved_activations": "device"}, 0),
        ({"saved_activations": "host"}, 0),
    ],
    ids=str,
)
def test_attention_kept_skipped_or_run_again_has_the_gradients_of_plain_torch(
    tmp_path, monkeypatch, device, policy, again
):
    """cuDNN's on a GPU, whose bits are not the same every time; the CPU's flash kernel elsewhere."""
    kernel, computes_on = ("cudnn", "cuda") if device == "cuda" else ("flash", "cpu")
    with cudnn_attention(monkeypatch) if device == "cuda" else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        plain = attention_blocks().to(computes_on)
        expected, _ = gradients_of(
            plain, torch.optim.SGD(plain.parameters(), lr=1.0), computes_on,
            lambda: {name: p.detach().cpu().clone() for name, p in plain.named_parameters()},
        )  # fmt: skip
        model = attention_blocks()
        model, optimizer = offload.wrap(
            model, torch.optim.SGD(model.parameters(), lr=1.0), device=device, step_aside="never",
            chunk_elements=CHUNK, device_memory="50MB", host_memory="50MB", storage=[str(tmp_path)], **policy,
        )  # fmt: skip
        got, calls = gradients_of(
            model, optimizer, computes_on,
            lambda: {n: t.cpu().clone() for block in model.offload.iter_blocks() for n, t in block},
        )  # fmt: skip
        model.offload.close()
    assert [(kernel in name, n) for name, n in calls.items()] == [(True, BLOCKS * (1 + again))]
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert largest > 0
        assert (got[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * largest, name


# ---- every wait is needed ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Saves a wide tensor or more for each of its two lines."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.up(x)
        return x + self.down(torch.tanh(h) * torch.sigmoid(h))


def train_blocks(directory, n_steps=3, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    settings = {"host_memory": "50MB", **settings}
    model, optimizer = offload.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), step_aside="never", chunk_elements=CHUNK,
        device_memory="50MB", storage=[str(directory)], **settings,
    )  # fmt: skip
    losses = []
    try:
        x = torch.randn(ROWS, WIDTH)
        for _ in range(n_steps):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        parameters = {n: t.clone() for block in model.offload.iter_blocks() for n, t in block}
        return parameters, losses, dict(model.offload.activations.nbytes_by_tier)
    finally:
        model.offload.close()


def slow(tier, **more):
    """With so little host memory that a tensor passes through the staging to storage in four pieces."""
    little = 4 * CHUNK * 14 + 4 * ACTIVATION_STAGING_NBYTES_MIN + 900_000
    return {
        "device": "emulated", "bus_bytes_per_s": SLOW_BUS, "saved_activations": tier,
        "host_memory": little if tier == "storage" else "50MB", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def kept_blocks(tmp_path_factory):
    with one_thread():
        return train_blocks(tmp_path_factory.mktemp("kept"), device="emulated", activations="keep")


def differs(got, expected):
    return any(not torch.equal(got[0][name], expected[0][name]) for name in expected[0])


@pytest.mark.parametrize("micro_batches", slow_but([2], [1, 2]))
@pytest.mark.parametrize("tier", ["host", "storage"])
def test_with_every_wait_in_place_a_slow_bus_changes_no_number(tmp_path, tier, micro_batches):
    expected = train_blocks(
        tmp_path / "kept", device="emulated", activations="keep", micro_batches=micro_batches
    )
    got = train_blocks(tmp_path / "slow", **slow(tier, micro_batches=micro_batches))
    assert got[1] == expected[1]
    assert not differs(got, expected)
    assert got[2][tier] >= 2 * BLOCKS * SAVED_NBYTES  # in the two steps that have a recipe


def compute_before_it_has_come_back(monkeypatch):
    swap_in = ActivationStore.swap_in

    def hurried(self, activations):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EmulatedDevice, "compute_waits", lambda self, event: None)
            return swap_in(self, activations)

    monkeypatch.setattr(ActivationStore, "swap_in", hurried)


def bring_it_back_before_it_has_left(monkeypatch):
    h2d = Copies.h2d

    def hurried(self, name, target, source, after=()):
        return h2d(self, name, target, source, () if name.startswith("swap_in") else after)

    monkeypatch.setattr(Copies, "h2d", hurried)


def write_it_before_it_has_left_the_device(monkeypatch):
    write = ActivationStore._write

    def open_gate(self, event):
        gate = Ticket()
        gate.complete()
        return gate

    def hurried(self, held, tensor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Copies, "gate", open_gate)
            write(self, held, tensor)

    monkeypatch.setattr(ActivationStore, "_write", hurried)


def read_it_before_it_has_been_written(monkeypatch):
    start = ActivationStore._start

    def hurried(self, held):
        held.written.clear()
        start(self, held)

    monkeypatch.setattr(ActivationStore, "_start", hurried)


class SlowDrive:
    """An engine whose transfers take 30 ms longer. Reads that are not waited for have tickets that are done at once."""

    def __init__(self, engine, reads_are_waited_for, threads):
        self._engine, self._reads_are_waited_for, self._threads = engine, reads_are_waited_for, threads

    def _later(self, transfer):
        ticket = Ticket()

        def late():
            transfer().wait()
            ticket.complete()

        thread = threading.Thread(target=late)
        thread.start()
        self._threads.append(thread)
        return ticket

    def read(self, address, nbytes, offset, urgent=False):
        def transfer():
            time.sleep(0.03)
            return self._engine.read(address, nbytes, offset, urgent)

        ticket, done = self._later(transfer), Ticket()
        done.complete()
        return ticket if self._reads_are_waited_for else done

    def write(self, address, nbytes, offset, after=None):
        def transfer():
            if after is not None:
                after.wait()
            time.sleep(0.03)
            return self._engine.write(address, nbytes, offset)

        return self._later(transfer)


def on_a_slow_drive(monkeypatch, reads_are_waited_for=True):
    threads, storage, close = [], ActivationStore._storage, OffloadEngine.close

    def slowed(self):
        store, staging = storage(self)
        place = types.SimpleNamespace(
            engine=SlowDrive(store.engine, reads_are_waited_for, threads),
            grow=store.grow,
            allocate=store.allocate,
        )
        return place, staging

    def join_and_close(self):
        for thread in threads:
            thread.join()
        close(self)

    monkeypatch.setattr(ActivationStore, "_storage", slowed)
    monkeypatch.setattr(OffloadEngine, "close", join_and_close)


def copy_it_before_it_has_been_read(monkeypatch):
    on_a_slow_drive(monkeypatch, reads_are_waited_for=False)


def read_into_the_staging_before_it_has_been_copied(monkeypatch):
    def hurried(self):
        while self._returning:
            lease, _ = self._returning.popleft()
            lease.release_after(lambda: None)

    monkeypatch.setattr(ActivationStore, "_give_back_staging", hurried)


def fill_the_staging_before_it_has_been_written(monkeypatch):
    on_a_slow_drive(monkeypatch)
    write = ActivationStore._write

    def hurried(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lease, "release_after", lambda self, wait: self._give_back(self))
            write(self, *arguments)

    monkeypatch.setattr(ActivationStore, "_write", hurried)


@pytest.mark.slow
def test_a_slow_drive_changes_no_number(tmp_path, kept_blocks, monkeypatch):
    on_a_slow_drive(monkeypatch)
    assert not differs(train_blocks(tmp_path / "slow", **slow("storage")), kept_blocks)


@pytest.mark.parametrize(
    ("tier", "without"),
    [
        ("host", compute_before_it_has_come_back),
        ("host", bring_it_back_before_it_has_left),
        ("storage", compute_before_it_has_come_back),
        ("storage", write_it_before_it_has_left_the_device),
        ("storage", copy_it_before_it_has_been_read),
        ("storage", read_into_the_staging_before_it_has_been_copied),
        ("storage", fill_the_staging_before_it_has_been_written),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_without_one_wait_the_numbers_change(tmp_path, kept_blocks, monkeypatch, tier, without):
    without(monkeypatch)
    try:
        got = train_blocks(tmp_path / "slow", **slow(tier))
    except RuntimeError as noticed:  # the copy came after autograd had saved the tensor
        assert "modified by an inplace operation" in str(noticed)
        return
    assert differs(got, kept_blocks)


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_read_before_the_write_of_the_same_bytes_changes_the_numbers(tmp_path, monkeypatch, is_waited_for):
    """One saved tensor a block and one staging piece a tensor: the piece was last lent to the tensor before."""
    monkeypatch.setattr(Block, "forward", lambda self, x: x + self.down(torch.tanh(self.up(x))))
    expected = train_blocks(tmp_path / "kept", device="emulated", activations="keep")
    if not is_waited_for:
        read_it_before_it_has_been_written(monkeypatch)
    got = train_blocks(tmp_path / "slow", **slow("storage", host_memory="50MB"))
    assert differs(got, expected) != is_waited_for
