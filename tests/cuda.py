"""For tests on a CUDA device: kernels that give the same bits every time, and copies that come late."""

import os

import pytest
import torch

from offload.tiers.device import CudaDevice

COPY_CYCLES = 12_000_000
"""A device sleep of about 7 ms before each copy: several times what a small block computes."""


def deterministic_cuda(monkeypatch):
    """Skips without a CUDA device. Attention is written out: the backward of its fused kernels is not deterministic."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def sleepy_copies(monkeypatch):
    """Whatever does not wait for a copy comes before it."""
    copy = CudaDevice._copy

    def late(self, stream, target, source, after):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(COPY_CYCLES)
        return copy(self, stream, target, source, after)

    monkeypatch.setattr(CudaDevice, "_copy", late)
