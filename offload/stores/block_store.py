"""One block's bytes: where its parameter planes, optimizer states and waiting gradients are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from offload.model.flat import BlockLayout, FlatBuffer, Segment
from offload.transfer.io_engine import Ticket
from offload.types import BlockState, checked_move


@dataclass
class Slot:
    """Device memory for one block's planes; `bytes_tensor` is uint8 and page aligned on a CPU device tier."""

    bytes_tensor: torch.Tensor
    owner: BlockRecord | None = None


@dataclass
class GradBuffer:
    """fp32 gradient plane that backward fills; `owner` is the block whose gradients it holds or is being updated."""

    plane: torch.Tensor
    owner: BlockRecord | None = None


@dataclass
class StateExtents:
    """Optimizer state of one flat buffer: first `host_chunks` chunk records in `host`, the rest at `offset`."""

    host: torch.Tensor | None
    host_chunks: int
    offset: int


@dataclass
class BlockRecord:
    """Everything the runtime knows of one block (or of the root)."""

    index: int
    layout: BlockLayout
    is_root: bool
    param_offset: int
    """Extent of the parameter planes on storage; -1 when they live in host or device memory for good."""
    states: dict[int, StateExtents]
    """By position in `layout.buffers`; trainable ones only."""
    state: BlockState = BlockState.STORED
    slot: Slot | None = None
    tickets: list[Ticket] = field(default_factory=list)
    """Fetch or update in flight."""
    grad_offset: int = -1
    grad_host: torch.Tensor | None = None
    """Where unapplied gradients wait: a host plane, or an extent on storage."""
    grad_buffer: GradBuffer | None = None
    touched: set[int] = field(default_factory=set)
    """id() of the segments' parameters that have received a gradient since the last update."""
    grads_waiting: bool = False
    """Unapplied gradients are in `grad_host` or at `grad_offset`."""
    pending_update: bool = False
    """step() has decided to apply them; the next fetch does so."""
    outstanding_backwards: int = 0
    updated_since_step: bool = False
    in_use: int = 0
    grad_norms: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The block's module path."""
        return self.layout.name

    def move(self, new: BlockState) -> None:
        """Go to `new`, refusing an illegal move."""
        self.state = checked_move(self.name, self.state, new)

    def plane(self, buffer: FlatBuffer, slot: Slot | None = None) -> torch.Tensor:
        """1-D view in the buffer's dtype of its plane inside the slot."""
        held = slot or self.slot
        if held is None:
            raise RuntimeError(f"block {self.name} has no slot")
        start = buffer.plane_offset_nbytes
        return held.bytes_tensor[start : start + buffer.n_elements * buffer.dtype.itemsize].view(buffer.dtype)

    def bind(self) -> None:
        """Let every parameter's data be its view of the slot."""
        for buffer in self.layout.buffers:
            plane = self.plane(buffer)
            for segment in buffer.segments:
                segment.parameter.data = segment.view(plane)

    def unbind(self) -> None:
        """Replace every parameter's data by a one-element NaN seen at the parameter's shape: no memory, loud misuse."""
        for buffer in self.layout.buffers:
            hole = torch.full((1,), float("nan"), dtype=torch.float32).to(buffer.dtype)
            for segment in buffer.segments:
                segment.parameter.data = hole.expand(segment.numel).as_strided(
                    segment.shape, (0,) * len(segment.shape)
                )

    def grad_view(self, buffer: FlatBuffer, segment: Segment, plane: torch.Tensor) -> torch.Tensor:
        """One parameter's part of a gradient plane, in the parameter's shape."""
        start = buffer.grad_start + segment.start
        return plane[start : start + segment.numel].view(segment.shape)
