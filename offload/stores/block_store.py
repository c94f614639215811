"""One block's bytes: where its parameter planes, optimizer states and waiting gradients are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from offload.model import guarded
from offload.model.flat import BlockLayout, FlatBuffer, Segment
from offload.stores.sides import Sides
from offload.tiers.device import PAST, Event
from offload.transfer.io_engine import Ticket
from offload.types import BlockState, checked_move


@dataclass
class Slot:
    """Memory of the host tier for one block's planes (of the device tier where the device shares the host's memory).

    `bytes_tensor` is uint8, page aligned, and what storage is read into and written from.
    """

    bytes_tensor: torch.Tensor
    owner: BlockRecord | None = None
    free_after: Event = PAST
    """The end of a copy to the device that still reads it for its last owner."""


@dataclass
class DeviceSlot:
    """Memory of a device of its own for one block's planes; rewritten only after `free_after`."""

    bytes_tensor: torch.Tensor
    owner: BlockRecord | None = None
    free_after: Event = PAST


@dataclass
class GradBuffer:
    """Gradient plane, fp32 or, for gradients that come once, bf16; `owner` is the block whose gradients it holds.

    A `permanent` one never changes hands.
    """

    plane: torch.Tensor
    owner: BlockRecord | None = None
    permanent: bool = False
    taken: int = 0
    """The how many-th taking this is: the one taken first comes back first."""
    free_after: Event = PAST
    leaving: list[tuple[int, int, Event]] = field(default_factory=list)
    """Ranges of elements that are copied out by themselves, and the end of each copy."""
    _parts: dict[tuple[int, torch.Size], torch.Tensor] = field(default_factory=dict)

    def part(self, buffer: FlatBuffer, segment: Segment) -> torch.Tensor:
        """One parameter's part of the plane, in the parameter's shape; blocks of the same layout share it."""
        key = (buffer.grad_start + segment.start, segment.shape)
        if key not in self._parts:
            self._parts[key] = self.plane[key[0] : key[0] + segment.numel].view(segment.shape)
        return self._parts[key]

    def ends_of(self, start: int, stop: int) -> list[Event]:
        """What has to be over before elements in this range change; each is told of once."""
        found = [part for part in self.leaving if part[0] < stop and start < part[1]]
        if found:
            self.leaving = [part for part in self.leaving if part not in found]
        return [event for _, _, event in found]

    def release(self) -> None:
        """Let the next block have it."""
        if not self.permanent:
            self.owner = None


@dataclass
class StateExtents:
    """Optimizer state of one flat buffer: first `host_chunks` chunk records in `host`, the rest at `offset`.

    Of a block that is updated on the device (`BlockRecord.on_device`) `host` is device memory, and has all of them.
    """

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
    arriving: list[tuple[int, int, Ticket]] = field(default_factory=list)
    """Of an update in parts: first byte of the slot, byte after the last, and what completes when it has made these."""
    device_slot: DeviceSlot | None = None
    """The copy that a device of its own computes with; None where the device computes on `slot`."""
    loaded: Event = PAST
    """The end of the copy from `slot` to `device_slot`; `slot` stays as it is until then."""
    device_stale: bool = False
    """An update has changed the parameters since they were copied to the device (the root only)."""
    grad_offset: int = -1
    grad_host: torch.Tensor | None = None
    """Where unapplied gradients wait: a host plane, or an extent on storage."""
    grad_buffer: GradBuffer | None = None
    """What backward adds to, in device memory."""
    grad_out: GradBuffer | None = None
    """What the update in flight reads, in host memory."""
    grad_out_home: GradBuffer | None = None
    """The root's own `grad_out`, on a device of its own."""
    grad_gate: Ticket | None = None
    """Completes when the gradients have arrived where the update will look for them."""
    gives_way: bool = False
    """Its update in flight is made when no other block's can be: the next forward needs it late."""
    parking: GradBuffer | None = None
    """Still being written to `grad_offset`, until `grad_gate` completes."""
    touched: set[int] = field(default_factory=set)
    """id() of the segments' parameters that have received a gradient since the last update."""
    grads_waiting: bool = False
    """Unapplied gradients are in `grad_host` or at `grad_offset`."""
    pending_update: bool = False
    """step() has decided to apply them; the next fetch does so."""
    awaiting_backward: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)
    """Calls whose backward may still come; a graph that is dropped leaves it."""
    outdated: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)
    """Calls of which a step has updated the parameters, so that their backward cannot come any more."""
    updated_since_step: bool = False
    updated: set[int] = field(default_factory=set)
    """id() of parameters that an update of this step changes (the root's only)."""
    trains: bool = False
    """Its module has trainable parameters, its own or the root's."""
    checked: bool = False
    """A training forward has shown that nothing leaves it past its results (model/opaque.py)."""
    recomputed: bool = False
    """It has run once more for backward."""
    in_use: int = 0
    """Uses of the parameters on the device that are going on."""
    host_in_use: int = 0
    """Of these, and of readers, those that need the host slot to stay."""
    grad_norms: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    on_device: bool = False
    """Parameters (`slot`) and optimizer state are in the memory of a device of its own for good, and updated there."""
    sides: Sides | None = None
    """Both sets of extents, where every step is durable (stores/sides.py)."""
    recipes: dict[Any, Any] = field(default_factory=dict)
    """How to recompute it, by the shapes of its inputs (recompute/by_recipe.py)."""
    _holes: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    """What the parameters' data are while they are nowhere to be computed with."""
    _views: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    """What they are while they are at `_viewed`, the address of a slot."""
    _viewed: int = 0
    keeps_writes: bool = False
    """What is computed with is the master, in memory of its own: what is written there while it is bound stays."""
    written: str = ""
    """Name of the first parameter that was written to from outside in vain."""
    is_bound: bool = False
    """Its parameters' data are views of the memory that compute reads."""
    _watched: list[torch.nn.Parameter] = field(default_factory=list)
    _watched_names: list[str] = field(default_factory=list)
    _writes: list[int] = field(default_factory=list)
    """Of each one watched: how often it had been written to from outside when it was looked at last."""

    def end_step(self, *, made: bool) -> None:
        """optimizer.step() is over, and has left the parameters as they were if not `made`. Graphs of before it cannot
        go backward through what it has updated: a block refuses its calls, the root's operations look, as torch's do,
        at how often a parameter has been changed in place."""
        if made and self.updated_since_step and self.awaiting_backward:
            self.outdated.update(self.awaiting_backward)
        if made and self.is_root and self.updated:
            self._count_updates()
        self.updated.clear()
        self.updated_since_step = False
        self.awaiting_backward.clear()

    def turn(self, side: int) -> None:
        """Read from the other set of extents from now on."""
        sides = self.sides
        if sides is None:
            return
        sides.current = side
        if self.param_offset >= 0:
            self.param_offset = sides.param_offsets[side]
        for position, extents in self.states.items():
            extents.offset = sides.state_offsets[position][side] + sides.host_chunk_nbytes.get(position, 0)

    @property
    def name(self) -> str:
        """The block's module path."""
        return self.layout.name

    @property
    def label(self) -> str:
        """How spans name it."""
        return "root" if self.is_root else str(self.index)

    def move(self, new: BlockState) -> None:
        """Go to `new`, refusing an illegal move."""
        self.state = checked_move(self.name, self.state, new)

    @property
    def compute_bytes(self) -> torch.Tensor | None:
        """The uint8 memory that compute reads the planes from; None when they are not on the device."""
        held = self.device_slot or self.slot
        return None if held is None else held.bytes_tensor

    def plane(self, buffer: FlatBuffer, bytes_tensor: torch.Tensor | None = None) -> torch.Tensor:
        """1-D view in the buffer's dtype of its plane inside `bytes_tensor` (the slot's, when not given)."""
        if bytes_tensor is None:
            if self.slot is None:
                raise RuntimeError(f"block {self.name} has no slot")
            bytes_tensor = self.slot.bytes_tensor
        start = buffer.plane_offset_nbytes
        return bytes_tensor[start : start + buffer.n_elements * buffer.dtype.itemsize].view(buffer.dtype)

    def values(self) -> list[tuple[str, torch.Tensor]]:
        """(name, what is in its slot) of every parameter; copies in host memory where the slot stays on the device."""
        found = [
            (s.name, s.view(self.plane(buffer))) for buffer in self.layout.buffers for s in buffer.segments
        ]
        return [(name, value.to("cpu")) for name, value in found] if self.on_device else found

    def bind(self) -> None:
        """Let every parameter's data be its view of the memory that compute reads."""
        self.note_writes()
        self.is_bound = True
        held = self.compute_bytes
        address = 0 if held is None else held.data_ptr()
        if address != self._viewed:
            with torch.inference_mode(False):  # or the parameters would be inference tensors ever after
                self._make_views(held)
            self._viewed = address
        for parameter, view in self._views:
            guarded.put(parameter, view)

    def _make_views(self, held: torch.Tensor | None) -> None:
        """A block that stays where it is, as the root does, needs them once."""
        self._views = []
        for buffer in self.layout.buffers:
            plane = self.plane(buffer, held)
            self._views += [(segment.parameter, segment.view(plane)) for segment in buffer.segments]

    def unbind(self, torch_device: torch.device) -> None:
        """Replace every parameter's data by a one-element NaN seen at the parameter's shape: no memory, loud misuse."""
        self.note_writes()
        self.is_bound = False
        if not self._holes:  # made once: a steady step allocates nothing on the device
            with torch.inference_mode(False):  # as in `bind`
                self._make_holes(torch_device)
        for parameter, nothing in self._holes:
            guarded.put(parameter, nothing)

    def _make_holes(self, torch_device: torch.device) -> None:
        for buffer in self.layout.buffers:
            hole = torch.full((1,), float("nan"), dtype=torch.float32, device=torch_device).to(buffer.dtype)
            for segment in buffer.segments:
                nothing = hole.as_strided(segment.shape, (0,) * len(segment.shape))
                self._holes.append((segment.parameter, nothing))

    def watch_writes(self) -> None:
        """From now on parameters are the engine's: see [Note: guarded parameters] in model/guarded.py."""
        segments = [segment for buffer in self.layout.buffers for segment in buffer.segments]
        for segment in segments:
            guarded.guard(segment.parameter, segment.name)
        counted = [segment for segment in segments if not segment.parameter.is_inference()]
        self._watched = [segment.parameter for segment in counted]
        self._watched_names = [segment.name for segment in counted]
        self._writes = [parameter._version for parameter in self._watched]

    def _count_updates(self) -> None:
        self.note_writes()
        for parameter in self._watched:
            if id(parameter) in self.updated:
                torch.autograd.graph.increment_version(parameter)
        self._writes = [parameter._version for parameter in self._watched]

    def note_writes(self) -> None:
        """Look whether a parameter was written to from outside since this was called last, and was it in vain."""
        found = [parameter._version for parameter in self._watched]
        if found == self._writes:
            return
        if not (self.keeps_writes and self.is_bound) and not self.written:
            pairs = zip(self._watched_names, found, self._writes, strict=True)
            self.written = next(name for name, now, before in pairs if now != before)
        self._writes = found
