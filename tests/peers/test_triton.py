"""The fused AdamW of a device, as far as it can be looked at without one: interpreted, and as the code it becomes."""

import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow


def test_interpreted_it_has_the_bits_of_the_extensions_kernels():
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers.triton_side"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "the same bits"


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("is_split", [True, False])
def test_compiled_nothing_is_fused_approximated_or_flushed_to_zero(capability, is_split):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from offload.optim import fused_adamw

    constants = {
        "chunk_elements": 1 << 18, "record_nbytes": 10 << 18, "is_split": is_split, "has_l2": True,
        "lerp_from_grad": False, "block": fused_adamw.BLOCK,
    }  # fmt: skip
    pointers = {"param": "*i16" if is_split else "*fp32", "lo": "*i16", "moments": "*fp32", "grad": "*bf16"}
    if capability < 80:
        pointers["grad"] = "*fp32"
    known = {**pointers, "start": "i64", "stop": "i64", "n_elements": "i64"}
    kernel = fused_adamw._adamw
    signature = {name: known.get(name, "fp32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=indices)
    code = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
    )
    operations = set(re.findall(r"\b(?:add|sub|mul|fma|div|sqrt|rcp|ex2)\.[\w.]*f32\b", code.asm["ptx"]))
    assert operations == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
