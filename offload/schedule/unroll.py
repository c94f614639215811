"""Unrolls a plan into the operations of whole steps, with their dependencies and memory.

[Note: what bounds the look-ahead] A fetch needs a slot that an earlier block has left. A micro-batch computes only when
the swaps of the one two before it are over, so two micro-batches of tensors are in flight at most. A block's backward
needs a gradient buffer, or of the only one (over a bus) the part that it fills next, its gradients a place in host
memory. An update piece needs one of `update_buffers` buffers.

[Note: which update goes first] Those made during backward go in the order in which their gradients come. What is left
when backward has ended goes in the order of the next forward: the root's, the first blocks', at last the held ones.
Over a bus the gradients of these wait in host memory of their own, and their updates are made in backward too where no
other can be.
"""

from __future__ import annotations

from collections import deque

from offload.planner.memory import block_working_nbytes, boundary_nbytes, root_working_nbytes
from offload.planner.placement import HOST_SLOTS
from offload.planner.plan import INPUT, Plan
from offload.planner.workload import Workload
from offload.schedule.emitter import Emitter, Index
from offload.schedule.operations import Operation
from offload.types import GRAD_PARTS


class Unroller(Emitter):
    """Emits operations in the order in which the executor issues them."""

    # ---- a step ----------------------------------------------------------------------------------------------

    def run_step(self) -> None:
        """Forward, backward, updates."""
        closed = self.last_compute
        root_ready = self.updated.get(None)
        micros = range(self.plan.micro_batches)
        streamed = [block for block in range(self.n_blocks) if self.takes_slot(block)]
        at_turn = set(streamed[max(0, len(streamed) - self.plan.n_slots) :])
        self.at_start = set(streamed[: self.plan.n_slots])
        staged = [block for block in range(self.n_blocks) if self.stages(block)]
        self.host_start, host_turn = set(staged[:HOST_SLOTS]), set(staged[-HOST_SLOTS:])
        returned = not (self.shares_host or self.deferred) and self.plan.n_slots >= len(streamed)
        if returned:
            self.host_start, host_turn = set(), set()
        for block in range(self.n_blocks):
            self.fetch(block, closed, returned=returned, stays=block in host_turn)
            last = None
            for micro in micros:
                last = self.forward(block, micro, root_ready)
            if block in at_turn or not self.takes_slot(block):
                continue
            self.resident.discard(block)
            self.free_slots.append(last)
        self.in_window = deque([self.last_compute, self.out_window[-1]])
        flops = self.workload.root_flops_per_sample * self.samples
        alive = 0
        if self.traced:  # the boundary's room is held throughout, and is the root's while no block computes
            batch = self.plan.batch_samples
            boundary = boundary_nbytes(self.workload, batch, self.plan.micro_batches)
            alive = max(0, root_working_nbytes(self.workload, batch) - boundary)
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
                self.fetch(uses[fetched], None, stays=True)
                fetched += 1
            self.backward_block(block)
            if not self.shares_host:
                while fetched < len(uses) and self.can_fetch(uses[fetched]):
                    self.fetch(uses[fetched], None, stays=True)
                    fetched += 1
            self.swap_in_ahead(done=self.n_backwards)
            if not (self.shares_host and block in self.held):
                self.grads_leave(block)
            if self.stays(block) and not self.deferred:
                self.update_on_device(block)
        for block in range(self.plan.on_device_blocks if self.deferred else 0):
            self.update_on_device(block)
        if self.plan.on_device_root:
            self.update_on_device(None)
        if self.last_compute is not None:
            self.ends.append(self.last_compute)
        for block in self.plan.held_blocks:
            if self.shares_host:
                self.grads_leave(block)
            elif self.workload.blocks[block].trainable_numel:
                self.grad_landing.append(self.updated[block])
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
        trains = self.workload.blocks[block].trainable_numel > 0
        buffer = self.grad_buffers.popleft() if trains else ()
        last: Index = None
        for micro in range(self.plan.micro_batches):
            leaves = trains and self.only_buffer and micro == self.plan.micro_batches - 1
            last = self.backward(block, micro, buffer if micro == 0 else (), leaves=leaves)
        stays = self.shares_host and (block in self.at_start or not self.takes_slot(block))
        if not stays:
            self.resident.discard(block)
            if not self.shares_host and self.takes_slot(block):
                self.free_slots.append(last)

    def backward(self, block: int, micro: int, buffer: tuple[Index, ...], *, leaves: bool) -> int:
        """One micro-batch: swap in, recompute, backward. `buffer`: what has to have left the gradient buffer, in parts
        where it is the only one; `leaves`: the block's gradients do so as they come."""
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
        arrived = [*self.loaded[block], self.arrived.pop((block, micro))]
        if len(buffer) == 1:
            arrived.append(buffer[0])
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
        index, n_parts = 0, GRAD_PARTS if leaves or len(buffer) > 1 else 1
        released = temporary + kept + again + host + storage
        for part in range(n_parts):
            index = self.compute(
                "backward",
                factor * work.flops_per_sample * self.samples / n_parts,
                buffer[part] if len(buffer) > 1 else None,
                block=block,
                micro=micro,
                acquires=(("device", temporary if part == 0 else 0),),
                releases=(("device", released if part == n_parts - 1 else 0),),
                launches=1 / n_parts,
            )
            if leaves:
                self.grads_left.append(self._copy_grads(block, 1 / n_parts))
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
        else:
            self._leave_host_before_turn(block, self.last_compute)

    def _leave_host_before_turn(self, block: int, when: Index) -> None:
        """Those that forward begins with stay."""
        if block not in self.host_start:
            self.leave_host(block, when)

    def _copy_grads(self, block: int, share: float = 1.0) -> int:
        """A share of a block's gradients leaves the device, behind those in `grads_left`."""
        waits_in_host = block in self.deferred and self.plan.grads_in_host[block]
        nbytes, before = self.grad_nbytes(block), self.grads_left[-1] if self.grads_left else None
        waiting: tuple[tuple[str, int], ...] = ()
        if before is None and waits_in_host:
            waiting = (("host", nbytes),)
        elif before is None:
            before = self.grad_landing.popleft()
        return self.emit(
            "grad_out", "d2h", share * nbytes, self.last_compute, before, block=block, acquires=waiting
        )

    def _grads_leave(self, block: int) -> None:
        late = block in self.deferred
        waits_in_host = late and self.plan.grads_in_host[block]
        out: Index = self.last_compute
        left, self.grads_left = tuple(self.grads_left), []
        if not self.shares_host:
            left = left or (self._copy_grads(block),)
            out = left[-1]
        elif waits_in_host:  # a copy by the thread that computes
            out = self.last_compute = self.emit("grad_out", "d2h", self.grad_nbytes(block), out, block=block)
        done = out
        if not late:
            self.update(block, (out, *self.fetched[block]), reads_param=False, rank=self.rank(block))
            done = self.updated[block]
            self._leave_host_before_turn(block, done)
        elif not waits_in_host:
            done = self.emit("spill", "write", self.grad_nbytes(block), out, block=block)
        if late:
            self.grads_ready[block] = done
            self._leave_host_before_turn(block, self.last_compute)
        self.grad_buffers.append((done,) if self.shares_host else left)
        if not (self.shares_host or waits_in_host or block in self.held):
            self.grad_landing.append(done)
        if self.shares_host and block not in self.resident:
            self.free_slots.append(done)

    def update_head(self) -> float:
        """Start updating the share of the root whose gradients precede the blocks', unless all updates wait."""
        numel = self.workload.root_stored_numel
        if len(self.deferred) == self.n_blocks or not numel:
            return 0.0
        early, chunk = self.workload.early_numel, self.plan.chunk_elements or 1
        share = early // chunk * chunk / numel
        if share:
            out = self._root_gradients(share)
            self.update(
                None, (), reads_param=False, share=share, rank=self.rank(self.n_blocks), gradients=out
            )
        return share

    def _root_gradients(self, share: float) -> list[Index]:
        """A share of them on its way out of a device with memory of its own, a part for each piece of the update."""
        if self.shares_host:
            return [self.last_compute]
        numel = share * self.workload.root_stored_numel
        n = 1 if self.workload.rule.whole_gradients else self.n_pieces(numel, share)
        nbytes = self.plan.state_format.grad_nbytes * numel / n
        return [self.emit("grad_out", "d2h", nbytes, self.last_compute) for _ in range(n)]

    def rank(self, block: int | None) -> int:
        """Place of the update of a block (None: the root; the number of blocks: the head) among those of all steps.
        See [Note: which update goes first]."""
        if self.deferred:  # they are listed in the order in which forward needs them, after the root's
            return 0
        n, first = self.n_blocks, 1 + self.step * (2 * self.n_blocks + 4)
        if block is None:
            return first + n + 1
        if block in self.held:
            return first + n + 2 + block
        plan = self.plan
        n_left = plan.grads_per_buffer * (plan.n_grad_buffers if self.shares_host else 2)
        n_left -= self.shares_host and bool(plan.held_blocks)
        if not plan.params_on_device:
            n_left = min(n_left, plan.n_slots)
        return first + (n + 2 + block if block < n_left else n - block)

    def update_root(self, share: float) -> None:
        """The rest's gradients are complete when backward ends, and forward needs the root's parameters first."""
        numel = self.workload.root_stored_numel
        if not numel:
            return
        out, after = self._root_gradients(share), (self.updated.get(None),)
        made = self.update(None, after, reads_param=False, share=share, rank=self.rank(None), gradients=out)
        if not self.shares_host:
            # What was updated before backward, then each part as soon as it is updated.
            nbytes = self.plan.state_format.param_nbytes * numel
            loaded: Index = self.last_compute
            if share < 1:
                loaded = self.emit("load", "h2d", nbytes * (1 - share), loaded)
            for pieces in zip(made, strict=True) if len(out) == len(made) else [made]:
                part = nbytes * share * len(pieces) / len(made)
                loaded = self.emit("load", "h2d", part, *pieces, loaded)
            self.updated[None] = loaded


def unroll(
    plan: Plan,
    workload: Workload,
    *,
    shares_host: bool,
    launch_overhead_s: float = 0.0,
    device_update_s: float = 0.0,
    n_steps: int = 3,
) -> tuple[list[Operation], list[int]]:
    """The operations of `n_steps` steps, and the index of the last computing operation of each. Deferred updates of a
    step run in the next one, so only steps after the first are steady. `device_update_s`: see `Emitter`."""
    unroller = Unroller(
        plan,
        workload,
        shares_host=shares_host,
        launch_overhead_s=launch_overhead_s,
        device_update_s=device_update_s,
    )
    for _ in range(n_steps):
        unroller.run_step()
    return unroller.operations, unroller.ends
