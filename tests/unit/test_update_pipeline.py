"""The out-of-core update gives the bits of the in-memory kernel, whatever is on storage and however it is cut."""

import os
import random

import numpy as np
import pytest
import torch

from offload import _C

PARAM_DTYPE = {"split_bf16": torch.int16, "fp32": torch.float32}
GRAD_NBYTES = {"float32": 4, "bfloat16": 2}
STORE_NBYTES = 4 << 20
STATE_OFFSET, GRAD_OFFSET = 1 << 20, 3 << 20  # the parameter extent is at 0


class Harness:
    """A store with extents for parameters, state and gradients, a pipeline on it, and memory to move through."""

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

    def move(self, verb, tensor, offset):
        """Reads or writes `tensor`, a view of `self.view`."""
        getattr(self.engine, verb)(tensor.data_ptr(), tensor.nbytes, offset).wait(timeout_s=30)

    def store(self, content, offset):
        place = self.view[offset : offset + content.nbytes]
        place.copy_(content.view(torch.uint8))
        self.move("write", place, offset)

    def close(self):
        self.pipeline.close()
        self.engine.close()


def split(master):
    hi, lo = torch.empty_like(master, dtype=torch.int16), torch.empty_like(master, dtype=torch.int16)
    _C.split_master(master.data_ptr(), hi.data_ptr(), lo.data_ptr(), master.numel())
    return hi, lo


def reference(codec, master, grads, segments_per_step):
    """Parameter plane and state after updates of whole segments by the scalar kernel."""
    n = master.numel()
    param, lo = (
        split(master) if codec == "split_bf16" else (master.clone(), torch.zeros(n, dtype=torch.int16))
    )
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    for grad, segments in zip(grads, segments_per_step, strict=True):
        for start, count, hyper in segments:
            _C.adamw_update(
                codec, param[start:].data_ptr(), lo[start:].data_ptr(), exp_avg[start:].data_ptr(),
                exp_avg_sq[start:].data_ptr(), grad[start:].data_ptr(), str(grad.dtype).removeprefix("torch."), count,
                hyper, "scalar",
            )  # fmt: skip
    return param, (lo, exp_avg, exp_avg_sq) if codec == "split_bf16" else (exp_avg, exp_avg_sq)


def records_of(planes, chunk_elements):
    """Chunk records of the state planes, end to end."""
    n = planes[0].numel()
    pieces = [
        plane[start : start + chunk_elements].view(torch.uint8)
        for start in range(0, n, chunk_elements)
        for plane in planes
    ]
    return torch.cat(pieces)


def first_planes(codec, master):
    n = master.numel()
    moments = (torch.zeros(n), torch.zeros(n))
    return (split(master)[1], *moments) if codec == "split_bf16" else moments


def random_segments(rng, n, step):
    """Sorted, disjoint, with gaps, down to one element; hyperparameters differ and some are maximised."""
    cuts = sorted(rng.sample(range(n + 1), 2 * rng.randint(1, 6)))
    return [
        (start, end - start, _C.Hyper(rng.choice([1e-2, 3e-4]), rng.choice([0.9, 0.3]), 0.99, 1e-8,
         rng.choice([0.0, 0.1]), step, rng.random() < 0.7, rng.choice([1.0, 0.5]), rng.random() < 0.3))
        for start, end in zip(cuts[::2], cuts[1::2], strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("codec", ["split_bf16", "fp32"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("host_chunks", "read_param", "spilled"), [(0, True, True), (1, False, False), (99, True, False)]
)
@pytest.mark.parametrize(
    ("chunk_elements", "n_buffers", "n_threads"), [(2048, 2, 2), (4096, 3, 1), (65536, 1, 2)]
)
@pytest.mark.parametrize(("n_drives", "backend"), [(1, "auto"), (2, "auto"), (2, "posix")])
def test_out_of_core_updates_have_the_bits_of_the_in_memory_kernel(
    tmp_path,
    codec,
    grad_dtype,
    host_chunks,
    read_param,
    spilled,
    chunk_elements,
    n_buffers,
    n_threads,
    n_drives,
    backend,
):
    n, n_steps = 10240, 3
    generator, rng = torch.Generator().manual_seed(1), random.Random(chunk_elements + n_drives)
    master = torch.randn(n, generator=generator)
    grads = [torch.randn(n, generator=generator).to(getattr(torch, grad_dtype)) for _ in range(n_steps)]
    segments_per_step = [random_segments(rng, n, step) for step in range(1, n_steps + 1)]
    harness = Harness(tmp_path, chunk_elements, n_buffers, n_drives, backend, n_threads)
    host_chunks = min(host_chunks, -(-n // chunk_elements))
    param = harness.view[: n * PARAM_DTYPE[codec].itemsize].view(PARAM_DTYPE[codec])
    param.copy_(split(master)[0] if codec == "split_bf16" else master)
    harness.move("write", param, 0)
    records = records_of(first_planes(codec, master), chunk_elements)
    host_nbytes = _C.record_nbytes(codec, ["float32"] * 2, min(n, host_chunks * chunk_elements))
    host_state, stored = records[:host_nbytes].clone(), records[host_nbytes:]
    if stored.numel():
        harness.store(stored, STATE_OFFSET)
    for grad, segments in zip(grads, segments_per_step, strict=True):
        if spilled:
            harness.store(grad, GRAD_OFFSET)
        if read_param:
            param.zero_()
        job = _C.UpdateJob(
            param_codec=codec, n_elements=n, param_address=param.data_ptr(), param_offset=0, read_param=read_param,
            state_offset=STATE_OFFSET if stored.numel() else -1, state_host_address=host_state.data_ptr(),
            host_chunks=host_chunks, grad_address=0 if spilled else grad.data_ptr(), grad_dtype=grad_dtype,
            grad_offset=GRAD_OFFSET if spilled else -1, segments=segments,
        )  # fmt: skip
        harness.pipeline.submit(job).wait(timeout_s=30)
    expected, expected_state = reference(codec, master, grads, segments_per_step)
    assert torch.equal(param, expected)
    param.zero_()
    harness.move("read", param, 0)
    assert torch.equal(param, expected)
    on_storage = harness.view[STATE_OFFSET : STATE_OFFSET + stored.numel()]
    if stored.numel():
        harness.move("read", on_storage, STATE_OFFSET)
    assert torch.equal(torch.cat([host_state, on_storage]), records_of(expected_state, chunk_elements))
    harness.close()


def test_an_update_on_storage_follows_in_memory_torch_adamw(tmp_path):
    """Ten steps; the two differ by roundings only (see test_adamw_kernel.py for the bound of one)."""
    n = 8192
    generator = torch.Generator().manual_seed(3)
    parameter = torch.nn.Parameter(torch.randn(n, generator=generator))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    harness = Harness(tmp_path, 2048, 3)
    hi = harness.view[: n * 2].view(torch.int16)
    hi.copy_(split(parameter.detach())[0])
    harness.store(records_of(first_planes("split_bf16", parameter.detach()), 2048), STATE_OFFSET)
    for step in range(1, 11):
        parameter.grad = torch.randn(n, generator=generator)
        optimizer.step()
        job = _C.UpdateJob(
            param_codec="split_bf16", n_elements=n, param_address=hi.data_ptr(), state_offset=STATE_OFFSET,
            grad_address=parameter.grad.data_ptr(), segments=[(0, n, _C.Hyper(1e-2, 0.9, 0.999, 1e-8, 0.1, step))],
        )  # fmt: skip
        harness.pipeline.submit(job).wait(timeout_s=30)
    state = harness.view[STATE_OFFSET : STATE_OFFSET + n * 10]
    harness.move("read", state, STATE_OFFSET)
    lo = torch.cat([record[: 2048 * 2] for record in state.split(2048 * 10)]).view(torch.int16)
    master = torch.empty(n)
    _C.merge_master(hi.data_ptr(), lo.data_ptr(), master.data_ptr(), n)
    torch.testing.assert_close(master, parameter.detach(), rtol=2e-6, atol=2e-7)
    harness.close()


@pytest.mark.parametrize("codec", ["split_bf16", "fp32"])
@pytest.mark.parametrize("where", ["storage", "host"])
def test_updates_of_the_same_bytes_queued_without_a_wait_are_never_stale(tmp_path, codec, where):
    n, n_steps = 8192, 8
    master = torch.randn(n, generator=torch.Generator().manual_seed(2))
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(step)) for step in range(n_steps)]
    segments = [[(0, n, _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.1, step))] for step in range(1, n_steps + 1)]
    expected, _ = reference(codec, master, grads, segments)
    harness = Harness(tmp_path, 2048, 16, n_threads=3)
    param = harness.view[: n * PARAM_DTYPE[codec].itemsize].view(PARAM_DTYPE[codec])
    param.copy_(split(master)[0] if codec == "split_bf16" else master)
    harness.move("write", param, 0)
    records = records_of(first_planes(codec, master), 2048)
    harness.store(records, STATE_OFFSET)
    state = {"state_offset": STATE_OFFSET}
    if where == "host":
        state = {"state_host_address": records.data_ptr(), "host_chunks": n // 2048}
    tickets = []
    for grad, step_segments in zip(grads, segments, strict=True):
        job = _C.UpdateJob(
            param_codec=codec, n_elements=n, param_address=param.data_ptr(), param_offset=0, read_param=True,
            grad_address=grad.data_ptr(), segments=step_segments, **state,
        )  # fmt: skip
        tickets.append(harness.pipeline.submit(job))
    for ticket in tickets:
        ticket.wait(timeout_s=30)
    assert torch.equal(param, expected)
    harness.close()


def job_on(harness, param, grad, lr=1e-3, **changes):
    n = param.numel()
    settings = {
        "param_codec": "fp32", "n_elements": n, "param_address": param.data_ptr(), "state_offset": STATE_OFFSET,
        "grad_address": grad.data_ptr(), "segments": [(0, n, _C.Hyper(lr, 0.9, 0.99, 1e-8, 0.0, 1))],
    }  # fmt: skip
    return _C.UpdateJob(**{**settings, **changes})


@pytest.mark.parametrize("read_param", [False, True])
@pytest.mark.parametrize("backend", ["posix", "uring"])
def test_chunks_without_gradients_cost_no_traffic_and_keep_their_bits(tmp_path, read_param, backend):
    """Of five chunks, gradients for parts of the second and fourth: their records and parameters move, no others."""
    n, chunk = 5 * 2048, 2048
    harness = Harness(tmp_path, chunk, 2, backend=backend)
    master = torch.randn(n, generator=torch.Generator().manual_seed(1))
    param = harness.view[: n * 4].view(torch.float32)
    harness.store(master, 0)
    harness.store(torch.zeros(n * 2), STATE_OFFSET)
    param.copy_(torch.zeros(n) if read_param else master)
    before = harness.engine.counters()
    hyper = _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.1, 1)
    segments = [(chunk, 64, hyper), (chunk + 128, 64, hyper), (3 * chunk + 64, chunk - 64, hyper)]
    grad = torch.ones(n)
    job = job_on(harness, param, grad, segments=segments, param_offset=0, read_param=read_param)
    harness.pipeline.submit(job).wait(timeout_s=30)
    after = harness.engine.counters()
    expected, _ = reference("fp32", master, [grad], [segments])
    assert torch.equal(param, expected)
    assert after["written_bytes"] - before["written_bytes"] == 2 * chunk * (8 + 4)
    assert after["read_bytes"] - before["read_bytes"] == 2 * chunk * 8 + read_param * n * 4
    stored_param = harness.view[3 << 19 : (3 << 19) + n * 4].view(torch.float32)
    harness.move("read", stored_param, 0)
    assert torch.equal(stored_param, expected)
    assert harness.pipeline.stats()["chunks"] == 2
    harness.close()


@pytest.mark.parametrize(("n_buffers", "n_threads"), [(2, 2), (1, 1), (2, 4)])
def test_many_queued_jobs_finish_with_few_buffers(tmp_path, n_buffers, n_threads):
    harness = Harness(tmp_path, 2048, n_buffers, n_threads=n_threads)
    n, n_jobs = 4096, 24
    params = harness.view[: n_jobs * n * 4].view(torch.float32).view(n_jobs, n)
    grad = torch.ones(n)
    tickets = [
        harness.pipeline.submit(job_on(harness, param, grad, state_offset=STATE_OFFSET + i * n * 8))
        for i, param in enumerate(params)
    ]
    for ticket in tickets:
        ticket.wait(timeout_s=30)
    assert torch.equal(params, params[:1].expand_as(params))
    assert (params < 0).all()
    stats = harness.pipeline.stats()
    assert stats["chunks"] == n_jobs * n // 2048
    assert stats["kernel_s"] > 0
    assert stats["wait_read_s"] >= 0
    harness.close()


def test_close_finishes_what_is_queued_and_refuses_more(tmp_path):
    harness = Harness(tmp_path, 2048, 2)
    param, grad = harness.view[: 8192 * 4].view(torch.float32), torch.ones(8192)
    tickets = [harness.pipeline.submit(job_on(harness, param, grad)) for _ in range(5)]
    harness.pipeline.close()
    assert all(ticket.done() for ticket in tickets)
    harness.pipeline.close()
    with pytest.raises(ValueError, match="closed"):
        harness.pipeline.submit(job_on(harness, param, grad))
    harness.close()


@pytest.mark.fault
@pytest.mark.parametrize("nth", range(1, 11))
def test_a_failing_transfer_fails_its_job_and_spares_the_others(tmp_path, nth):
    """Three jobs of three chunks are queued at once; reads and writes of the first and second fail in turn."""
    harness = Harness(tmp_path, 4096, 2, inject={"fail_nth": nth, "errno": 5})
    n, n_jobs = 10240, 3
    params = harness.view[: n_jobs * n * 4].view(torch.float32).view(n_jobs, n)
    grad, failures = torch.ones(n), 0
    tickets = [
        harness.pipeline.submit(
            job_on(harness, param, grad, state_offset=STATE_OFFSET + i * n * 8, param_offset=i * n * 4)
        )
        for i, param in enumerate(params)
    ]
    for param, ticket in zip(params, tickets, strict=True):
        try:
            ticket.wait(timeout_s=30)
        except OSError as error:
            failures += 1
            assert error.errno == 5
            assert "store0" in str(error)
        else:
            assert (param < 0).all()
    assert failures == 1
    harness.close()


@pytest.mark.fault
def test_short_transfers_do_not_change_a_bit(tmp_path):
    harness = Harness(tmp_path, 4096, 2, inject={"short_every": 2, "short_nbytes": 4096})
    param, grad = harness.view[: 8192 * 4].view(torch.float32), torch.ones(8192)
    segments = [(0, 8192, _C.Hyper(1e-3, 0.9, 0.99, 1e-8, 0.0, 1))]
    harness.pipeline.submit(job_on(harness, param, grad, param_offset=0)).wait(timeout_s=30)
    assert torch.equal(param, reference("fp32", torch.zeros(8192), [grad], [segments])[0])
    harness.close()


HYPER = _C.Hyper(1e-3, 0.9, 0.99, 1e-8, 0.0, 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_elements": 100}, "2048"),
        ({"param_address": 0}, "parameter plane"),
        ({"grad_address": 0}, "gradients"),
        ({"state_offset": -1}, "state_offset"),
        ({"state_offset": 512}, "4096"),
        ({"read_param": True}, "param_offset"),
        ({"param_offset": 100}, "page"),
        ({"grad_offset": 100}, "4096"),
        ({"host_chunks": 1}, "state_host_address"),
        ({"segments": [(4000, 4193, HYPER)]}, "inside"),
        ({"segments": [(10, 10, HYPER), (5, 2, HYPER)]}, "sorted"),
        ({"segments": [(1, 2**64 - 1, HYPER)]}, "inside"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_a_byte_moves(tmp_path, changes, named):
    harness = Harness(tmp_path, 2048, 2)
    param, grad = harness.view[: 8192 * 4].view(torch.float32), torch.ones(8192)
    with pytest.raises(ValueError, match=named):
        harness.pipeline.submit(job_on(harness, param, grad, **changes))
    assert harness.engine.counters()["read_bytes"] == 0
    harness.close()


def test_a_pipeline_without_an_engine_updates_what_is_in_host_memory_and_refuses_storage():
    n = 4096
    need = _C.UpdatePipeline.buffer_nbytes_required(2048, 2)
    buffers = _C.Arena(need)
    pipeline = _C.UpdatePipeline(None, 2048, 2, 1, buffers.address, need)
    param, grad, state = torch.zeros(n), torch.ones(n), torch.zeros(n * 8, dtype=torch.uint8)
    in_memory = {"state_offset": -1, "state_host_address": state.data_ptr(), "host_chunks": 2}
    pipeline.submit(job_on(None, param, grad, **in_memory)).wait(timeout_s=30)
    assert (param < 0).all()
    with pytest.raises(ValueError, match="no engine"):
        pipeline.submit(job_on(None, param, grad))
    pipeline.close()


def test_chunks_without_anything_to_update_are_neither_read_nor_written(tmp_path):
    n, chunk = 10240, 2048
    harness = Harness(tmp_path, chunk, 2)
    harness.view.fill_(0)
    harness.store(records_of(first_planes("fp32", torch.zeros(n)), chunk), STATE_OFFSET)
    param = harness.view[: 4 * n].view(torch.float32)
    before = harness.engine.counters()
    hyper = _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.0, 1, True, 1.0, False)
    grad = torch.ones(n)
    job = _C.UpdateJob(
        param_codec="fp32", n_elements=n, param_address=param.data_ptr(), param_offset=0, state_offset=STATE_OFFSET,
        grad_address=grad.data_ptr(), segments=[(2 * chunk + 5, 10, hyper)],
    )  # fmt: skip
    harness.pipeline.submit(job).wait(timeout_s=30)
    after = harness.engine.counters()
    assert after["read_bytes"] - before["read_bytes"] == 8 * chunk
    assert after["written_bytes"] - before["written_bytes"] == 12 * chunk
    assert param.nonzero().flatten().tolist() == list(range(2 * chunk + 5, 2 * chunk + 15))
    harness.close()


@pytest.mark.parametrize("backend", ["posix", "auto"])
def test_nothing_is_written_before_the_gate_opens_and_reads_go_on_meanwhile(tmp_path, backend):
    """Two of four chunks have buffers: they are read and computed, and the drive has the old bytes until then."""
    n, chunk = 8192, 2048
    harness = Harness(tmp_path, chunk, 2, backend=backend)
    harness.view.fill_(0)
    param, grad, gate = harness.view[: 4 * n].view(torch.float32), torch.ones(n), _C.Ticket()
    before = harness.engine.counters()
    ticket = harness.pipeline.submit(
        job_on(
            harness,
            param,
            grad,
            param_out_offset=0,
            state_out_offset=STATE_OFFSET + (1 << 19),
            write_gate=gate,
        )
    )
    with pytest.raises(TimeoutError):
        ticket.wait(timeout_s=0.1)
    assert harness.pipeline.stats()["chunks"] == 2
    assert harness.engine.counters()["written_bytes"] == before["written_bytes"]
    gate.complete()
    ticket.wait(timeout_s=30)
    assert harness.engine.counters()["written_bytes"] - before["written_bytes"] == n * 12
    assert (param < 0).all()
    harness.close()


def test_a_gate_that_fails_fails_the_update_with_its_words_and_leaves_the_drive_alone(tmp_path):
    harness = Harness(tmp_path, 2048, 2)
    param, grad, gate = harness.view[: 4 * 8192].view(torch.float32), torch.ones(8192), _C.Ticket()
    ticket = harness.pipeline.submit(job_on(harness, param, grad, write_gate=gate))
    gate.complete("the step before could not be committed")
    with pytest.raises(OSError, match="the step before could not be committed"):
        ticket.wait(timeout_s=30)
    assert harness.engine.counters()["written_bytes"] == 0
    harness.pipeline.submit(job_on(harness, param, grad)).wait(timeout_s=30)  # its buffers have come back
    harness.close()


def test_two_jobs_on_disjoint_chunks_together_move_what_one_would(tmp_path):
    """The second, third and fifth chunk, then the others, to another place: as one job of all."""
    n, chunk = 5 * 2048, 2048
    master = torch.randn(n, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(n, generator=torch.Generator().manual_seed(2))
    found = []
    for parts in ([[]], [[(chunk, 3 * chunk), (4 * chunk, n)], [(0, chunk), (3 * chunk, 4 * chunk)]]):
        place = tmp_path / str(len(parts))
        place.mkdir()
        harness = Harness(place, chunk, 2)
        param = harness.view[: 4 * n].view(torch.float32)
        param.copy_(master)
        harness.store(torch.full((2 * n,), 0.5), STATE_OFFSET)
        hyper = _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.1, 1)
        for only in parts:
            inside = only or [(0, n)]
            segments = [
                (a, b - a, hyper) for a, b in inside if b - a > 0 and a != 0
            ]  # the first chunk: as it is
            if not only:
                segments = [(chunk, n - chunk, hyper)]
            job = job_on(
                harness, param, grad, segments=segments, only=only, param_out_offset=0,
                state_out_offset=STATE_OFFSET + (1 << 19),
            )  # fmt: skip
            harness.pipeline.submit(job).wait(timeout_s=30)
        assert harness.engine.counters()["written_bytes"] == n * 8 + n * 12  # put there, and moved
        out = harness.view[STATE_OFFSET : STATE_OFFSET + 8 * n]
        harness.move("read", out, STATE_OFFSET + (1 << 19))
        found.append((param.clone(), out.clone()))
        harness.close()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
