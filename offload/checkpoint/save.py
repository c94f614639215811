"""Write a checkpoint: a bounded stream from the tiers into one file, with a checksum for every chunk on the way."""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from offload.checkpoint.directory import EXTENTS_FILE, MANIFEST_FILE, NewCheckpoint, keep_only, locked
from offload.errors import ConfigError, StoreError, UsageError
from offload.model.flat import FlatBuffer
from offload.runtime.engine import OffloadEngine
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.training_state import checked_stateful, training_state
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Chunk, Piece, chunks_of, param_piece, state_piece
from offload.tiers.encoding import dtype_name, encode
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
from offload.transfer.io_engine import Engine, Ticket, crc32c
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


class StreamingCopy:
    """Moves pieces into a file through a ring of staging buffers; reads, checksums and writes overlap."""

    def __init__(self, source: Engine | None, target: Engine, ring: list[torch.Tensor]) -> None:
        self._source, self._target = source, target
        self._free = list(ring)
        self._depth = max(1, len(ring) // 2)
        self._reading: deque[tuple[Ticket | None, torch.Tensor, int, int, Any, int]] = deque()
        self._writing: deque[tuple[Ticket, torch.Tensor]] = deque()

    def add(self, piece: Piece, offset: int, checksums: Any, index: int) -> None:
        """Start moving `piece` to `offset`; its checksum will be `checksums[index]`."""
        while not self._free:
            self._hand_on() if self._reading else self._end_write()
        staging = self._free.pop()
        ticket = None
        if piece.nbytes == 0:
            self._free.append(staging)  # a rule that keeps nothing
            return
        if piece.memory is not None:
            staging[: piece.nbytes].copy_(piece.memory)
        elif self._source is not None:
            ticket = self._source.read(staging.data_ptr(), round_up(piece.nbytes, PAGE_NBYTES), piece.offset)
        self._reading.append((ticket, staging, piece.nbytes, offset, checksums, index))
        if len(self._reading) >= self._depth:
            self._hand_on()

    def _hand_on(self) -> None:
        ticket, staging, nbytes, offset, checksums, index = self._reading.popleft()
        if ticket is not None:
            ticket.wait()
        checksums[index] = crc32c(staging.data_ptr(), nbytes)
        whole_nbytes = round_up(nbytes, PAGE_NBYTES)
        staging[nbytes:whole_nbytes].zero_()
        self._writing.append((self._target.write(staging.data_ptr(), whole_nbytes, offset), staging))

    def _end_write(self) -> None:
        ticket, staging = self._writing.popleft()
        ticket.wait()
        self._free.append(staging)

    def finish(self) -> None:
        """Wait for everything that was added."""
        while self._reading:
            self._hand_on()
        while self._writing:
            self._end_write()


@dataclass
class _Room:
    """Hands out page-aligned extents of the checkpoint's file."""

    end_nbytes: int = 0

    def take(self, nbytes: int) -> int:
        """Offset of the next extent."""
        offset = self.end_nbytes
        self.end_nbytes += round_up(nbytes, PAGE_NBYTES)
        return offset


def _pieces(
    engine: OffloadEngine, block: BlockRecord, position: int, chunk: Chunk, chunk_elements: int
) -> tuple[Piece, Piece | None]:
    """Where the chunk's parameters and (of trainable ones) its record are; in memory, where they must be made first."""
    buffer = block.layout.buffers[position]
    if engine.parts.in_device is not None and buffer.trainable:
        param, record = engine.parts.in_device.chunk_of(position, chunk.start, chunk.n)
        return Piece(param.numel(), memory=param), Piece(record.numel(), memory=record)
    state = state_piece(block, position, chunk) if buffer.trainable else None
    return param_piece(block, buffer, chunk), state


def _copy_buffer(
    engine: OffloadEngine, block: BlockRecord, position: int, copy: StreamingCopy, offsets: tuple[int, int]
) -> tuple[Any, Any]:
    """Checksums of the plane and of the records, complete once `copy` has finished."""
    buffer, chunk_elements = block.layout.buffers[position], engine.config.chunk_elements
    n_chunks = -(-buffer.n_elements // chunk_elements)
    of_param, of_state = np.zeros(n_chunks, np.uint32), np.zeros(n_chunks, np.uint32)
    at_param, at_state = offsets
    for chunk in chunks_of(buffer, chunk_elements):
        param, state = _pieces(engine, block, position, chunk, chunk_elements)
        copy.add(param, at_param, of_param, chunk.index)
        at_param += param.nbytes
        if state is not None:
            copy.add(state, at_state, of_state, chunk.index)
            at_state += state.nbytes
    return of_param, of_state


def parameters_of(buffer: FlatBuffer, optimizer: OffloadOptimizer) -> list[Parameter]:
    """The buffer's parameters as a manifest names them."""
    return [
        Parameter(name=s.name, start=s.start, shape=list(s.shape), step=optimizer.steps_of(s.parameter))
        for s in buffer.segments
    ]


class _File:
    """The extents' file, made in full before the first byte is copied, so that a full disk shows early."""

    def __init__(self, path: str, nbytes: int, engine: OffloadEngine) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _reserve(path, self.descriptor, nbytes)
            config = engine.config
            self.engine = Engine(
                [path],
                backend=config.backend,
                direct=config.direct_io,
                block_nbytes=config.io_block_nbytes,
                queue_depth=config.io_queue_depth,
            )
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is not None:
                self.engine.cancel()
            self.engine.close()
            if kind is None:
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)


def _reserve(path: str, descriptor: int, nbytes: int) -> None:
    free_nbytes = shutil.disk_usage(os.path.dirname(path)).free
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            os.ftruncate(descriptor, nbytes)
            return
        raise StoreError(
            f"{os.path.dirname(path)}: a checkpoint takes {nbytes} bytes here and {free_nbytes} are free, "
            f"{max(0, nbytes - free_nbytes)} too few: {error.strerror}: free some space, lower keep_last, or save "
            "elsewhere"
        ) from error


def _write_manifest(path: str, manifest: Manifest) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(frame(KIND, manifest.model_dump_json()))
        file.flush()
        os.fsync(file.fileno())


def _copy_state(engine: OffloadEngine, optimizer: OffloadOptimizer, path: str) -> tuple[list[Block], int]:
    """Write the extents' file; give the blocks of its manifest and its bytes."""
    everything = [engine.root, *engine.blocks]
    room = _Room()
    offsets = [
        [
            (room.take(b.n_elements * b.dtype.itemsize), room.take(b.state_nbytes) if b.trainable else -1)
            for b in block.layout.buffers
        ]
        for block in everything
    ]
    resources = engine.parts.resources
    piece_nbytes = resources.staging.numel() // engine.config.chunk_buffers
    ring = [
        resources.staging[i * piece_nbytes : (i + 1) * piece_nbytes]
        for i in range(engine.config.chunk_buffers)
    ]
    source = None if resources.store is None else resources.store.engine
    blocks: list[Block] = []
    checksums: list[list[tuple[Any, Any]]] = []
    with _File(path, max(room.end_nbytes, PAGE_NBYTES), engine) as file:
        copy = StreamingCopy(source, file.engine, ring)
        for block, places in zip(everything, offsets, strict=True):
            checksums.append([_copy_buffer(engine, block, i, copy, place) for i, place in enumerate(places)])
        copy.finish()
    for block, places, sums in zip(everything, offsets, checksums, strict=True):
        buffers = [
            Buffer(
                dtype=dtype_name(b.dtype),
                trainable=b.trainable,
                n_elements=b.n_elements,
                param=Extent(
                    offset=place[0],
                    nbytes=b.n_elements * b.dtype.itemsize,
                    crc32c=pack_checksums(of_param),
                ),
                state=Extent(offset=place[1], nbytes=b.state_nbytes, crc32c=pack_checksums(of_state))
                if b.trainable
                else None,
                parameters=parameters_of(b, optimizer),
            )
            for b, place, (of_param, of_state) in zip(block.layout.buffers, places, sums, strict=True)
        ]
        blocks.append(Block(name=block.name, generation=optimizer.steps_made, buffers=buffers))
    return blocks, room.end_nbytes


def save(
    model: nn.Module, directory: str, *, state: Mapping[str, Any] | None = None, keep_last: int | None = None
) -> str:
    """Save the complete training state of a wrapped model between two steps. Returns the new checkpoint's path.

    It holds parameters, moments and step counts bit for bit, the optimizer's groups, persistent buffers, the random
    states of torch (CPU and GPU), numpy and Python, and the `state_dict()` of everything in `state` (LR schedulers, the
    position in the data). It takes 12 bytes a trainable parameter with AdamW (others: docs/optimizers.md); memory used
    is the update pipeline's own.
    It appears at once, by a rename, as `directory/step-<n>`; then all but the last `keep_last` (None: no limit) go.
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
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{directory}: cannot be made: {error.strerror}: name one that this user can write to"
        ) from error
    with locked(directory, exclusive=True), NewCheckpoint(directory, optimizer.steps_made) as new:
        training = encode(training_state(model, optimizer, tracked))
        blocks, nbytes = _copy_state(engine, optimizer, os.path.join(new.path, EXTENTS_FILE))
        manifest = Manifest(
            fingerprint=fingerprint_of(engine),
            step=optimizer.steps_made,
            files=[EXTENTS_FILE],
            stripe_nbytes=1 << 20,
            nbytes=nbytes,
            chunk_elements=engine.config.chunk_elements,
            rule=Rule.of(optimizer.rule),
            blocks=blocks,
            training=training,
        )
        _write_manifest(os.path.join(new.path, MANIFEST_FILE), manifest)
        path = new.commit()
        if keep_last is not None:
            keep_only(directory, keep_last)
    return path
