"""The manifest: what a checkpoint or a kept store holds, where, and with which checksums. Read as if by an enemy.

Two lines of JSON. The first names the format, its version, and the bytes and CRC32C of the second.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload._C import crc32c
from offload.errors import CheckpointError, CorruptError
from offload.tiers.encoding import dtype_named
from offload.types import PAGE_NBYTES, PLANE_ELEMENTS
from offload.update_rules import ADAMW, Plane, PlaneKind, UpdateRule

FORMAT_VERSION = 2
"""2 says which update rule the state is of; version 1 has AdamW's, in fp32."""
MANIFEST_NBYTES_MAX = 1 << 28
ENTRIES_MAX = 1 << 18
"""Parameters, and buffers, of one model."""

CODECS = {"bfloat16": "split_bf16", "float32": "fp32"}
"""How the master is spread over plane and record, by the dtype of the parameter plane."""

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Name = Annotated[str, Field(max_length=4096)]


class Strict(BaseModel):
    """Refuses unknown keys and does not convert."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StatePlane(Strict):
    """One plane of a record of optimizer state."""

    name: Name
    kind: PlaneKind


class Rule(Strict):
    """What the optimizer state is of."""

    name: Name = ADAMW.name
    title: Name = ""
    whole_gradients: bool = False
    planes: Annotated[list[StatePlane], Field(max_length=8)] = [
        StatePlane(name=plane.name, kind=plane.kind) for plane in ADAMW.planes
    ]

    @classmethod
    def of(cls, rule: UpdateRule) -> Rule:
        """As a manifest names it."""
        planes = [StatePlane(name=plane.name, kind=plane.kind) for plane in rule.planes]
        return cls(name=rule.name, title=rule.title, whole_gradients=rule.whole_gradients, planes=planes)

    @property
    def rule(self) -> UpdateRule:
        """With the sizes that follow from it."""
        planes = tuple(Plane(plane.name, plane.kind) for plane in self.planes)
        return UpdateRule(self.name, planes, self.title, self.whole_gradients)


class Extent(Strict):
    """A byte range and the CRC32C of each of its chunks, as base64 of little-endian 32-bit numbers."""

    offset: Count
    nbytes: Count
    crc32c: str

    def checksums(self) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """One for each chunk."""
        return unpack_checksums(self.crc32c)


class Parameter(Strict):
    """One parameter inside a flat buffer; `step` counts the optimizer steps it has taken."""

    name: Name
    start: Count
    shape: Annotated[list[Count], Field(max_length=64)]
    step: Count

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Buffer(Strict):
    """One flat buffer: its plane, and (trainable) its optimizer state in records of `chunk_elements` elements."""

    dtype: str
    trainable: bool
    n_elements: Annotated[int, Field(ge=0, le=1 << 48)]
    param: Extent
    state: Extent | None
    parameters: Annotated[list[Parameter], Field(max_length=ENTRIES_MAX)]


class Block(Strict):
    """One block (or the root); `generation` counts the steps that have changed it."""

    name: Name
    generation: Count
    buffers: Annotated[list[Buffer], Field(max_length=1024)]


class Manifest(Strict):
    """A complete training state. `files` are bare names, striped by `stripe_nbytes` when there are several."""

    fingerprint: str
    step: Count
    files: Annotated[list[Name], Field(min_length=1, max_length=1024)]
    stripe_nbytes: Annotated[int, Field(ge=PAGE_NBYTES, le=1 << 40)]
    nbytes: Count
    chunk_elements: Annotated[int, Field(ge=PLANE_ELEMENTS, le=1 << 30)]
    rule: Rule = Rule()
    blocks: Annotated[list[Block], Field(max_length=ENTRIES_MAX)]
    training: Any

    def parameters(self) -> dict[str, tuple[Buffer, Parameter]]:
        """Every parameter by name."""
        return {
            p.name: (buffer, p)
            for block in self.blocks
            for buffer in block.buffers
            for p in buffer.parameters
        }


def fingerprint(parameters: Iterable[tuple[str, Iterable[int], bool]]) -> str:
    """What identifies a model: the (name, shape, trainable) of its parameters, in any order."""
    lines = sorted(f"{name} {list(shape)} {trainable}" for name, shape, trainable in parameters)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def pack_checksums(values: np.ndarray[Any, Any]) -> str:
    """As `Extent.crc32c` holds them."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<u4").tobytes()).decode()


def unpack_checksums(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Undo `pack_checksums`. Raises ValueError."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4")


def crc32c_of(data: bytes) -> int:
    """CRC32C of some bytes."""
    held = np.frombuffer(data, dtype=np.uint8)
    return crc32c(held.ctypes.data, len(data))


def frame(kind: str, body: str) -> bytes:
    """The two lines of a file of this kind."""
    raw = body.encode()
    head = {"format": kind, "version": FORMAT_VERSION, "nbytes": len(raw), "crc32c": crc32c_of(raw)}
    return json.dumps(head).encode() + b"\n" + raw + b"\n"


def unframe(kind: str, data: bytes, where: str) -> Any:
    """The second line's JSON. Raises CheckpointError for another kind or version, CorruptError for other bytes."""
    first, separator, rest = data.partition(b"\n")
    try:
        head = json.loads(first) if len(first) < PAGE_NBYTES and separator else None
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("format") != kind:
        raise CheckpointError(
            f"{where}: is not the {kind} that was expected here; its first line is {first[:60]!r}"
        )
    version, nbytes = head.get("version"), head.get("nbytes")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: has format version {version!r}, this library reads up to {FORMAT_VERSION}: "
            "upgrade offload to read it"
        )
    if not isinstance(nbytes, int) or not 0 <= nbytes <= MANIFEST_NBYTES_MAX or len(rest) < nbytes:
        raise CorruptError(f"{where}: has {len(rest)} bytes after its first line, which says {nbytes!r}")
    body = rest[:nbytes]
    if crc32c_of(body) != head.get("crc32c"):
        raise CorruptError(f"{where}: its checksum is wrong: resume from another checkpoint")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error


def read_bounded(path: str) -> bytes:
    """A file of at most MANIFEST_NBYTES_MAX bytes. Raises CheckpointError when it is larger or cannot be read."""

    def opened(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe's other end is not waited for

    try:
        with open(path, "rb", opener=opened) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path}: is no file: resume from another checkpoint")
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > MANIFEST_NBYTES_MAX:
                raise CheckpointError(
                    f"{path}: has {nbytes} bytes, a manifest has at most {MANIFEST_NBYTES_MAX}"
                )
            return file.read(MANIFEST_NBYTES_MAX + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


_Model = TypeVar("_Model", bound=Strict)


def validated(model: type[_Model], content: Any, where: str) -> _Model:
    """`content` as a `model`. Raises CheckpointError that names the first wrong entry."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: entry {place}: {first['msg']}") from error


def check(manifest: Manifest, where: str) -> Manifest:
    """Everything that pydantic cannot see: names, bounds, overlaps. Raises CheckpointError; gives `manifest` back."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{where}: {why}")

    for name in manifest.files:
        if name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name:
            raise refuse(f"file name {name!r} is not a bare name: it could lead anywhere")
    if manifest.chunk_elements % PLANE_ELEMENTS or manifest.stripe_nbytes % PAGE_NBYTES:
        raise refuse("chunk_elements or stripe_nbytes is not a whole number of pages")
    rule = manifest.rule.rule
    names: set[str] = set()
    ranges: list[tuple[int, int, str]] = []
    for block in manifest.blocks:
        for buffer in block.buffers:
            itemsize = dtype_named(buffer.dtype).itemsize
            n_chunks = -(-buffer.n_elements // manifest.chunk_elements)
            if buffer.n_elements % PLANE_ELEMENTS:
                raise refuse(f"block {block.name}: {buffer.n_elements} elements are no whole number of pages")
            if buffer.trainable != (buffer.state is not None) or (
                buffer.trainable and buffer.dtype not in CODECS
            ):
                raise refuse(f"block {block.name}: a buffer of {buffer.dtype} has the wrong kind of state")
            _check_extent(manifest, buffer.param, buffer.n_elements * itemsize, n_chunks, refuse)
            ranges.append((buffer.param.offset, buffer.param.offset + buffer.param.nbytes, block.name))
            if buffer.state is not None:
                state_nbytes = rule.state_nbytes(
                    CODECS[buffer.dtype], buffer.n_elements, manifest.chunk_elements
                )
                _check_extent(manifest, buffer.state, state_nbytes, n_chunks, refuse)
                ranges.append((buffer.state.offset, buffer.state.offset + buffer.state.nbytes, block.name))
            end = 0
            for parameter in buffer.parameters:
                if parameter.name in names:
                    raise refuse(f"parameter {parameter.name} occurs twice")
                names.add(parameter.name)
                if parameter.start < end or parameter.start + parameter.numel > buffer.n_elements:
                    raise refuse(f"parameter {parameter.name} lies outside its buffer or on another one")
                end = parameter.start + parameter.numel
    if len(names) > ENTRIES_MAX:
        raise refuse(f"{len(names)} parameters; at most {ENTRIES_MAX} are read")
    ranges.sort()
    for (_, end, one), (start, _, other) in itertools.pairwise(ranges):
        if start < end:
            raise refuse(f"extents of block {one} and block {other} overlap")
    return manifest


def _check_extent(manifest: Manifest, extent: Extent, nbytes: int, n_chunks: int, refuse: Any) -> None:
    if extent.nbytes != nbytes or extent.offset % PAGE_NBYTES or extent.offset + nbytes > manifest.nbytes:
        raise refuse(
            f"extent of {extent.nbytes} bytes at {extent.offset} is misplaced: {nbytes} bytes inside "
            f"{manifest.nbytes} expected"
        )
    try:
        n_checksums = len(base64.b64decode(extent.crc32c, validate=True)) / 4
    except ValueError as error:
        raise refuse(f"checksums of the extent at {extent.offset} are malformed") from error
    if n_checksums != n_chunks:
        raise refuse(f"extent at {extent.offset} has {n_checksums} checksums for {n_chunks} chunks")
