"""Activation checkpoints (block inputs) between forward and backward: on the device, in host memory or on storage.

Backward wants them in the reverse order of forward, so bringing some back starts bringing as many bytes of those
before them: two micro-batches of tensors on the device, one that computes and one in transfer, as the planner counts.

[Note: device memory of what leaves] A tensor that is copied out is held until its copy has ended, or until compute that
is given later has been ordered after the copy: then the allocator may hand its memory to that compute. The launching
thread never waits for the copy. It may run far ahead of the device, so it orders instead of looking whether a copy has
ended: otherwise it would hold what all of forward swaps out.

[Note: what goes beside an input] While backward is at a block, the gradients of its output and of its input are on the
device, of the whole batch, and so may be its input, which has come back, and the next one: four tensors as large as an
input, however small the micro-batches. Where nobody has planned, an input stays on the device only as long as there is
room for them, so that a large batch does not fill it up.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from offload.cut_short import MayBeCutShort, whole, whole_but_for_waits
from offload.errors import BudgetError, UsageError
from offload.telemetry import SpanLog, Stalls
from offload.tiers.device import PAST, DeviceTier, Event, Pin
from offload.tiers.host import HostArena, Lease, LeaseRing, Spare
from offload.tiers.storage import Store
from offload.transfer.copies import Copies
from offload.transfer.io_engine import Ticket
from offload.types import PAGE_NBYTES, round_up

Tier = Literal["device", "host", "storage"]

_LOCKED_NBYTES = 64 << 20
"""Host memory of planes is page-locked in pieces of at least so much: a registration costs as much as many copies."""

BESIDE_AN_INPUT = 4
"""See [Note: what goes beside an input]."""


@dataclass(eq=False, slots=True)
class _Held:
    """One activation that waits for backward. `kept` is it, or what has come back of it."""

    tier: Tier
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    label: str
    kept: torch.Tensor | None = None
    plane: torch.Tensor | None = None
    """Its host memory, for tier host on a device of its own."""
    source: torch.Tensor | None = None
    """The device tensor that is being copied out. See [Note: device memory of what leaves]."""
    copied: Event = PAST
    offset: int = -1
    written: list[Ticket] = field(default_factory=list)
    read_nbytes: int = 0
    """How far reads from storage have been issued."""
    allocated: Event = PAST
    """The end of the compute before `kept` was allocated for what comes back, which may have had its memory."""
    arrived: Event = PAST


class Activation:
    """What autograd holds in place of the tensor. Dropping it without `swap_in` frees the bytes too."""

    def __init__(self, held: _Held) -> None:
        self.held = held


class ActivationStore(MayBeCutShort):
    """Holds activations within `device_nbytes` and `spare_host`, further ones on `store`.

    `staging` is host memory through which bytes pass to storage and back. `tier` fixes where activations go; None
    takes the first of device, host and storage that has room. Raises BudgetError when none has; it tells what inputs of
    `n_blocks` take.
    """

    def __init__(
        self,
        device: DeviceTier,
        copies: Copies,
        store: Store | None,
        stalls: Stalls,
        spans: SpanLog,
        *,
        tier: Tier | None,
        device_nbytes: int,
        spare_host: Spare,
        staging: torch.Tensor,
        pin: Pin = "auto",
        n_blocks: int = 0,
    ) -> None:
        self._device = device
        self._copies = copies
        self._store = store
        self._stalls = stalls
        self._spans = spans
        self._tier = tier
        self._staying: tuple[Tier, ...] = ("device", "host") if device.shares_host else ("device",)
        """Tiers whose memory the device computes in."""
        self._left: dict[Tier, Spare] = {"device": Spare(device_nbytes), "host": spare_host}
        self._pin = pin
        self._n_blocks = n_blocks
        self._staging = LeaseRing(staging) if staging.numel() >= 2 * PAGE_NBYTES else None
        self._order: dict[_Held, None] = {}
        """In the order in which forward gave them."""
        self._leaving: dict[_Held, None] = {}
        """Those with a `source`, in the order in which they were given."""
        self._reading: list[_Held] = []
        """Those of which parts are still to be read from storage, in the order in which they get staging."""
        self._returning: deque[tuple[Lease, Event]] = deque()
        """Staging through which parts come back, and the end of the copy of each to the device, in that order."""
        self._dropped: deque[_Held] = deque()
        """Given up while they were being copied."""
        self._ahead_nbytes = 0
        """The most that one `swap_in` has asked for."""
        self._free_extents: dict[int, list[int]] = {}
        self._free_planes: dict[int, deque[tuple[torch.Tensor, Event]]] = {}
        """By bytes: host memory, and the end of the copy that last read it."""
        self._region: HostArena | None = None
        """Where planes are taken from."""
        self._locked_nbytes = 0
        """Of the region, from its first byte on, what has been page-locked."""
        self.nbytes_by_tier: dict[Tier, int] = {"device": 0, "host": 0, "storage": 0}
        """Bytes ever put into each tier."""

    # ---- away ------------------------------------------------------------------------------------------------

    @whole_but_for_waits
    def swap_out(self, tensor: torch.Tensor, tier: Tier | None = None, label: str = "") -> Activation:
        """Take `tensor` until `swap_in`; the caller drops it at once. It must be dense, with strides in any order.

        `tier` is where this one goes; without it, the first that has room. `label` is for its spans. Raises
        BudgetError when none has.
        """
        self._reap()
        return self._take(tensor, self._tier_for(tensor.nbytes, tier or self._tier), label)

    @whole_but_for_waits
    def swap_out_where_room(self, tensor: torch.Tensor, tier: Tier, label: str = "") -> Activation | None:
        """The same; None, and nothing done, where `tier` has no room for it."""
        return self._take(tensor, tier, label) if self.has_room(tensor.nbytes, tier) else None

    def _take(self, tensor: torch.Tensor, tier: Tier, label: str) -> Activation:
        nbytes = tensor.nbytes
        held = _Held(tier, nbytes, tuple(tensor.shape), tensor.stride(), tensor.dtype, label)
        self.nbytes_by_tier[held.tier] += nbytes
        if held.tier == "storage":
            self._write(held, tensor)
        elif held.tier == "host" and not self._device.shares_host:
            self._copy_out(held, tensor)
        else:
            self._left[held.tier].nbytes -= nbytes
            held.kept = tensor
        self._order[held] = None
        activation = Activation(held)
        # no __del__: torch.compile around a model makes twins of what is made inside
        weakref.finalize(activation, self._forget, held)
        return activation

    @whole
    def order_after_left(self, but_of: str | None = None) -> None:
        """Compute given from now on comes after what is on its way out of the device, and may use its memory: all of it
        but what has the label `but_of`. So no more is in transfer than that and what is swapped out next."""
        self._reap()
        with self._stalls.waiting("activation"):
            for held in list(self._leaving):
                if held.label != but_of:
                    self._device.compute_waits(held.copied)
                    held.source = None
                    self._leaving.pop(held, None)

    def has_room(self, nbytes: int, tier: Tier) -> bool:
        """Whether a tensor of `nbytes` may go to `tier` now."""
        self._reap()
        if tier == "storage":
            return self._store is not None and self._staging is not None
        if tier == "host" and not self._device.shares_host:  # planes of whole pages, used again
            fits = self._left[tier].nbytes >= round_up(nbytes, PAGE_NBYTES)
            return fits or bool(self._free_planes.get(nbytes))
        return self._left[tier].nbytes >= nbytes

    def left_nbytes(self, tier: Literal["device", "host"]) -> int:
        """What may still go to `tier`, of any kind; see `again_nbytes`."""
        self._reap()
        return self._left[tier].nbytes

    def beside_nbytes(self, nbytes: int) -> int:
        """Device memory that has to be left beside an input of `nbytes`. See [Note: what goes beside an input]."""
        return 0 if self._device.shares_host else BESIDE_AN_INPUT * nbytes

    def again_nbytes(self, nbytes: int) -> int:
        """Host memory that tensors of `nbytes` have had and only such can have again."""
        return len(self._free_planes.get(nbytes, ())) * round_up(nbytes, PAGE_NBYTES)

    def allow_on_device(self, nbytes: int) -> None:
        """So many bytes more: a plan has counted what computes beside them."""
        self._left["device"].nbytes += nbytes

    def _tier_for(self, nbytes: int, fixed: Tier | None) -> Tier:
        if fixed:
            rooms: list[tuple[Tier, int]] = [(fixed, nbytes)]
        else:
            with_others_nbytes = nbytes + self.beside_nbytes(nbytes)
            rooms = [
                ("device", with_others_nbytes),
                ("host", nbytes),
                ("storage", nbytes),
                ("device", nbytes),
            ]
        for tier, needed_nbytes in rooms:
            if self.has_room(needed_nbytes, tier):
                return tier
        raise BudgetError(self._no_room(nbytes, fixed))

    def _no_room(self, nbytes: int, fixed: Tier | None) -> str:
        """That an input has none, and what to do."""
        device, host = (f"{self._left[tier].nbytes} bytes of {tier}_memory" for tier in ("device", "host"))
        storage = "no storage" if self._store is None else "too little host_memory for staging to storage"
        left = {"device": device, "host": host, "storage": storage}
        if fixed:
            memory = "host" if fixed == "storage" else fixed
            found, remedy = left[fixed], f"raise {memory}_memory, leave activations at 'auto'"
        else:
            found, remedy = ", ".join(left.values()), "raise one of them"
        if self._store is None and fixed != "device":
            remedy += ", give storage=[directory]"
        together = f", those of {self._n_blocks} blocks {self._n_blocks * nbytes}" if self._n_blocks else ""
        return (
            f"the input of a block ({nbytes} bytes{together}) has to wait for backward and no room is left for it: "
            f"{found}; {remedy}, or use a smaller batch"
        )

    def _copy_out(self, held: _Held, tensor: torch.Tensor) -> None:
        free = self._free_planes.setdefault(held.nbytes, deque())
        read: Event = PAST
        if free:
            held.plane, read = free.popleft()
        else:
            held.plane = self._plane(held.nbytes)
        held.copied = self._copies.d2h(f"swap_out {held.label}", held.plane, _as_bytes(tensor), [read])
        held.source, self._leaving[held] = tensor, None

    def _plane(self, nbytes: int) -> torch.Tensor:
        """Host memory of an activation, counted in whole pages.

        Planes lie end to end in one region as large as all that the budget has left. Its pages become present as planes
        come to lie in them, and are page-locked a little ahead of that, never beyond the region.
        """
        if self._region is None or self._region.left_nbytes < nbytes:
            self._region, self._locked_nbytes = self._new_region(nbytes), 0
        region, paged_nbytes = self._region, round_up(nbytes, PAGE_NBYTES)
        missing_nbytes = region.nbytes - region.left_nbytes + paged_nbytes - self._locked_nbytes
        if missing_nbytes > 0:
            piece_nbytes = min(max(missing_nbytes, _LOCKED_NBYTES), region.nbytes - self._locked_nbytes)
            self._device.page_lock(region.address + self._locked_nbytes, piece_nbytes, self._pin)
            self._locked_nbytes += piece_nbytes
        self._left["host"].nbytes -= paged_nbytes
        return region.take(nbytes)

    def _new_region(self, nbytes: int) -> HostArena:
        """All that is left; for one plane of `nbytes` where the system gives no addresses ahead of their use."""
        try:
            return HostArena(self._left["host"].nbytes // PAGE_NBYTES * PAGE_NBYTES)
        except OSError:
            return HostArena(nbytes)

    def _write(self, held: _Held, tensor: torch.Tensor) -> None:
        store, staging = self._storage()
        held.offset = self._extent(store, held.nbytes)
        flat = _as_bytes(tensor)
        for start in range(0, held.nbytes, staging.piece_nbytes_max):
            part = flat[start : start + staging.piece_nbytes_max]
            self._give_back_staging()
            while self._returning and not staging.has_room(part.numel()):
                self._wait_for_staging()
            with self._stalls.waiting("activation"):
                lease = staging.lease(part.numel())
            gate = None
            if self._device.shares_host:
                lease.bytes_tensor[: part.numel()].copy_(part)
            else:
                held.copied = self._copies.d2h(
                    f"swap_out {held.label}", lease.bytes_tensor[: part.numel()], part
                )
                gate = self._copies.gate(held.copied)
                held.source, self._leaving[held] = tensor, None
            address, nbytes = lease.bytes_tensor.data_ptr(), round_up(part.numel(), PAGE_NBYTES)
            ticket = store.engine.write(address, nbytes, held.offset + start, after=gate)
            self._spans.add_work("write", f"spill {held.label}", ticket)
            held.written.append(ticket)
            lease.release_after(ticket.wait)

    def _storage(self) -> tuple[Store, LeaseRing]:
        if self._store is None or self._staging is None:
            raise UsageError("activations='storage' needs storage=[directory] and host_memory for staging")
        return self._store, self._staging

    def _extent(self, store: Store, nbytes: int) -> int:
        free = self._free_extents.setdefault(nbytes, [])
        if free:
            return free.pop()
        store.grow(round_up(nbytes, PAGE_NBYTES))
        return store.allocate(nbytes)

    # ---- back ------------------------------------------------------------------------------------------------

    @whole
    def swap_in(self, activations: Sequence[Activation]) -> list[torch.Tensor]:
        """The tensors again, on the device. Those that forward gave before them start to come back too."""
        self._reap()
        wanted = [activation.held for activation in activations]
        if any(held not in self._order for held in wanted):
            raise UsageError("backward ran twice through a block whose input was swapped out")
        for held in wanted:
            del self._order[held]
            self._start(held)
        for held in wanted:
            self._finish_reads(held)
        with self._stalls.waiting("activation"):
            for held in wanted:
                self._device.compute_waits(held.arrived)
        tensors = []
        for held in wanted:
            if held.kept is None:
                raise UsageError("an activation has been lost; please report this")
            tensors.append(held.kept)
            self._release(held)
        asked_nbytes = sum(held.nbytes for held in wanted if held.tier not in self._staying)
        self._ahead_nbytes = max(self._ahead_nbytes, asked_nbytes)
        self._start_ahead(self._ahead_nbytes)
        return tensors

    @whole
    def left_block(self) -> None:
        """Backward has left a block: until it takes the next there is room for two micro-batches that come back, ahead
        of the parameters that are loaded in its place."""
        if not self._device.shares_host:
            self._start_ahead(2 * self._ahead_nbytes)

    def _start_ahead(self, nbytes: int) -> None:
        """Begin to bring back what backward will want next, until `nbytes` are on their way."""
        self._give_back_staging()
        for held in reversed(list(self._order)):  # a copy: `_forget` may come at any moment
            if nbytes <= 0:
                return
            if held.tier in self._staying:
                continue
            if held.kept is None:
                is_written = all(ticket.done() for ticket in held.written)
                has_staging = self._staging is not None and self._staging.has_room(self._piece_nbytes(held))
                if held.tier == "storage" and not (is_written and has_staging):
                    return
                self._start(held)
            nbytes -= held.nbytes

    def _start(self, held: _Held) -> None:
        """Begin to bring it back to the device; does nothing when begun."""
        if held.kept is not None:
            return
        device = self._device.torch_device
        held.kept = torch.empty_strided(held.shape, held.stride, dtype=held.dtype, device=device)
        held.allocated = self._device.mark()
        if held.plane is not None:
            after = [held.copied, held.allocated]
            held.arrived = self._copies.h2d(f"swap_in {held.label}", _as_bytes(held.kept), held.plane, after)
            return
        with self._stalls.waiting("activation"):
            for ticket in held.written:
                ticket.wait()  # a read may not overtake the write of the same extent
        self._reading.append(held)
        self._issue_reads()

    def _piece_nbytes(self, held: _Held) -> int:
        """Of its next read."""
        _, staging = self._storage()
        return min(held.nbytes - held.read_nbytes, staging.piece_nbytes_max)

    def _issue_reads(self) -> None:
        """As many pieces as there is staging for, in the order in which they were begun."""
        store, staging = self._storage()
        self._give_back_staging()
        while self._reading:
            held = self._reading[0]
            while held.kept is not None and held.read_nbytes < held.nbytes:
                nbytes = self._piece_nbytes(held)
                if not staging.has_room(nbytes):
                    return
                part = _as_bytes(held.kept)[held.read_nbytes : held.read_nbytes + nbytes]
                lease = staging.lease(nbytes)
                address, nbytes = lease.bytes_tensor.data_ptr(), round_up(part.numel(), PAGE_NBYTES)
                ticket = store.engine.read(address, nbytes, held.offset + held.read_nbytes, urgent=True)
                self._spans.add_work("read", f"read_back {held.label}", ticket)
                source = lease.bytes_tensor[: part.numel()]
                after = [held.allocated, held.arrived]  # so that the last part's failure is any part's
                held.arrived = self._copies.h2d_when(
                    [ticket], f"swap_in {held.label}", part, source, after, returns=True
                )
                self._returning.append((lease, held.arrived))
                held.read_nbytes += part.numel()
            self._reading.pop(0)

    def _finish_reads(self, held: _Held) -> None:
        """All of it is on its way to the device; then what comes next has the staging."""
        while held in self._reading:
            self._issue_reads()
            if held in self._reading:
                self._wait_for_staging()
        if self._reading:
            self._issue_reads()

    def _wait_for_staging(self) -> None:
        """Until the part that has its staging for longest is on the device."""
        with self._stalls.waiting("activation"):
            self._returning[0][1].wait()
        self._give_back_staging()

    def _give_back_staging(self) -> None:
        """Let others have what has been copied to the device."""
        while self._returning and self._returning[0][1].done():
            lease, arrived = self._returning[0]
            arrived.wait()  # a failure: of this tensor or of one that backward does not want yet
            self._returning.popleft()
            lease.release_after(arrived.wait)

    # ---- letting go ------------------------------------------------------------------------------------------

    def _release(self, held: _Held) -> None:
        if held in self._reading:
            self._reading.remove(held)
        if held.tier == "storage":
            self._free_extents[held.nbytes].append(held.offset)
        elif held.plane is not None:
            self._free_planes[held.nbytes].append((held.plane, held.arrived))
        else:
            self._left[held.tier].nbytes += held.nbytes
        held.source = held.kept = held.plane = None
        self._leaving.pop(held, None)

    def _forget(self, held: _Held) -> None:
        """Autograd dropped it: no backward will come for it. In whatever thread, so that nothing may wait here."""
        if held not in self._order:
            return
        self._order.pop(held, None)
        if held.copied.done() and held.arrived.done() and all(ticket.done() for ticket in held.written):
            self._release(held)
        else:
            self._dropped.append(held)

    def _reap(self) -> None:
        """Let go of what was dropped while it was being copied: compute given from now on may use its memory."""
        while self._dropped:
            held = self._dropped.popleft()
            for ticket in held.written:  # the next owner of its place on storage may write there at once
                ticket.wait()
            self._device.compute_waits(held.copied)
            self._device.compute_waits(held.arrived)
            self._release(held)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as it lies there."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
