"""For tests on a CUDA device: kernels that give the same bits every time, and copies that come late."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from offload.tiers.device import CudaDevice

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
"""Among the devices of a test that takes the fixture `device`."""

COPY_CYCLES = 12_000_000
"""A device sleep of about 7 ms before each copy: several times what a small block computes."""


@contextlib.contextmanager
def ready(device, monkeypatch):
    """`device`, with deterministic kernels where it is CUDA."""
    with deterministic_cuda(monkeypatch) if device == "cuda" else contextlib.nullcontext():
        yield device


@contextlib.contextmanager
def deterministic_cuda(monkeypatch, attention=SDPBackend.MATH):
    """Skips without a CUDA device. Attention is written out: not every fused kernel's backward is deterministic. What
    cuBLAS has to be told is in tests/conftest.py.

    Budgets are those of `small_budgets`.
    """
    small_budgets(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(attention):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def small_budgets(monkeypatch):
    """Skips without a CUDA device. Budgets of a few MB place state as small models need it (none of it stays on the
    device unasked), and torch's allocator is not held to them: it takes 20 MiB at once."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(CudaDevice, "own_nbytes", 0)
    monkeypatch.setattr(CudaDevice, "updates_faster", False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device=None: None)


@contextlib.contextmanager
def cudnn_attention(monkeypatch):
    """Skips where there is none. Its backward does not give the same bits every time, and torch refuses it where they
    are asked for: deterministic algorithms are off."""
    small_budgets(monkeypatch)
    backend = getattr(SDPBackend, "CUDNN_ATTENTION", None)
    if backend is None:
        pytest.skip("this torch has no cuDNN attention")
    with sdpa_kernel(backend):
        query = torch.randn(2, 2, 128, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        try:
            torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        except RuntimeError as error:
            pytest.skip(f"no cuDNN attention here: {error}")
        yield


def sleepy_copies(monkeypatch):
    """Whatever does not wait for a copy comes before it."""
    copy = CudaDevice._copy

    def late(self, stream, target, source, after):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(COPY_CYCLES)
        return copy(self, stream, target, source, after)

    monkeypatch.setattr(CudaDevice, "_copy", late)
