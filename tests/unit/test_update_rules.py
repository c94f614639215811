"""Every rule's kernel: the same bits at every instruction set, torch's arithmetic, and moments in fewer bits."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from offload import _C
from offload.update_rules import LO_NBYTES, RULES, kernel_rule
from tests.unit.test_adamw_kernel import start_state, with_specials

LEVELS = _C.simd_levels()
COUNTS = [0, 1, 7, 8, 15, 16, 17, 1023, 4096]
MOMENTS = ["fp32", "bf16", "8bit"]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.uint8,
    "uint8": torch.uint8,
}
HYPERS = {
    "adamw": [{"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}, {"beta1": 0.3, "beta2": 0.9, "decoupled": False}],
    "sgd": [
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5, "step": 1},
        {},
    ],
    "lion": [{"beta1": 0.9, "beta2": 0.99}, {"beta1": 0.95, "beta2": 0.98, "grad_scale": 0.37}],
}


def hyper_of(**changes):
    return _C.Hyper(**{"lr": 1e-2, "weight_decay": 0.1, "step": 3, "noise_seed": 5, **changes})


class Side:
    """Master, state planes and their scales, as a rule's kernel takes them."""

    def __init__(self, rule, codec, master, moments):
        self.rule, self.codec, self.n = rule, codec, master.numel()
        self.put(master)
        self.planes, self.absmax = [], []
        for plane, moment in zip(rule.planes, moments, strict=False):
            scale = torch.zeros(-(-self.n // 256))
            if plane.is_quantised:
                codes, scale = quantise(moment, plane.kind == "int8")
                self.planes.append(codes)
            else:
                self.planes.append(moment.to(DTYPES[plane.kind], copy=True))
            self.absmax.append(scale)

    def put(self, master):
        self.param, self.lo = master.clone(), torch.zeros(self.n, dtype=torch.int16)
        if self.codec == "split_bf16":
            self.param = torch.empty(self.n, dtype=torch.int16)
            _C.split_master(master.data_ptr(), self.param.data_ptr(), self.lo.data_ptr(), self.n)

    def update(self, grad, hyper, level="auto", start=0, n=None):
        n = self.n - start if n is None else n
        kinds = self.rule.kinds
        _C.rule_update(
            self.rule.name, kinds, self.codec, self.param[start:].data_ptr(), self.lo[start:].data_ptr(),
            [p[start:].data_ptr() for p in self.planes], [a[start // 256 :].data_ptr() for a in self.absmax],
            grad[start:].data_ptr(), str(grad.dtype).removeprefix("torch."), n, hyper, start, level,
        )  # fmt: skip

    def master(self):
        if self.codec == "fp32":
            return self.param
        merged = torch.empty(self.n)
        _C.merge_master(self.param.data_ptr(), self.lo.data_ptr(), merged.data_ptr(), self.n)
        return merged

    def moments(self):
        """As fp32."""
        values = []
        for plane, stored, absmax in zip(self.rule.planes, self.planes, self.absmax, strict=True):
            if plane.is_quantised:
                table = dynamic_map(plane.kind == "int8")
                values.append(table[stored.long()] * absmax.repeat_interleave(256)[: self.n])
            else:
                values.append(stored.float())
        return values

    def bits(self):
        held = [self.param, self.lo, *self.planes, *self.absmax]
        return torch.cat([tensor.view(torch.uint8) for tensor in held])


def dynamic_map(is_signed):
    """The map of arXiv 2110.02861, as its authors' library makes it: means of equal parts of each decade."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if is_signed else decade + 1)
        bounds = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        means = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += means.tolist() + ((-means).tolist() if is_signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64).float()


def quantise(x, is_signed):
    """(codes, absmax a block of 256): the nearest value of the map; a positive second moment keeps above zero."""
    table = dynamic_map(is_signed)
    blocks = -(-x.numel() // 256)
    padded = torch.zeros(blocks * 256)
    padded[: x.numel()] = x
    absmax = padded.view(blocks, 256).abs().amax(1)
    share = (padded.view(blocks, 256) / absmax.where(absmax > 0, torch.ones(()))[:, None]).view(-1)[
        : x.numel()
    ]
    codes = torch.bucketize(share, (table[:-1] + table[1:]) / 2)
    if not is_signed:
        codes = codes.clamp(min=1).where(x > 0, codes)
    return codes.to(torch.uint8), absmax


def both_moments(n, seed=0):
    _, exp_avg, exp_avg_sq, _ = start_state(n, seed=seed)
    return [exp_avg, exp_avg_sq]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_every_instruction_set_gives_the_bits_of_scalar(name, moments, level):
    rule = kernel_rule(name, moments)
    for codec in LO_NBYTES:
        for grad_dtype in (torch.float32, torch.bfloat16):
            for n in COUNTS:
                master, *_, grad = start_state(n, grad_dtype)
                for changes in HYPERS[name]:
                    sides = [Side(rule, codec, master, both_moments(n)) for _ in range(2)]
                    for side, at in zip(sides, (level, "scalar"), strict=True):
                        side.update(grad, hyper_of(**changes), at)
                    assert torch.equal(sides[0].bits(), sides[1].bits()), (codec, grad_dtype, n, changes)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("name", RULES)
def test_infinities_and_nans_have_the_same_bits_at_every_instruction_set(name, moments):
    master, exp_avg, exp_avg_sq, grad = with_specials(start_state(2 * 9**4))
    rule = kernel_rule(name, moments)
    sides = [Side(rule, "split_bf16", master, [exp_avg, exp_avg_sq]) for _ in LEVELS]
    for side, level in zip(sides, LEVELS, strict=True):
        side.update(grad, hyper_of(**HYPERS[name][0]), level)
        assert torch.equal(side.bits(), sides[0].bits())


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("name", RULES)
def test_a_nan_gradient_becomes_a_nan_parameter_and_a_nan_moment(name, moments):
    rule = kernel_rule(name, moments)
    side = Side(rule, "split_bf16", torch.ones(512), [torch.ones(512), torch.ones(512)])
    grad = torch.ones(512)
    grad[7] = float("nan")
    side.update(grad, hyper_of(**HYPERS[name][0]))
    assert side.master()[7].isnan()
    assert not side.master()[8:].isnan().any()
    assert all(moment[7].isnan() for moment in side.moments())
    assert not any(moment[256:].isnan().any() for moment in side.moments())


# ---- the arithmetic is torch's ---------------------------------------------------------------------------------


def in_torch(name, master, changes, grads):
    """Parameters and moments after torch's own steps; Lion's as in program 1 of its paper."""
    parameter = torch.nn.Parameter(master.clone())
    maximize = changes.get("maximize", False)
    if name == "sgd":
        names = ("momentum", "dampening", "nesterov")
        settings = {key: changes[key] for key in names if key in changes}
        optimizer = torch.optim.SGD(
            [parameter], lr=1e-2, weight_decay=0.1, maximize=maximize, foreach=False, fused=False, **settings
        )
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
        buffer = optimizer.state[parameter].get("momentum_buffer")
        return [parameter.detach()] + ([] if buffer is None else [buffer])
    beta1, beta2, scale = changes["beta1"], changes["beta2"], changes.get("grad_scale", 1.0)
    p, m = master.clone(), torch.zeros_like(master)
    for grad in grads:
        grad = grad * scale
        p = p * (1 - 1e-2 * 0.1)
        p = p.add((m * beta1).add(grad, alpha=1 - beta1).sign(), alpha=-1e-2)
        m = (m * beta2).add(grad, alpha=1 - beta2)
    return [p, m]


CASES = [(name, changes) for name in ("sgd", "lion") for changes in HYPERS[name] if "step" not in changes]


def compare_with_torch(exactly):
    for name, changes in CASES:
        for codec in LO_NBYTES:
            master = start_state(257)[0]
            grads = [start_state(257, seed=seed)[3] for seed in range(5)]
            expected = in_torch(name, master, changes, grads)
            rule = kernel_rule(name, has_momentum="momentum" in changes)
            for level in LEVELS:
                side = Side(rule, codec, master, [torch.zeros(257)])
                for step, grad in enumerate(grads, start=1):
                    side.update(grad, hyper_of(**{**changes, "step": step}), level)
                for ours, theirs in zip([side.master(), *side.moments()], expected, strict=True):
                    if exactly and not torch.equal(ours, theirs):
                        raise SystemExit(f"{name} {changes} {codec} {level}: bits differ from torch")
                    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_sgd_and_lion_stay_within_roundings_of_torch_at_its_own_instruction_set():
    compare_with_torch(exactly=False)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512", "DEFAULT"), reason="x86-64 only"
)
def test_sgd_and_lion_have_the_bits_of_torch_where_torch_does_not_fuse():
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}  # read once, at import
    root = str(pathlib.Path(_C.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr


# ---- moments in bf16 -------------------------------------------------------------------------------------------


def test_bf16_moments_are_rounded_to_a_neighbour_with_the_exact_value_as_mean():
    """A moment between two bf16 values: each is taken as often as the other is near, over elements and over steps."""
    rule, n = kernel_rule("lion", "bf16"), 1 << 16
    low, step = torch.tensor(1.0), 2.0**-7
    for share in (0.1, 0.5, 0.9):
        grad = torch.full((n,), float(low + share * step))
        side = Side(rule, "fp32", torch.zeros(n), [torch.zeros(n)])
        side.update(grad, hyper_of(beta1=0.0, beta2=0.0))
        taken = side.moments()[0]
        assert set(taken.tolist()) == {1.0, 1.0 + step}
        up = float((taken > 1.0).double().mean())
        assert abs(up - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_a_second_moment_in_bf16_follows_beta2_0_999_where_rounding_to_nearest_would_stand_still():
    """When the gradient halves, v falls to a quarter, 0.999 a step; rounded to nearest it stays where it was."""
    rule, n, steps = kernel_rule("adamw", "bf16"), 4096, 2000
    side = Side(rule, "fp32", torch.zeros(n), [torch.ones(n), torch.ones(n)])
    grad, exact, nearest = torch.full((n,), 0.5), 1.0, torch.ones((), dtype=torch.bfloat16)
    for step in range(1, steps + 1):
        side.update(grad, hyper_of(beta1=0.9, beta2=0.999, step=step, lr=1e-4))
        exact = exact * 0.999 + 0.001 * 0.25
        nearest = (nearest.float() * 0.999 + 0.001 * 0.25).to(torch.bfloat16)
    assert float(nearest) > 0.99
    assert abs(float(side.moments()[1].mean()) / exact - 1) < 0.005


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_pieces_of_a_parameter_have_the_bits_of_the_whole(moments):
    """Wherever chunks cut it, and wherever its flat buffer begins."""
    rule, n = kernel_rule("adamw", moments), 2048
    master, *_, grad = start_state(n)
    changes = HYPERS["adamw"][0]
    whole, pieces = (Side(rule, "split_bf16", master, both_moments(n)) for _ in range(2))
    whole.update(grad, hyper_of(**changes))
    for start, count in ((0, 256), (256, 1280), (1536, 512)):
        pieces.update(grad, hyper_of(**changes), start=start, n=count)
    assert torch.equal(whole.bits(), pieces.bits())
    behind = Side(rule, "split_bf16", torch.cat([master, master]), [m.repeat(2) for m in both_moments(n)])
    behind.update(grad.repeat(2), hyper_of(**changes, noise_origin=n), start=n)
    for ours, theirs in zip(behind.planes, whole.planes, strict=True):
        assert torch.equal(ours[n:], theirs)
    other = Side(rule, "split_bf16", master, both_moments(n))
    other.update(grad, hyper_of(**changes | {"noise_seed": 6}))
    assert torch.equal(other.bits(), whole.bits()) == (moments == "8bit")


# ---- moments in 8 bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_map_is_that_of_the_paper(is_signed):
    expected = dynamic_map(is_signed)
    assert expected.numel() == 256
    torch.testing.assert_close(torch.tensor(_C.quant_map(is_signed)), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_8_bit_adamw_is_dequantise_update_quantise_of_the_paper(n):
    """Three steps against torch's fp32 AdamW between this file's own quantisation; one code apart on a tie at most."""
    rule = kernel_rule("adamw", "8bit")
    master, exp_avg, exp_avg_sq, _ = start_state(n)
    exp_avg_sq[::3] *= 1e-6  # decades below the largest of the block
    side = Side(rule, "fp32", master, [exp_avg, exp_avg_sq])
    for step in range(1, 4):
        grad = start_state(n, seed=step)[3]
        parameter = torch.nn.Parameter(side.param.clone())
        optimizer = torch.optim.AdamW(
            [parameter], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, foreach=False
        )
        moments = [m.clone() for m in side.moments()]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step - 1)), "exp_avg": moments[0], "exp_avg_sq": moments[1],
        }  # fmt: skip
        parameter.grad = grad
        optimizer.step()
        side.update(grad, hyper_of(beta1=0.9, beta2=0.999, eps=1e-8, step=step))
        torch.testing.assert_close(side.param, parameter.detach(), rtol=1e-5, atol=1e-6)
        for plane, codes, absmax, moment in zip(rule.planes, side.planes, side.absmax, moments, strict=True):
            expected, scales = quantise(moment, plane.kind == "int8")
            torch.testing.assert_close(absmax, scales, rtol=1e-6, atol=0)
            apart = (codes.int() - expected.int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 0.01


@pytest.mark.slow
def test_map_and_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for is_signed in (True, False):
        theirs = functional.create_dynamic_map(signed=is_signed)
        torch.testing.assert_close(theirs, dynamic_map(is_signed), rtol=1e-6, atol=1e-9)
    rule = kernel_rule("lion", "8bit")
    grad = start_state(4096)[3]
    side = Side(rule, "fp32", torch.zeros(4096), [torch.zeros(4096)])
    side.update(grad, hyper_of(beta1=0.9, beta2=0.0))
    codes, state = functional.quantize_blockwise(grad, code=dynamic_map(True), blocksize=256)
    torch.testing.assert_close(side.absmax[0], state.absmax)
    apart = (side.planes[0].int() - codes.view(-1).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


def test_a_second_moment_above_zero_never_becomes_zero():
    """It is 10^-9 of the largest of its block; as zero, the update would be a moment divided by eps."""
    rule = kernel_rule("adamw", "8bit")
    exp_avg_sq = torch.full((256,), 1e-9)
    exp_avg_sq[0] = 1.0
    side = Side(rule, "fp32", torch.zeros(256), [torch.zeros(256), torch.zeros(256)])
    side.update(exp_avg_sq.sqrt(), hyper_of(beta1=0.9, beta2=0.0, step=10))
    assert (side.planes[1][1:] == 1).all()
    zeros = Side(rule, "fp32", torch.zeros(256), [torch.zeros(256), torch.zeros(256)])
    zeros.update(torch.zeros(256), hyper_of(beta1=0.9, beta2=0.9, eps=1e-8))
    assert (zeros.moments()[1] == 0).all()
    assert (zeros.param == 0).all()


def test_records_take_the_bytes_that_the_extension_says():
    for name in RULES:
        for moments in MOMENTS:
            rule = kernel_rule(name, moments)
            for codec in LO_NBYTES:
                for n in (0, 2048, 4096, 6144, 1 << 18):
                    assert rule.record_nbytes(codec, n) == _C.record_nbytes(codec, rule.kinds, n)
    assert kernel_rule("adamw", "8bit").nbytes_per_element("split_bf16") == 2 + 2 * (1 + 4 / 256)
    assert kernel_rule("sgd", has_momentum=False).record_nbytes("fp32", 2048) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_vector_level_is_really_vectorised(name, level):
    rule = kernel_rule(name)
    master, *_, grad = start_state(1 << 15)
    side, hyper = Side(rule, "split_bf16", master, both_moments(1 << 15)), hyper_of(**HYPERS[name][0])

    def best_s(at):
        times = []
        for _ in range(100):
            start = time.perf_counter()
            side.update(grad, hyper, at)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best_s(level) < best_s("scalar") / 2


if __name__ == "__main__":
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        raise SystemExit("torch ignored ATEN_CPU_CAPABILITY")
    compare_with_torch(exactly=True)
