"""For pytest: `-p tests.fake_cuda.plugin`. Loads the library that FAKE_CUDA names (see `build`), before torch."""

import ctypes
import os
import sys

import pytest

assert "torch" not in sys.modules, "the device has to be there before torch looks for one"
ctypes.CDLL(os.environ["FAKE_CUDA"], ctypes.RTLD_GLOBAL)

from tests.fake_cuda import torch_cuda  # noqa: E402

torch_cuda.install()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """A GPU's square root is the nearest number; that of torch's kernel for CPUs is not always."""
    from offload.optim import torch_rules

    torch_rules._square_root = lambda value, target: target.copy_(value.double().sqrt_())
