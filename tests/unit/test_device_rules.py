"""The update rules in torch's operations have the bits of the extension's kernels."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload import _C
from offload.model.flat import FlatBuffer
from offload.optim.torch_rules import UPDATES, Views
from offload.optim.updater import Updater, fused_for
from offload.tiers.device import CudaDevice
from offload.tiers.emulated_device import EmulatedDevice
from offload.update_rules import ADAMW
from tests.unit.test_adamw_kernel import start_state, with_specials

ALIKE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
SETTINGS = {
    "adamw": [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled": False},
        {"beta1": 0.4, "step": 3},
        {"step": 70, "maximize": True, "grad_scale": 0.3},
        {"weight_decay": 0.1, "decoupled": False, "step": 2, "maximize": True},
    ],
    "sgd": [
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"momentum": 0.9, "step": 2, "dampening": 0.3, "weight_decay": 0.01},
        {"momentum": 0.9, "dampening": 0.3, "maximize": True},
        {"momentum": 0.9, "step": 5, "nesterov": True, "grad_scale": 0.3},
        {"momentum": 0.9, "step": 3, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    ],
    "lion": [{"weight_decay": 0.1}, {"beta1": 0.95, "step": 4, "maximize": True}],
}
CASES = [(rule, settings) for rule, several in SETTINGS.items() for settings in several]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_kernel(rule, planes, grad, hyper, codec):
    param, lo, *moments = planes
    _C.rule_update(
        rule,
        ["float32"] * len(moments),
        codec,
        param.data_ptr(),
        lo.data_ptr(),
        [m.data_ptr() for m in moments],
        [0] * len(moments),
        grad.data_ptr(),
        str(grad.dtype).removeprefix("torch."),
        param.numel(),
        hyper,
    )


def by_torch(rule, planes, grad, hyper, codec, device):
    param, lo, *moments = (plane.to(device, copy=True) for plane in planes)
    views = Views(
        param,
        lo if codec == "split_bf16" else None,
        grad.to(device),
        tuple(moments),
        tuple(torch.full((3, param.numel()), float("nan"), device=device)),
        torch.empty((), device=device),
    )
    UPDATES[rule](views, hyper)
    return [plane.cpu() for plane in (param, lo, *moments)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("special", [False, True], ids=["random", "special values"])
@pytest.mark.parametrize(("rule", "settings"), CASES, ids=str)
def test_torchs_operations_give_the_kernels_bits(rule, settings, special, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    hyper = _C.Hyper(**{**ALIKE, **settings})
    for codec, grad_dtype in itertools.product(["split_bf16", "fp32"], [torch.float32, torch.bfloat16]):
        state = start_state(9**4, grad_dtype)
        master, *moments, grad = with_specials(state) if special else state
        moments = moments[: {"adamw": 2, "sgd": "momentum" in settings, "lion": 1}[rule]]
        param, lo = master, torch.zeros(master.numel(), dtype=torch.int16)
        if codec == "split_bf16":
            param = torch.empty(master.numel(), dtype=torch.bfloat16)
            _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), master.numel())
        expected = [plane.clone() for plane in (param, lo, *moments)]
        by_kernel(rule, expected, grad, hyper, codec)
        found = by_torch(rule, (param, lo, *moments), grad, hyper, codec, device)
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("rule", "settings"), [case for case in CASES if case[0] != "adamw"], ids=str)
def test_an_update_takes_no_memory(rule, settings):
    """AdamW does on a CPU alone, whose root is taken in fp64."""
    state = start_state(4096, torch.float32)
    master, *moments, grad = state
    moments = moments[: {"sgd": "momentum" in settings, "lion": 1}[rule]]
    param, lo = master.to(torch.bfloat16), torch.zeros(4096, dtype=torch.int16)
    scratch, divisor = tuple(torch.zeros(3, 4096)), torch.zeros(())
    with Allocations([param, lo, grad, *moments, *scratch, divisor]) as found:
        UPDATES[rule](
            Views(param, lo, grad, tuple(moments), scratch, divisor), _C.Hyper(**{**ALIKE, **settings})
        )
    assert found.names == []


class Allocations(TorchDispatchMode):
    """Operations whose result is in other memory than that of the `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self._known:
            self.names.append(str(function))
        return result


def test_a_fused_kernel_is_launched_with_the_device_of_its_tensors_as_the_current_one(monkeypatch):
    """Triton launches on the current one, which `device="cuda:1"` does not make it."""
    current, launched_on = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    tier = EmulatedDevice()
    buffer = FlatBuffer(torch.float32, True, (), 4096, 0, 0, ADAMW, 4096)
    plane, records = torch.zeros(4096), torch.zeros(buffer.state_nbytes, dtype=torch.uint8)
    updater = Updater(4096, tier, lambda *_: launched_on.extend(current))
    updater.update(buffer, plane, records, torch.zeros(4096), [(0, 4096, _C.Hyper(**ALIKE))])
    tier.close()
    assert launched_on == [plane.device]


ALIKE_BUT_NOISE = {**ALIKE, "noise_seed": 1, "noise_origin": 512}
SEGMENTS = [
    (0, 512, ALIKE),
    (512, 1024, ALIKE_BUT_NOISE),
    (1536, 512, {**ALIKE, "weight_decay": 0.1}),
    (2048, 448, ALIKE),
    (2560, 512, ALIKE),
    (3072, 512, ALIKE),
]
RUNS = [(0, 1536), (1536, 2048), (2048, 2496), (2560, 3584)]


def test_neighbours_that_are_updated_alike_are_one_launch():
    """What lies between two parameters is not theirs."""
    launched = []
    tier = EmulatedDevice()
    buffer = FlatBuffer(torch.float32, True, (), 4096, 0, 0, ADAMW, 4096)
    updater = Updater(4096, tier, lambda *args: launched.append(args[4:6]))
    segments = [(start, n, _C.Hyper(**hyper)) for start, n, hyper in SEGMENTS]
    updater.update(buffer, torch.zeros(4096), torch.zeros(1), torch.zeros(4096), segments)
    tier.close()
    assert launched == RUNS


@pytest.mark.parametrize(
    "changed", [*ALIKE, "decoupled", "grad_scale", "maximize", "momentum", "dampening", "nesterov"]
)
def test_neighbours_that_differ_in_what_an_update_reads_are_not(changed):
    launched = []
    tier = EmulatedDevice()
    buffer = FlatBuffer(torch.float32, True, (), 4096, 0, 0, ADAMW, 4096)
    updater = Updater(4096, tier, lambda *args: launched.append(args[4:6]))
    one = _C.Hyper(**ALIKE)
    value = getattr(one, changed)
    changes = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value / 2 + 0.01}
    other = _C.Hyper(**{**ALIKE, changed: changes[type(value)]()})
    updater.update(
        buffer, torch.zeros(4096), torch.zeros(1), torch.zeros(4096), [(0, 64, one), (64, 64, other)]
    )
    tier.close()
    assert launched == [(0, 64), (64, 128)]


@pytest.mark.gpu
def test_on_a_gpu_the_fused_kernel_is_used_and_gives_the_kernels_bits():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton")
    tier = CudaDevice(torch.device("cuda"), 1 << 30)
    try:
        fused = fused_for(tier)
        assert fused is not None
        for settings, special in itertools.product(SETTINGS["adamw"], (False, True)):
            hyper = _C.Hyper(**{**ALIKE, **settings})
            state = start_state(4096, torch.bfloat16)
            master, *moments, grad = with_specials(state) if special else state
            param, lo = torch.empty(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.int16)
            _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), 4096)
            buffer = FlatBuffer(torch.bfloat16, True, (), 4096, 0, 0, ADAMW, 4096)
            records = torch.cat([plane.view(torch.uint8) for plane in (lo, *moments)]).cuda()
            found = param.cuda()
            Updater(4096, tier, fused).update(buffer, found, records, grad.cuda(), [(0, 4096, hyper)])
            by_kernel("adamw", planes := [param, lo, *moments], grad, hyper, buffer.codec)
            assert torch.equal(found.cpu().view(torch.int16), planes[0].view(torch.int16))
            expected = torch.cat([plane.view(torch.uint8) for plane in planes[1:]])
            assert torch.equal(records.cpu(), expected)
    finally:
        tier.close()
