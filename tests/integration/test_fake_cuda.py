"""What runs on a GPU only, on a device that torch takes for CUDA and that is none (tests/fake_cuda)."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests import fake_cuda

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PARTS = {
    "the device": "tests/integration/test_device_tier.py",
    "state on the device": "tests/integration/test_states_on_device.py",
    "exactness": "tests/integration/test_exactness.py",
    "saved activations": "tests/integration/test_saved_activations.py tests/integration/test_late_plan.py",
    "updates": "tests/integration/test_early_root.py tests/integration/test_run_ahead.py "
    "tests/integration/test_held_updates.py tests/unit/test_device_rules.py",
    "order": "tests/integration/test_device_order.py",
}
NEEDS_A_GPU = (
    "test_a_steady_step_on_a_gpu_asks", "test_on_a_gpu_the_fused_kernel", "allocators_reserve_on_a_gpu",
    "test_without_one_hand_over_there_is_a_race",
)  # fmt: skip
"""Its profiler, Triton, its allocator's figures, copies that come late."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    pytest.mark.skipif(
        not importlib.metadata.version("torch").startswith(fake_cuda.TORCH) or torch.version.cuda is not None,
        reason=f"made for a torch {fake_cuda.TORCH} that was built for CPUs",
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The device as a shared library."""
    root, target = pathlib.Path(torch.__file__).parent, tmp_path_factory.mktemp("fake_cuda") / "device.so"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    links = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{root / 'lib'}"]
    source = str(pathlib.Path(fake_cuda.__file__).with_name("device.cpp"))
    command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", source, "-o", str(target), *includes, *links]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    return target


@pytest.mark.parametrize("part", PARTS, ids=lambda name: name.replace(" ", "-"))
def test_what_is_for_a_gpu_passes_on_a_device_that_says_it_is_one(library, part):
    """Its path, its operands and autograd's thread for it are CUDA's: an operation of tensors of both devices fails."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "tests.fake_cuda.plugin", "-p", "no:cacheprovider", "-m", "gpu",
        "-o", "timeout=300", "-k", " and ".join(f"not {name}" for name in NEEDS_A_GPU), *PARTS[part].split(),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "FAKE_CUDA": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of the worker that runs this test
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=850, check=False
    )
    told = run.stdout[-4000:] + run.stderr[-2000:]
    assert run.returncode == 0, told
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, told
    assert int(passed[1]) >= 5, told
