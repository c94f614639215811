"""What of the training state stays in the memory of a device of its own, where it is updated. Pure arithmetic on bytes.

[Note: which state stays on the device] The next forward waits for the root's update and for the first block's, whose
gradients come last: nothing hides their way over the bus and back. So it is the root's state first, then that of the
first blocks. They move nothing and ask nothing of the CPU. At least two blocks are streamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload.planner.placement import BlockBytes, LeastDevice, Placement
from offload.planner.plan import Plan, StateFormat
from offload.planner.workload import Workload

PIECE_ELEMENTS = 1 << 20
"""Elements that are updated at once, at most: few enough for the device's cache."""
SCRATCH_PLANES = 3
"""Of fp32, for what is in between."""
STREAMED_BLOCKS_MIN = 2


@dataclass(frozen=True)
class OnDevice:
    """The root's parameters, gradients and optimizer state, and those of the first `n_blocks` blocks."""

    root: bool = False
    n_blocks: int = 0

    def __bool__(self) -> bool:
        return self.root or self.n_blocks > 0

    def nbytes(self, blocks: Sequence[BlockBytes], root: BlockBytes, *, keeps_gradients: bool) -> int:
        """Device memory for all of it. `keeps_gradients`: those of blocks stay there too, since updates wait."""
        if not self:
            return 0
        found = sum(b.slot_nbytes + b.state_nbytes for b in blocks[: self.n_blocks])
        if keeps_gradients:
            found += sum(b.grad_nbytes for b in blocks[: self.n_blocks])
        if self.root:
            found += root.slot_nbytes + root.grad_nbytes + root.state_nbytes
        staying = [*blocks[: self.n_blocks], *([root] if self.root else [])]
        return found + scratch_nbytes(max(b.grad_nbytes for b in staying))


def scratch_nbytes(grad_nbytes: int) -> int:
    """What updates need for themselves, where the largest plane of fp32 gradients has so many bytes."""
    return SCRATCH_PLANES * min(4 * PIECE_ELEMENTS, grad_nbytes)


def blocks_max(grad_nbytes: Sequence[int]) -> int:
    """How many first blocks may stay. Their gradients pass through the buffers of what is streamed, which are as large
    as that needs: none stays that is followed by smaller ones alone."""
    most = max(0, len(grad_nbytes) - STREAMED_BLOCKS_MIN)
    largest = max(grad_nbytes, default=0)
    return next((n for n in range(most) if max(grad_nbytes[n + 1 :]) < largest), most)


def fill_device(
    blocks: Sequence[BlockBytes], root: BlockBytes, more_nbytes: int, *, keeps_gradients: bool
) -> OnDevice:
    """What `more_nbytes` hold beside the root's parameters and gradients, which are on the device anyway.

    See [Note: which state stays on the device]. A root without state, or too large, leaves all to the blocks.
    """
    n_blocks, grad = 0, max((b.grad_nbytes for b in blocks), default=0)
    left = more_nbytes - scratch_nbytes(max(grad, root.grad_nbytes))
    with_root = 0 < root.state_nbytes <= left
    left -= root.state_nbytes if with_root else 0
    for block in blocks[: blocks_max([b.grad_nbytes for b in blocks])]:
        nbytes = block.slot_nbytes + block.state_nbytes + (block.grad_nbytes if keeps_gradients else 0)
        if nbytes > left:
            break
        n_blocks, left = n_blocks + 1, left - nbytes
    return OnDevice(with_root, n_blocks)


def most_to_ask_for(
    blocks: Sequence[BlockBytes], root: BlockBytes, device_nbytes: int, *, keeps_gradients: bool
) -> int:
    """Bytes for `fill_device` that make most stay and leave room in `device_nbytes` for what is streamed, or 0."""
    sums = [scratch_nbytes(max([root.grad_nbytes, *(b.grad_nbytes for b in blocks)]))]
    for b in blocks[: blocks_max([b.grad_nbytes for b in blocks])]:
        sums.append(sums[-1] + b.slot_nbytes + b.state_nbytes + (b.grad_nbytes if keeps_gradients else 0))
    for asked in sorted({*sums, *(total + root.state_nbytes for total in sums)}, reverse=True):
        stays = fill_device(blocks, root, asked, keeps_gradients=keeps_gradients)
        nbytes = stays.nbytes(blocks, root, keeps_gradients=keeps_gradients)
        if nbytes + LeastDevice.of(*streamed(blocks, root, stays)).nbytes <= device_nbytes:
            return asked if stays else 0
    return 0


def streamed(
    blocks: Sequence[BlockBytes], root: BlockBytes, stays: OnDevice
) -> tuple[list[BlockBytes], BlockBytes]:
    """What is left to be placed."""
    return list(blocks[stays.n_blocks :]), BlockBytes(0, (), 0) if stays.root else root


def with_device_states(placed: Placement, stays: OnDevice, nbytes: int) -> Placement:
    """The placement of what is streamed as one of everything: what stays on the device takes `nbytes` there."""
    n = stays.n_blocks
    return replace(
        placed,
        params_in_host=[True] * n + placed.params_in_host,  # in memory, at least: no fetch brings them
        grads_in_host=[False] * n + placed.grads_in_host,
        host_chunks=[0] * n + placed.host_chunks,
        device_nbytes=placed.device_nbytes + nbytes,
        on_device_root=stays.root,
        on_device_blocks=n,
    )


def of_plan(plan: Plan) -> OnDevice:
    """What a plan keeps on the device."""
    return OnDevice(plan.on_device_root, plan.on_device_blocks)


def blocks_of(workload: Workload, state: StateFormat) -> tuple[list[BlockBytes], BlockBytes]:
    """The blocks and the root in bytes, without the padding of whole pages."""

    def bytes_of(stored_numel: int, frozen_numel: int) -> BlockBytes:
        slot_nbytes = state.param_nbytes * (stored_numel + frozen_numel)
        return BlockBytes(slot_nbytes, (state.state_of(stored_numel),), 4 * stored_numel)

    blocks = [bytes_of(b.stored_numel, b.frozen_numel) for b in workload.blocks]
    return blocks, bytes_of(workload.root_stored_numel, workload.root_frozen_numel)


def streamed_workload(
    workload: Workload, state: StateFormat, stays: OnDevice, *, keeps_gradients: bool
) -> Workload:
    """The workload without the parameters and states that stay, whose arithmetic is left. Twice is as good as once."""
    n = stays.n_blocks
    blocks, root = blocks_of(workload, state)
    numel = sum(b.stored_numel for b in workload.blocks[:n]) + workload.root_stored_numel * stays.root
    if not numel and not any(b.frozen_numel for b in workload.blocks[:n]):
        return workload
    found = replace(
        workload,
        blocks=(
            *(replace(b, trainable_numel=0, frozen_numel=0, padding_numel=0) for b in workload.blocks[:n]),
            *workload.blocks[n:],
        ),
        on_device_numel=workload.on_device_numel + numel,
        on_device_nbytes=workload.on_device_nbytes
        + stays.nbytes(blocks, root, keeps_gradients=keeps_gradients),
    )
    if stays.root:
        found = replace(
            found, root_trainable_numel=0, root_frozen_numel=0, root_padding_numel=0, root_early_numel=0
        )
    return found


def streamed_by(plan: Plan, workload: Workload) -> Workload:
    """What is left of `workload` for `plan` to stream."""
    keeps = bool(plan.deferred_blocks)
    return streamed_workload(workload, plan.state_format, of_plan(plan), keeps_gradients=keeps)
