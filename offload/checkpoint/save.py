"""Write a checkpoint: a bounded stream from the tiers into one file, with a checksum for every chunk on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from offload.checkpoint.beside import SaveBeside
from offload.checkpoint.copying import Item, StreamingCopy, share
from offload.checkpoint.directory import EXTENTS_FILE, MANIFEST_FILE, NewCheckpoint, locked
from offload.checkpoint.pieces import on_sides, pieces_of
from offload.config import stays_the_same
from offload.errors import ConfigError, StoreError, UsageError
from offload.model.flat import FlatBuffer
from offload.runtime.engine import OffloadEngine
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.training_state import checked_stateful, training_state
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import chunks_of
from offload.tiers.durable_files import naming, sync_file, write_file
from offload.tiers.encoding import dtype_name, encode
from offload.tiers.host import HostArena
from offload.tiers.manifest import (
    Block,
    Buffer,
    Extent,
    Manifest,
    Parameter,
    Rule,
    fingerprint,
    frame,
    pack_checksums,
)
from offload.transfer.io_engine import Engine
from offload.types import PAGE_NBYTES, round_up

KIND = "offload-checkpoint"


def engine_of(model: nn.Module) -> OffloadEngine:
    """The engine of a wrapped model. Raises UsageError for one that is not."""
    engine = getattr(model, "offload", None)
    if not isinstance(engine, OffloadEngine):
        raise UsageError(f"{type(model).__name__} is not wrapped: call offload.wrap or offload.load first")
    return engine


def fingerprint_of(engine: OffloadEngine) -> str:
    """Of the model that the engine trains."""
    return fingerprint(
        (segment.name, segment.shape, buffer.trainable)
        for block in [engine.root, *engine.blocks]
        for buffer in block.layout.buffers
        for segment in buffer.segments
    )


@dataclass
class _Room:
    """Hands out page-aligned extents of the checkpoint's file."""

    end_nbytes: int = 0

    def take(self, nbytes: int) -> int:
        """Offset of the next extent."""
        offset = self.end_nbytes
        self.end_nbytes += round_up(nbytes, PAGE_NBYTES)
        return offset


@dataclass
class _Saved:
    """One flat buffer: where it goes in the file, and what belongs to the step boundary and is gone later."""

    block: BlockRecord
    position: int
    param_at: int
    state_at: int
    parameters: list[Parameter]
    of_param: Any
    of_state: Any

    @property
    def buffer(self) -> FlatBuffer:
        """Its layout."""
        return self.block.layout.buffers[self.position]

    def described(self) -> Buffer:
        """As the manifest has it, once the checksums are known."""
        b = self.buffer
        param_nbytes = b.n_elements * b.dtype.itemsize
        state = None
        if b.trainable:
            state = Extent(offset=self.state_at, nbytes=b.state_nbytes, crc32c=pack_checksums(self.of_state))
        return Buffer(
            dtype=dtype_name(b.dtype),
            trainable=b.trainable,
            n_elements=b.n_elements,
            param=Extent(offset=self.param_at, nbytes=param_nbytes, crc32c=pack_checksums(self.of_param)),
            state=state,
            parameters=self.parameters,
        )


def _to_save(engine: OffloadEngine, optimizer: OffloadOptimizer) -> tuple[list[_Saved], int]:
    """Every buffer, the root's first, and the bytes of the file."""
    room, found = _Room(), []
    for block in [engine.root, *engine.blocks]:
        for position, b in enumerate(block.layout.buffers):
            n_chunks = -(-b.n_elements // engine.config.chunk_elements)
            found.append(
                _Saved(
                    block,
                    position,
                    room.take(b.n_elements * b.dtype.itemsize),
                    room.take(b.state_nbytes) if b.trainable else -1,
                    parameters_of(b, optimizer),
                    np.zeros(n_chunks, np.uint32),
                    np.zeros(n_chunks, np.uint32),
                )
            )
    return found, room.end_nbytes


def _items(engine: OffloadEngine, saved: _Saved) -> Iterator[Item]:
    """Its chunks, each's parameters and then its record."""
    at_param, at_state = saved.param_at, saved.state_at
    for chunk in chunks_of(saved.buffer, engine.config.chunk_elements):
        param, state = pieces_of(engine, saved.block, saved.position, chunk)
        yield Item(
            saved.block, param, at_param, saved.of_param, chunk.index, may_be_written=saved.block.keeps_writes
        )
        at_param += param.nbytes
        if state is not None and state.nbytes:  # some update rules keep nothing
            yield Item(saved.block, state, at_state, saved.of_state, chunk.index)
            at_state += state.nbytes


def parameters_of(buffer: FlatBuffer, optimizer: OffloadOptimizer) -> list[Parameter]:
    """The buffer's parameters as a manifest names them."""
    return [
        Parameter(name=s.name, start=s.start, shape=list(s.shape), step=optimizer.steps_of(s.parameter))
        for s in buffer.segments
    ]


class _File:
    """The extents' file, made in full before the first byte is copied, so that a full disk shows early."""

    def __init__(self, path: str, nbytes: int, engine: OffloadEngine) -> None:
        self._path, self._nbytes = path, nbytes
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with naming(path):
                os.ftruncate(self._descriptor, nbytes)
            config = engine.config
            self.engine = Engine(
                [path],
                backend=config.backend,
                direct=config.direct_io,
                block_nbytes=config.io_block_nbytes,
                queue_depth=config.io_queue_depth,
            )
        except BaseException:
            os.close(self._descriptor)
            raise

    def share(self, items: list[Item], paths: list[str]) -> list[Item]:
        """Take over extents of the store, where that is one file and the file system can; what is left to do. One that
        has been deleted is copied: the store has it open."""
        if len(paths) == 1 and os.path.exists(paths[0]):
            source = os.open(paths[0], os.O_RDONLY | os.O_CLOEXEC)
            try:
                items = share(items, source, self._descriptor)
            finally:
                os.close(source)
        if not any(item.shared for item in items):
            _reserve(self._path, self._descriptor, self._nbytes)
        return items

    def close(self) -> None:
        """All of it is on the drive afterwards."""
        try:
            self.engine.close()
            sync_file(self._descriptor, self._path)
        finally:
            self._close_descriptor()

    def abandon(self) -> None:
        """Stop what is in flight."""
        self.engine.cancel()
        self.engine.close()
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _reserve(path: str, descriptor: int, nbytes: int) -> None:
    free_nbytes = shutil.disk_usage(os.path.dirname(path)).free
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return
        raise StoreError(
            f"{os.path.dirname(path)}: a checkpoint takes {nbytes} bytes here and {free_nbytes} are free, "
            f"{max(0, nbytes - free_nbytes)} too few: {error.strerror}: free some space, lower keep_last, or save "
            "elsewhere"
        ) from error


class _Save:
    """One checkpoint on its way. Everything that belongs to the step boundary is taken when it is made."""

    def __init__(
        self,
        engine: OffloadEngine,
        optimizer: OffloadOptimizer,
        tracked: Mapping[str, Any],
        directory: str,
        keep_last: int | None,
    ) -> None:
        self._engine = engine
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(directory, exclusive=True))
            self._new = stack.enter_context(NewCheckpoint(directory, optimizer.steps_made, keep_last))
            self._training = encode(training_state(engine.model, optimizer, dict(tracked)))
            self._step, self._rule = optimizer.steps_made, Rule.of(optimizer.rule)
            self._saved, self._nbytes = _to_save(engine, optimizer)
            file_nbytes = max(self._nbytes, PAGE_NBYTES)
            self._file = _File(os.path.join(self._new.path, EXTENTS_FILE), file_nbytes, engine)
            self._stack = stack.pop_all()
        try:
            store = engine.parts.resources.store
            self._source = None if store is None else store.engine
            items = [item for saved in self._saved for item in _items(engine, saved)]
            self.items = self._file.share(items, [] if store is None else store.paths)
        except BaseException:
            self.abandon()
            raise

    @property
    def path(self) -> str:
        """The checkpoint's, once it is complete."""
        return self._new.final

    def copy(self, ring: list[torch.Tensor]) -> StreamingCopy:
        """What moves the items, through `ring`."""
        return StreamingCopy(self._source, self._file.engine, ring)

    def complete(self) -> None:
        """Everything has been copied: let the checkpoint appear."""
        try:
            self._file.close()
            blocks: dict[int, tuple[str, list[Buffer]]] = {}
            for saved in self._saved:
                name_and_buffers = blocks.setdefault(saved.block.index, (saved.block.name, []))
                name_and_buffers[1].append(saved.described())
            manifest = Manifest(
                fingerprint=fingerprint_of(self._engine),
                step=self._step,
                files=[EXTENTS_FILE],
                stripe_nbytes=1 << 20,
                nbytes=self._nbytes,
                chunk_elements=self._engine.config.chunk_elements,
                rule=self._rule,
                blocks=[
                    Block(name=name, generation=self._step, buffers=held) for name, held in blocks.values()
                ],
                training=self._training,
            )
            content = frame(KIND, manifest.model_dump_json())
            write_file(os.path.join(self._new.path, MANIFEST_FILE), content)
            self._new.commit()
        finally:
            self._stack.close()

    def abandon(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(OSError):
            self._file.abandon()
        self._stack.close()


def _ring(memory: torch.Tensor, n: int) -> list[torch.Tensor]:
    piece_nbytes = memory.numel() // n
    return [memory[i * piece_nbytes : (i + 1) * piece_nbytes] for i in range(n)]


@contextlib.contextmanager
def _abandoned_on_failure(save: _Save, copy: StreamingCopy) -> Iterator[None]:
    """Whatever is raised inside leaves nothing of the checkpoint."""
    try:
        yield
    except BaseException:
        save.abandon()
        copy.abandon()
        raise


def _copy_now(engine: OffloadEngine, save: _Save) -> None:
    """Through the update pipeline's chunk buffers, which nobody uses between two steps."""
    copy = save.copy(_ring(engine.parts.resources.staging, engine.config.chunk_buffers))
    with _abandoned_on_failure(save, copy):
        for item in save.items:
            copy.add(item)
        copy.finish()
    save.complete()


def _piece_nbytes(buffer: FlatBuffer, chunk_elements: int) -> int:
    """Whole pages for the larger of a chunk's parameters and its record."""
    record_nbytes = buffer.record_nbytes(chunk_elements) if buffer.trainable else 0
    return round_up(max(chunk_elements * buffer.dtype.itemsize, record_nbytes), PAGE_NBYTES)


def _copy_beside(engine: OffloadEngine, save: _Save) -> None:
    """Through two pieces of host memory beside the budget. No update comes before what a loop does to parameters by
    itself, so those that it may write to are copied first."""
    buffers = [b for block in [engine.root, *engine.blocks] for b in block.layout.buffers]
    piece_nbytes = max(_piece_nbytes(b, engine.config.chunk_elements) for b in buffers)
    copy = save.copy(_ring(HostArena(2 * piece_nbytes).bytes_tensor, 2))
    with _abandoned_on_failure(save, copy):
        for item in save.items:
            if item.may_be_written:
                copy.add(item)
        copy.finish_reads()
    left = [item for item in save.items if not item.may_be_written]
    order = (
        [engine.root, *engine.blocks] if engine.config.deferred else [*reversed(engine.blocks), engine.root]
    )
    engine.saves.begin(SaveBeside(left, order, on_sides(engine), copy, save.complete, save.abandon))


def save(
    model: nn.Module,
    directory: str,
    *,
    state: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    wait: bool = True,
) -> str:
    """Save the complete training state of a wrapped model between two steps. Returns the new checkpoint's path.

    It holds parameters, moments and step counts bit for bit, the optimizer's groups, persistent buffers, the random
    states of torch (CPU and GPU), numpy and Python, and the `state_dict()` of everything in `state` (LR schedulers, the
    position in the data). It takes 12 bytes a trainable parameter with AdamW (others: docs/optimizers.md); memory used
    is the update pipeline's own.
    It appears at once, by a rename, as `directory/step-<n>`; then all go but it and the latest others,
    `keep_last` in all (None: no limit).
    Where the file system can share extents between files (XFS, Btrfs) and the store is one file there, nothing is
    copied. With `wait=False` training may go on at once, and the checkpoint, which is of this step boundary all the
    same, appears later: after `model.offload.wait_saved()`, the next save or resume, or `close()`, which raise
    StoreError when it could not be written; two chunks of host memory are used meanwhile. Parameters that a loop may
    write to between steps (of fp32, not streamed) are copied before it returns.
    Raises UsageError inside a step, StoreError when it does not fit, CheckpointError when another process is using
    `directory`; what was there stays as it was.
    """
    engine = engine_of(model)
    tracked = checked_stateful(engine.tracked if state is None else state)
    if engine.config.durability == "none":
        raise ConfigError("durability='none' keeps nothing: use 'checkpoint' to save, or 'step'")
    if keep_last is not None and keep_last < 1:
        raise ConfigError(
            f"keep_last={keep_last}: at least the new checkpoint has to stay; give 1 or more, or None"
        )
    optimizer = engine.at_step_boundary("save")
    directory = stays_the_same(directory)  # until what is written beside training is complete
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{directory}: cannot be made: {error.strerror}: name one that this user can write to"
        ) from error
    begun = _Save(engine, optimizer, tracked, directory, keep_last)
    (_copy_now if wait else _copy_beside)(engine, begun)
    return begun.path
