"""Which blocks' parameters the device can compute with: loads copies into device slots, and drops them.

`SharedResidency` is for a device that computes on the host's slots; `CopiedResidency` for one with memory of its own.
"""

from __future__ import annotations

from typing import Protocol

import torch

from offload.errors import BudgetError
from offload.schedule.use_order import Phase
from offload.stores.block_store import BlockRecord, DeviceSlot
from offload.tiers.device import PAST, DeviceTier, Event
from offload.transfer.copies import Copies


class Residency(Protocol):
    """What the scheduler needs of either."""

    def holds(self, block: BlockRecord) -> bool: ...
    def needs_host_slot(self, phase: Phase) -> bool: ...
    def load(
        self, block: BlockRecord, order: dict[int, int], *, must: bool, kept: frozenset[int] = frozenset()
    ) -> bool: ...
    @property
    def n_slots(self) -> int: ...
    def begin_use(self, block: BlockRecord) -> None: ...
    def end_use(self, block: BlockRecord) -> None: ...
    def outdated(self, block: BlockRecord, *, in_part: bool = False) -> None: ...
    def host_slot_leaves(self, block: BlockRecord) -> Event: ...


class SharedResidency:
    """The host slot is the device's: loading binds the parameters to it."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device
        self._bound: set[int] = set()

    def holds(self, block: BlockRecord) -> bool:
        """Never more than the host slot does."""
        return False

    def needs_host_slot(self, phase: Phase) -> bool:
        """It is what is computed with."""
        return True

    @property
    def n_slots(self) -> int:
        """Of its own."""
        return 0

    def load(
        self, block: BlockRecord, order: dict[int, int], *, must: bool, kept: frozenset[int] = frozenset()
    ) -> bool:
        """Bind, when it is about to be used."""
        if must and block.index not in self._bound:
            block.bind()
            self._bound.add(block.index)
            block.device_stale = False
        return must

    def begin_use(self, block: BlockRecord) -> None:
        """Nothing to wait for."""

    def end_use(self, block: BlockRecord) -> None:
        """Nothing to record."""

    def outdated(self, block: BlockRecord, *, in_part: bool = False) -> None:
        """An update changes the slot in place, and a parameter that is read meanwhile must not show half of it."""
        if in_part:
            return
        self._bound.discard(block.index)
        block.unbind(self._torch_device)
        block.device_stale = block.is_root

    def host_slot_leaves(self, block: BlockRecord) -> Event:
        """What computes with it now would read another block."""
        self._bound.discard(block.index)
        block.unbind(self._torch_device)
        return PAST


class CopiedResidency:
    """Device slots of one size, each owned by one block from the start of its load until it is dropped."""

    def __init__(self, slots: list[DeviceSlot], device: DeviceTier, copies: Copies) -> None:
        self._slots = slots
        self._device = device
        self._copies = copies

    def holds(self, block: BlockRecord) -> bool:
        """Whether a current copy is on the device, or on its way; or the parameters themselves are there."""
        return block.on_device or (block.device_slot is not None and not block.device_stale)

    def needs_host_slot(self, phase: Phase) -> bool:
        """After backward the update runs in it; forward needs no more than the copy."""
        return phase == "backward"

    @property
    def n_slots(self) -> int:
        """How many blocks can be on the device at once."""
        return len(self._slots)

    def load(
        self, block: BlockRecord, order: dict[int, int], *, must: bool, kept: frozenset[int] = frozenset()
    ) -> bool:
        """Start copying the parameters from the host slot, once what is in flight for it has ended.

        False when no slot can be spared; those of `kept` blocks are not unless one `must`.
        """
        if self.holds(block) or block.slot is None:
            return self.holds(block)
        if block.device_slot is None:
            slot = self._free_slot(block, order, must, kept)
            if slot is None:
                return False
            block.device_slot, slot.owner = slot, block
        nbytes = block.layout.slot_nbytes
        target, source = block.device_slot.bytes_tensor[:nbytes], block.slot.bytes_tensor[:nbytes]
        after = [block.device_slot.free_after]
        if not block.loaded.done():  # another thread may still have to start it
            after.append(block.loaded)
        name = f"load {block.label}"
        if block.arriving:
            block.loaded = self._copies.h2d_in_parts(block.arriving, name, target, source, after)
        else:
            block.loaded = self._copies.h2d_when(block.tickets, name, target, source, after)
        block.device_slot.free_after = block.loaded  # for when it is given up before it was used
        block.device_stale = False
        return True

    def _free_slot(
        self, wanted_by: BlockRecord, order: dict[int, int], must: bool, kept: frozenset[int]
    ) -> DeviceSlot | None:
        held: list[tuple[int, DeviceSlot, BlockRecord]] = []
        for slot in self._slots:
            if slot.owner is None:
                return slot
            if not slot.owner.in_use and slot.owner.index not in kept:
                held.append((order.get(slot.owner.index, len(order)), slot, slot.owner))
        rank, chosen, victim = max(held, key=lambda item: item[0], default=(0, None, None))
        if chosen is None or victim is None:
            if must and kept:
                return self._free_slot(wanted_by, order, must, frozenset())
            if must:
                raise BudgetError("every device slot is in use at once; raise device_memory")
            return None
        if not must and rank <= order.get(wanted_by.index, 0):
            return None
        self.outdated(victim)
        return chosen

    def begin_use(self, block: BlockRecord) -> None:
        """Compute given from now on sees the loaded parameters; whoever reads one earlier sees none of them."""
        self._device.compute_waits(block.loaded)
        if not block.is_bound:
            block.bind()

    def end_use(self, block: BlockRecord) -> None:
        """The slot may be rewritten after the compute given so far."""
        if block.device_slot is not None:
            block.device_slot.free_after = self._device.mark()

    def outdated(self, block: BlockRecord, *, in_part: bool = False) -> None:
        """The copy is of no more use: give the slot up; the root keeps its own and is loaded again.

        `in_part`: the rest of it is still computed with.
        """
        if block.device_slot is None:
            return
        if block.is_root:
            block.device_stale = True
            block.device_slot.free_after = self._device.mark()
            if not in_part:
                block.unbind(self._device.torch_device)
            return
        if block.in_use:
            block.device_slot.free_after = self._device.mark()
        block.device_slot.owner, block.device_slot = None, None
        block.unbind(self._device.torch_device)

    def host_slot_leaves(self, block: BlockRecord) -> Event:
        """When it may be rewritten: the copy from it has to have ended."""
        return block.loaded
