"""Stores that outlived their process (durability `step`): find them, read their last committed step as a manifest."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from offload.errors import CheckpointError, CorruptError
from offload.runtime.commits import LAYOUT_KIND, RECORD_KIND
from offload.tiers.encoding import dtype_named
from offload.tiers.host import HostArena
from offload.tiers.manifest import (
    CODECS,
    ENTRIES_MAX,
    MANIFEST_NBYTES_MAX,
    Block,
    Buffer,
    Count,
    Extent,
    Manifest,
    Name,
    Parameter,
    Rule,
    Strict,
    check,
    pack_checksums,
    read_bounded,
    unframe,
    unpack_checksums,
    validated,
)
from offload.transfer.io_engine import Engine
from offload.types import PAGE_NBYTES

_Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


class _ParameterLayout(Strict):
    name: Name
    start: Count
    shape: Annotated[list[Count], Field(max_length=64)]


class _BufferLayout(Strict):
    dtype: str
    trainable: bool
    n_elements: Count
    param_offsets: _Pair
    state_offsets: _Pair | None
    parameters: Annotated[list[_ParameterLayout], Field(max_length=ENTRIES_MAX)]


class _BlockLayout(Strict):
    name: Name
    buffers: Annotated[list[_BufferLayout], Field(max_length=1024)]


class _Layout(Strict):
    fingerprint: str
    files: Annotated[list[Name], Field(min_length=1, max_length=1024)]
    stripe_nbytes: Annotated[int, Field(ge=PAGE_NBYTES, le=1 << 40)]
    nbytes: Count
    chunk_elements: Annotated[int, Field(ge=1, le=1 << 30)]
    rule: Rule = Rule()
    slots: _Pair
    slot_nbytes: Annotated[int, Field(ge=PAGE_NBYTES, le=MANIFEST_NBYTES_MAX)]
    blocks: Annotated[list[_BlockLayout], Field(max_length=ENTRIES_MAX)]


class _Record(Strict):
    sequence: Count
    step: Count
    sides: list[Annotated[int, Field(ge=0, le=1)]]
    generations: list[Count]
    steps: list[list[list[Count]]]
    checksums: list[list[str]]
    training: Any


@dataclass(frozen=True)
class KeptStore:
    """A store nobody is using, and its last committed step."""

    manifest_path: str
    paths: list[str]
    manifest: Manifest
    layout: _Layout
    record: _Record
    descriptors: list[int]
    """Of `paths`, which are locked through them."""
    empty: list[str]
    """Files of other dead runs beside it that had not committed a step."""

    def is_laid_out_as(self, layout: dict[str, Any], paths: list[str], file_nbytes: int) -> bool:
        """Whether a store of this layout, with files there, could go on in its place.

        It may be larger: room for activations is added once their size is known.
        """
        told = _Layout.model_validate(json.loads(json.dumps(layout)))
        mine, theirs = (x.model_dump(exclude={"files", "nbytes"}) for x in (self.layout, told))
        places, others = ([os.path.realpath(os.path.dirname(p)) for p in of] for of in (self.paths, paths))
        large_enough = all(os.fstat(descriptor).st_size >= file_nbytes for descriptor in self.descriptors)
        return mine == theirs and places == others and large_enough

    def checksums(self) -> list[list[Any]]:
        """Of each block's buffers, uint32 of shape (chunks, 2): its parameters' and its records'."""
        return [[unpack_checksums(packed).reshape(-1, 2) for packed in of] for of in self.record.checksums]

    @property
    def remains(self) -> list[str]:
        """Every file it consists of; what describes it comes first."""
        name = os.path.basename(self.manifest_path)
        beside = dict.fromkeys(os.path.join(os.path.dirname(path), name) for path in self.paths)
        return [self.manifest_path, *(p for p in beside if p != self.manifest_path), *self.paths]

    def remove(self) -> None:
        """Delete it. What describes it goes first: nobody finds half of it."""
        for path in self.remains:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self.remove_empty()

    def remove_empty(self) -> None:
        """Delete what is left of the other runs."""
        for path in self.empty:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def manifests_in(directory: str) -> list[str]:
    """The kept stores' descriptions in a storage directory."""
    return sorted(glob.glob(os.path.join(glob.escape(directory), "offload-*.manifest")))


@contextlib.contextmanager
def taken_over(directory: str, others: list[str]) -> Iterator[KeptStore]:
    """The store in `directory` (its other drives in `others`) with the latest committed step, locked meanwhile.

    Raises CheckpointError when there is none, or only such as a living process uses; CorruptError when no record is
    whole.
    """
    busy: list[str] = []
    empty: list[str] = []
    broken: list[CheckpointError] = []
    best: KeptStore | None = None
    with contextlib.ExitStack() as locks:
        for path in manifests_in(directory):
            try:
                layout = validated(_Layout, unframe(LAYOUT_KIND, read_bounded(path), path), path)
                files = _files_of(layout, path, [directory, *others])
                descriptors = _lock(files, locks)
                if descriptors is None:
                    busy.append(path)
                    continue
                found = _last_committed(layout, files, descriptors, path)
                if found is None:
                    empty += [path, *files]
                    continue
            except CheckpointError as error:
                broken.append(error)
                continue
            if best is None or (found.record.step, found.record.sequence) > (
                best.record.step,
                best.record.sequence,
            ):
                best = found
        if best is None and busy:
            raise CheckpointError(f"{busy[0]}: a living process is using this store: wait for it, or stop it")
        if best is None and broken:
            raise broken[0]
        if best is None and empty:
            raise CheckpointError(f"{directory}: no step had been committed when the run ended: start again")
        if best is None:
            raise CheckpointError(f"{directory}: holds no checkpoint and no kept store")
        best.empty.extend([*empty, *_never_described([directory, *others], locks)])
        yield best


def _never_described(directories: list[str], locks: contextlib.ExitStack) -> list[str]:
    """Store files of dead runs that nothing describes, such as one that was killed while it resumed; locked."""
    found = []
    for directory in dict.fromkeys(map(os.path.realpath, directories)):
        described = {os.path.basename(path).removesuffix(".manifest") for path in manifests_in(directory)}
        for path in sorted(glob.glob(os.path.join(glob.escape(directory), "offload-*.store"))):
            run = os.path.basename(path).removesuffix(".store").rpartition("-")[0]
            with contextlib.suppress(CheckpointError):  # it is no file, or another user's
                if run not in described and _lock([path], locks) is not None:
                    found.append(path)
    return found


def _lock(paths: list[str], locks: contextlib.ExitStack) -> list[int] | None:
    """Descriptors that hold the locks until `locks` closes them; None where somebody else has one."""
    descriptors = []
    for path in paths:
        try:
            descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(descriptors[-1]).st_mode):  # of a pipe, a read would not end
            locks.callback(os.close, descriptors[-1])
            raise CheckpointError(f"{path}: is no file")
        locks.callback(os.close, descriptors[-1])
        try:
            fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return descriptors


def _files_of(layout: _Layout, where: str, directories: list[str]) -> list[str]:
    paths = []
    for name in layout.files:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
            raise CheckpointError(f"{where}: file name {name!r} is not a bare name: it could lead anywhere")
        found = next(
            (os.path.join(d, name) for d in directories if os.path.exists(os.path.join(d, name))), None
        )
        if found is None:
            raise CheckpointError(
                f"{where}: its file {name} is in none of {', '.join(directories)}: name every drive that the run had"
            )
        paths.append(found)
    return paths


def _last_committed(
    layout: _Layout, paths: list[str], descriptors: list[int], where: str
) -> KeptStore | None:
    """None when no record has ever been written."""
    records: list[_Record] = []
    why: list[CheckpointError] = []
    n_blank = 0
    arena = HostArena(layout.slot_nbytes)
    try:
        engine = Engine(paths, stripe_nbytes=layout.stripe_nbytes)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be opened: {error}") from error
    try:
        for slot in layout.slots:
            try:
                engine.read(arena.address, arena.nbytes, slot).wait()
                content = arena.bytes_tensor[: layout.slot_nbytes].numpy().tobytes()
                n_blank += content[:PAGE_NBYTES] == bytes(PAGE_NBYTES)
                records.append(validated(_Record, unframe(RECORD_KIND, content, where), where))
            except (OSError, ValueError) as error:
                why.append(CorruptError(f"{where}: a commit record cannot be read: {error}"))
            except CheckpointError as error:
                why.append(error)
    finally:
        engine.close()
    if not records and n_blank:
        return None  # one record has been begun at most
    if not records:
        raise CorruptError(f"{where}: neither of its two commit records is whole: {why[0]}")
    record = max(records, key=lambda r: r.sequence)
    return KeptStore(where, paths, _compose(layout, record, where), layout, record, descriptors, [])


def _compose(layout: _Layout, record: _Record, where: str) -> Manifest:
    """The layout and a record together as the manifest of one step."""
    try:
        blocks = [
            _block(block, side, generation, steps, sums, layout)
            for block, side, generation, steps, sums in zip(
                layout.blocks, record.sides, record.generations, record.steps, record.checksums, strict=True
            )
        ]
    except ValueError as error:
        raise CheckpointError(f"{where}: its commit record does not fit its layout: {error}") from error
    manifest = Manifest(
        fingerprint=layout.fingerprint,
        step=record.step,
        files=layout.files,
        stripe_nbytes=layout.stripe_nbytes,
        nbytes=layout.nbytes,
        chunk_elements=layout.chunk_elements,
        rule=layout.rule,
        blocks=blocks,
        training=record.training,
    )
    return check(manifest, where)


def _block(
    block: _BlockLayout,
    side: int,
    generation: int,
    steps: list[list[int]],
    checksums: list[str],
    layout: _Layout,
) -> Block:
    buffers = []
    rule, chunk_elements = layout.rule.rule, layout.chunk_elements
    for buffer, counts, packed in zip(block.buffers, steps, checksums, strict=True):
        sums = unpack_checksums(packed)
        if sums.size != 2 * -(-buffer.n_elements // chunk_elements):
            raise ValueError(f"block {block.name} has {sums.size} checksums")
        of_param, of_state = np.ascontiguousarray(sums[0::2]), np.ascontiguousarray(sums[1::2])
        state = None
        if buffer.state_offsets is not None and buffer.dtype in CODECS:
            nbytes = rule.state_nbytes(CODECS[buffer.dtype], buffer.n_elements, chunk_elements)
            state = Extent(offset=buffer.state_offsets[side], nbytes=nbytes, crc32c=pack_checksums(of_state))
        param_nbytes = buffer.n_elements * dtype_named(buffer.dtype).itemsize
        buffers.append(
            Buffer(
                dtype=buffer.dtype,
                trainable=buffer.trainable,
                n_elements=buffer.n_elements,
                param=Extent(
                    offset=buffer.param_offsets[side], nbytes=param_nbytes, crc32c=pack_checksums(of_param)
                ),
                state=state,
                parameters=[
                    Parameter(name=p.name, start=p.start, shape=p.shape, step=count)
                    for p, count in zip(buffer.parameters, counts, strict=True)
                ],
            )
        )
    return Block(name=block.name, generation=generation, buffers=buffers)
