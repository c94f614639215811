"""DeepSpeed's asynchronous I/O handle over this library's engine, and the switch that gives it to DeepSpeed.

The interface is that of DeepSpeed 0.19's `aio_handle` (deepspeed/ops/csrc/aio/py_lib/py_ds_aio.cpp). Results are what
happened: `wait` returns how many operations have completed, and an operation that fails raises OSError, where it is
waited for, with path, offset and errno.
"""

from __future__ import annotations

import ctypes
import logging
import os
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from offload._C import Arena, FileEngine, Ticket
from offload.errors import ConfigError, UsageError

logger = logging.getLogger("offload")

_BLOCK_NBYTES_MAX = 1 << 30
_VALIDATION_NBYTES = 1 << 24
_BYTES_ALIGNED = 512
"""What `get_alignment` counts in: DeepSpeed cuts a transfer into `intra_op_parallelism` parts of whole sectors."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class _LockedMemory:
    """Page-aligned tensors whose pages stay in memory, by address; all handles share them."""

    def __init__(self) -> None:
        self._nbytes_at: dict[int, int] = {}
        self._refusal_told = False

    def new(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of `numel` elements; not locked where the limit of locked memory is reached."""
        nbytes = numel * dtype.itemsize
        arena = Arena(max(1, nbytes))
        if _libc.mlock(arena.address, arena.nbytes) != 0 and not self._refusal_told:
            self._refusal_told = True
            logger.warning(
                "locking %d bytes of memory is refused (%s): I/O works, but they can be paged out; raise ulimit -l",
                arena.nbytes,
                os.strerror(ctypes.get_errno()),
            )
        tensor = torch.frombuffer(memoryview(arena), dtype=torch.uint8)[:nbytes].view(dtype)
        self._nbytes_at[arena.address] = arena.nbytes
        weakref.finalize(arena, self._nbytes_at.pop, arena.address, None)
        return tensor

    def free(self, tensor: torch.Tensor) -> bool:
        """Unlock a tensor made here; its memory goes with its last reference. False for any other tensor."""
        nbytes = self._nbytes_at.pop(tensor.data_ptr(), None)
        if nbytes is None:
            return False
        _libc.munlock(tensor.data_ptr(), nbytes)
        return True

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all of `tensor` lies in memory made here and not freed."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        return any(first <= start and end <= first + nbytes for first, nbytes in self._nbytes_at.items())


_locked = _LockedMemory()
_moved = {"read_bytes": 0, "written_bytes": 0}
_handles: weakref.WeakSet[aio_handle] = weakref.WeakSet()


def counters() -> dict[str, int]:
    """Bytes read and written by all handles of this process, those that are gone included."""
    total = dict(_moved)
    for handle in list(_handles):
        for name, nbytes in handle._engine.counters().items():
            total[name] += nbytes
    return total


def _retire(engine: FileEngine) -> None:
    for name, nbytes in engine.counters().items():
        _moved[name] += nbytes
    engine.close()


class _Pending:
    """An operation in flight. It keeps its tensor alive, and `then` is done when it has completed."""

    def __init__(self, ticket: Ticket, tensor: torch.Tensor, then: list[Callable[[], None]]) -> None:
        self._ticket, self._tensor, self._then = ticket, tensor, then

    def wait(self) -> None:
        self._ticket.wait()
        for action in self._then:
            action()


class aio_handle:  # DeepSpeed's name
    """Reads files into tensors and writes tensors to files, one io_uring ring a handle.

    `block_size` bytes is the largest single transfer, `queue_depth` how many are in flight. `single_submit`,
    `overlap_events` and `intra_op_parallelism` are kept for the getters: transfers are always submitted in batches and
    without waiting. Files are opened with O_DIRECT and transferred directly where address, offset and length are on
    the file system's boundaries, through the page cache where not.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        if block_size < 1 or not 1 <= queue_depth <= 4096 or intra_op_parallelism < 1:
            raise ConfigError(
                f"aio_handle: block_size={block_size}, intra_op_parallelism={intra_op_parallelism}: at least 1; "
                f"queue_depth={queue_depth}: 1 to 4096"
            )
        self._block_size, self._queue_depth = block_size, queue_depth
        self._single_submit, self._overlap_events = single_submit, overlap_events
        self._intra_op_parallelism = intra_op_parallelism
        self._engine = FileEngine(
            block_nbytes=min(_BLOCK_NBYTES_MAX, max(_BYTES_ALIGNED, block_size)), queue_depth=queue_depth
        )
        self._pending: list[_Pending] = []
        weakref.finalize(self, _retire, self._engine)
        _handles.add(self)

    # ---- what it was made with -------------------------------------------------------------------------------

    def get_block_size(self) -> int:
        """Bytes of the largest single transfer."""
        return self._block_size

    def get_queue_depth(self) -> int:
        """Transfers in flight."""
        return self._queue_depth

    def get_single_submit(self) -> bool:
        """As given."""
        return self._single_submit

    def get_overlap_events(self) -> bool:
        """As given."""
        return self._overlap_events

    def get_intra_op_parallelism(self) -> int:
        """As given."""
        return self._intra_op_parallelism

    def get_alignment(self) -> int:
        """Bytes that a caller rounds lengths up to. Other lengths work as well."""
        return _BYTES_ALIGNED * self._intra_op_parallelism

    # ---- transfers -------------------------------------------------------------------------------------------

    def async_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Start to fill `buffer` from byte `file_offset` of a file. Returns 0; `wait` counts it."""
        self._pending.append(self._start(True, buffer, filename, file_offset))
        return 0

    def async_pwrite(
        self,
        buffer: torch.Tensor,
        filename: str | int | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """Start to write `buffer` to byte `file_offset` of a file or of a descriptor. Returns 0; `wait` counts it."""
        target = fd if filename is None else filename
        if target is None:
            raise UsageError("async_pwrite needs a filename or fd")
        self._pending.append(self._start(False, buffer, target, file_offset))
        return 0

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Fill `buffer` from a file and wait. Returns 1, the operations completed."""
        self._start(True, buffer, filename, file_offset).wait()
        return 1

    def sync_pwrite(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Write `buffer` to a file and wait. Returns 1, the operations completed."""
        self._start(False, buffer, filename, file_offset).wait()
        return 1

    def pread(self, buffer: torch.Tensor, filename: str, validate: bool, *later: Any, **named: Any) -> int:
        """`pread(buffer, filename, validate, async, file_offset=0)`: `async_pread` or `sync_pread`.

        With `validate`, the bytes are read again by other means when the operation completes, and compared.
        """
        return self._choose(True, buffer, filename, validate, *_async_and_offset(later, named))

    def pwrite(self, buffer: torch.Tensor, filename: str, validate: bool, *later: Any, **named: Any) -> int:
        """`pwrite(buffer, filename, validate, async, file_offset=0)`: `async_pwrite` or `sync_pwrite`."""
        return self._choose(False, buffer, filename, validate, *_async_and_offset(later, named))

    def read(self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """`pread` that waits."""
        return self._choose(True, buffer, filename, validate, False, file_offset)

    def write(self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """`pwrite` that waits."""
        return self._choose(False, buffer, filename, validate, False, file_offset)

    def wait(self) -> int:
        """Wait for all operations started and not yet waited for. Returns how many have completed.

        Raises the first one's OSError, after all have ended, when any has failed.
        """
        pending, self._pending = self._pending, []
        failure: BaseException | None = None
        for operation in pending:
            try:
                operation.wait()
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return len(pending)

    def _choose(
        self,
        is_read: bool,
        buffer: torch.Tensor,
        filename: str,
        validate: bool,
        later: bool,
        file_offset: int,
    ) -> int:
        operation = self._start(is_read, buffer, filename, file_offset, validate=validate)
        if later:
            self._pending.append(operation)
            return 0
        operation.wait()
        return 1

    def _start(
        self, is_read: bool, buffer: torch.Tensor, target: str | int, offset: int, *, validate: bool = False
    ) -> _Pending:
        if offset < 0:
            raise UsageError(f"file_offset={offset}: must not be negative")
        if not buffer.is_contiguous():
            raise UsageError("a tensor that is read or written must be contiguous")
        host = buffer.detach() if buffer.device.type == "cpu" else buffer.detach().cpu()
        if isinstance(target, os.PathLike):
            target = os.fspath(target)
        transfer = self._engine.read if is_read else self._engine.write
        nbytes = host.numel() * host.element_size()
        ticket = transfer(target, host.data_ptr(), nbytes, offset)
        then: list[Callable[[], None]] = []
        if is_read and host.device != buffer.device:
            then.append(lambda: _copy_back(buffer, host))
        if validate and isinstance(target, str):
            then.append(lambda: _compare(host, target, offset))
        return _Pending(ticket, host, then)

    # ---- memory ----------------------------------------------------------------------------------------------

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A page-aligned, page-locked host tensor of `num_elem` elements in the example's dtype, not initialised."""
        return _locked.new(num_elem, example_tensor.dtype)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Unlock a tensor made by `new_cpu_locked_tensor`. False for any other."""
        return _locked.free(tensor)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether `buffer` is page-locked, by torch or by `new_cpu_locked_tensor`."""
        return _locked.holds(buffer) or (torch.cuda.is_available() and buffer.is_pinned())


def _async_and_offset(later: tuple[Any, ...], named: dict[str, Any]) -> tuple[bool, int]:
    """`async` is a keyword of Python, so it can only be given by position or through **."""
    names = ("async", "file_offset")
    values = dict(zip(names, later, strict=False)) | named
    if set(values) - set(names) or "async" not in values or len(later) > 2:
        raise UsageError("write pread(buffer, filename, validate, async, file_offset=0)")
    return bool(values["async"]), int(values.get("file_offset", 0))


def _copy_back(buffer: torch.Tensor, host: torch.Tensor) -> None:
    with torch.no_grad():
        buffer.copy_(host)


def _compare(tensor: torch.Tensor, path: str, offset: int) -> None:
    """Raise OSError unless the file has the tensor's bytes at `offset`."""
    expected = tensor.reshape(-1).view(torch.uint8)
    with open(path, "rb") as file:
        file.seek(offset)
        for start in range(0, expected.numel(), _VALIDATION_NBYTES):
            part = expected[start : start + _VALIDATION_NBYTES]
            if file.read(part.numel()) != part.numpy().tobytes():
                raise OSError(f"{path}: the bytes from offset {offset + start} are not those of the tensor")


def _at_once(operation: Callable[[aio_handle, torch.Tensor, str, bool], int]) -> Callable[..., int]:
    """`operation` of a handle that is made for it alone."""

    def transfer(
        buffer: torch.Tensor,
        filename: str,
        block_size: int,
        queue_depth: int,
        single_submit: bool,
        overlap_events: bool,
        validate: bool,
    ) -> int:
        """All of `buffer` from or to a file. Returns 1, the operations completed."""
        handle = aio_handle(block_size, queue_depth, single_submit, overlap_events)
        return operation(handle, buffer, filename, validate)

    return transfer


aio_read = _at_once(aio_handle.read)
aio_write = _at_once(aio_handle.write)


def deepspeed_memcpy(destination: torch.Tensor, source: torch.Tensor) -> int:
    """Copy a tensor. Returns 0."""
    _copy_back(destination, source)
    return 0


_MODULE = types.SimpleNamespace(
    aio_handle=aio_handle, aio_read=aio_read, aio_write=aio_write, deepspeed_memcpy=deepspeed_memcpy
)
"""What DeepSpeed's `AsyncIOBuilder().load()` gives from now on."""


def use_io_engine() -> Callable[[], None]:
    """Let DeepSpeed, unmodified, swap through this library's I/O engine from now on. Returns a function that undoes it.

    Call it before `deepspeed.initialize`. Nothing is compiled: libaio is not needed. Raises ConfigError where
    DeepSpeed is not installed.
    """
    try:
        import deepspeed.ops
        from deepspeed.ops.op_builder import async_io
    except ImportError as error:
        raise ConfigError(f"use_io_engine needs DeepSpeed: pip install deepspeed ({error})") from error
    builders = [async_io.AsyncIOBuilder]
    try:
        from deepspeed.ops.op_builder import cpu
    except ImportError:  # a DeepSpeed for another accelerator
        pass
    else:
        builders.append(cpu.AsyncIOBuilder)
    compatible = deepspeed.ops.__compatible_ops__
    replaced: list[tuple[Any, str, Any]] = []
    for builder in builders:
        for name, stand_in in (("load", _load), ("is_compatible", _is_compatible)):
            replaced.append((builder, name, builder.__dict__.get(name)))
            setattr(builder, name, stand_in)
    before = compatible.get("async_io")
    compatible["async_io"] = True
    logger.info("DeepSpeed swaps through offload's I/O engine (%s)", FileEngine(queue_depth=1).backend)

    def undo() -> None:
        compatible["async_io"] = before
        for owner, name, original in replaced:
            delattr(owner, name) if original is None else setattr(owner, name, original)

    return undo


def _load(_builder: Any, verbose: bool = True) -> Any:
    return _MODULE


def _is_compatible(_builder: Any, verbose: bool = False) -> bool:
    return True


__all__ = ["aio_handle", "aio_read", "aio_write", "counters", "deepspeed_memcpy", "use_io_engine"]
