"""Host slots: what is read into them from storage, who owns them, and who has to give one up.

[Note: one owner per slot] A slot belongs to one block from the start of its fetch until its eviction. Eviction is
lazy and picks the block whose next use is farthest, so that blocks near each turn (forward to backward, and
backward to the next forward) stay and are not read again. A block with an update in flight keeps its slot: the
update changes the parameters in place and writes them to storage, after which the copy is clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from offload.errors import BudgetError, CorruptError
from offload.runtime.device_residency import Residency
from offload.stores.block_store import BlockRecord, Slot
from offload.stores.sides import Sides
from offload.telemetry import SpanLog, Stalls
from offload.tiers.storage import Store
from offload.transfer.copies import Copies
from offload.types import BlockState

NextUse = Callable[[BlockRecord], int]
"""In how many uses of blocks the host slot of one is needed."""


class HostSlots:
    """The slots, and what is in flight for the blocks that own them. `updated` is told when an update has ended."""

    def __init__(
        self,
        slots: list[Slot],
        store: Store | None,
        residency: Residency,
        copies: Copies,
        stalls: Stalls,
        spans: SpanLog,
    ) -> None:
        self._slots = slots
        self._store = store
        self._residency = residency
        self._copies = copies
        self._stalls = stalls
        self._spans = spans
        self.updated: Callable[[BlockRecord], None] = lambda _: None
        self.check_commit: Callable[[], None] = lambda: None
        """Raises when that has failed: an update that waited for it only repeats so."""
        self.verify_s = 0.0
        """Spent in comparing fetched parameters with their checksums."""

    def __len__(self) -> int:
        return len(self._slots)

    # ---- what is in flight -----------------------------------------------------------------------------------

    def read(self, block: BlockRecord, *, urgent: bool) -> None:
        """Start reading the block's parameters into its slot."""
        if self._store is None or block.slot is None:
            raise BudgetError(f"block {block.name} is stored, but there is no storage")
        block.move(BlockState.FETCHING)
        slot, nbytes = block.slot, block.layout.slot_nbytes
        gate = None if slot.free_after.done() else self._copies.gate(slot.free_after)
        ticket = self._store.engine.read(
            slot.bytes_tensor.data_ptr(), nbytes, block.param_offset, urgent=urgent, after=gate
        )
        self._spans.add_work("read", f"fetch {block.label}", ticket)
        block.tickets = [ticket]

    def settle(self, block: BlockRecord) -> None:
        """Complete a fetch or update that has ended, without waiting."""
        if block.tickets and all(ticket.done() for ticket in block.tickets):
            self.complete(block, "fetch")

    def wait(self, block: BlockRecord) -> None:
        """Until the parameters are in the slot and no update is changing them."""
        if block.tickets:
            self.complete(block, "update" if block.state is BlockState.UPDATING else "fetch")

    def complete(self, block: BlockRecord, cause: str) -> None:
        """Wait for the fetch or update of `block`; `cause` is the stall's."""
        with self._stalls.waiting(cause):
            try:
                for ticket in block.tickets:
                    ticket.wait()  # a failed one stays, and fails every later use of the block too
            except OSError:
                self.check_commit()
                raise
        if block.state is BlockState.FETCHING and block.sides is not None and block.sides.verifies:
            self._verify(block, block.sides)
        block.tickets, block.arriving = [], []
        updated = block.state is BlockState.UPDATING
        if block.state is not BlockState.RESIDENT:
            block.move(BlockState.RESIDENT)
        if updated:
            self.updated(block)

    def _verify(self, block: BlockRecord, sides: Sides) -> None:
        """Raise CorruptError when the parameters that were read are not those that were written."""
        begin_s = time.perf_counter()
        for position, buffer in enumerate(block.layout.buffers):
            wrong = sides.wrong_chunk(position, buffer, block.plane(buffer).data_ptr())
            if wrong is not None and self._store is not None:
                raise CorruptError(
                    f"store {self._store.paths[0]}: chunk {wrong} of the parameters of block {block.name} has another "
                    "checksum than was written: the drive or another program has changed it; resume from the last "
                    "committed step"
                )
        self.verify_s += time.perf_counter() - begin_s

    # ---- who owns them ---------------------------------------------------------------------------------------

    def take(self, block: BlockRecord, next_use: NextUse, kept: Container[int], *, must: bool) -> bool:
        """A slot for `block`. False when none can be spared: never with `must`, which takes one of a `kept` block too,
        and waits. Its last owner may still be read from: see `wait_free`."""
        slot = block.slot or self._free(
            block, next_use, kept, must=must
        )  # it has one where a wait was left after that
        if slot is not None:
            block.slot, slot.owner = slot, block
        return slot is not None

    def _free(
        self, wanted_by: BlockRecord, next_use: NextUse, kept: Container[int], *, must: bool
    ) -> Slot | None:
        for slot in self._slots:
            if slot.owner is None:
                return slot
        for held in self._slots:
            self.settle(held.owner)  # type: ignore[arg-type]  # every slot has an owner here
        owners = [s.owner for s in self._slots if s.owner is not None and not s.owner.host_in_use]
        clean = [o for o in owners if o.state is BlockState.RESIDENT]
        if wanted_by.pending_update and not must:  # an update cannot be told to begin after a copy
            clean = [o for o in clean if o.loaded.done()]
        spared = [o for o in clean if o.index not in kept]
        victim = max(spared or (clean if must else []), key=next_use, default=None)
        if victim and (must or next_use(victim) > next_use(wanted_by)):
            return self.evict(victim)
        if not must:
            return None
        busy = [o for o in owners if o.tickets]
        if not busy:
            raise BudgetError("every block slot is in use at once; raise device_memory or prefetch_blocks")
        self.complete(busy[0], "slot")
        return self._free(wanted_by, next_use, kept, must=must)

    def wait_free(self, block: BlockRecord) -> None:
        """Until nothing of its last owner is read in the block's slot."""
        if block.slot is not None and not block.slot.free_after.done():
            with self._stalls.waiting("slot"):
                block.slot.free_after.wait()

    def evict(self, block: BlockRecord) -> Slot:
        """Take the slot from `block`, whose parameters are in the store too."""
        slot = block.slot
        if slot is None:
            raise BudgetError(f"block {block.name} has no slot to give up")
        slot.free_after = self._residency.host_slot_leaves(block)
        block.move(BlockState.STORED)
        block.slot, slot.owner = None, None
        return slot
