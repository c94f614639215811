"""Moves blocks: issues fetches and updates ahead of use, and waits only where data demands it.

[Note: one owner per slot] A slot belongs to one block from the start of its fetch until its eviction. Eviction is
lazy and picks the block whose next use is farthest, so that blocks near each turn (forward to backward, and
backward to the next forward) stay and are not read again. A block with an update in flight keeps its slot: the
update changes the parameters in place and writes them to storage, after which the copy is clean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.errors import BudgetError, UsageError
from offload.model.flat import FlatBuffer
from offload.schedule.operations import Phase, Use, UseCursor
from offload.stores.block_store import BlockRecord, GradBuffer, Slot
from offload.telemetry import Stalls
from offload.tiers.storage import Store
from offload.transfer.io_engine import Hyper, UpdateJob, UpdatePipeline
from offload.types import BlockState

HyperOf = Callable[[torch.nn.Parameter], "Hyper"]
"""Hyperparameters of this step's update of one parameter; counts the step."""


class Scheduler:
    """The executor over real resources. `blocks` in order of use; `root` is always resident."""

    def __init__(
        self,
        blocks: list[BlockRecord],
        root: BlockRecord,
        slots: list[Slot],
        grad_buffers: list[GradBuffer],
        store: Store | None,
        pipeline: UpdatePipeline,
        stalls: Stalls,
        spare_host_nbytes: int = 0,
    ) -> None:
        self._spare_host_nbytes = spare_host_nbytes
        self.blocks = blocks
        self.root = root
        self._slots = slots
        self._grad_buffers = grad_buffers
        self._store = store
        self._pipeline = pipeline
        self._stalls = stalls
        self._cursor = UseCursor(len(blocks))
        self._pending_segments: dict[int, list[list[tuple[int, int, Hyper]]]] = {}

    # ---- residency -------------------------------------------------------------------------------------------

    def settle(self, block: BlockRecord) -> None:
        """Complete a fetch or update that has ended, without waiting."""
        if block.tickets and all(ticket.done() for ticket in block.tickets):
            self._complete(block, "fetch")

    def _complete(self, block: BlockRecord, cause: str) -> None:
        tickets, block.tickets = block.tickets, []
        with self._stalls.waiting(cause):
            for ticket in tickets:
                ticket.wait()
        updated = block.state is BlockState.UPDATING
        if block.state is not BlockState.RESIDENT:
            block.move(BlockState.RESIDENT)
        if updated and block.grad_buffer is not None and block is not self.root:
            block.grad_buffer.owner = None
            block.grad_buffer = None

    def wait_resident(self, block: BlockRecord) -> None:
        """Block until the parameters are in the slot and no update is changing them."""
        if block.tickets:
            self._complete(block, "update" if block.state is BlockState.UPDATING else "fetch")

    def _free_slot(self, wanted_by: BlockRecord, must: bool) -> Slot | None:
        for slot in self._slots:
            if slot.owner is None:
                return slot
        order = {index: rank for rank, index in enumerate(self._cursor.upcoming())}
        for held in self._slots:
            self.settle(held.owner)  # type: ignore[arg-type]  # every slot has an owner here
        owners = [s.owner for s in self._slots if s.owner is not None and not s.owner.in_use]
        clean = [o for o in owners if o.state is BlockState.RESIDENT]
        clean.sort(key=lambda o: order.get(o.index, len(order)))
        if clean and (must or order.get(clean[-1].index, 0) > order.get(wanted_by.index, 0)):
            return self._evict(clean[-1])
        if not must:
            return None
        busy = [o for o in owners if o.tickets]
        if not busy:
            raise BudgetError("every block slot is in use at once; raise device_memory or prefetch_blocks")
        with self._stalls.waiting("slot"):
            self._complete(busy[0], "slot")
        return self._free_slot(wanted_by, must)

    @staticmethod
    def _evict(block: BlockRecord) -> Slot:
        slot = block.slot
        if slot is None:
            raise BudgetError(f"block {block.name} has no slot to give up")
        block.move(BlockState.STORED)
        block.slot, slot.owner = None, None
        block.unbind()
        return slot

    def fetch(self, block: BlockRecord, *, must: bool) -> bool:
        """Start bringing the parameters in (and the pending update, if any). False when no slot can be spared."""
        if block.state is BlockState.STORED:
            slot = self._free_slot(block, must)
            if slot is None:
                return False
            block.slot, slot.owner = slot, block
            if block.pending_update:
                self._submit_update(block, read_param=True)
            else:
                block.move(BlockState.FETCHING)
                if self._store is None:
                    raise BudgetError(f"block {block.name} is stored, but there is no storage")
                block.tickets = [
                    self._store.engine.read(
                        slot.bytes_tensor.data_ptr(),
                        block.layout.slot_nbytes,
                        block.param_offset,
                        urgent=must,
                    )
                ]
            block.bind()
        elif block.pending_update:
            self.wait_resident(block)
            self._submit_update(block, read_param=False)
        return True

    def begin(self, block: BlockRecord, phase: Phase) -> None:
        """Make `block` resident for `phase`, then look ahead."""
        self._cursor.at(Use(block.index, phase))
        block.in_use += 1
        self.fetch(block, must=True)
        if block.tickets:
            self.prefetch()
        self.wait_resident(block)
        self.prefetch()

    def end(self, block: BlockRecord) -> None:
        """The block's compute is over; it stays until its slot is wanted."""
        block.in_use -= 1
        self.prefetch()

    def prefetch(self) -> None:
        """Start fetches in the order of next use, for as long as slots can be had."""
        for index in self._cursor.upcoming():
            block = self.blocks[index]
            if block.state is not BlockState.STORED and not block.pending_update:
                continue
            if block.in_use or block.tickets:
                continue
            if not self.fetch(block, must=False):
                return

    # ---- gradients -------------------------------------------------------------------------------------------

    def begin_gradients(self, block: BlockRecord) -> None:
        """Give the block a gradient buffer, with what it has accumulated so far."""
        if block.updated_since_step:
            raise UsageError(
                f"block {block.name}: backward ran again before optimizer.step(), and its update has been made "
                "already; accumulate under `with model.offload.no_sync():`, or use update='deferred'"
            )
        if block.grad_buffer is not None or block.layout.grad_elements == 0:
            return
        buffer = self._free_grad_buffer()
        block.grad_buffer, buffer.owner = buffer, block
        if block.grads_waiting:
            plane = buffer.plane[: block.layout.grad_elements]
            if block.grad_host is not None:
                plane.copy_(block.grad_host)
            elif self._store is not None:
                with self._stalls.waiting("gradient"):
                    self._store.engine.read(
                        plane.data_ptr(), plane.numel() * 4, block.grad_offset, urgent=True
                    ).wait()
            block.grads_waiting = False

    def _free_grad_buffer(self) -> GradBuffer:
        for buffer in self._grad_buffers:
            if buffer.owner is None:
                return buffer
        for buffer in self._grad_buffers:
            owner = buffer.owner
            if owner is not None and owner.tickets and not owner.in_use:
                self._complete(owner, "gradient")
                return buffer
        raise BudgetError("every gradient buffer is in use at once; raise device_memory")

    def accumulate(
        self, block: BlockRecord, buffer: FlatBuffer, position: int, parameter: torch.nn.Parameter
    ) -> None:
        """Move `parameter.grad` into the block's gradient plane: copied the first time, added after that."""
        grad = parameter.grad
        if grad is None:
            return
        if block.grad_buffer is None:
            self.begin_gradients(block)
        if block.grad_buffer is None:
            raise UsageError(f"block {block.name} received a gradient but has no trainable parameter")
        target = block.grad_view(buffer, buffer.segments[position], block.grad_buffer.plane)
        if id(parameter) in block.touched:
            target.add_(grad)
        else:
            target.copy_(grad)
            block.touched.add(id(parameter))
        parameter.grad = None

    def park_gradients(self, block: BlockRecord) -> None:
        """Put unapplied gradients where they wait, and free the gradient buffer."""
        if block.grad_buffer is None or block is self.root:
            return
        buffer = block.grad_buffer
        plane = buffer.plane[: block.layout.grad_elements]
        if block.grad_host is None and block.grad_offset < 0:
            self._take_host_gradients(block)
        if block.grad_host is not None:
            block.grad_host.copy_(plane)
        elif self._store is not None:
            with self._stalls.waiting("gradient"):
                self._store.engine.write(plane.data_ptr(), plane.numel() * 4, block.grad_offset).wait()
        block.grads_waiting = True
        block.grad_buffer, buffer.owner = None, None

    def _take_host_gradients(self, block: BlockRecord) -> None:
        """Host memory for gradients that must wait, from what the budget has left (DRAM-only placement)."""
        nbytes = block.layout.grad_elements * 4
        if nbytes > self._spare_host_nbytes:
            raise UsageError(
                f"block {block.name}: its gradients have to wait for more of them, which takes {nbytes} bytes, and "
                f"{self._spare_host_nbytes} bytes of host_memory are left: raise it, or give storage=[directory]"
            )
        self._spare_host_nbytes -= nbytes
        block.grad_host = torch.empty(block.layout.grad_elements, dtype=torch.float32)

    # ---- updates ---------------------------------------------------------------------------------------------

    def segments(self, block: BlockRecord, hyper_of: HyperOf) -> list[list[tuple[int, int, Hyper]]]:
        """Per flat buffer, the (start, n, hyperparameters) of every parameter that has a gradient."""
        return [
            [
                (segment.start, segment.numel, hyper_of(segment.parameter))
                for segment in buffer.segments
                if buffer.trainable and id(segment.parameter) in block.touched
            ]
            for buffer in block.layout.buffers
        ]

    def update_now(self, block: BlockRecord, hyper_of: HyperOf) -> None:
        """Start the update of a resident block whose gradients are in its gradient buffer."""
        self._pending_segments[block.index] = self.segments(block, hyper_of)
        self._submit_update(block, read_param=False)

    def update_later(self, block: BlockRecord, hyper_of: HyperOf) -> None:
        """Decide the update now; it runs with the block's next fetch."""
        self._pending_segments[block.index] = self.segments(block, hyper_of)
        block.pending_update = True

    def _submit_update(self, block: BlockRecord, *, read_param: bool) -> None:
        block.move(BlockState.UPDATING)
        block.pending_update = False
        segments_of = self._pending_segments.pop(block.index)
        in_buffer = block.grad_buffer is not None
        for position, buffer in enumerate(block.layout.buffers):
            plane = block.plane(buffer)
            offset = -1 if block.param_offset < 0 else block.param_offset + buffer.plane_offset_nbytes
            segments = segments_of[position]
            if not segments:
                if read_param and self._store is not None:
                    block.tickets.append(
                        self._store.engine.read(plane.data_ptr(), buffer.plane_nbytes, offset)
                    )
                continue
            extents = block.states[position]
            grad_nbytes_before = 4 * buffer.grad_start
            grad_address, grad_offset = 0, -1
            if block.grad_buffer is not None:
                grad_address = block.grad_buffer.plane.data_ptr() + grad_nbytes_before
            elif block.grad_host is not None:
                grad_address = block.grad_host.data_ptr() + grad_nbytes_before
            else:
                grad_offset = block.grad_offset + grad_nbytes_before
            block.tickets.append(
                self._pipeline.submit(
                    UpdateJob(
                        param_codec=buffer.codec,
                        n_elements=buffer.n_elements,
                        param_address=plane.data_ptr(),
                        param_offset=offset,
                        read_param=read_param,
                        state_offset=extents.offset,
                        state_host_address=0 if extents.host is None else extents.host.data_ptr(),
                        host_chunks=extents.host_chunks,
                        grad_address=grad_address,
                        grad_offset=grad_offset,
                        segments=segments,
                    )
                )
            )
        block.touched.clear()
        if not in_buffer:
            block.grads_waiting = False

    def flush(self) -> None:
        """Make every decided update and wait for everything in flight."""
        for block in [*self.blocks, self.root]:
            if block.pending_update:
                self.wait_resident(block)
                self.fetch(block, must=True)
                self.wait_resident(block)
        for block in [*self.blocks, self.root]:
            self.wait_resident(block)

    def rewind(self) -> None:
        """A step has ended: the next use is forward of the first block."""
        self._cursor.rewind()
