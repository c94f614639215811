"""Emits the operations of a plan: what each waits for, and how parameters come, are updated and leave.

What is carried from operation to operation, and from step to step, is here; `unroll.py` says what a step does with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from offload.planner.memory import is_traced
from offload.planner.placement import HOST_SLOTS
from offload.planner.plan import INPUT, Plan
from offload.planner.states_on_device import streamed_by
from offload.planner.workload import Workload
from offload.schedule.operations import Kind, Lane, Operation
from offload.types import PAGE_NBYTES, round_up

Index = int | None

PIECES = "pieces"
"""Of updates, each in one of `Plan.update_buffers` buffers: counted as the bytes of a tier are."""
ONE_PIECE = ((PIECES, 1),)


class Emitter:
    """The operations so far, and what those that use the same slots, buffers and staging have to wait for."""

    def __init__(
        self,
        plan: Plan,
        workload: Workload,
        *,
        shares_host: bool,
        launch_overhead_s: float,
        device_update_s: float = 0.0,
    ) -> None:
        self.plan = plan
        self.workload = streamed_by(plan, workload)
        self.device_update_s = device_update_s
        """All updates of what stays on the device."""
        self.shares_host = shares_host
        self.launch_overhead_s = launch_overhead_s
        self.operations: list[Operation] = []
        self.n_blocks = len(workload.blocks)
        self.traced = shares_host and is_traced(self.workload)
        """What is alive is known, and nothing of it waits for a bus."""
        self.samples = plan.batch_samples / plan.micro_batches
        self.deferred = set(plan.deferred_blocks)
        self.held = set(plan.held_blocks)
        self.step = 0
        state = plan.state_format
        self.update_dram = (
            2 * state.state_nbytes + state.param_nbytes * (1 + state.update_reads_param) + state.grad_nbytes
        )
        # Carried from operation to operation, and from step to step.
        self.free_slots: deque[Index] = deque([None] * plan.n_slots)
        self.resident: set[int] = set()
        self.updated: dict[int | None, Index] = {}
        """Per block: what its next fetch waits for."""
        self.grads_ready: dict[int, Index] = {}
        """Per deferred block: where its gradients have arrived."""
        n_buffers = plan.n_grad_buffers * plan.grads_per_buffer
        self.grad_buffers: deque[tuple[Index, ...]] = deque([(None,)] * n_buffers)
        self.only_buffer = n_buffers == 1 and not shares_host
        """Gradients leave it in `GRAD_PARTS` parts, each as soon as it is there."""
        self.grads_left: list[Index] = []
        """Of the block whose gradients leave so: their copies."""
        n_landing = 2 * plan.grads_per_buffer + (0 if shares_host else len(plan.held_blocks))
        self.grad_landing: deque[Index] = deque([None] * n_landing)
        self.out_window: deque[Index] = deque([None] * 2)
        self.spill_window: deque[Index] = deque([None] * 2)
        self.in_window: deque[Index] = deque([None] * 2)
        self.host_slots: deque[Index] = deque([None] * HOST_SLOTS)
        self.in_host: set[int] = set()
        """Blocks whose parameters, which are on storage, are in a host slot."""
        self.fetched: dict[int, tuple[Index, ...]] = {}
        """Per block: when they are in its host slot, for the update."""
        self.loaded: dict[int, tuple[Index, ...]] = {}
        self.at_start: set[int] = set()
        """Blocks whose parameters stay in their slots from backward to the next forward."""
        self.stored: dict[tuple[int, int], Index] = {}
        """Per block and micro-batch: its swap-out or spill."""
        self.boundary: dict[tuple[int, int], Index] = {}
        """Per block and micro-batch: its gradient towards the block before, where that leaves the device."""
        self.to_swap_in: deque[tuple[int, int]] = deque()
        self.arrived: dict[tuple[int, int], Index] = {}
        self.n_backwards = self.n_swapped_in = 0
        self.last_compute: Index = None
        self.ends: list[int] = []
        self._tensors: dict[tuple[int, str | None], int] = {}
        """What `tensors` has found."""

    # ---- emitting --------------------------------------------------------------------------------------------

    def emit(
        self,
        kind: Kind,
        lane: Lane,
        amount: float,
        *after: Index,
        block: int | None = None,
        micro: int | None = None,
        acquires: tuple[tuple[str, int], ...] = (),
        releases: tuple[tuple[str, int], ...] = (),
        whole_flops: float = 0.0,
        fixed_s: float = 0.0,
        launches: float = 1.0,
        rank: int = 0,
    ) -> int:
        """Append one operation; None among `after` waits for nothing. `launches`: the share of a micro-batch's way
        through a block that it is."""
        dram = 0.0
        if lane in ("read", "write"):
            dram = amount
        elif lane in ("h2d", "d2h"):
            dram = amount * (2 if self.shares_host else 1)
        elif lane == "cpu":
            dram = amount * self.update_dram
        name = kind + (" root" if block is None else f" {block}") + ("" if micro is None else f".{micro}")
        self.operations.append(
            Operation(
                kind,
                lane,
                name,
                float(amount),
                tuple(sorted({a for a in after if a is not None})),
                dram,
                whole_flops,
                launches * self.launch_overhead_s
                if kind in ("forward", "backward") and block is not None
                else fixed_s,
                tuple(a for a in acquires if a[1]),
                tuple(r for r in releases if r[1]),
                self.step,
                block,
                micro,
                rank,
            )
        )
        return len(self.operations) - 1

    def compute(self, kind: Kind, flops: float, *after: Index, **memory: object) -> int:
        """One operation of the device, which works them off in the order of the list."""
        index = self.emit(kind, "compute", flops, *after, self.last_compute, **memory)  # type: ignore[arg-type]
        self.last_compute = index
        return index

    def tensors(self, block: int, outcome: str | None) -> int:
        """Bytes a micro-batch of the block's tensors with this outcome (None: all), input included."""
        known = self._tensors.get((block, outcome))
        if known is None:
            known = self._tensors[block, outcome] = self._sum_of_tensors(block, outcome)
        return known

    def _sum_of_tensors(self, block: int, outcome: str | None) -> int:
        outcomes = self.plan.activations[block]
        work = self.workload.blocks[block]
        named = [(INPUT, work.input_nbytes_per_sample)] + [(t.name, t.nbytes_per_sample) for t in work.saved]
        return int(
            sum(
                self.samples * nbytes
                for name, nbytes in named
                if outcome is None or outcomes.get(name, "recompute") == outcome
            )
        )

    def extents(self, block: int) -> int:
        """Bytes on storage of a micro-batch's tensors that are swapped to it: whole pages each."""
        outcomes = self.plan.activations[block]
        sizes = self.workload.blocks[block].nbytes_by_tensor()
        stored = [nbytes for name, nbytes in sizes.items() if outcomes.get(name) == "storage"]
        return sum(round_up(int(self.samples * nbytes), PAGE_NBYTES) for nbytes in stored)

    # ---- parameters and updates ------------------------------------------------------------------------------

    def param_nbytes(self, block: int) -> int:
        """The block's parameters."""
        work = self.workload.blocks[block]
        return self.plan.state_format.param_nbytes * (work.stored_numel + work.frozen_numel)

    def fetch(self, block: int, step_closed: Index, *, returned: bool = False, stays: bool = False) -> None:
        """Bring parameters in, with the deferred update where there is one. Sets `loaded`.

        For a device with memory of its own. `returned`: it got them back from the last update. `stays`: they stay in
        the host slot until `leave_host` is called; else it is free when they are loaded.
        """
        if self.stays(block):
            self.loaded[block] = self.fetched[block] = ()
            return
        slot: Index = None
        if block not in self.resident and self.takes_slot(block):
            slot = self.free_slots.popleft()
        source: tuple[Index, ...] = (self.updated.get(block),)
        stored, resident = self.plan.param_on_storage(block), block in self.resident
        room: Index = None
        held = block in self.in_host
        if self.stages(block) and not returned:
            resident = held
            room = None if resident else self.host_slots.popleft()
            self.in_host.add(block)
        if step_closed is not None and block in self.grads_ready:
            source = self.late_update(block, (step_closed, slot if self.shares_host else room), held)
        elif not (resident or returned) and stored:
            wait = slot if self.shares_host else room
            source = (self.emit("fetch", "read", self.param_nbytes(block), wait, *source, block=block),)
        if self.shares_host:
            self.loaded[block] = (*source, slot)
        elif block not in self.resident:
            self.loaded[block] = (
                self.emit("load", "h2d", self.param_nbytes(block), slot, *source, block=block),
            )
        self.fetched[block] = source
        if not stays and not self.shares_host:
            self.leave_host(block, self.loaded[block][0])
        self.resident.add(block)

    def stays(self, block: int) -> bool:
        """Whether its parameters and state are on a device with memory of its own for good."""
        return block < self.plan.on_device_blocks

    def stages(self, block: int) -> bool:
        """Whether its parameters pass through a host slot on their way to the device."""
        return self.plan.param_on_storage(block) and not self.shares_host

    def can_fetch(self, block: int) -> bool:
        """Whether there is a place for its parameters."""
        if self.stays(block):
            return True
        return bool(self.free_slots) and (
            not self.stages(block) or block in self.in_host or bool(self.host_slots)
        )

    def leave_host(self, block: int, when: Index) -> None:
        """The host slot is free once `when` has ended."""
        if block in self.in_host:
            self.in_host.discard(block)
            self.host_slots.append(when)

    def takes_slot(self, block: int) -> bool:
        """Not a block that stays on the device; and where the device computes in host memory, none that is there."""
        if self.stays(block):
            return False
        return not self.shares_host or self.plan.param_on_storage(block)

    def late_update(self, block: int, wait: tuple[Index, ...], held: bool) -> tuple[Index, ...]:
        """A deferred update: it reads the parameters into the buffer that they were fetched to, and hands them on."""
        arrived = self.grads_ready.pop(block)
        if not self.plan.grads_in_host[block]:
            read_nbytes = self.workload.stored_grad_reads * self.grad_nbytes(block)
            arrived = self.emit("read_back", "read", read_nbytes, arrived, *wait, block=block)
        in_memory = held or not self.plan.param_on_storage(block)
        in_memory |= self.shares_host and block in self.resident
        waiting = self.grad_nbytes(block) if self.plan.grads_in_host[block] and not self.shares_host else 0
        return self.update(block, (arrived, *wait), reads_param=not in_memory, releases=(("host", waiting),))

    def update_on_device(self, block: int | None) -> None:
        """Of a block that stays there, or the root: no kernel of the model's runs meanwhile."""
        n_staying = self.plan.on_device_blocks + self.plan.on_device_root
        self.compute("update", 0.0, block=block, fixed_s=self.device_update_s / n_staying)

    def grad_nbytes(self, block: int) -> int:
        """The block's gradients."""
        return self.plan.grad_nbytes * self.workload.blocks[block].stored_numel

    def n_pieces(self, numel: float, share: float = 1.0) -> int:
        """Of the update of so many parameters, a share of a block's."""
        n = max(1, round(self.plan.update_pieces * share))
        if self.plan.chunk_elements is not None:
            n = max(1, min(n, -int(-numel // self.plan.chunk_elements)))
        return n

    def update(
        self,
        block: int | None,
        after: tuple[Index, ...],
        *,
        reads_param: bool,
        releases: tuple[tuple[str, int], ...] = (),
        share: float = 1.0,
        rank: int = 0,
        gradients: Sequence[Index] = (None,),
    ) -> tuple[Index, ...]:
        """The pieces of an update, or a share of it. Returns what a use of the new parameters waits for in memory.

        Updates of higher `rank` begin after all that could begin before them. `gradients`: what each piece's wait for,
        one for all or one for each of `n_pieces`."""
        plan, state = self.plan, self.plan.state_format
        whole = self.workload.root_stored_numel if block is None else self.workload.blocks[block].stored_numel
        numel = share * whole
        stored_param = block is not None and plan.param_on_storage(block)
        in_host = share * plan.state_in_host_nbytes(-1 if block is None else block, whole)
        states = state.state_nbytes * numel - in_host
        param = state.param_nbytes * numel if stored_param else 0
        read = states + (param if reads_param and state.update_reads_param else 0)
        frozen = self.param_nbytes(block) - param if block is not None and reads_param and stored_param else 0
        computed: list[Index] = []
        last: Index = None
        n = self.n_pieces(numel, share)
        for piece in range(n):
            arrived = gradients[piece * len(gradients) // n]
            freed = releases if piece == n - 1 else ()
            piece_in = (read + frozen) / n
            before = (*after, arrived)
            got = self.emit("state_in", "read", piece_in, *before, block=block, rank=rank, acquires=ONE_PIECE)
            made = self.emit("update", "cpu", numel / n, got, *before, block=block, rank=rank, releases=freed)
            piece_out = (state.stored_nbytes * numel if plan.durable_steps else states + param) / n
            last = self.emit(
                "state_out", "write", piece_out, made, last, block=block, rank=rank, releases=ONE_PIECE
            )
            computed.append(made)
        self.updated[block] = last
        return (last,) if self.shares_host else tuple(computed)
