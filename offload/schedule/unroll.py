"""Unrolls a plan into the operations of whole steps, with their dependencies and memory.

[Note: what bounds the look-ahead] A fetch needs a slot that an earlier block has left. A micro-batch computes only when
the swaps of the one two before it are over, so two micro-batches of tensors are in flight at most. A block's backward
needs a gradient buffer, its gradients a place in host memory. An update piece needs one of `update_buffers` buffers.
"""

from __future__ import annotations

from collections import deque

from offload.planner.memory import block_working_nbytes, is_traced, root_working_nbytes
from offload.planner.plan import INPUT, Plan
from offload.planner.workload import Workload
from offload.schedule.operations import Kind, Lane, Operation
from offload.types import PAGE_NBYTES, round_up

Index = int | None


class Unroller:
    """Emits operations in the order in which the executor issues them."""

    def __init__(
        self, plan: Plan, workload: Workload, *, shares_host: bool, launch_overhead_s: float
    ) -> None:
        self.plan = plan
        self.workload = workload
        self.shares_host = shares_host
        self.launch_overhead_s = launch_overhead_s
        self.operations: list[Operation] = []
        self.n_blocks = len(workload.blocks)
        self.traced = shares_host and is_traced(workload)
        """What is alive is known, and nothing of it waits for a bus."""
        self.samples = plan.batch_samples / plan.micro_batches
        self.deferred = set(plan.deferred_blocks)
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
        self.grad_buffers: deque[Index] = deque([None] * plan.n_grad_buffers)
        self.grad_landing: deque[Index] = deque([None] * 2)
        self.pieces: deque[Index] = deque([None] * plan.update_buffers)
        self.out_window: deque[Index] = deque([None] * 2)
        self.spill_window: deque[Index] = deque([None] * 2)
        self.in_window: deque[Index] = deque([None] * 2)
        self.fetch_ring: deque[Index] = deque([None] * 2)
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
    ) -> int:
        """Append one operation; None among `after` waits for nothing."""
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
                self.launch_overhead_s if kind in ("forward", "backward") and block is not None else 0.0,
                tuple(a for a in acquires if a[1]),
                tuple(r for r in releases if r[1]),
                self.step,
                block,
                micro,
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

    def fetch(self, block: int, step_closed: Index) -> None:
        """Bring parameters in, with the deferred update where there is one. Sets `loaded`."""
        slot: Index = None
        if block not in self.resident and self.takes_slot(block):
            slot = self.free_slots.popleft()
        source: tuple[Index, ...] = (self.updated.get(block),)
        in_host, resident = self.plan.params_in_host[block], block in self.resident
        staged = not (in_host or resident or self.shares_host)
        room = self.fetch_ring.popleft() if staged else None
        if step_closed is not None and block in self.grads_ready:
            source = self.late_update(block, (step_closed, slot if self.shares_host else room))
            if self.plan.update == "mixed" and not resident and not in_host:
                source = (self.emit("fetch", "read", self.param_nbytes(block), room, *source, block=block),)
        elif not resident and not in_host:
            wait = slot if self.shares_host else room
            source = (self.emit("fetch", "read", self.param_nbytes(block), wait, *source, block=block),)
        ready: tuple[Index, ...] = ()
        if self.shares_host:
            ready = (*source, slot)
        elif not resident:
            ready = (self.emit("load", "h2d", self.param_nbytes(block), slot, *source, block=block),)
        if staged:
            self.fetch_ring.append(ready[0])
        self.resident.add(block)
        self.loaded[block] = ready

    def takes_slot(self, block: int) -> bool:
        """Where the device computes in host memory, a block that lives there needs no other place."""
        return not (self.shares_host and self.plan.params_in_host[block])

    def late_update(self, block: int, wait: tuple[Index, ...]) -> tuple[Index, ...]:
        """A deferred update. With every update deferred it reads the parameters into their staging buffer and hands
        them on; where only some are, it runs in the background as soon as it may, and the fetch reads its result."""
        arrived = self.grads_ready.pop(block)
        if not self.plan.grads_in_host[block]:
            arrived = self.emit("read_back", "read", self.grad_nbytes(block), arrived, *wait, block=block)
        mixed = self.plan.update == "mixed"
        in_memory = self.plan.params_in_host[block] or (block in self.resident and self.shares_host)
        waiting = self.grad_nbytes(block) if self.plan.grads_in_host[block] and not self.shares_host else 0
        made = self.update(
            block,
            (arrived, wait[0]) if mixed and not self.shares_host else (arrived, *wait),
            reads_param=not in_memory,
            releases=(("host", waiting),),
        )
        return (self.updated[block],) if mixed and not self.plan.params_in_host[block] else made

    def grad_nbytes(self, block: int) -> int:
        """The block's gradients."""
        return self.plan.state_format.grad_nbytes * self.workload.blocks[block].stored_numel

    def update(
        self,
        block: int | None,
        after: tuple[Index, ...],
        *,
        reads_param: bool,
        releases: tuple[tuple[str, int], ...] = (),
        share: float = 1.0,
    ) -> tuple[Index, ...]:
        """The pieces of an update, or a share of it. Returns what a use of the new parameters waits for in memory."""
        plan, state = self.plan, self.plan.state_format
        whole = self.workload.root_stored_numel if block is None else self.workload.blocks[block].stored_numel
        numel = share * whole
        stored_param = block is not None and not plan.params_in_host[block]
        in_host = share * plan.state_in_host_nbytes(-1 if block is None else block, whole)
        states = state.state_nbytes * numel - in_host
        param = state.param_nbytes * numel if stored_param else 0
        read = states + (param if reads_param and state.update_reads_param else 0)
        frozen = self.param_nbytes(block) - param if block is not None and reads_param and stored_param else 0
        computed: list[Index] = []
        last: Index = None
        n = plan.update_pieces
        if plan.chunk_elements is not None:
            n = max(1, min(n, -int(-numel // plan.chunk_elements)))
        for piece in range(n):
            freed = releases if piece == n - 1 else ()
            buffer = self.pieces.popleft()
            got = self.emit("state_in", "read", (read + frozen) / n, buffer, *after, block=block)
            made = self.emit("update", "cpu", numel / n, got, *after, block=block, releases=freed)
            last = self.emit("state_out", "write", (states + param) / n, made, last, block=block)
            self.pieces.append(last)
            computed.append(made)
        self.updated[block] = last
        return (last,) if self.shares_host else tuple(computed)

    # ---- a step ----------------------------------------------------------------------------------------------

    def run_step(self) -> None:
        """Forward, backward, updates."""
        closed = self.last_compute
        root_ready = self.updated.get(None)
        micros = range(self.plan.micro_batches)
        streamed = [block for block in range(self.n_blocks) if self.takes_slot(block)]
        at_turn = set(streamed[max(0, len(streamed) - self.plan.n_slots) :])
        self.at_start = set(streamed[: self.plan.n_slots])
        for block in range(self.n_blocks):
            self.fetch(block, closed)
            last = None
            for micro in micros:
                last = self.forward(block, micro, root_ready)
            if block in at_turn or not self.takes_slot(block):
                continue
            self.resident.discard(block)
            self.free_slots.append(last)
        self.in_window = deque([self.last_compute, self.out_window[-1]])
        flops = self.workload.root_flops_per_sample * self.samples
        alive = root_working_nbytes(self.workload, self.plan.batch_samples) if self.traced else 0
        for micro in micros:
            acquired = (("device", alive),) if micro == 0 else ()
            self.compute("forward", flops, root_ready, acquires=acquired)
        for micro in micros:
            released = (("device", alive),) if micro == self.plan.micro_batches - 1 else ()
            self.compute("backward", 2 * flops, releases=released)
        if self.shares_host:  # the first block's backward asks for its tensors, and nobody before it
            self.in_window = deque([self.last_compute] * 2)
        head = self.update_head()
        uses = list(reversed(range(self.n_blocks)))
        self.to_swap_in = deque((block, micro) for block in uses for micro in micros)
        self.n_backwards = self.n_swapped_in = fetched = 0
        for position, block in enumerate(uses):
            while fetched < min(len(uses), position + 1):
                self.fetch(uses[fetched], None)
                fetched += 1
            self.backward_block(block)
            if not self.shares_host:
                while self.free_slots and fetched < len(uses):
                    self.fetch(uses[fetched], None)
                    fetched += 1
            self.swap_in_ahead(done=self.n_backwards)
            self.grads_leave(block)
        if self.last_compute is not None:
            self.ends.append(self.last_compute)
        self.update_root(1 - head)
        self.step += 1

    def forward(self, block: int, micro: int, root_ready: Index) -> int:
        """One micro-batch through one block, and what leaves the device after it."""
        before: list[Index] = [*self.loaded[block], self.out_window.popleft(), root_ready]
        transit = self.boundary_nbytes(block)
        if transit and block > 0:
            arrived = self.stored[block - 1, micro]
            before.append(self.emit("swap_in", "h2d", transit, arrived, block=block, micro=micro))
        everything, kept = self.tensors(block, None), self.tensors(block, "device")
        host, storage = self.tensors(block, "host"), self.tensors(block, "storage")
        leaves = host + storage
        if self.traced:  # forward has less alive than backward; what is swapped goes as soon as it is made
            everything, leaves = kept, 0
        index = self.compute(
            "forward",
            self.workload.blocks[block].flops_per_sample * self.samples,
            *before,
            block=block,
            micro=micro,
            acquires=(("device", everything),),
            releases=(("device", everything - kept - leaves),),
        )
        out: Index = None
        if host + storage:
            room = self.spill_window.popleft() if storage else None
            out = self.emit(
                "swap_out",
                "d2h",
                storage if self.shares_host else host + storage,
                index,
                room,
                block=block,
                micro=micro,
                acquires=(("host", host),),
                releases=(("device", leaves),),
            )
            if self.shares_host:  # a copy by the thread that computes
                self.last_compute = out
        self.out_window.append(out)
        if storage:
            out = self.emit(
                "spill",
                "write",
                storage,
                out,
                block=block,
                micro=micro,
                acquires=(("storage", self.extents(block)),),
            )
            self.spill_window.append(out)
        self.stored[block, micro] = out
        return index

    def backward_block(self, block: int) -> None:
        """All micro-batches of one block backward; its slot is free afterwards."""
        buffer = self.grad_buffers.popleft() if self.workload.blocks[block].trainable_numel else None
        last: Index = None
        for micro in range(self.plan.micro_batches):
            last = self.backward(block, micro, buffer if micro == 0 else None)
        stays = self.shares_host and (block in self.at_start or not self.takes_slot(block))
        if not stays:
            self.resident.discard(block)
            if not self.shares_host:
                self.free_slots.append(last)

    def backward(self, block: int, micro: int, buffer: Index) -> int:
        """One micro-batch: swap in, recompute, backward."""
        host, storage = self.tensors(block, "host"), self.tensors(block, "storage")
        kept, again = self.tensors(block, "device"), self.tensors(block, "recompute")
        work = self.workload.blocks[block]
        temporary = int(2 * self.samples * max((t.nbytes_per_sample for t in work.saved), default=0))
        if self.traced:
            inputs = int(self.samples * work.input_nbytes_per_sample)
            alive = block_working_nbytes(self.workload, block, self.plan.batch_samples, self.samples)
            there = self.plan.activations[block].get(INPUT) in ("device", "storage")
            again = max(0, alive - (kept + storage - inputs * there)) + inputs * (not there)
            host = temporary = 0  # what comes back from host memory is among what is alive
        self.swap_in_ahead(done=self.n_backwards)
        arrived = [buffer, *self.loaded[block], self.arrived.pop((block, micro))]
        if self.shares_host and self.tensors(block, "storage"):  # a copy by the thread that computes
            back = self.tensors(block, "storage")
            arrived.append(self.last_compute)
            self.last_compute = self.emit("swap_in", "h2d", back, *arrived, block=block, micro=micro)
        outcomes = self.plan.activations[block]
        flops = sum(
            t.recompute_flops_per_sample
            for t in work.saved
            if outcomes.get(t.name, "recompute") == "recompute"
        )
        self.compute(
            "recompute",
            flops * self.samples,
            *arrived,
            block=block,
            micro=micro,
            acquires=(("device", again),),
            whole_flops=work.flops_per_sample * self.samples,
        )
        numel = work.trainable_numel + work.frozen_numel
        factor = 1 + (work.trainable_numel / numel if numel else 1)
        index = self.compute(
            "backward",
            factor * work.flops_per_sample * self.samples,
            block=block,
            micro=micro,
            acquires=(("device", temporary),),
            releases=(("device", temporary + kept + again + host + storage),),
        )
        self.in_window.append(index)
        self.n_backwards += 1
        boundary = self.boundary_nbytes(block)
        if boundary:
            self.boundary[block, micro] = self.emit(
                "swap_out", "d2h", boundary, index, block=block, micro=micro
            )
        return index

    def boundary_nbytes(self, block: int) -> int:
        """What crosses the bus between this block and the next, a micro-batch."""
        if self.plan.boundary_on_device:
            return 0
        return int(self.samples * self.workload.blocks[block].input_nbytes_per_sample)

    def swap_in_ahead(self, done: int) -> None:
        """Swap in what the next two micro-batches after the first `done` need, before whatever is issued next."""
        while self.to_swap_in and self.n_swapped_in < done + 2:
            block, micro = self.to_swap_in[0]
            boundary = self.boundary_nbytes(block)
            if boundary and block < self.n_blocks - 1 and (block + 1, micro) not in self.boundary:
                return
            self.to_swap_in.popleft()
            self.n_swapped_in += 1
            self.arrived[block, micro] = self.swap_in(block, micro, boundary)

    def swap_in(self, block: int, micro: int, boundary: int) -> Index:
        """A micro-batch's swapped tensors, and the gradient of its output where that is not on the device."""
        host, storage = self.tensors(block, "host"), self.tensors(block, "storage")
        room = self.in_window.popleft()
        source = self.stored[block, micro]
        if storage:
            left = (("storage", self.extents(block)),)
            source = self.emit(
                "read_back",
                "read",
                storage,
                source,
                room,
                block=block,
                micro=micro,
                acquires=(("device", storage if self.traced else 0),),
                releases=left,
            )
        if not host + storage + boundary:
            return room
        if self.shares_host and not host:
            return source
        return self.emit(
            "swap_in",
            "h2d",
            0 if self.shares_host else host + storage + boundary,
            source,
            room,
            self.boundary.pop((block + 1, micro), None),
            block=block,
            micro=micro,
            acquires=(("device", 0 if self.traced else host + storage),),
            releases=(("host", host),),
        )

    def grads_leave(self, block: int) -> None:
        """A block's gradients go to where they wait or to the update."""
        if self.workload.blocks[block].trainable_numel:
            self._grads_leave(block)
        elif self.shares_host and block not in self.resident:
            self.free_slots.append(self.last_compute)

    def _grads_leave(self, block: int) -> None:
        late = block in self.deferred
        waits_in_host = late and self.plan.grads_in_host[block]
        out: Index = self.last_compute
        if not self.shares_host:
            landing = None if waits_in_host else self.grad_landing.popleft()
            waiting = (("host", self.grad_nbytes(block)),) if waits_in_host else ()
            out = self.emit(
                "grad_out", "d2h", self.grad_nbytes(block), out, landing, block=block, acquires=waiting
            )
        elif waits_in_host:  # a copy by the thread that computes
            out = self.last_compute = self.emit("grad_out", "d2h", self.grad_nbytes(block), out, block=block)
        done = out
        if not late:
            self.update(block, (out,), reads_param=False)
            done = self.updated[block]
        elif not waits_in_host:
            done = self.emit("spill", "write", self.grad_nbytes(block), out, block=block)
        if late:
            self.grads_ready[block] = done
        self.grad_buffers.append(done if self.shares_host else out)
        if not self.shares_host and not waits_in_host:
            self.grad_landing.append(done)
        if self.shares_host and block not in self.resident:
            self.free_slots.append(done)

    def update_head(self) -> float:
        """Start updating the share of the root whose gradients precede the blocks', unless all updates wait."""
        numel = self.workload.root_stored_numel
        if len(self.deferred) == self.n_blocks or not numel:
            return 0.0
        early, chunk = self.workload.root_early_numel, self.plan.chunk_elements or 1
        share = early // chunk * chunk / numel
        if share:
            out: Index = self.last_compute
            if not self.shares_host:
                out = self.emit("grad_out", "d2h", self.plan.state_format.grad_nbytes * share * numel, out)
            self.update(None, (out,), reads_param=False, share=share)
        return share

    def update_root(self, share: float) -> None:
        """The rest's gradients are complete when backward ends, and forward needs the root's parameters first."""
        numel = self.workload.root_stored_numel
        if not numel:
            return
        out: Index = self.last_compute
        if not self.shares_host:
            out = self.emit("grad_out", "d2h", self.plan.state_format.grad_nbytes * share * numel, out)
        made = self.update(None, (out, self.updated.get(None)), reads_param=False, share=share)
        if not self.shares_host:
            self.updated[None] = self.emit("load", "h2d", self.plan.state_format.param_nbytes * numel, *made)


def unroll(
    plan: Plan, workload: Workload, *, shares_host: bool, launch_overhead_s: float = 0.0, n_steps: int = 3
) -> tuple[list[Operation], list[int]]:
    """The operations of `n_steps` steps, and the index of the last computing operation of each. Deferred updates of a
    step run in the next one, so only steps after the first are steady."""
    unroller = Unroller(plan, workload, shares_host=shares_host, launch_overhead_s=launch_overhead_s)
    for _ in range(n_steps):
        unroller.run_step()
    return unroller.operations, unroller.ends
