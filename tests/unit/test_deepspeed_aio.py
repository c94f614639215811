"""The promises of DeepSpeed's I/O handle, kept by ours: contents, counts, offsets, descriptors, memory, errors.

On every alignment that callers come with: whole blocks of page-locked memory, one KiB apart, and anything else.
"""

import gc
import os
import sys
import threading

import pytest
import torch

from offload._C import FileEngine
from offload.deepspeed.aio import aio_handle, aio_read, aio_write, counters, deepspeed_memcpy
from offload.errors import ConfigError, UsageError

KIB = 1024


def random_bytes(n, seed=0):
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def locked(handle, content):
    tensor = handle.new_cpu_locked_tensor(content.numel(), content)
    tensor.copy_(content)
    return tensor


@pytest.fixture
def handle():
    return aio_handle(KIB, 2, True, True, 2)


def test_the_getters_give_what_it_was_made_with():
    made = aio_handle(
        block_size=2048, queue_depth=7, single_submit=True, overlap_events=False, intra_op_parallelism=3
    )
    assert made.get_block_size() == 2048
    assert made.get_queue_depth() == 7
    assert made.get_single_submit() is True
    assert made.get_overlap_events() is False
    assert made.get_intra_op_parallelism() == 3
    assert made.get_alignment() == 3 * 512
    assert aio_handle().get_block_size() == 1 << 20
    assert aio_handle().get_queue_depth() == 128


@pytest.mark.parametrize("arguments", [(0,), (1024, 0), (1024, 5000), (1024, 1, True, True, 0)])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ConfigError):
        aio_handle(*arguments)


@pytest.mark.parametrize("where", ["locked", "shifted", "plain"])
@pytest.mark.parametrize("nbytes", [1, 511, 512, KIB, 4 * KIB, 4 * KIB + 7, 300 * KIB, 1 << 20])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_has_the_bytes_written_and_a_tensor_the_bytes_read(
    tmp_path, handle, where, nbytes, asynchronous
):
    path, content = str(tmp_path / "file"), random_bytes(nbytes)
    held = handle.new_cpu_locked_tensor(nbytes + KIB, content)
    into = {"locked": held[:nbytes], "shifted": held[KIB:], "plain": torch.empty(nbytes, dtype=torch.uint8)}[
        where
    ]
    into.copy_(content)
    if asynchronous:
        assert handle.async_pwrite(into, path) == 0
        assert handle.wait() == 1
    else:
        assert handle.sync_pwrite(into, path) == 1
    with open(path, "rb") as file:
        assert file.read() == content.numpy().tobytes()
    into.zero_()
    if asynchronous:
        assert handle.async_pread(into, path) == 0
        assert handle.wait() == 1
    else:
        assert handle.sync_pread(into, path) == 1
    assert torch.equal(into, content)


def test_any_dtype_is_moved_as_its_bytes(tmp_path, handle):
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        content = torch.arange(1000).to(dtype)
        handle.sync_pwrite(content, str(tmp_path / "file"))
        read = torch.empty_like(content)
        handle.sync_pread(read, str(tmp_path / "file"))
        assert torch.equal(read, content)


@pytest.mark.parametrize("n_operations", [2, 3, 40])
def test_wait_counts_what_was_started(tmp_path, handle, n_operations):
    contents = [locked(handle, random_bytes(4 * KIB, seed)) for seed in range(n_operations)]
    paths = [str(tmp_path / str(i)) for i in range(n_operations)]
    for content, path in zip(contents, paths, strict=True):
        assert handle.async_pwrite(content, path) == 0
    assert handle.wait() == n_operations
    assert handle.wait() == 0
    read = [torch.empty_like(content) for content in contents]
    for tensor, path in zip(read, paths, strict=True):
        assert handle.async_pread(tensor, path) == 0
    assert handle.wait() == n_operations
    assert all(torch.equal(a, b) for a, b in zip(read, contents, strict=True))


@pytest.mark.parametrize("parts", [[1, 1, 1], [1, 1, 2], [2, 1, 1], [1, 3, 1]])
@pytest.mark.parametrize("by", ["name", "direct descriptor", "descriptor"])
def test_parts_are_written_at_their_offsets_and_keep_what_is_there(tmp_path, handle, parts, by):
    path, content = str(tmp_path / "file"), locked(handle, random_bytes(sum(parts) * KIB))
    start = 0
    for part in parts:
        source = content[start : start + part * KIB]
        if by == "name":
            assert handle.async_pwrite(buffer=source, filename=path, file_offset=start) == 0
        else:
            flags = os.O_CREAT | os.O_WRONLY | (os.O_DIRECT if by.startswith("direct") else 0)
            descriptor = os.open(path, flags)
            assert handle.async_pwrite(buffer=source, fd=descriptor, file_offset=start) == 0
            os.close(descriptor)  # it may be closed before the write has ended
        assert handle.wait() == 1
        start += part * KIB
        with open(path, "rb") as file:
            assert file.read() == content[:start].numpy().tobytes()
    for offset in (0, KIB, 100):
        read = torch.empty(start - KIB - offset, dtype=torch.uint8)
        assert handle.sync_pread(read, path, offset) == 1
        assert torch.equal(read, content[offset : offset + read.numel()])


def test_pread_and_pwrite_take_async_and_validate_by_position_or_name(tmp_path, handle):
    path, content = str(tmp_path / "file"), random_bytes(5 * KIB)
    assert handle.pwrite(content, path, True, False) == 1
    assert handle.pwrite(content, path, True, True, 0) == 0
    assert handle.wait() == 1
    assert handle.pwrite(content[:KIB], path, False, **{"async": False, "file_offset": 5 * KIB}) == 1
    read = torch.empty(6 * KIB, dtype=torch.uint8)
    assert handle.pread(read, path, True, False) == 1
    assert torch.equal(read, torch.cat([content, content[:KIB]]))
    assert handle.read(read, path, True) == handle.write(read, path, True) == 1
    with pytest.raises(UsageError, match="async"):
        handle.pread(read, path, True)


def test_validation_sees_other_bytes(tmp_path, handle):
    path, content = str(tmp_path / "file"), random_bytes(4 * KIB)
    handle.pwrite(content, path, True, True)
    handle._pending[0]._ticket.wait()
    content.add_(1)  # what the file has is not what the tensor has
    with pytest.raises(OSError, match="not those of the tensor"):
        handle.wait()


def test_functions_of_the_module(tmp_path):
    path, content = str(tmp_path / "file"), random_bytes(4 * KIB)
    assert aio_write(content, path, KIB, 4, False, True, True) == 1
    read, copied = torch.empty_like(content), torch.empty_like(content)
    assert aio_read(read, path, KIB, 4, False, True, True) == 1
    deepspeed_memcpy(copied, read)
    assert torch.equal(copied, content)


def test_what_fails_raises_with_the_file_and_the_rest_completes(tmp_path, handle):
    read = torch.empty(4 * KIB, dtype=torch.uint8)
    with pytest.raises(FileNotFoundError, match="missing"):
        handle.sync_pread(read, str(tmp_path / "missing"))
    with pytest.raises(OSError, match="nowhere"):
        handle.async_pwrite(read, str(tmp_path / "nowhere" / "file"))
    (tmp_path / "short").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="100 bytes"):
        handle.sync_pread(read, str(tmp_path / "short"))
    with pytest.raises(OSError, match="file descriptor"):
        handle.async_pwrite(read, fd=9999)
    with pytest.raises(UsageError, match="contiguous"):
        handle.sync_pwrite(read.view(2, -1).t(), str(tmp_path / "file"))
    with pytest.raises(UsageError, match="negative"):
        handle.sync_pwrite(read, str(tmp_path / "file"), -1)
    assert handle.wait() == 0
    assert handle.sync_pwrite(read, str(tmp_path / "file")) == 1


@pytest.mark.fault
@pytest.mark.parametrize("backend", ["uring", "posix"])
@pytest.mark.parametrize("nth", range(1, 9))
def test_every_transfer_that_fails_is_reported_by_wait_and_only_once(tmp_path, handle, backend, nth):
    """8 transfers of 1 KiB; the n-th fails on the drive."""
    handle._engine = FileEngine(backend=backend, block_nbytes=KIB, inject={"fail_nth": nth, "op": "write"})
    for i in range(2):
        handle.async_pwrite(random_bytes(4 * KIB, i), str(tmp_path / str(i)))
    with pytest.raises(OSError, match=f"write of 1024 bytes at offset .* of {tmp_path}/[01]") as raised:
        handle.wait()
    assert raised.value.errno == 5
    assert handle.wait() == 0


@pytest.mark.fault
@pytest.mark.parametrize("short_nbytes", [512, 1000, 4096])
def test_short_transfers_go_on_until_all_bytes_are_there(tmp_path, handle, short_nbytes):
    content, read = locked(handle, random_bytes(64 * KIB)), torch.empty(64 * KIB, dtype=torch.uint8)
    handle._engine = FileEngine(
        block_nbytes=16 * KIB, inject={"short_every": 2, "short_nbytes": short_nbytes}
    )
    handle.sync_pwrite(content, str(tmp_path / "file"))
    handle.sync_pread(read, str(tmp_path / "file"))
    assert torch.equal(read, content)


def test_locked_memory_is_known_until_it_is_freed(handle):
    tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.bfloat16))
    assert (tensor.dtype, tensor.numel(), tensor.data_ptr() % 4096) == (torch.bfloat16, 1000, 0)
    other = aio_handle(KIB, 2)
    assert handle.is_pinned(tensor)
    assert other.is_pinned(tensor[10:20])
    assert not handle.is_pinned(torch.empty(1000))
    assert other.free_cpu_locked_tensor(tensor) is True
    assert not handle.is_pinned(tensor)
    assert handle.free_cpu_locked_tensor(tensor) is False
    tensor.fill_(1)  # still there: unlocked, not unmapped


def test_locked_memory_that_is_forgotten_is_not_taken_for_locked(handle):
    tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.uint8))
    address = tensor.data_ptr()
    del tensor
    gc.collect()
    from offload.deepspeed.aio import _locked

    assert address not in _locked._nbytes_at


def test_the_tensor_of_an_operation_in_flight_may_be_forgotten(tmp_path, handle):
    for i in range(20):
        handle.async_pwrite(torch.full((64 * KIB,), i, dtype=torch.uint8), str(tmp_path / str(i)))
    gc.collect()
    assert handle.wait() == 20
    assert all((tmp_path / str(i)).read_bytes() == bytes([i]) * (64 * KIB) for i in range(20))


@pytest.mark.parametrize("operation", ["pread", "pwrite", "sync_pread", "sync_pwrite"])
def test_another_thread_runs_while_an_operation_is_waited_for(tmp_path, handle, operation):
    path, content = str(tmp_path / "file"), locked(handle, random_bytes(4 * KIB))
    handle.sync_pwrite(content, path)
    arguments = (content, path) if operation.startswith("sync") else (content, path, False, False)
    ran = threading.Event()
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is given the interpreter by time
    try:
        threading.Thread(target=ran.set).start()
        for _ in range(32):
            assert getattr(handle, operation)(*arguments) == 1
            if ran.is_set():
                break
    finally:
        sys.setswitchinterval(before)
    assert ran.is_set()


def test_whoever_has_waited_finds_no_descriptor_of_the_file_open(tmp_path, handle):
    path = str(tmp_path / "file")
    content = random_bytes(KIB + 7)

    def is_open():
        links = [f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd")]
        return any(os.path.lexists(link) and os.readlink(link).startswith(path) for link in links)

    for _ in range(500):
        handle.async_pwrite(content, path)
        handle.wait()
        assert not is_open()


def test_counters_add_up_over_handles_that_are_gone(tmp_path):
    before = counters()
    for i in range(3):
        handle = aio_handle()
        handle.sync_pwrite(random_bytes(4 * KIB), str(tmp_path / "file"))
        handle.sync_pread(torch.empty(2 * KIB, dtype=torch.uint8), str(tmp_path / "file"))
        del handle
        gc.collect()
        assert counters()["written_bytes"] - before["written_bytes"] == (i + 1) * 4 * KIB
        assert counters()["read_bytes"] - before["read_bytes"] == (i + 1) * 2 * KIB
