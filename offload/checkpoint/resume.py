"""Put a saved training state into a wrapped model, whatever its placement, drives, budgets, device and chunk size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.checkpoint.directory import checkpoints_in, locked, newest
from offload.checkpoint.kept_store import KeptStore, manifests_in, taken_over
from offload.checkpoint.read import ChunkReader, read_manifest
from offload.checkpoint.save import engine_of, fingerprint_of
from offload.errors import CheckpointError
from offload.model.flat import FlatBuffer
from offload.runtime.engine import OffloadEngine
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.training_state import checked_stateful, load_training_state
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Chunk, chunks_of, fill, param_piece, state_piece
from offload.tiers.encoding import decode, dtype_name
from offload.tiers.host import HostArena
from offload.tiers.manifest import Buffer, Manifest, Parameter
from offload.transfer.io_engine import merge_master, split_master
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import ADAMW, LO_NBYTES, QUANT_BLOCK_ELEMENTS, UpdateRule


@dataclass(frozen=True)
class Resumed:
    """What `resume` found: the checkpoint's path, and how many optimizer steps it had made."""

    path: str
    step: int


def _planes(record: torch.Tensor, n: int, codec: str, rule: UpdateRule) -> list[tuple[torch.Tensor, int]]:
    """(lo) and the rule's planes of a chunk record of `n` elements: typed, and how many elements share an entry."""
    begin = LO_NBYTES[codec] * n
    planes = [(record[:begin].view(torch.int16), 1)] if begin else []
    for plane in rule.planes:
        part = record[begin : begin + plane.nbytes(n)]
        begin += part.numel()
        if plane.is_quantised:
            planes += [(part[:n], 1), (part[n:].view(torch.float32), QUANT_BLOCK_ELEMENTS)]
        else:
            planes.append((part.view(getattr(torch, plane.kind)), 1))
    return planes


def _convert(
    param: torch.Tensor, record: torch.Tensor, n: int, to_split: bool, rule: UpdateRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk of one codec in the other: the fp32 master is the same in both."""
    other = torch.zeros(
        rule.record_nbytes("split_bf16" if to_split else "fp32", n), dtype=torch.uint8, device="cpu"
    )
    planes_nbytes = sum(plane.nbytes(n) for plane in rule.planes)
    lo_nbytes = LO_NBYTES["split_bf16"] * n
    if to_split:
        hi = torch.empty(n, dtype=torch.bfloat16, device="cpu")
        split_master(param.data_ptr(), hi.data_ptr(), other.data_ptr(), n)
        other[lo_nbytes : lo_nbytes + planes_nbytes] = record[:planes_nbytes]
        return hi.view(torch.uint8), other
    master = torch.empty(n, dtype=torch.float32, device="cpu")
    merge_master(param.data_ptr(), record.data_ptr(), master.data_ptr(), n)
    other[:planes_nbytes] = record[lo_nbytes : lo_nbytes + planes_nbytes]
    return master.view(torch.uint8), other


class _Filler:
    """Fills target chunks from source chunks, parameter by parameter."""

    def __init__(self, reader: ChunkReader, engine: OffloadEngine) -> None:
        self._reader, self._engine = reader, engine
        self._sources = reader.manifest.parameters()
        self._chunk_elements = engine.config.chunk_elements
        n = min(
            self._chunk_elements,
            max((b.n_elements for x in self._blocks() for b in x.layout.buffers), default=0),
        )
        itemsize = max((b.dtype.itemsize for x in self._blocks() for b in x.layout.buffers), default=2)
        self._param = HostArena(n * itemsize)
        rule = engine.root.layout.buffers[0].rule if engine.root.layout.buffers else ADAMW
        self._rule = reader.manifest.rule.rule
        self._record = HostArena(max(rule.record_nbytes(codec, n) for codec in LO_NBYTES))

    def _blocks(self) -> list[BlockRecord]:
        return [self._engine.root, *self._engine.blocks]

    def fill(self) -> None:
        """Every block of the engine."""
        for block in self._blocks():
            for position, buffer in enumerate(block.layout.buffers):
                for chunk in chunks_of(buffer, self._chunk_elements):
                    self._fill_chunk(block, position, buffer, chunk)

    def _fill_chunk(self, block: BlockRecord, position: int, buffer: FlatBuffer, chunk: Chunk) -> None:
        itemsize = buffer.dtype.itemsize
        param = self._param.bytes_tensor[: chunk.n * itemsize]
        param_whole = self._param.bytes_tensor[: round_up(chunk.n * itemsize, PAGE_NBYTES)]
        record = self._record.bytes_tensor[:0]
        if buffer.trainable:
            record = self._record.bytes_tensor[: buffer.record_nbytes(chunk.n)]
        param_whole.zero_()
        record.zero_()
        for segment in buffer.segments:
            begin = max(segment.start, chunk.start)
            end = min(segment.start + segment.numel, chunk.start + chunk.n)
            if begin < end:
                self._copy(
                    segment.name,
                    begin - segment.start,
                    end - begin,
                    buffer,
                    begin - chunk.start,
                    param,
                    record,
                )
        store = self._engine.parts.resources.store
        fill(param_piece(block, buffer, chunk), param_whole, store)
        if buffer.trainable:
            fill(state_piece(block, position, chunk), record, store)

    def _copy(
        self,
        name: str,
        skip: int,
        n: int,
        target: FlatBuffer,
        at: int,
        param: torch.Tensor,
        record: torch.Tensor,
    ) -> None:
        """Elements `skip` to `skip + n` of a parameter to element `at` of the target chunk."""
        source, entry = self._sources[name]
        size = self._reader.manifest.chunk_elements
        target_n = param.numel() // target.dtype.itemsize
        done = 0
        while done < n:
            first = entry.start + skip + done
            index, within = divmod(first, size)
            held_n = self._reader.elements(source, index)
            count = min(n - done, held_n - within)
            from_param, from_record = self._reader.chunk(source, index)
            if target.trainable and source.dtype != dtype_name(target.dtype):
                from_param, from_record = _convert(
                    from_param, from_record, held_n, target.codec == "split_bf16", self._rule
                )
            itemsize = target.dtype.itemsize
            to = (at + done) * itemsize
            param[to : to + count * itemsize] = from_param[within * itemsize : (within + count) * itemsize]
            if target.trainable:
                planes = zip(
                    _planes(record, target_n, target.codec, self._rule),
                    _planes(from_record, held_n, target.codec, self._rule),
                    strict=True,
                )
                for (into, shared), (out_of, _) in planes:
                    start, n_entries = within // shared, -(-count // shared)
                    to = (at + done) // shared
                    into[to : to + n_entries] = out_of[start : start + n_entries]
            done += count


def check_same_model(manifest: Manifest, engine: OffloadEngine, where: str) -> None:
    """Raise CheckpointError, naming the first difference, unless the manifest is of the engine's model."""
    saved = manifest.parameters()
    for block in [engine.root, *engine.blocks]:
        for buffer in block.layout.buffers:
            for segment in buffer.segments:
                found = saved.pop(segment.name, None)
                if found is None:
                    raise CheckpointError(f"{where}: is of another model: it has no parameter {segment.name}")
                _check_parameter(found, segment.name, list(segment.shape), buffer, where)
    if saved:
        raise CheckpointError(f"{where}: is of another model: this one has no parameter {next(iter(saved))}")
    _check_same_rule(manifest, engine, where)
    if manifest.fingerprint != fingerprint_of(engine):
        raise CheckpointError(
            f"{where}: its fingerprint is not that of its own parameters: it has been edited"
        )


def _check_parameter(
    found: tuple[Buffer, Parameter], name: str, shape: list[int], buffer: FlatBuffer, where: str
) -> None:
    source, entry = found
    if entry.shape != shape:
        raise CheckpointError(
            f"{where}: is of another model: {name} has shape {entry.shape} there and {shape} here"
        )
    if source.trainable != buffer.trainable:
        there = "trained" if source.trainable else "frozen"
        raise CheckpointError(f"{where}: {name} was {there} when it was saved: set requires_grad as it was")
    if not buffer.trainable and source.dtype != dtype_name(buffer.dtype):
        raise CheckpointError(
            f"{where}: the frozen {name} is {source.dtype} there and {dtype_name(buffer.dtype)} here: "
            "build the model in the dtype it had"
        )


def _check_same_rule(manifest: Manifest, engine: OffloadEngine, where: str) -> None:
    saved = manifest.rule.rule
    ours = next((b.rule for x in [engine.root, *engine.blocks] for b in x.layout.buffers), saved)
    if saved != ours:
        raise CheckpointError(
            f"{where}: holds the state of {saved.described}, this run's optimizer is {ours.described}: use the "
            "optimizer and the optimizer_state it was saved with"
        )


def restore(engine: OffloadEngine, optimizer: OffloadOptimizer, reader: ChunkReader) -> None:
    """Fill the tiers and the step counts from a manifest that is of the engine's model."""
    engine.begin_replacing_state()
    _Filler(reader, engine).fill()
    _set_steps(optimizer, engine, reader.manifest)


def resume(model: nn.Module, directory: str, *, state: Mapping[str, Any] | None = None) -> Resumed:
    """Go on where a run was saved, or was killed: training continues with the bits it would have had.

    `model` is wrapped, with any placement, budgets, drives, device and chunk size; the optimizer has the groups it had.
    `directory` is a checkpoint, the directory given to `save` (its newest is taken), or a storage directory of a run
    with durability 'step' (its last committed step; other drives are looked for in the model's own storage
    directories). Such a store goes on in place where the model's own is laid out alike in the same directories;
    otherwise what it holds is copied. The objects in `state` are given their saved state by `load_state_dict`, and
    tracked from now on. With durability 'step' the resumed step is committed at once, and a kept store that was copied
    is removed then. Memory used meanwhile: three chunks with their state, beside the budgets.
    Raises CheckpointError for another model, a newer format, or nothing to read; CorruptError when stored bytes are not
    those that were written. After either the model is not to be trained further.
    """
    engine = engine_of(model)
    tracked = checked_stateful(state or {})
    optimizer = engine.at_step_boundary("resume")
    if not checkpoints_in(directory) and manifests_in(directory):
        with taken_over(directory, engine.config.storage) as store:
            if _go_on_in_place(engine, optimizer, store, tracked, directory):
                return Resumed(directory, optimizer.steps_made)
            _resume_from(engine, optimizer, store.manifest, store.paths, tracked, directory)
            if engine.commits is not None:
                store.remove()
        return Resumed(directory, optimizer.steps_made)
    path = newest(directory)
    with locked(os.path.dirname(os.path.abspath(path)), exclusive=False):
        manifest = read_manifest(path)
        paths = [os.path.join(path, name) for name in manifest.files]
        _resume_from(engine, optimizer, manifest, paths, tracked, path)
    return Resumed(path, optimizer.steps_made)


def _reader(engine: OffloadEngine, manifest: Manifest, paths: list[str]) -> ChunkReader:
    config = engine.config
    options = {"backend": config.backend, "direct": config.direct_io, "block_nbytes": config.io_block_nbytes}
    return ChunkReader(manifest, paths, **options)


def _set_steps(optimizer: OffloadOptimizer, engine: OffloadEngine, manifest: Manifest) -> None:
    steps = {name: entry.step for name, (_, entry) in manifest.parameters().items()}
    for block in [engine.root, *engine.blocks]:
        for buffer in block.layout.buffers:
            for segment in buffer.segments:
                optimizer.set_steps_of(segment.parameter, steps[segment.name])
    optimizer.steps_made = manifest.step


def _go_on_in_place(
    engine: OffloadEngine,
    optimizer: OffloadOptimizer,
    kept: KeptStore,
    tracked: Mapping[str, Any],
    where: str,
) -> bool:
    """Take over the kept store itself, where the engine's own is laid out alike in the same places. Whether it did.

    All of it is read and verified; nothing is written, and its last record stays the committed one.
    """
    commits, own = engine.commits, engine.parts.resources.store
    if commits is None or own is None:
        return False
    if not kept.is_laid_out_as(commits.layout(), own.paths, own.file_nbytes):
        return False
    check_same_model(kept.manifest, engine, where)
    training = decode(kept.manifest.training)
    with _reader(engine, kept.manifest, kept.paths) as reader:
        reader.verify()
    engine.drop_copies()
    run_id = os.path.basename(kept.manifest_path).removeprefix("offload-").removesuffix(".manifest")
    manifests = [path for path in kept.remains if path not in kept.paths]
    own.adopt(run_id, kept.paths, [os.dup(descriptor) for descriptor in kept.descriptors], manifests)
    record = kept.record
    _set_steps(optimizer, engine, kept.manifest)
    commits.go_on_from(optimizer, record.sequence, record.sides, record.generations, kept.checksums())
    load_training_state(training, engine.model, optimizer, tracked, where)
    engine.track(**tracked)
    engine.drop_copies()
    kept.remove_empty()
    return True


def _resume_from(
    engine: OffloadEngine,
    optimizer: OffloadOptimizer,
    manifest: Manifest,
    paths: list[str],
    tracked: Mapping[str, Any],
    where: str,
) -> None:
    check_same_model(manifest, engine, where)
    training = decode(manifest.training)
    with _reader(engine, manifest, paths) as reader:
        restore(engine, optimizer, reader)
    load_training_state(training, engine.model, optimizer, tracked, where)
    engine.track(**tracked)
    engine.end_replacing_state()
