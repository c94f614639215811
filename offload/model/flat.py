"""Flat buffers: the parameters of a block, of one dtype and trainability, end to end in one plane."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from offload.config import CHUNK_ELEMENTS
from offload.errors import ConfigError
from offload.types import PAGE_NBYTES, PLANE_ELEMENTS, SEGMENT_ELEMENTS, round_up
from offload.update_rules import ADAMW, UpdateRule

_CODECS = {torch.bfloat16: "split_bf16", torch.float32: "fp32"}
TRAINABLE_DTYPES = frozenset(_CODECS)


@dataclass(frozen=True)
class Segment:
    """One parameter inside a flat buffer: elements `start` to `start + numel`."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    numel: int
    shape: torch.Size

    def view(self, plane: torch.Tensor) -> torch.Tensor:
        """This parameter's part of a 1-D `plane`, in its own shape."""
        return plane[self.start : self.start + self.numel].view(self.shape)


@dataclass(frozen=True)
class FlatBuffer:
    """Layout of one plane. `plane_offset_nbytes` is where it starts inside the block's slot and extent."""

    dtype: torch.dtype
    trainable: bool
    segments: tuple[Segment, ...]
    n_elements: int
    plane_offset_nbytes: int
    grad_start: int
    """First element of this buffer in the block's fp32 gradient plane (trainable buffers only)."""
    rule: UpdateRule = ADAMW
    chunk_elements: int = CHUNK_ELEMENTS
    """Elements of one record of optimizer state."""

    @property
    def plane_nbytes(self) -> int:
        """Bytes of the parameter plane."""
        return round_up(self.n_elements * self.dtype.itemsize, PAGE_NBYTES)

    @property
    def codec(self) -> str:
        """`split_bf16` or `fp32`: how the fp32 master is spread over the planes."""
        return _CODECS[self.dtype]

    @property
    def state_nbytes(self) -> int:
        """Bytes of optimizer state beside the plane; 0 when frozen."""
        if not self.trainable:
            return 0
        return self.rule.state_nbytes(self.codec, self.n_elements, self.chunk_elements)

    def record_nbytes(self, n: int) -> int:
        """Bytes of the record of a chunk of `n` elements (trainable buffers only)."""
        return self.rule.record_nbytes(self.codec, n)

    def record_begin(self, index: int) -> int:
        """Bytes of the records before that of chunk `index`."""
        return index * self.rule.record_nbytes(self.codec, self.chunk_elements)

    def first_records_nbytes(self, n_chunks: int) -> int:
        """Bytes of the records of the first `n_chunks` chunks."""
        n_elements = min(self.n_elements, n_chunks * self.chunk_elements)
        return self.rule.state_nbytes(self.codec, n_elements, self.chunk_elements)


@dataclass(frozen=True)
class BlockLayout:
    """All flat buffers of a block. Sizes in bytes of its slot and elements of its fp32 gradient plane."""

    name: str
    buffers: tuple[FlatBuffer, ...]
    slot_nbytes: int
    grad_elements: int

    @property
    def trainable_elements(self) -> int:
        """Padded trainable elements."""
        return sum(b.n_elements for b in self.buffers if b.trainable)

    @property
    def trainable_segments(self) -> list[Segment]:
        """Where each trainable parameter is."""
        return [segment for b in self.buffers if b.trainable for segment in b.segments]

    @property
    def state_nbytes(self) -> int:
        """Optimizer-state bytes of all its buffers."""
        return sum(b.state_nbytes for b in self.buffers)


def lay_out(
    name: str,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    compute_dtype: torch.dtype | None,
    rule: UpdateRule = ADAMW,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> BlockLayout:
    """Group a block's parameters by (dtype, trainability) and place them end to end.

    `compute_dtype` is the dtype that trainable fp32 parameters will be computed in (their fp32 value stays the
    master); None keeps each parameter's own. `rule` and `chunk_elements` say what optimizer state there is.
    Raises ConfigError for a trainable dtype without a codec.
    """
    groups: dict[tuple[torch.dtype, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for parameter_name, parameter in parameters:
        dtype = parameter.dtype
        if compute_dtype is not None and dtype == torch.float32:
            dtype = compute_dtype
        if parameter.requires_grad and dtype not in _CODECS:
            raise ConfigError(
                f"trainable parameter {parameter_name} is {dtype}; offload trains bfloat16 and float32 parameters: "
                "call model.to(torch.bfloat16) first, or freeze it"
            )
        groups.setdefault((dtype, parameter.requires_grad), []).append((parameter_name, parameter))
    buffers: list[FlatBuffer] = []
    offset_nbytes = grad_start = 0
    for (dtype, trainable), members in groups.items():
        segments: list[Segment] = []
        start = 0
        for parameter_name, parameter in members:
            segments.append(Segment(parameter_name, parameter, start, parameter.numel(), parameter.shape))
            start = round_up(start + parameter.numel(), SEGMENT_ELEMENTS)
        n_elements = round_up(start, PLANE_ELEMENTS)
        buffer = FlatBuffer(
            dtype, trainable, tuple(segments), n_elements, offset_nbytes, grad_start, rule, chunk_elements
        )
        buffers.append(buffer)
        offset_nbytes += buffer.plane_nbytes
        grad_start += n_elements if trainable else 0
    return BlockLayout(name, tuple(buffers), offset_nbytes, grad_start)
