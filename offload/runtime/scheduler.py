"""Moves blocks: issues fetches, loads and updates ahead of use, and waits only where data demands it.

[Note: two steps to the device] Storage is read into host slots (`HostSlots`), and updates run in them. A device that
shares the host's memory computes on them; for one with memory of its own a resident block is then loaded into a
device slot (`Residency`), and an update makes that copy outdated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from offload.cut_short import MayBeCutShort, whole_but_for_waits
from offload.runtime.device_residency import Residency
from offload.runtime.device_updates import DeviceUpdates
from offload.runtime.early_root import Range
from offload.runtime.gradients import Gradients
from offload.runtime.host_slots import HostSlots
from offload.runtime.update_jobs import (
    HyperOf,
    Part,
    RootParts,
    Segments,
    make_job,
    needs_job,
    param_offset,
    parts_of,
    touched_segments,
)
from offload.schedule.use_order import ForwardCursor, Phase, Use, UseCursor, kept_in_forwards
from offload.stores.block_store import BlockRecord
from offload.telemetry import Stalls
from offload.tiers.storage import Store
from offload.transfer.io_engine import Ticket, UpdatePipeline
from offload.types import BlockState


class Scheduler(MayBeCutShort):
    """The executor over real resources. `blocks` in order of use; `root` is always resident.

    `holds`: whether one update may be held until backward has ended (a plan says whether its schedule holds it).
    """

    def __init__(
        self,
        blocks: list[BlockRecord],
        root: BlockRecord,
        host: HostSlots,
        store: Store | None,
        pipeline: UpdatePipeline,
        residency: Residency,
        gradients: Gradients,
        stalls: Stalls,
        device_updates: DeviceUpdates | None,
        *,
        holds: bool,
    ) -> None:
        self.blocks = blocks
        self.root = root
        self.host = host
        self._store = store
        self._pipeline = pipeline
        self._residency = residency
        self._stalls = stalls
        self._device_updates = device_updates
        self.gradients = gradients
        self._in_steps = UseCursor(len(blocks))
        self._in_forwards = _forwards(blocks, len(host), residency.n_slots)
        self._cursor: UseCursor | ForwardCursor = self._in_steps
        self._to_hold = _to_hold(blocks) if holds else None
        self._pending_segments: dict[int, list[Segments]] = {}
        self._root_parts = RootParts(root)
        self._held: BlockRecord | None = None
        self.gate: Callable[[], Ticket | None] = lambda: None
        """What the writes of the next update have to wait for."""
        self.before_update: Callable[[BlockRecord], None] = lambda _: None
        """Returns when what an update overwrites is not needed any more."""

    # ---- parameters that come in -----------------------------------------------------------------------------

    @whole_but_for_waits
    def wait_resident(self, block: BlockRecord) -> None:
        """Block until the parameters are in the slot and no update is changing them."""
        self.host.wait(block)

    def wait_loaded(self, block: BlockRecord) -> None:
        """Block until the device has what compute given so far reads of the host slot, which may then be changed."""
        with self._stalls.waiting("load"):
            block.loaded.wait()

    def _next_host_use(self, block: BlockRecord) -> int:
        """How far ahead the host slot is needed: not for a forward before which the copy on the device is current."""
        backward = self._cursor.uses_until(block.index, "backward")
        if self._computes_with_copy(block):
            return backward
        return min(backward, self._cursor.uses_until(block.index, "forward"))

    def _computes_with_copy(self, block: BlockRecord) -> bool:
        """Whether the copy on the device will be current in forward."""
        return self._residency.holds(block) and not block.grads_waiting

    @whole_but_for_waits
    def fetch(self, block: BlockRecord, *, must: bool) -> bool:
        """Start bringing the parameters in (and the pending update, if any). False when no slot can be spared."""
        if block.state is BlockState.STORED:
            if not self._take_slot(block, must):
                return False
            if block.pending_update:
                self.host.wait_free(block)
                self._submit_update(block, read_param=True)
            else:
                self.host.read(block, urgent=must)
        elif block.pending_update:
            self.wait_resident(block)
            self._submit_update(block, read_param=False)
        return True

    def _take_slot(self, block: BlockRecord, must: bool) -> bool:
        return self.host.take(block, self._next_host_use, self._cursor.kept, must=must)

    @contextlib.contextmanager
    def reading(self, block: BlockRecord) -> Iterator[None]:
        """Inside, the block's host slot holds its parameters, with every decided update made."""
        block.host_in_use += 1
        try:
            self.fetch(block, must=True)
            self.wait_resident(block)
            yield
        finally:
            block.host_in_use -= 1

    # ---- uses ------------------------------------------------------------------------------------------------

    def begin(self, block: BlockRecord, phase: Phase, *, ends_there: bool = False) -> None:
        """Have `block` on the device for `phase`, then look ahead. `ends_there`: no backward follows this forward."""
        if not ends_there:
            self._cursor = self._in_steps
        elif block.index == 0:  # the first, so that it is not a block here and there in a step
            self._cursor = self._in_forwards
        self._cursor.at(Use(block.index, phase))
        block.in_use += 1
        block.host_in_use += 1
        if not self._residency.holds(block):
            self.fetch(block, must=True)
            self._residency.load(block, self._cursor.ranks(), must=True, kept=self._cursor.kept_on_device)
            if block.tickets:
                self.prefetch()
        self.wait_resident(block)  # what it was loaded after has ended, and lets go of its gradients
        block.host_in_use -= not self._residency.needs_host_slot(phase)
        with self._stalls.waiting("load"):
            self._residency.begin_use(block)
        self.prefetch()

    def end(self, block: BlockRecord, phase: Phase) -> None:
        """The block's compute is over; it stays until its slot is wanted."""
        self._residency.end_use(block)
        block.in_use -= 1
        block.host_in_use -= self._residency.needs_host_slot(phase)
        self.prefetch()

    def prefetch(self) -> None:
        """Start fetches, then loads, in the order of next use, for as long as slots can be had.

        Loads start one after the other. While a block is in use that is needed again before another, the other's does
        not begin to wait for an update: that of the first, whose update comes first, would wait behind it.
        """
        for block in self._to_fetch():
            if not self.fetch(block, must=False):
                break
        order, kept, comes_back = self._cursor.ranks(), self._cursor.kept_on_device, False
        for index in self._cursor.upcoming():
            block = self.blocks[index]
            comes_back = comes_back or block.in_use > 0
            if block.in_use or self._residency.holds(block):
                continue
            self.host.settle(block)
            if block.slot is None or block.pending_update or (comes_back and block.tickets):
                return
            if not self._residency.load(block, order, must=False, kept=kept):
                return

    def _to_fetch(self) -> Iterator[BlockRecord]:
        """What a host slot is wanted for, or an update due, in the order of `_next_host_use`."""
        waiting = {
            block.index
            for block in self.blocks
            if (block.state is BlockState.STORED or block.pending_update)
            and not (block.in_use or block.tickets)
        }
        for use in self._cursor.ahead():
            if not waiting:
                return
            block = self.blocks[use.block]
            if use.block not in waiting or (use.phase == "forward" and self._computes_with_copy(block)):
                continue
            waiting.discard(use.block)
            yield block

    def hold_root(self) -> None:
        """The root's parameters are about to be computed with."""
        root = self.root
        if root.pending_update:
            self.fetch(root, must=True)
        if root.device_stale:
            self._residency.load(root, {}, must=True)  # what has been updated, while the rest still is
        self.wait_resident(root)
        self._residency.begin_use(root)

    # ---- updates ---------------------------------------------------------------------------------------------

    def _segments(self, block: BlockRecord, hyper_of: HyperOf) -> list[Segments]:
        segments_of = touched_segments(block, hyper_of)
        if block.is_root:
            block.updated |= block.touched
            self._root_parts.add_rest(segments_of)
        return segments_of

    def update_now(self, block: BlockRecord, hyper_of: HyperOf) -> None:
        """Start the update of a block whose gradients are in its gradient buffer."""
        if block.on_device and self._device_updates is not None:
            self._update_on_device(block, hyper_of, self._device_updates)
            return
        self._update_segments(block, self._segments(block, hyper_of))

    def _update_on_device(self, block: BlockRecord, hyper_of: HyperOf, updates: DeviceUpdates) -> None:
        if block.grads_waiting:  # a step without a backward that ends the accumulation
            self.gradients.begin(block)
        with self._stalls.waiting("save"):
            self.before_update(block)
        updates.update(block, touched_segments(block, hyper_of))
        if block.is_root:
            block.updated |= block.touched
        self.gradients.drop(block)
        block.touched.clear()

    def _update_segments(
        self, block: BlockRecord, segments_of: list[Segments], only: list[list[Range]] | None = None
    ) -> None:
        self._pending_segments[block.index] = segments_of
        self.wait_resident(block)
        parts = self.gradients.hand_over(block, segments_of)
        self._residency.outdated(block, in_part=only is not None)
        read_param = block.state is BlockState.STORED
        if read_param:
            self._take_slot(block, must=True)
            self.host.wait_free(block)
        self._submit_update(block, read_param=read_param, only=only, parts=parts)

    def update_early(self, final: set[int], chunks: list[list[Range]], hyper_of: HyperOf) -> None:
        """Start the update of those `chunks` of the root whose gradients are `final` (runtime/early_root.py).

        The root's last update of the step makes the rest of these parameters' too.
        """
        root = self.root
        later = root.touched - final
        root.touched &= final
        now = self._root_parts.take_early(self._segments(root, hyper_of), chunks)
        self._update_segments(root, now, only=chunks)
        root.touched = later

    def root_is_due(self) -> bool:
        """Whether it has gradients that no update has taken, or chunks that an update has left behind."""
        return bool(self.root.touched) or self._root_parts.is_due

    # [Note: one update is held] In forward each block waits for its own update, so that all have been made when the
    # last blocks run, and storage stands idle until backward gives the first gradients. The last block but one can have
    # its update in that time instead: it is held until backward has ended, where memory has room for its gradients
    # beside those of a block in backward and one in an update. The last block's would leave the same gap a block later.

    def hold(self, block: BlockRecord) -> bool:
        """Whether the update of a block, whose backward has ended, is to wait for the end of backward."""
        if block is not self._to_hold or self._held is not None or not self.gradients.can_hold():
            return False
        self._held = block
        return True

    def _gives_way(self, block: BlockRecord) -> bool:
        """Whether others are updated before the block, whose gradients wait in host memory meanwhile."""
        return not block.is_root and block.index >= len(self.blocks) - self.gradients.n_that_wait()

    def update_held(self, hyper_of: HyperOf) -> None:
        """At the end of backward: start the update that was held, and put those under way in the order of use."""
        held, self._held = self._held, None
        if held is not None:
            self.update_now(held, hyper_of)
        self._pipeline.turn()

    def drop_undone(self) -> None:
        """Forget the gradients of updates that a failed backward has left undone."""
        self._root_parts.forget_rest()
        held, self._held = self._held, None
        if held is not None:
            held.touched.clear()
            self.gradients.drop(held)
        if self._root_parts.is_divided:
            self.root.touched.clear()
            self._update_segments(self.root, [[] for _ in self.root.layout.buffers])

    def update_later(self, block: BlockRecord, hyper_of: HyperOf) -> None:
        """Decide the update now; it runs with the block's next fetch, or at once where nothing is fetched."""
        if block.on_device:
            self.update_now(block, hyper_of)
            return
        self._pending_segments[block.index] = self._segments(block, hyper_of)
        self._residency.outdated(block)
        block.pending_update = True

    def _submit_update(
        self,
        block: BlockRecord,
        *,
        read_param: bool,
        only: list[list[Range]] | None = None,
        parts: list[Part] | None = None,
    ) -> None:
        with self._stalls.waiting("save"):
            self.before_update(block)
        if block.grads_waiting and not read_param:  # computed with since, maybe
            self.wait_loaded(block)
        block.move(BlockState.UPDATING)
        block.pending_update = False
        segments_of = self._pending_segments.pop(block.index)
        gate = self.gate()
        if parts is None:  # the gradients waited
            parts = parts_of(block, segments_of)
            for part in parts:
                part.gate = block.grad_gate
        block.gives_way = self._gives_way(block)
        without_job = set(range(len(block.layout.buffers)))
        for part in parts:
            chunks = self._chunks_to_move(block, part, only)
            if not chunks or not needs_job(block, part):
                continue
            job = make_job(
                block, part, read_param=read_param, only=chunks, write_gate=gate, store=self._store
            )
            block.tickets.append(self._pipeline.submit(job))
            without_job.discard(part.position)
            if block.is_root:
                slot_bytes = part.slot_bytes(block.layout.buffers[part.position])
                block.arriving.append((*slot_bytes, block.tickets[-1]))
        if read_param and self._store is not None:
            for position in sorted(without_job):
                buffer = block.layout.buffers[position]
                address, offset = block.plane(buffer).data_ptr(), param_offset(block, position)
                block.tickets.append(self._store.engine.read(address, buffer.plane_nbytes, offset))
        if block.sides is not None and only is None:
            block.sides.generation += 1
            block.turn(block.sides.other)
            if block.is_root:
                self._root_parts.turned()
        block.touched.clear()
        block.grads_waiting = False
        if not block.tickets:  # as where the root's early update has moved every chunk
            self.host.complete(block, "update")

    def _chunks_to_move(self, block: BlockRecord, part: Part, only: list[list[Range]] | None) -> list[Range]:
        """Of a part, of which those without gradients move only where there are two sides."""
        if block.sides is None or not block.is_root:
            return [(part.start, part.stop)]
        left = self._root_parts.chunks_left(part.position) if only is None else only[part.position]
        return part.within(left)

    def flush(self) -> None:
        """Make every decided update and wait for everything in flight."""
        for block in [*self.blocks, self.root]:
            if block.pending_update:
                self.wait_resident(block)
                self.fetch(block, must=True)
                self.wait_resident(block)
        for block in [*self.blocks, self.root]:
            self.wait_resident(block)
        if self._device_updates is not None:
            self._device_updates.finish()

    def drop_copies(self, block: BlockRecord) -> None:
        """The block's bytes in the store, or in the host slot that is its home, are about to be replaced."""
        self.wait_resident(block)
        self.wait_loaded(block)
        self._residency.outdated(block)
        if block.param_offset >= 0 and block.slot is not None:
            self.host.evict(block)

    def rewind(self) -> None:
        """A step has ended: the next use is forward of the first block."""
        self._cursor = self._in_steps
        self._in_steps.rewind()


def _forwards(blocks: list[BlockRecord], n_slots: int, n_device_slots: int) -> ForwardCursor:
    """Of blocks that share so many slots."""
    loaded = [block.index for block in blocks if not block.on_device] if n_device_slots else []
    on_device = kept_in_forwards(loaded, n_device_slots)
    fetched = [block.index for block in blocks if block.param_offset >= 0 and block.index not in on_device]
    return ForwardCursor(len(blocks), kept_in_forwards(fetched, n_slots), on_device)


def _to_hold(blocks: list[BlockRecord]) -> BlockRecord | None:
    """The last block but one, where its parameters have memory of their own and storage has its state."""
    if len(blocks) < 4:
        return None
    block = blocks[-2]
    on_storage = any(extents.offset >= 0 for extents in block.states.values())
    return block if block.param_offset < 0 and on_storage else None
