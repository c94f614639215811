"""The codec is lossless on every pattern; the kernels agree with each other bit for bit and with torch closely."""

import numpy as np
import pytest
import torch

from offload import _C

LEVELS = _C.simd_levels()
COUNTS = [0, 1, 7, 8, 15, 16, 17, 1023, 4096]


def split(bits, level="auto"):
    hi, lo = np.empty(bits.size, np.uint16), np.empty(bits.size, np.int16)
    _C.split_master(bits.ctypes.data, hi.ctypes.data, lo.ctypes.data, bits.size, level)
    return hi, lo


def merge(hi, lo, level="auto"):
    out = np.empty(hi.size, np.uint32)
    _C.merge_master(hi.ctypes.data, lo.ctypes.data, out.ctypes.data, hi.size, level)
    return out


@pytest.mark.slow
def test_split_master_round_trips_over_every_32_bit_pattern():
    step = 1 << 24
    for start in range(0, 1 << 32, step):
        bits = np.arange(start, start + step, dtype=np.uint64).astype(np.uint32)
        hi, lo = split(bits)
        assert np.array_equal(merge(hi, lo), bits), f"in {start:#x}..{start + step:#x}"


@pytest.mark.parametrize("level", LEVELS)
def test_split_master_round_trips_ties_nans_infinities_and_a_sample(level):
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    sample = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([(tops[:, None] | lows).ravel(), sample])
    hi, lo = split(bits, level)
    assert np.array_equal(merge(hi, lo, level), bits)


def test_hi_is_the_nearest_bfloat16_with_ties_away_from_zero():
    bits = np.random.default_rng(1).integers(0, 0x7F7F8000, 1 << 18, dtype=np.uint64).astype(np.uint32)
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000
    hi, _ = split(bits)
    value = bits.view(np.float32).astype(np.float64)
    below = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    above = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    got = (hi.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    finite = np.isfinite(above)
    expected = np.where(above - value <= value - below, above, below)
    assert np.array_equal(got[finite], expected[finite])


def test_a_nan_master_is_served_as_a_nan():
    """See docs/adr/0003-split-master.md: the codec alone cannot promise this, so the update writes one NaN."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800001, 0x7FC00000], dtype=np.uint32)
    _C.canonicalize_nan(bits.ctypes.data, bits.size)
    hi, _ = split(bits)
    assert np.isnan((hi.astype(np.uint32) << 16).view(np.float32)).all()


def hyper(step=3, **changes):
    settings = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=step)
    return _C.Hyper(**{**settings, **changes})


def planes(codec, grad_dtype, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(n, generator=generator)
    exp_avg = torch.randn(n, generator=generator) * 0.1
    exp_avg_sq = torch.rand(n, generator=generator) * 0.01
    grad = torch.randn(n, generator=generator).to(grad_dtype)
    hi, lo = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
    _C.split_master(master.data_ptr(), hi.data_ptr(), lo.data_ptr(), n)
    return (master.clone() if codec == "fp32" else hi), lo, exp_avg, exp_avg_sq, grad, master


def run(codec, grad_dtype, n, level, hyper):
    param, lo, exp_avg, exp_avg_sq, grad, master = planes(codec, grad_dtype, n)
    name = str(grad_dtype).removeprefix("torch.")
    _C.adamw_update(
        codec, param.data_ptr(), lo.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), name, n,
        hyper, level,
    )  # fmt: skip
    result = torch.empty(n)
    if codec == "fp32":
        result = param
    else:
        _C.merge_master(param.data_ptr(), lo.data_ptr(), result.data_ptr(), n)
    return result, exp_avg, exp_avg_sq, grad, master


@pytest.mark.parametrize("codec", ["split_bf16", "fp32"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("n", COUNTS)
def test_every_instruction_set_gives_the_bits_of_scalar(codec, grad_dtype, level, n):
    for settings in ({}, {"decoupled": False}, {"grad_scale": 0.37, "maximize": True}):
        expected = run(codec, grad_dtype, n, "scalar", hyper(**settings))
        got = run(codec, grad_dtype, n, level, hyper(**settings))
        for ours, theirs in zip(got[:3], expected[:3], strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("codec", ["split_bf16", "fp32"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_one_update_is_within_a_few_roundings_of_torch(codec, kind):
    n, step = 4096, 7
    settings = hyper(step=step, decoupled=kind is torch.optim.AdamW)
    ours, our_avg, our_sq, grad, master = run(codec, torch.float32, n, "auto", settings)
    _, _, exp_avg, exp_avg_sq, _, _ = planes(codec, torch.float32, n)
    parameter = torch.nn.Parameter(master.clone())
    optimizer = kind([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step - 1)), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq,
    }  # fmt: skip
    parameter.grad = grad.clone()
    optimizer.step()
    _, _, old_avg, old_sq, _, old = planes(codec, torch.float32, n)
    for got, expected, before in [
        (ours, parameter.detach(), old), (our_avg, exp_avg, old_avg), (our_sq, exp_avg_sq, old_sq),
    ]:  # fmt: skip
        largest_operand = torch.maximum(torch.maximum(expected.abs(), before.abs()), (expected - before).abs())
        ulp = torch.finfo(torch.float32).eps * largest_operand
        roundings = 2 if kind is torch.optim.AdamW else 8  # with L2, g + wd * p is rounded too
        assert ((got - expected).abs() <= roundings * ulp).all()
