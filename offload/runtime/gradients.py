"""Gradients on their way: from autograd into a block's plane, from there to the update or to where they wait.

[Note: gradients that come once] A bf16 parameter's gradient is bf16. Where a step gives it once and its update is made
at once, nothing is added up, and the plane holds it as it came: an fp32 buffer then serves two blocks, and half of the
bytes leave the device. The first sign of accumulation (`no_sync`, a block that is called twice) makes them fp32 for
good; micro-batches and updates that wait have fp32 from the start.

[Note: the only buffer] Of two buffers on a device one is emptied while the next block fills the other. Where blocks
are so large that there is one, all gradients of a block would cross the bus before the next block's could begin. What
the last micro-batch gives of a parameter is final, so it leaves at once, and the next block's may take its place once
it has left: both come in the same order, a block apart. A block whose gradients go out at once (one that is updated on
the device, and accumulates) is followed by one that waits for all of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from offload.cut_short import MayBeCutShort, whole
from offload.errors import BudgetError, UsageError
from offload.model.flat import FlatBuffer
from offload.runtime import taken_gradients
from offload.runtime.early_root import Range, split
from offload.runtime.update_jobs import Part, Segments, parts_of
from offload.stores.block_store import BlockRecord, GradBuffer
from offload.telemetry import SpanLog, Stalls
from offload.tiers.device import DeviceTier, Pin
from offload.tiers.host import HostArena, Spare
from offload.tiers.storage import Store
from offload.transfer.copies import Copies
from offload.types import PAGE_NBYTES, ROOT_PARTS, SEGMENT_ELEMENTS, round_up

logger = logging.getLogger("offload")

LEAVES_ALONE_NBYTES = 4 << 20
"""Gradients of fewer bytes leave with others: a copy costs the thread that launches as much as some kernels."""


@dataclass
class _Leaving:
    """Gradients of a block that leave as they come: where to, whose place that is, and which elements have left."""

    block: BlockRecord
    updates: bool
    target: torch.Tensor | None = None
    out: GradBuffer | None = None
    left: set[Range] = field(default_factory=set)


def refuse_updated(block: BlockRecord) -> None:
    """Raise UsageError where a backward would change what has been updated in this step already."""
    if block.updated_since_step:
        raise UsageError(
            f"block {block.name}: its update of this step has been made already, during a backward that ran before "
            "without optimizer.step(), or failed midway. To accumulate, run all backwards but the last under "
            "`with model.offload.no_sync():`; to be able to go on after a failed one, or to forget with zero_grad() "
            "what another model's loss has left here (a discriminator), use update='deferred'"
        )


def look_at_forward(block: BlockRecord) -> None:
    """Say once where a forward computes with what torch would compute with after `optimizer.step()` only."""
    if block.updated_since_step:
        _tell_of_forward_before_step()


@functools.cache
def _tell_of_forward_before_step() -> None:
    logger.warning(
        "a forward came between backward and optimizer.step(): it computes with the parameters of after that step, "
        "which are updated during backward; evaluate after step(), or use update='deferred'"
    )


class Gradients(MayBeCutShort):
    """Owns the gradient buffers. `buffers` are in device memory, `out_buffers` in host memory (none when shared).

    `one_each`: every block's gradients come once a step, as long as nobody calls `will_accumulate`.
    `complete(block, cause)` waits for the block's update. `spare_host` may be taken for waiting gradients,
    page-locked as `pin` says.
    """

    def __init__(
        self,
        buffers: list[GradBuffer],
        out_buffers: list[GradBuffer],
        device: DeviceTier,
        copies: Copies,
        store: Store | None,
        stalls: Stalls,
        spans: SpanLog,
        spare_host: Spare,
        pin: Pin,
        one_each: bool,
        complete: Callable[[BlockRecord, str], None],
    ) -> None:
        self._fp32 = buffers, out_buffers
        self._buffers, self._out_buffers = buffers, out_buffers
        self.one_each = one_each
        if one_each:
            self._buffers, self._out_buffers = _halves(buffers), _halves(out_buffers)
        self._device = device
        self._copies = copies
        self._store = store
        self._stalls = stalls
        self._spans = spans
        self._spare_host = spare_host
        self._pin = pin
        self._complete = complete
        self._n_taken = 0
        self._leaving: _Leaving | None = None

    def will_accumulate(self) -> None:
        """More than one gradient of a parameter is about to come in a step. Waits for the updates under way."""
        if not self.one_each:
            return
        self.one_each = False
        for buffer in [*self._buffers, *self._out_buffers]:
            owner = buffer.owner
            if owner is not None and owner.tickets:
                self._complete(owner, "gradient")
            elif owner is not None and owner.grad_buffer is buffer and not owner.touched:
                self.drop(owner)
            if buffer.owner is not None:
                raise UsageError(
                    f"block {buffer.owner.name} is in the middle of a backward: begin to accumulate gradients "
                    "(no_sync(), or a second forward) before it or after it"
                )
            buffer.free_after.wait()
        self._buffers, self._out_buffers = self._fp32

    # ---- in backward -----------------------------------------------------------------------------------------

    def begin(self, block: BlockRecord) -> None:
        """Give the block a gradient buffer, with what it has accumulated so far."""
        refuse_updated(block)
        if block.grad_buffer is not None or block.layout.grad_elements == 0:
            return
        buffer = self._take(self._buffers)
        block.grad_buffer, buffer.owner = buffer, block
        if not buffer.leaving:
            self._device.compute_waits(buffer.free_after)
        if block.grads_waiting:
            self._wait_left(buffer, (0, block.layout.grad_elements))
            self._bring_back(block, buffer.plane[: block.layout.grad_elements])
        elif block.parking is not None:
            self._wait_parked(
                block
            )  # those were discarded, but may still be on the way to where these will wait

    def last_come(self, block: BlockRecord, *, updates: bool) -> None:
        """What the block's backward gives from now on is final, and its update follows or (not `updates`) waits. See
        [Note: the only buffer]. Of a block that is updated on the device nothing leaves it."""
        leaves = len(self._buffers) == 1 and not self._device.shares_host and not block.on_device
        self._leaving = _Leaving(block, updates) if leaves else None

    @whole
    def accumulate(
        self, block: BlockRecord, buffer: FlatBuffer, position: int, parameter: torch.nn.Parameter
    ) -> None:
        """Move `parameter.grad` into the block's gradient plane: copied the first time, added after that."""
        grad = taken_gradients.grad_of(parameter)
        if grad is None:
            return
        if not (block.in_use or block.is_root):
            raise UsageError(
                f"{buffer.segments[position].name} has received a gradient outside of the backward of its block: the "
                "loss reads it by itself (a penalty on weights), or the model calls a module of the block from outside "
                "of it, and it has its values only while its block computes: use the optimizer's weight_decay, return "
                "the penalty from the block's forward, or give offload.wrap blocks=[modules] without that module"
            )
        if grad.layout is not torch.strided:
            raise UsageError(
                f"block {block.name}: the gradient of {buffer.segments[position].name} is sparse, and gradients are "
                "kept dense: use sparse=False where it is made (nn.Embedding, nn.functional.embedding)"
            )
        if block.grad_buffer is None:
            self.begin(block)
        if block.grad_buffer is None:
            raise UsageError(f"block {block.name} received a gradient but has no trainable parameter")
        segment = buffer.segments[position]
        target = block.grad_buffer.part(buffer, segment)
        first = buffer.grad_start + segment.start
        self._wait_left(block.grad_buffer, (first, first + segment.numel))
        if id(parameter) in block.touched:
            if target.dtype != torch.float32:
                raise UsageError(
                    f"block {block.name}: a second gradient of one parameter came in one step: run all backwards of a "
                    "step but the last under `with model.offload.no_sync():`"
                )
            target.add_(grad)
        else:
            target.copy_(grad)
            block.touched.add(id(parameter))
        taken_gradients.take(parameter, segment.name)
        if (
            self._leaving is not None
            and self._leaving.block is block
            and target.nbytes >= LEAVES_ALONE_NBYTES
        ):
            self._leave(self._leaving, block.grad_buffer, (first, first + segment.numel))

    # ---- out of the device -----------------------------------------------------------------------------------

    def hand_over(self, block: BlockRecord, segments_of: list[Segments]) -> list[Part]:
        """Let the update have the gradients: `grad_out` holds those of a part once its gate (None: now) has completed.

        `segments_of`: per flat buffer what the update reads; of the root no more leaves the device.
        """
        buffer, shared = block.grad_buffer, self._device.shares_host
        parts = parts_of(block, segments_of, ROOT_PARTS if block.is_root and not shared else 1)
        if buffer is None:
            return parts
        out = buffer if shared else self._out_of(block)
        if not (shared or block.is_root):
            self._leave_rest(block, buffer, out.plane)
        block.grad_out = out
        for part in parts:
            if part.segments and block.is_root and not shared:
                self._copy_out(block, buffer, out.plane, _ranges(block, part))
                block.grad_gate = self._copies.gate(buffer.free_after)
            part.gate = block.grad_gate
        if not block.is_root:
            block.grad_buffer = None
        return parts

    def park(self, block: BlockRecord) -> None:
        """Put unapplied gradients where they wait, and free the gradient buffer. In one of its own they stay."""
        buffer = block.grad_buffer
        if buffer is None or buffer.permanent:
            return
        if self._device.shares_host:
            self._find_place(block)
            target, out = (block.grad_host, None) if block.grad_host is not None else (buffer.plane, buffer)
        else:
            target, out = self._waiting_place(block)
        block.grads_waiting = True
        if out is not buffer:
            self._leave_rest(block, buffer, target)
        if out is not None and self._store is not None:
            block.parking = out
            block.grad_gate = self._store.engine.write(
                out.plane.data_ptr(),
                block.layout.grad_elements * 4,
                block.grad_offset,
                after=block.grad_gate,
            )
            self._spans.add_work("write", f"spill {block.label}", block.grad_gate)
        block.grad_buffer = None

    def can_hold(self) -> bool:
        """Whether a block may keep its gradient buffer until backward has ended: two others go on without it."""
        return self._device.shares_host and len(self._buffers) > 2

    def n_that_wait(self) -> int:
        """For how many updates gradients that have left the device can wait: two others go on without their buffers."""
        return max(0, len(self._out_buffers) - (4 if self.one_each else 2))

    def drop(self, block: BlockRecord) -> None:
        """Free a gradient buffer that nothing was added to, or whose gradients compute has used."""
        self._leaving = None
        if block.grad_buffer is not None and not block.grad_buffer.permanent:
            block.grad_buffer.release()
            block.grad_buffer = None

    @contextmanager
    def looked_at(self, block: BlockRecord) -> Iterator[None]:
        """Inside, the block's gradients are in its gradient buffer; those that wait elsewhere stay there too."""
        waiting = block.grads_waiting
        self.begin(block)
        try:
            yield
        finally:
            if waiting:
                self.drop(block)
                block.grads_waiting = True

    def updated(self, block: BlockRecord) -> None:
        """The block's update has read its gradients."""
        block.grad_gate = None
        if block.grad_out is not None:
            block.grad_out.release()
            block.grad_out = None

    def _copy_out(
        self, block: BlockRecord, buffer: GradBuffer, target: torch.Tensor, ranges: list[Range]
    ) -> None:
        """Start to copy the elements in `ranges`."""
        for start, stop in ranges:
            buffer.free_after = self._copies.d2h(
                f"grad_out {block.label}", target[start:stop], buffer.plane[start:stop]
            )
            if self._leaving is not None:
                buffer.leaving.append((start, stop, buffer.free_after))
        if ranges and self._leaving is None:
            buffer.leaving.clear()  # copies end in order: `free_after` is behind all of them

    def _leave(self, leaving: _Leaving, buffer: GradBuffer, elements: Range) -> None:
        """These are final, unless more comes: then they leave again, behind what has left."""
        block = leaving.block
        if leaving.target is None and leaving.updates:
            leaving.out = self._out_of(block)
            leaving.target = leaving.out.plane
        elif leaving.target is None:
            leaving.target, leaving.out = self._waiting_place(block)
        self._copy_out(block, buffer, leaving.target, [elements])
        leaving.left.add(elements)

    def _leave_rest(self, block: BlockRecord, buffer: GradBuffer, target: torch.Tensor) -> None:
        """All of the block's gradients that have not left do so, and `buffer` may be another block's."""
        n = block.layout.grad_elements
        if self._device.shares_host:
            target[:n].copy_(buffer.plane[:n])
        else:
            left = set() if self._leaving is None else self._leaving.left
            rest = split(0, n, sorted(left))[1]
            self._copy_out(block, buffer, target, [(start, start + numel) for start, numel in rest])
            block.grad_gate = self._copies.gate(buffer.free_after)
            self._leaving = None
        buffer.release()

    def _out_of(self, block: BlockRecord) -> GradBuffer:
        """Host memory through which the block's gradients pass."""
        if self._leaving is not None and self._leaving.out is not None:
            return self._leaving.out
        out = block.grad_out_home or self._take(self._out_buffers)
        out.owner = block
        return out

    def _waiting_place(self, block: BlockRecord) -> tuple[torch.Tensor, GradBuffer | None]:
        """Host memory in which the block's gradients wait, or through which they pass to storage (whose it is then)."""
        self._find_place(block)
        if block.grad_host is not None:
            return block.grad_host, None
        out = self._out_of(block)
        return out.plane, out

    def _wait_left(self, buffer: GradBuffer, elements: Range) -> None:
        """Compute given from now on may change these elements."""
        if buffer.leaving:
            for event in buffer.ends_of(*elements):
                self._device.compute_waits(event)

    # ---- waiting ---------------------------------------------------------------------------------------------

    def _find_place(self, block: BlockRecord) -> None:
        """Where the block's gradients wait, with nothing of earlier ones on the way there."""
        if block.grad_host is None and block.grad_offset < 0:
            self._take_place(block)
        self._wait_parked(block)

    def _wait_parked(self, block: BlockRecord) -> None:
        if block.grad_gate is not None:
            with self._stalls.waiting("gradient"):
                block.grad_gate.wait()
            block.grad_gate = None
        if block.parking is not None:
            block.parking.release()
            block.parking = None

    def _bring_back(self, block: BlockRecord, plane: torch.Tensor) -> None:
        """Accumulation goes on: the waiting gradients return to device memory."""
        self._wait_parked(block)
        block.grads_waiting = False
        shared = self._device.shares_host
        if block.grad_host is not None:
            source, lent = block.grad_host[: plane.numel()], None
        elif self._store is not None:
            lent = None if shared else self._take(self._out_buffers)
            source = plane if lent is None else lent.plane[: plane.numel()]
            with self._stalls.waiting("gradient"):
                self._store.engine.read(
                    source.data_ptr(), source.numel() * 4, block.grad_offset, urgent=True
                ).wait()
        else:
            return
        if source is plane:
            return
        arrived = self._copies.h2d(f"swap_in {block.label}", plane, source, [self._device.mark()])
        self._device.compute_waits(arrived)
        if lent is not None:
            arrived.wait()

    def _take(self, buffers: list[GradBuffer]) -> GradBuffer:
        """A buffer without owner; waits for the first that an update or a write gives back."""
        self._n_taken += 1
        for buffer in sorted(buffers, key=_comes_back):
            owner = buffer.owner
            if owner is not None and owner.parking is buffer:  # maybe of an earlier call of the block in use
                self._wait_parked(owner)
            elif owner is not None and owner.in_use:
                continue
            elif owner is not None and owner.tickets:
                self._complete(owner, "gradient")
            elif owner is not None:
                continue
            buffer.taken = self._n_taken
            return buffer
        raise BudgetError("every gradient buffer is in use at once; raise device_memory")

    def _take_place(self, block: BlockRecord) -> None:
        """Room for gradients that must wait though no step defers them: on storage, without one in host memory that
        the budget has left."""
        nbytes = round_up(block.layout.grad_elements * 4, PAGE_NBYTES)
        if self._store is not None:
            self._store.grow(nbytes)
            block.grad_offset = self._store.allocate(nbytes)
            return
        if nbytes > self._spare_host.nbytes and self._lend(block):
            return
        if nbytes > self._spare_host.nbytes:
            raise UsageError(
                f"block {block.name}: its gradients have to wait for more of them, which takes {nbytes} bytes, and "
                f"{self._spare_host.nbytes} bytes of host_memory are left: raise it, or give storage=[directory]"
            )
        self._spare_host.nbytes -= nbytes
        arena = HostArena(nbytes)
        self._device.page_lock(arena.address, arena.nbytes, self._pin)
        block.grad_host = arena.take(block.layout.grad_elements * 4).view(torch.float32)

    def _lend(self, block: BlockRecord) -> bool:
        """Give the block a buffer in host memory for good, of those beyond the two that all need."""
        free = [buffer for buffer in self._out_buffers if buffer.owner is None and buffer.free_after.done()]
        if self.one_each or not free or len(self._out_buffers) <= 2:
            return False
        self._out_buffers.remove(free[0])
        block.grad_host = free[0].plane[: block.layout.grad_elements]
        return True


def _comes_back(buffer: GradBuffer) -> tuple[bool, bool, int]:
    """Order of gradient buffers by when they can be had: free ones, then as they were taken, at last those of updates
    that give way to others, which are made in the other direction."""
    owner = buffer.owner
    if owner is None:
        return False, False, buffer.taken
    return True, owner.gives_way, -buffer.taken if owner.gives_way else buffer.taken


def _halves(buffers: list[GradBuffer]) -> list[GradBuffer]:
    """Two bf16 buffers of as many elements in the memory of each fp32 one."""
    return [GradBuffer(half) for buffer in buffers for half in buffer.plane.view(torch.bfloat16).chunk(2)]


def _ranges(block: BlockRecord, part: Part) -> list[Range]:
    """Elements of the block's gradient plane that the part's segments cover; what touches is one range."""
    ranges: list[Range] = []
    grad_start = block.layout.buffers[part.position].grad_start
    for start, n, _ in part.segments:
        first = grad_start + start
        if ranges and first - ranges[-1][1] < SEGMENT_ELEMENTS:
            ranges[-1] = (ranges[-1][0], first + n)
        else:
            ranges.append((first, first + n))
    return ranges
