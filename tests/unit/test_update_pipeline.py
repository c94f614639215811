"""The out-of-core update gives the bits of the in-memory kernel, whatever is on storage and however it is cut."""

import os

import numpy as np
import pytest
import torch

from offload import _C

PARAM_DTYPE = {"split_bf16": torch.int16, "fp32": torch.float32}
STATE_NBYTES = {"split_bf16": 10, "fp32": 8}
STORE_NBYTES = 4 << 20


class Harness:
    """A store with a parameter extent at 0, a state extent at 1 MiB and a gradient extent at 3 MiB."""

    def __init__(
        self, directory, chunk_elements, n_buffers, n_drives=1, backend="posix", n_threads=2, inject=None
    ):
        paths = []
        for i in range(n_drives):
            path = directory / f"store{i}"
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, STORE_NBYTES)
            paths.append(str(path))
        self.engine = _C.Engine(paths, backend=backend, stripe_nbytes=1 << 16, inject=inject)
        need = _C.UpdatePipeline.buffer_nbytes_required(chunk_elements, n_buffers)
        self.buffers = _C.Arena(need)
        self.pipeline = _C.UpdatePipeline(
            self.engine, chunk_elements, n_buffers, n_threads, self.buffers.address, need
        )
        self.chunk_elements = chunk_elements
        self.memory = _C.Arena(STORE_NBYTES)
        self.view = torch.from_numpy(np.frombuffer(self.memory, dtype=np.uint8))

    def move(self, verb, memory_offset, nbytes, offset):
        getattr(self.engine, verb)(self.memory.address + memory_offset, nbytes, offset).wait(timeout_s=30)


def reference(codec, master, grads, segments_per_step):
    n = master.numel()
    param, lo = master.clone(), torch.zeros(n, dtype=torch.int16)
    if codec == "split_bf16":
        param = torch.empty(n, dtype=torch.int16)
        _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), n)
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    for grad, segments in zip(grads, segments_per_step, strict=True):
        for start, count, hyper in segments:
            _C.adamw_update(
                codec,
                param[start:].data_ptr(),
                lo[start:].data_ptr(),
                exp_avg[start:].data_ptr(),
                exp_avg_sq[start:].data_ptr(),
                grad[start:].data_ptr(),
                "float32",
                count,
                hyper,
                "scalar",
            )
    return param


@pytest.mark.parametrize("codec", ["split_bf16", "fp32"])
@pytest.mark.parametrize(
    ("host_chunks", "read_param", "spilled"), [(0, True, True), (1, False, False), (99, True, False)]
)
@pytest.mark.parametrize(("chunk_elements", "n_buffers"), [(2048, 2), (4096, 3), (65536, 2)])
@pytest.mark.parametrize(("n_drives", "backend"), [(1, "auto"), (2, "posix")])
def test_out_of_core_updates_have_the_bits_of_the_in_memory_kernel(
    tmp_path, codec, host_chunks, read_param, spilled, chunk_elements, n_buffers, n_drives, backend
):
    n, n_steps = 10240, 3
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(n, generator=generator)
    grads = [torch.randn(n, generator=generator) for _ in range(n_steps)]
    segments_per_step = [
        [
            (0, 1000, _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.1, step)),
            (1024, 8191, _C.Hyper(3e-3, 0.8, 0.95, 1e-6, 0.0, step, grad_scale=0.5)),
        ]
        for step in range(1, n_steps + 1)
    ]
    harness = Harness(tmp_path, chunk_elements, n_buffers, n_drives, backend)
    n_chunks = -(-n // chunk_elements)
    host_chunks = min(host_chunks, n_chunks)
    itemsize = PARAM_DTYPE[codec].itemsize
    param = harness.view[: n * itemsize].view(PARAM_DTYPE[codec])
    records = torch.zeros(n * STATE_NBYTES[codec], dtype=torch.uint8)
    if codec == "split_bf16":
        lo = torch.empty(n, dtype=torch.int16)
        _C.split_master(master.data_ptr(), param.data_ptr(), lo.data_ptr(), n)
        for start in range(0, n, chunk_elements):
            chunk = lo[start : start + chunk_elements].view(torch.uint8)
            records[start * 10 : start * 10 + chunk.numel()] = chunk
    else:
        param.copy_(master)
    host_nbytes = min(n, host_chunks * chunk_elements) * STATE_NBYTES[codec]
    host_state = records[:host_nbytes].clone()
    stored = records[host_nbytes:]
    harness.move("write", 0, n * itemsize, 0)
    if stored.numel():
        harness.view[1 << 20 : (1 << 20) + stored.numel()] = stored
        harness.move("write", 1 << 20, stored.numel(), 1 << 20)
    for grad, segments in zip(grads, segments_per_step, strict=True):
        if spilled:
            harness.view[3 << 20 : (3 << 20) + 4 * n] = grad.view(torch.uint8)
            harness.move("write", 3 << 20, 4 * n, 3 << 20)
        if read_param:
            param.zero_()
        harness.pipeline.submit(
            _C.UpdateJob(
                param_codec=codec,
                n_elements=n,
                param_address=param.data_ptr(),
                param_offset=0,
                read_param=read_param,
                state_offset=1 << 20 if stored.numel() else -1,
                state_host_address=host_state.data_ptr(),
                host_chunks=host_chunks,
                grad_address=0 if spilled else grad.data_ptr(),
                grad_offset=3 << 20 if spilled else -1,
                segments=segments,
            )
        ).wait(timeout_s=30)
    expected = reference(codec, master, grads, segments_per_step)
    assert torch.equal(param, expected)
    param.zero_()
    harness.move("read", 0, n * itemsize, 0)
    assert torch.equal(param, expected)


def test_many_queued_jobs_finish_with_two_buffers_and_in_order(tmp_path):
    harness = Harness(tmp_path, 2048, 2)
    n = 8192
    param = harness.view[: n * 4].view(torch.float32)
    grad = torch.ones(n)
    jobs = [
        _C.UpdateJob(
            param_codec="fp32",
            n_elements=n,
            param_address=param.data_ptr(),
            state_offset=1 << 20,
            grad_address=grad.data_ptr(),
            segments=[(0, n, _C.Hyper(0.0, 0.9, 0.99, 1e-8, 0.0, 1))],
        )
        for _ in range(20)
    ]
    tickets = []
    for job in jobs:
        tickets.append(harness.pipeline.submit(job))
    for ticket in tickets:
        ticket.wait(timeout_s=30)
    harness.pipeline.close()


@pytest.mark.fault
@pytest.mark.parametrize("nth", range(1, 11))
def test_a_failing_transfer_fails_its_job_and_spares_the_next(tmp_path, nth):
    harness = Harness(tmp_path, 4096, 2, inject={"fail_nth": nth, "errno": 5})
    n = 10240
    param = harness.view[: n * 4].view(torch.float32)
    grad = torch.ones(n)

    def job():
        return _C.UpdateJob(
            param_codec="fp32",
            n_elements=n,
            param_address=param.data_ptr(),
            param_offset=0,
            state_offset=1 << 20,
            grad_address=grad.data_ptr(),
            segments=[(0, n, _C.Hyper(1e-3, 0.9, 0.99, 1e-8, 0.0, 1))],
        )

    failures = 0
    for _ in range(3):
        try:
            harness.pipeline.submit(job()).wait(timeout_s=30)
        except OSError as error:
            failures += 1
            assert error.errno == 5
    assert failures == 1
    harness.pipeline.close()
