"""Every optimizer, with moments in fp32, bf16 and 8 bits: the same bits out of core as in memory, on every path."""

from __future__ import annotations

import contextlib
import json
import pathlib

import pytest
import torch

import offload
from offload.checkpoint.directory import MANIFEST_FILE
from offload.checkpoint.save import KIND
from offload.errors import CheckpointError, ConfigError
from offload.tiers.manifest import crc32c_of
from offload.update_rules import kernel_rule
from tests.conftest import slow_but
from tests.fault.training import IN_MEMORY, STREAMING, Model, wrap_small

LR = 1e-3
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "lion": lambda p: offload.Lion(p, lr=LR, weight_decay=0.1),
}
KINDS = [(name, "fp32") for name in OPTIMIZERS] + [
    (name, moments) for name in ("adamw", "sgd", "lion") for moments in ("bf16", "8bit")
]
FAST = [("adamw", "bf16"), ("lion", "8bit")]
"""For paths whose combinations are many: the others are slow tests."""
FAST_OR_SLOW = [kind if kind in FAST else pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS]


def make(kind, moments, dtype=torch.bfloat16, **settings):
    """A wrapped model of three blocks; with `storage`, in the smallest budgets that would do."""
    torch.manual_seed(0)
    model = Model(3).to(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    settings = {"optimizer_state": moments, "chunk_elements": 2048, "chunk_buffers": 2, **settings}
    return wrap_small(model, optimizer, **settings)


def train(model, optimizer, n_steps, accumulate=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(n_steps):
        for part in range(accumulate):
            with contextlib.nullcontext() if part == accumulate - 1 else model.offload.no_sync():
                x = torch.randn(4, 8, generator=generator).to(dtype).to(model.offload.device)
                model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters_of(model):
    return {name: t.float().cpu().clone() for block in model.offload.iter_blocks() for name, t in block}


def result(kind, moments, dtype=torch.bfloat16, n_steps=6, accumulate=1, **settings):
    model, optimizer = make(kind, moments, dtype, **settings)
    train(model, optimizer, n_steps, accumulate)
    parameters = parameters_of(model)
    model.offload.close()
    return parameters


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def starts():
    torch.manual_seed(0)
    return {name: p.detach() for name, p in Model(3).named_parameters()}


@pytest.mark.parametrize(("kind", "moments"), KINDS)
def test_storage_has_the_bits_of_memory_whatever_the_chunks(tmp_path, kind, moments):
    """In memory nothing is streamed, chunks are large, and every parameter is somewhere else in its flat buffer."""
    expected = result(kind, moments, chunk_elements=1 << 16)
    assert_same(result(kind, moments, storage=[str(tmp_path / "a")]), expected)
    assert_same(
        result(kind, moments, storage=[str(tmp_path / "b")], update="deferred", update_threads=3), expected
    )


PATHS = {
    "fp32": {"dtype": torch.float32},
    "in host memory": {"host_memory": "100MB", "device_memory": "100MB", **STREAMING},
    "some of it in host memory": {"host_memory": 650_000, "device_memory": "100MB", **STREAMING},
    "accumulation": {"accumulate": 3},
    "clipping": {"max_grad_norm": 0.05},
    "durable steps": {"durability": "step"},
    "durable steps, clipped": {"durability": "step", "max_grad_norm": 0.05},
    "durable steps, verified": {"durability": "step", "verify_reads": True},
    "emulated device": {"device": "emulated"},
}
IN_BOTH = ("dtype", "accumulate", "max_grad_norm")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "moments"), FAST_OR_SLOW)
def test_no_path_changes_a_bit(tmp_path, path, kind, moments):
    settings = PATHS[path]
    expected = result(kind, moments, **{k: v for k, v in settings.items() if k in IN_BOTH})
    assert_same(result(kind, moments, storage=[str(tmp_path)], **settings), expected)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "plain sgd"])
def test_fp32_training_is_within_the_stated_bound_of_torch(tmp_path, kind):
    """Torch fuses some multiplications with additions; a last bit of a gradient is a thousandth of lr at most."""
    torch.manual_seed(0)
    reference = Model(3)
    optimizer = OPTIMIZERS[kind](reference.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        reference(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    got = result(kind, "fp32", torch.float32, n_steps=10, storage=[str(tmp_path)])
    for name, expected in reference.named_parameters():
        assert (got[name] - expected.detach()).abs().max() <= 1e-3 * LR
    assert (got["layers.0.linear.weight"] - starts()["layers.0.linear.weight"]).abs().max() > LR / 100


@pytest.mark.parametrize(("kind", "moments"), FAST_OR_SLOW)
def test_a_saved_run_goes_on_with_the_bits_it_would_have_had(tmp_path, kind, moments):
    """Saved from storage with one chunk size, resumed in memory with another, where parameters lie elsewhere."""
    whole = result(kind, moments, n_steps=6)
    model, optimizer = make(kind, moments, storage=[str(tmp_path / "store")])
    train(model, optimizer, 3)
    offload.save(model, str(tmp_path / "saved"))
    model.offload.close()
    model, optimizer = make(kind, moments, chunk_elements=6144)
    assert offload.resume(model, str(tmp_path / "saved")).step == 3
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        x = torch.randn(4, 8, generator=generator).to(torch.bfloat16)
        if number < 3:
            continue
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(parameters_of(model), whole)
    model.offload.close()


@pytest.mark.parametrize(("kind", "moments"), FAST_OR_SLOW)
def test_a_durable_run_that_ended_is_taken_over(tmp_path, kind, moments):
    settings = {"durability": "step", "storage": [str(tmp_path / "d")]}
    model, optimizer = make(kind, moments, **settings)
    train(model, optimizer, 3)
    expected = parameters_of(model)
    model.offload.close()
    model, _ = make(kind, moments, **settings)
    assert offload.resume(model, str(tmp_path / "d")).step == 3
    assert_same(parameters_of(model), expected)
    model.offload.close(remove=True)


def test_a_checkpoint_of_other_moments_is_refused_with_both_named(tmp_path):
    model, optimizer = make("adamw", "8bit")
    train(model, optimizer, 1)
    offload.save(model, str(tmp_path))
    model.offload.close()
    for kind, moments, named in (
        ("adamw", "fp32", "exp_avg float32"),
        ("lion", "8bit", "lion with exp_avg int8"),
    ):
        model, _ = make(kind, moments)
        with pytest.raises(CheckpointError, match=f"adamw with exp_avg int8.*{named}"):
            offload.resume(model, str(tmp_path))
        model.offload.close()


def test_a_checkpoint_from_before_rules_is_read_as_adamws(tmp_path):
    """Format version 1 did not say whose state it held."""
    model, optimizer = make("adamw", "fp32")
    train(model, optimizer, 2)
    expected = parameters_of(model)
    path = pathlib.Path(offload.save(model, str(tmp_path))) / MANIFEST_FILE
    model.offload.close()
    body = json.loads(path.read_bytes().splitlines()[1])
    assert body.pop("rule")["name"] == "adamw"
    raw = json.dumps(body).encode()
    head = {"format": KIND, "version": 1, "nbytes": len(raw), "crc32c": crc32c_of(raw)}
    path.write_bytes(json.dumps(head).encode() + b"\n" + raw + b"\n")
    model, _ = make("adamw", "fp32")
    assert offload.resume(model, str(tmp_path)).step == 2
    assert_same(parameters_of(model), expected)
    model.offload.close()


MORE = {
    "adamw, maximized": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1, maximize=True),
    "sgd, maximized": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, maximize=True),
}
ASIDE = {"step_aside": "always", "host_memory": "100MB", "device_memory": "100MB"}
"""Nothing streamed: on a device with memory of its own, all state is there and is updated there."""


@pytest.mark.parametrize(
    "loop", slow_but([{"max_grad_norm": 0.05}], [{}, {"accumulate": 3}, {"max_grad_norm": 0.05}]), ids=str
)
@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("kind", [*OPTIMIZERS, *MORE])
def test_an_unstreamed_device_of_its_own_has_the_bits_of_the_kernels(device, monkeypatch, kind, dtype, loop):
    monkeypatch.setitem(OPTIMIZERS, kind, {**OPTIMIZERS, **MORE}[kind])
    settings = {
        "device": device,
        "storage": [],
        "host_memory": "100MB",
        "device_memory": "100MB",
        **STREAMING,
    }
    expected = result(kind, "fp32", dtype, **settings, **loop)
    assert_same(result(kind, "fp32", dtype, **{**settings, **ASIDE}, **loop), expected)


@pytest.mark.parametrize("way", slow_but(["aside first"], ["aside first", "streamed first"]))
@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_goes_on_with_its_bits_from_an_unstreamed_device_to_storage_and_back(
    tmp_path, device, kind, dtype, way
):
    """Twice two steps and a checkpoint, in turn, where parameters and records lie elsewhere and in other chunks."""
    expected = result(kind, "fp32", dtype, n_steps=6, device=device, storage=[str(tmp_path / "uncut")])
    aside = {"device": device, "storage": [], "chunk_elements": 6144, **ASIDE}
    generator = torch.Generator().manual_seed(1)
    for part in range(3):
        is_aside = (part % 2 == 0) == (way == "aside first")
        settings = aside if is_aside else {"device": device, "storage": [str(tmp_path / f"store{part}")]}
        model, optimizer = make(kind, "fp32", dtype, **settings)
        assert model.offload.aside == is_aside
        if part:
            assert offload.resume(model, str(tmp_path / "saved")).step == 2 * part
        for _ in range(2):
            x = torch.randn(4, 8, generator=generator).to(dtype).to(model.offload.device)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        offload.save(model, str(tmp_path / "saved"))
        found = parameters_of(model)
        model.offload.close()
    assert_same(found, expected)


def test_an_unstreamed_device_of_its_own_refuses_moments_it_cannot_keep(tmp_path):
    with pytest.raises(ConfigError, match=r"step_aside='always'.*exp_avg bfloat16"):
        make("adamw", "bf16", device="emulated", storage=[str(tmp_path)], **ASIDE)


def test_an_unstreamed_device_of_its_own_refuses_moments_it_cannot_keep_of_a_model_without_blocks():
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"no blocks to stream.*exp_avg int8"):
        offload.wrap(model, optimizer, blocks=[], optimizer_state="8bit", device="emulated", **IN_MEMORY)


@pytest.mark.parametrize(("kind", "moments"), FAST_OR_SLOW)
def test_a_step_reads_and_writes_the_bytes_that_the_table_says(tmp_path, kind, moments):
    """Counted by the store, of one update of every parameter: state in and out, and the parameter out."""
    model, optimizer = make(kind, moments, storage=[str(tmp_path)], update="deferred", activations="keep")
    train(model, optimizer, 2)
    engine = model.offload
    engine.flush()
    before = engine.counters()
    train(model, optimizer, 1)
    engine.flush()
    read, written = (engine.counters()[name] - before[name] for name in ("read_bytes", "written_bytes"))
    n = sum(b.n_elements for x in [engine.root, *engine.blocks] for b in x.layout.buffers)
    in_blocks = sum(b.n_elements for x in engine.blocks for b in x.layout.buffers)
    rule = kernel_rule("adamw" if kind.startswith("adam") else "lion" if kind == "lion" else "sgd", moments,
                       has_momentum=kind != "plain sgd")  # fmt: skip
    state = sum(rule.record_nbytes("split_bf16", 2048) for _ in range(n // 2048))
    assert written == state + 2 * in_blocks + 4 * in_blocks  # gradients wait on storage
    assert state + 4 * in_blocks < read <= state + 4 * in_blocks + 4 * in_blocks
    engine.close()


@pytest.mark.slow
def test_optimizers_of_bitsandbytes_are_taken_as_spellings(tmp_path):
    optim = pytest.importorskip("bitsandbytes.optim")
    cases = {
        optim.AdamW8bit: ("adamw", "8bit"),
        optim.Lion8bit: ("lion", "8bit"),
        optim.Lion: ("lion", "fp32"),
    }
    for kind, (name, moments) in cases.items():
        model = Model(2)
        model, optimizer = offload.wrap(model, kind(model.parameters(), lr=LR), **IN_MEMORY)
        assert optimizer.rule == kernel_rule(name, moments)
        train(model, optimizer, 1)
        model.offload.close()


def test_what_is_not_supported_is_refused_with_what_is():
    model = Model(2)
    with pytest.raises(ConfigError, match=r"RMSprop is not supported.*AdamW, Adam and SGD, Lion"):
        offload.wrap(model, torch.optim.RMSprop(model.parameters()))
    with pytest.raises(ConfigError, match="amsgrad"):
        offload.wrap(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    model, optimizer = offload.wrap(model, torch.optim.SGD(model.parameters(), lr=LR), **IN_MEMORY)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ConfigError, match="wrapped without momentum"):
        train(model, optimizer, 1)
    model.offload.close()
