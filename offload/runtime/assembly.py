"""Build the tiers from a placement: arenas, slots, buffers, extents, and the first content of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.config import Config
from offload.errors import BudgetError
from offload.model.blocks import Cut
from offload.model.flat import BlockLayout, lay_out
from offload.planner.placement import BlockBytes, Placement
from offload.planner.plan import Plan
from offload.runtime.chosen_device import budgets
from offload.runtime.first_content import import_into
from offload.runtime.placing import place_run
from offload.stores.block_store import BlockRecord, DeviceSlot, GradBuffer, Slot, StateExtents
from offload.stores.sides import Sides, checksum_tables, durable_nbytes
from offload.telemetry import SpanLog
from offload.tiers.device import DeviceTier
from offload.tiers.host import HostArena, Spare
from offload.tiers.storage import Store
from offload.transfer.copies import Copies
from offload.transfer.io_engine import UpdatePipeline
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import UpdateRule


@dataclass
class Resources:
    """What has to be given back at the end. Holds no block, so that a forgotten model can go."""

    store: Store | None
    pipeline: UpdatePipeline
    device: DeviceTier
    copies: Copies
    arenas: list[HostArena]
    staging: torch.Tensor
    """The pipeline's chunk buffers (uint8); nobody else's unless the pipeline is idle."""

    def close(self) -> None:
        """End all threads, release the device and remove the store. Finishes what is in flight first."""
        self.copies.close()
        self.pipeline.close()
        if self.store is not None:
            self.store.close()
        self.device.close()

    def abandon(self) -> None:
        """The same, without the transfers that are still queued."""
        if self.store is not None:
            self.store.cancel()
        self.close()


@dataclass
class Assembly:
    """Everything the runtime runs on."""

    cut: Cut
    blocks: list[BlockRecord]
    root: BlockRecord
    slots: list[Slot]
    device_slots: list[DeviceSlot]
    grad_buffers: list[GradBuffer]
    out_buffers: list[GradBuffer]
    one_gradient_each: bool
    resources: Resources
    activation_staging: torch.Tensor
    placement: Placement
    device_nbytes: int
    host_nbytes: int
    spare_host: Spare
    """What is left of it, for activations and for gradients that have to wait."""


def staging_nbytes(config: Config, rule: UpdateRule) -> int:
    """Host memory of the update pipeline's chunk buffers."""
    return UpdatePipeline.buffer_nbytes_required(
        config.chunk_elements, config.chunk_buffers, rule.record_nbytes_per_element
    )


def block_bytes(layout: BlockLayout, chunk_elements: int) -> BlockBytes:
    """What the planner needs to know of one block."""
    chunks: list[int] = []
    for buffer in layout.buffers:
        if buffer.trainable:
            for start in range(0, buffer.n_elements, chunk_elements):
                chunks.append(buffer.record_nbytes(min(chunk_elements, buffer.n_elements - start)))
    return BlockBytes(round_up(layout.slot_nbytes, PAGE_NBYTES), tuple(chunks), layout.grad_elements * 4)


class _Builder:
    """Takes memory of every tier as the placement says, in one order, and hands out the pieces."""

    def __init__(
        self,
        cut: Cut,
        config: Config,
        compute_dtype: torch.dtype | None,
        device: DeviceTier,
        plan: Plan | None,
        rule: UpdateRule,
    ) -> None:
        self.cut = cut
        self.config, self.device, self.plan, self.rule = config, device, plan, rule
        self.layouts = [
            lay_out(name, parameters, compute_dtype, rule, config.chunk_elements)
            for (name, _), parameters in zip(cut.blocks, cut.block_parameters, strict=True)
        ]
        self.root_layout = lay_out("root", cut.root, compute_dtype, rule, config.chunk_elements)
        self.bytes_of = [block_bytes(layout, config.chunk_elements) for layout in self.layouts]
        self.staging_nbytes = staging_nbytes(config, rule)
        self.device_nbytes, self.host_nbytes = budgets(device, config)
        root_bytes = block_bytes(self.root_layout, config.chunk_elements)
        self.streams = bool(cut.blocks)
        if not self.streams:  # all state is in device memory: host memory is not what limits it
            self.host_nbytes = 2 * self.staging_nbytes + root_bytes.slot_nbytes + root_bytes.grad_nbytes
            self.host_nbytes += root_bytes.state_nbytes
        self.placement = place_run(
            self.bytes_of,
            root_bytes,
            config,
            device,
            rule,
            plan if self.streams else None,
            device_nbytes=self.device_nbytes,
            host_nbytes=self.host_nbytes,
            staging_nbytes=self.staging_nbytes,
            has_storage=self.has_storage,
            grads_per_buffer=2 if self.one_gradient_each else 1,
        )
        n_pieces = 4 * len(self.layouts) + 16
        on_device = self.placement.device_nbytes if device.shares_host else 0
        self.device_arena = HostArena(on_device + PAGE_NBYTES * n_pieces)
        self.host_arena = HostArena(self.placement.host_nbytes + PAGE_NBYTES * n_pieces)
        if config.pin == "always":  # what may be refused is refused before anything has moved
            self.page_lock()

    def page_lock(self) -> None:
        """Lock the host arena, whose pages become present by it."""
        self.device.page_lock(self.host_arena.address, self.host_arena.nbytes, self.config.pin)

    @property
    def has_storage(self) -> bool:
        return bool(self.config.storage) and self.streams

    def on_device(self, nbytes: int) -> torch.Tensor:
        """Device memory; from the arena where storage is read into it."""
        return self.device_arena.take(nbytes) if self.device.shares_host else self.device.allocate(nbytes)

    def gradients_wait(self, index: int) -> bool:
        """Whether the block's gradients wait for the end of every step; others wait only under `no_sync`."""
        if self.plan is None or self.config.deferred:
            return self.config.deferred
        return index in self.plan.deferred_blocks

    def make_store(self) -> Store | None:
        if not self.has_storage:
            return None
        config, placement = self.config, self.placement
        grads = sum(
            round_up(layout.grad_elements * 4, PAGE_NBYTES)
            for index, layout in enumerate(self.layouts)
            if self.gradients_wait(index) and not placement.grads_in_host[index]
        )
        state_nbytes = placement.storage_nbytes
        if config.durability == "step":
            state_nbytes = durable_nbytes([*self.layouts, self.root_layout], config.chunk_elements)
        store = Store(
            config.storage,
            state_nbytes + grads + PAGE_NBYTES * 8 * (len(self.layouts) + 2),
            stripe_nbytes=config.stripe_nbytes,
            backend=config.backend,
            direct=config.direct_io,
            block_nbytes=config.io_block_nbytes,
            queue_depth=config.io_queue_depth,
            keep=config.keep_store or config.durability == "step",
        )
        return store

    def make_resources(self, spans: SpanLog) -> Resources:
        store = self.make_store()
        staging = self.host_arena.take(self.staging_nbytes)
        try:
            pipeline = self.make_pipeline(store, staging)
        except BaseException:
            if store is not None:
                store.close()
            raise
        arenas = [self.device_arena, self.host_arena]
        return Resources(store, pipeline, self.device, Copies(self.device, spans), arenas, staging)

    def make_pipeline(self, store: Store | None, staging: torch.Tensor) -> UpdatePipeline:
        n_threads = self.config.update_threads if self.streams else (os.cpu_count() or 1)
        return UpdatePipeline(
            None if store is None else store.engine,
            self.config.chunk_elements,
            self.config.chunk_buffers,
            n_threads,
            staging.data_ptr(),
            self.staging_nbytes,
            self.rule.record_nbytes_per_element,
        )

    def make_slots(self) -> list[Slot]:
        """What storage is read into."""
        nbytes, placement = self._slot_nbytes, self.placement
        if placement.params_on_device:
            return []
        if self.device.shares_host:
            return [Slot(self.on_device(nbytes)) for _ in range(placement.n_slots)]
        return [Slot(self.host_arena.take(nbytes)) for _ in range(placement.n_host_slots)]

    def make_device_slots(self) -> list[DeviceSlot]:
        """What a device with memory of its own computes with."""
        if self.device.shares_host:
            return []
        slots = [DeviceSlot(self.on_device(self._slot_nbytes)) for _ in range(self.placement.n_slots)]
        for slot in slots:  # allocating may fill it
            slot.free_after = self.device.mark()
        return slots

    @property
    def _slot_nbytes(self) -> int:
        """Of the largest block that is streamed."""
        streamed = self.bytes_of[self.placement.on_device_blocks :]
        return max((b.slot_nbytes for b in streamed), default=0)

    def make_grad_buffers(self) -> tuple[list[GradBuffer], list[GradBuffer]]:
        nbytes = 4 * max((layout.grad_elements for layout in self.layouts), default=0)
        if nbytes == 0:
            return [], []
        n, n_host = self.placement.n_grad_buffers, self.placement.n_host_grad_buffers
        return (
            [GradBuffer(self.on_device(nbytes).view(torch.float32)) for _ in range(n)],
            [GradBuffer(self.host_arena.take(nbytes).view(torch.float32)) for _ in range(n_host)],
        )

    @property
    def one_gradient_each(self) -> bool:
        """Whether a block's gradients come once a step, in bfloat16, and are used at once."""
        micro_batches = self.config.micro_batches if self.plan is None else self.plan.micro_batches
        dtypes = {b.dtype for layout in self.layouts for b in layout.buffers if b.trainable}
        waits = any(self.gradients_wait(index) for index in range(len(self.layouts)))
        return micro_batches == 1 and dtypes == {torch.bfloat16} and not waits

    def make_block(self, index: int, store: Store | None, scratch: Slot | None) -> BlockRecord:
        layout, placement = self.layouts[index], self.placement
        param_offset, sides = -1, self._sides(layout, store)
        stays = placement.params_on_device or placement.params_in_host[index]
        if not stays and store is not None:
            param_offset = store.allocate(layout.slot_nbytes) if sides is None else sides.param_offsets[0]
        states = self._states(index, layout, store, sides)
        record = BlockRecord(index, layout, False, param_offset, states, sides=sides)
        if param_offset < 0:
            in_host = placement.params_in_host[index] or not placement.params_on_device
            take = self.host_arena.take if in_host else self.on_device
            record.slot = Slot(take(layout.slot_nbytes), record)
        if placement.grads_in_host[index]:
            record.grad_host = self.host_arena.take(layout.grad_elements * 4).view(torch.float32)
        elif store is not None and layout.grad_elements and self.gradients_wait(index):
            record.grad_offset = store.allocate(layout.grad_elements * 4)
        import_into(record, store, scratch, self.config.chunk_elements, self.device)
        return record

    def make_block_on_device(self, index: int) -> BlockRecord:
        """One that is not streamed, whose gradients stay too where its update waits for the end of a step."""
        layout = self.layouts[index]
        record = BlockRecord(index, layout, False, -1, {})
        if self.gradients_wait(index):
            grad = self.on_device(layout.grad_elements * 4).view(torch.float32)
            record.grad_buffer = GradBuffer(grad, record, permanent=True)
        self._put_on_device(record)
        return record

    def _put_on_device(self, record: BlockRecord) -> None:
        """Parameters and optimizer state, for good."""
        record.on_device = True
        record.slot = Slot(self.on_device(record.layout.slot_nbytes), record)
        for position, buffer in enumerate(record.layout.buffers):
            if buffer.trainable:
                n_chunks = -(-buffer.n_elements // self.config.chunk_elements)
                records = self.on_device(buffer.state_nbytes).zero_()
                record.states[position] = StateExtents(records, n_chunks, -1)
        import_into(record, None, None, self.config.chunk_elements, self.device)

    def make_root(self, store: Store | None) -> BlockRecord:
        """What of it is in host memory; `place_root` has to follow."""
        layout, index = self.root_layout, len(self.layouts)
        root = BlockRecord(index, layout, True, -1, {})
        if self.placement.on_device_root:
            return root
        root.sides = self._sides(layout, store)
        root.states = self._states(index, layout, store, root.sides)
        if self.device.shares_host:
            root.slot = Slot(self.on_device(layout.slot_nbytes), root)
            self.device_arena.keep_on_fork(root.slot.bytes_tensor)
        else:
            root.slot = Slot(self.host_arena.take(layout.slot_nbytes), root)
            out = self.host_arena.take(layout.grad_elements * 4).view(torch.float32)
            root.grad_out_home = GradBuffer(out, root, permanent=True)
        import_into(root, store, None, self.config.chunk_elements, self.device)
        return root

    def place_root(self, root: BlockRecord) -> None:
        """Its device memory; gradients when what the model had there is free."""
        if self.placement.on_device_root:
            self._put_on_device(root)
            self.device.trim()
        grad = self.on_device(root.layout.grad_elements * 4).view(torch.float32)
        root.grad_buffer = GradBuffer(grad, root, permanent=True)
        if not self.placement.on_device_root and not self.device.shares_host:
            root.device_slot = DeviceSlot(self.on_device(root.layout.slot_nbytes), root, self.device.mark())
            root.device_stale = True

    def _sides(self, layout: BlockLayout, store: Store | None) -> Sides | None:
        if store is None or self.config.durability != "step":
            return None

        def pair(nbytes: int) -> tuple[int, int]:
            return store.allocate(nbytes), store.allocate(nbytes)

        of_states = {i: pair(b.state_nbytes) for i, b in enumerate(layout.buffers) if b.trainable}
        chunk_elements = self.config.chunk_elements
        return Sides(
            pair(layout.slot_nbytes), of_states, checksum_tables(layout, chunk_elements), chunk_elements
        )

    def _states(
        self, index: int, layout: BlockLayout, store: Store | None, sides: Sides | None
    ) -> dict[int, StateExtents]:
        states: dict[int, StateExtents] = {}
        chunk_elements = self.config.chunk_elements
        left = self.placement.host_chunks[index]
        for position, buffer in enumerate(layout.buffers):
            if not buffer.trainable:
                continue
            n_chunks = -(-buffer.n_elements // chunk_elements)
            host_chunks = min(left, n_chunks)
            left -= host_chunks
            host_nbytes = buffer.first_records_nbytes(host_chunks)
            stored_nbytes = buffer.state_nbytes - host_nbytes
            if sides is not None:
                offset = sides.state_offsets[position][0] + host_nbytes
                sides.host_chunk_nbytes[position] = host_nbytes
            else:
                offset = store.allocate(stored_nbytes) if stored_nbytes and store is not None else -1
            host = self.host_arena.take(host_nbytes) if host_nbytes else None
            states[position] = StateExtents(host, host_chunks, offset)
        return states


def assemble(
    cuts: Sequence[Cut],
    config: Config,
    compute_dtype: torch.dtype | None,
    device: DeviceTier,
    spans: SpanLog,
    plan: Plan | None,
    rule: UpdateRule,
) -> Assembly:
    """Place the first of `cuts` that fits, create the store, and move every parameter to where it belongs, block by
    block.

    Raises BudgetError, that of the last, before anything is written when none fits.
    """
    for cut in cuts:
        try:
            builder = _Builder(cut, config, compute_dtype, device, plan, rule)
            break
        except BudgetError:
            if cut is cuts[-1]:
                raise
    resources = builder.make_resources(spans)
    try:
        return _fill(builder, resources)
    except BaseException:
        resources.abandon()
        raise


def _fill(builder: _Builder, resources: Resources) -> Assembly:
    """The model may be on the device: it leaves before its memory is taken for slots and gradients."""
    store, device = resources.store, resources.device
    slots = builder.make_slots()
    activation_staging = builder.host_arena.take(builder.placement.activation_staging_nbytes)
    scratch = slots[0] if slots else None
    n_on_device = builder.placement.on_device_blocks
    streamed = [builder.make_block(i, store, scratch) for i in range(n_on_device, len(builder.layouts))]
    root = builder.make_root(store)
    device.trim()
    builder.place_root(root)  # what stays of the model is in the memory that it came in until now
    blocks = [*map(builder.make_block_on_device, range(n_on_device)), *streamed]
    device_slots = builder.make_device_slots()
    grad_buffers, out_buffers = builder.make_grad_buffers()
    if builder.config.pin != "always":  # pages become present: only now is the model that was imported gone
        builder.page_lock()
    if store is not None:  # here too
        store.engine.register_buffer(builder.device_arena.address, builder.device_arena.nbytes)
        store.engine.register_buffer(builder.host_arena.address, builder.host_arena.nbytes)
    return Assembly(
        cut=builder.cut,
        blocks=blocks,
        root=root,
        slots=slots,
        device_slots=device_slots,
        grad_buffers=grad_buffers,
        out_buffers=out_buffers,
        one_gradient_each=builder.one_gradient_each,
        resources=resources,
        activation_staging=activation_staging,
        placement=builder.placement,
        device_nbytes=builder.device_nbytes,
        host_nbytes=builder.host_nbytes,
        spare_host=Spare(builder.host_nbytes - builder.placement.host_nbytes),
    )
