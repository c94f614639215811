"""The checksums that an update writes are those of the bytes it has written, for every codec and format of state."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
import torch

from offload import _C
from tests.unit.test_update_pipeline import STATE_OFFSET, Harness

PARAM_OUT, STATE_OUT = 5 << 19, 3 << 20
N, CHUNK = 45056, 20480
"""Two chunks of two and a half tiles of the pipeline's, and one of half a tile."""


@pytest.mark.parametrize("codec", ["split_bf16", "fp32"])
@pytest.mark.parametrize(
    "planes",
    [["float32", "float32"], ["bfloat16", "bfloat16"], ["int8", "uint8"]],
    ids=lambda planes: planes[0],
)
@pytest.mark.parametrize("update", ["all", "parts", "none", "a function"])
def test_checksums_are_those_of_the_bytes_on_the_drive(tmp_path, codec, planes, update):
    harness = Harness(tmp_path, CHUNK, 2)
    generator = torch.Generator().manual_seed(0)
    param_nbytes = N * (2 if codec == "split_bf16" else 4)
    param = harness.view[:param_nbytes]
    param.copy_(torch.randn(N // (1 if codec == "fp32" else 2), generator=generator).view(torch.uint8))
    state_nbytes = sum(_C.record_nbytes(codec, planes, n) for n in (CHUNK, CHUNK, N - 2 * CHUNK))
    state = torch.randn(state_nbytes // 4, generator=generator).abs()
    harness.store(state, STATE_OFFSET)
    grad = torch.randn(N, generator=generator)
    hyper = _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.1, 3)
    segments = {"parts": [(256, 20000, hyper), (20480, 8192, hyper), (40960, 3840, hyper)], "none": []}
    checksums = np.zeros(6, np.uint32)
    own = {"rule": "callback", "callback": lambda *piece: None} if update == "a function" else {}
    job = _C.UpdateJob(
        param_codec=codec, state_planes=planes, n_elements=N, param_address=param.data_ptr(),
        state_offset=STATE_OFFSET, grad_address=grad.data_ptr(), segments=segments.get(update, [(0, N, hyper)]),
        param_out_offset=PARAM_OUT, state_out_offset=STATE_OUT, checksums_address=checksums.ctypes.data, **own,
    )  # fmt: skip
    harness.pipeline.submit(job).wait(timeout_s=30)
    stored = (tmp_path / "store0").read_bytes()
    param_at, state_at = PARAM_OUT, STATE_OUT
    for index, n in enumerate((CHUNK, CHUNK, N - 2 * CHUNK)):
        of_param, of_record = param_nbytes // N * n, _C.record_nbytes(codec, planes, n)
        assert checksums[2 * index] == google_crc32c.value(stored[param_at : param_at + of_param])
        assert checksums[2 * index + 1] == google_crc32c.value(stored[state_at : state_at + of_record])
        param_at, state_at = param_at + of_param, state_at + of_record
    moved = stored[STATE_OUT : STATE_OUT + state_nbytes] != state.numpy().tobytes()
    assert moved == (update in ("all", "parts"))
    harness.close()
