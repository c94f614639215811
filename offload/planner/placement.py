"""Placement by budget: what each tier holds, or why it cannot fit. Pure arithmetic on bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import BudgetError
from offload.types import PAGE_NBYTES, round_up

ACTIVATION_STAGING_NBYTES_MAX = 64 << 20
ACTIVATION_STAGING_NBYTES_MIN = 128 << 10
ACTIVATION_STAGING_SHARE = 0.04
GRAD_BUFFERS_MAX = 4
"""Blocks whose updates may be under way while backward goes on; more let updates run further into forward."""


HOST_SLOTS = 3
"""Slots in host memory that storage is read into, where there is room: of the block that computes, whose update will
write there, of the one before it, whose update goes on, and of the next. With two, fetching waits for the update."""


@dataclass(frozen=True)
class BlockBytes:
    """What one block is made of, in bytes: parameter planes, optimizer state chunk by chunk, fp32 gradients."""

    slot_nbytes: int
    state_chunk_nbytes: tuple[int, ...]
    grad_nbytes: int

    @property
    def state_nbytes(self) -> int:
        """All chunk records."""
        return sum(self.state_chunk_nbytes)


@dataclass
class Placement:
    """Result of `place`. Index `len(blocks)` of `host_chunks` is the root."""

    n_slots: int
    """Parameter slots in device memory."""
    n_grad_buffers: int
    n_host_slots: int
    """Slots in host memory that storage is read into; 0 where the device shares the host's memory."""
    n_host_grad_buffers: int
    """For gradients that have left a device with memory of its own, fp32; those of held updates among them."""
    params_in_host: list[bool]
    grads_in_host: list[bool]
    host_chunks: list[int]
    device_nbytes: int
    host_nbytes: int
    storage_nbytes: int
    activation_staging_nbytes: int
    """Host memory through which activations go to storage; included in `host_nbytes`."""
    params_on_device: bool = False
    """Parameters that are not in host memory stay in device memory that storage's data can be read into: they are never
    stored."""
    n_held: int = 0
    """The gradients of so many blocks, the last ones, can wait in host memory while the updates of others are made."""
    on_device_root: bool = False
    on_device_blocks: int = 0
    """Whether the root's optimizer state, and that of how many first blocks, stays in device memory with their
    parameters and is updated there (planner/states_on_device.py)."""


def held_updates(left_nbytes: int, grad_nbytes: int, per_buffer: int, n_blocks: int) -> tuple[int, int]:
    """(updates that may give way to others, fp32 buffers for their gradients) that half of `left_nbytes` pays for; the
    other half is for activations and for gradients that wait. A buffer of `grad_nbytes` takes those of `per_buffer`
    blocks."""
    n_buffers = min(max(0, left_nbytes) // 2 // grad_nbytes, -(-n_blocks // per_buffer)) if grad_nbytes else 0
    return min(n_blocks, n_buffers * per_buffer), n_buffers


def _run_ahead(
    spare: int, slot: int, grad: int, least_slots: int, wanted: int, per_buffer: int, *, stays: bool
) -> tuple[int, int]:
    """(block slots, gradient buffers) that `spare` bytes beyond the least pay for.

    With a slot for every block no parameters move at all: that goes first where parameters `stays` is possible.
    Otherwise a block whose update is under way holds a slot and its gradients, so that more of either alone leave
    backward waiting for the other. Of what is left then, two thirds are for slots, which save reads at the turns, and
    the rest is for activations. A gradient buffer holds the gradients of `per_buffer` blocks.
    """
    n_slots, n_grads = least_slots, min(1, least_slots)
    overlaps = 0 if per_buffer > 1 or not grad else grad
    all_stay = (wanted - n_slots) * slot + overlaps + slot // 4
    if stays and n_slots < wanted and spare >= all_stay:
        n_slots, spare = wanted, spare - (wanted - n_slots) * slot
    if grad and n_grads and n_grads * per_buffer < 2 and spare >= grad:
        n_grads, spare = 2, spare - grad
    if n_slots < wanted and spare >= 2 * slot:
        n_slots, spare = n_slots + 1, spare - slot
    while grad and 2 <= n_grads * per_buffer < GRAD_BUFFERS_MAX:
        slots = min(per_buffer, wanted - n_slots)
        if spare < grad + slots * slot + slot or n_grads * per_buffer >= n_slots + slots:
            break
        n_slots, n_grads, spare = n_slots + slots, n_grads + 1, spare - grad - slots * slot
    more = max(0, min(wanted - n_slots, 2 * spare // (3 * slot) if slot else 0))
    return n_slots + more, n_grads


def _gb(nbytes: int) -> str:
    unit, name = next(
        ((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if nbytes >= u), (1, "bytes")
    )
    return f"{nbytes / unit:.4g} {name}"


def place(
    blocks: list[BlockBytes],
    root: BlockBytes,
    *,
    device_nbytes: int,
    host_nbytes: int,
    staging_nbytes: int,
    has_storage: bool,
    deferred: bool,
    prefetch_blocks: int | None,
    shares_host: bool = True,
    grads_per_buffer: int = 1,
    device_own_nbytes: int = 0,
    staying_nbytes: int = 0,
    held_max: int | None = None,
    computes_nbytes: int | None = None,
    inputs_wait_in: str | None = None,
) -> Placement:
    """Fill the tiers with what saves most traffic per byte of memory (DESIGN.md section 5).

    Traffic saved a step per byte held in DRAM: a parameter plane 3 (read twice, written once), a deferred gradient
    and optimizer state 2. The root's parameters stay on the device. A device that does not share the host's memory
    needs a mirror of the root, host slots and host gradient buffers besides, and half of its memory is for what it
    computes with, unless `prefetch_blocks` asks for more slots. `grads_per_buffer` is how many blocks' gradients a
    gradient buffer holds: 2 where they are not fp32. `device_own_nbytes` of the device's memory are beside
    `device_nbytes`: what its libraries, buffers and scales of quantized weights take; so are `staying_nbytes`, of
    optimizer state that stays there with its parameters. `held_max`: no more updates than
    these give way to others. `computes_nbytes`: what of `device_nbytes` is for what it computes with, where that is not
    half. `inputs_wait_in`: "device" or "host" where block inputs wait in that memory and nowhere else; half of what is
    free of it is left to them (unless `prefetch_blocks` asks for slots there). Raises BudgetError with the smallest
    budgets.
    """
    least = LeastDevice.of(blocks, root)
    slot, grad, fixed = least.slot_nbytes, least.grad_nbytes, least.root_nbytes
    n_host_slots, n_host_grads, mirror = (
        (0, 0, 0) if shares_host else (least.n_slots, min(1, len(blocks)), fixed)
    )
    if not has_storage:
        n_host_slots = 0
    activation_staging = ACTIVATION_STAGING_NBYTES_MIN if has_storage else 0
    always = staging_nbytes + activation_staging + mirror + n_host_grads * grad
    everything = sum(b.slot_nbytes + b.state_nbytes + (b.grad_nbytes if deferred else 0) for b in blocks)
    everything += root.state_nbytes
    least_host = always + (n_host_slots * slot if has_storage else everything)
    _refuse_what_cannot_fit(
        least,
        device_nbytes,
        staying_nbytes=staying_nbytes,
        own_nbytes=device_own_nbytes,
        host_nbytes=host_nbytes,
        least_host_nbytes=least_host,
        has_storage=has_storage,
    )
    spare = device_nbytes - least.nbytes
    if not shares_host and prefetch_blocks is None:
        computes = device_nbytes - device_nbytes // 2 if computes_nbytes is None else computes_nbytes
        spare = max(0, spare - computes)
    if shares_host and prefetch_blocks is None and inputs_wait_in == "device":
        spare //= 2
    wanted = len(blocks) if prefetch_blocks is None else min(len(blocks), prefetch_blocks + 1)
    n_slots, n_grad_buffers = _run_ahead(
        spare,
        slot,
        grad,
        least.n_slots,
        wanted,
        grads_per_buffer,
        stays=shares_host and has_storage and wanted == len(blocks),
    )
    params_on_device = shares_host and has_storage and n_slots == len(blocks) > 0
    left = host_nbytes - always
    if has_storage:
        more = _more_activation_staging_nbytes(left - n_host_slots * slot)
        activation_staging, left = activation_staging + more, left - more
    free = left - n_host_slots * slot
    inputs_nbytes = free // 2 if has_storage and inputs_wait_in == "host" else 0
    left -= inputs_nbytes
    if left >= everything:
        n_host_slots = 0  # every block has host memory of its own
    left -= n_host_slots * slot
    second = grad + slot * (n_host_slots > 0)
    if not shares_host and left >= second + (0 if n_host_slots else everything):
        n_host_grads, left = 2 * n_host_grads, left - grad * n_host_grads
        n_host_slots, left = n_host_slots + (n_host_slots > 0), left - slot * (n_host_slots > 0)
    params_in_host, grads_in_host, host_chunks, left = fill_host(
        blocks, root, left, deferred, params_elsewhere=params_on_device
    )
    n_held = 0
    if not shares_host and all(params_in_host):
        left, n_host_slots = left + n_host_slots * slot, 0
        if not deferred:
            to_hold = len(blocks) if held_max is None else min(held_max, len(blocks))
            n_held, more = held_updates(left, grad, grads_per_buffer, to_hold)
            n_host_grads, left = n_host_grads + more, left - more * grad
    storage = 0
    for i, block in enumerate([*blocks, root]):
        storage += sum(block.state_chunk_nbytes[host_chunks[i] :])
        if i < len(blocks):
            storage += 0 if params_in_host[i] or params_on_device else block.slot_nbytes
    return Placement(
        n_slots=n_slots,
        n_grad_buffers=n_grad_buffers,
        n_host_slots=n_host_slots,
        n_host_grad_buffers=n_host_grads,
        params_in_host=params_in_host,
        grads_in_host=grads_in_host,
        host_chunks=host_chunks,
        device_nbytes=fixed + n_slots * slot + n_grad_buffers * grad,
        host_nbytes=host_nbytes - left - inputs_nbytes,
        storage_nbytes=storage,
        activation_staging_nbytes=activation_staging,
        params_on_device=params_on_device,
        n_held=n_held,
    )


def first_chunks(chunk_nbytes: Sequence[int], fraction: float) -> int:
    """How many of the first chunks come nearest to `fraction` of all their bytes."""
    wanted_nbytes, n = fraction * sum(chunk_nbytes), 0
    for nbytes in chunk_nbytes:
        wanted_nbytes -= nbytes
        if wanted_nbytes < -nbytes / 2:
            break
        n += 1
    return n


def state_nbytes_in_host(numel: int, state_nbytes: float, chunk_elements: int, fraction: float) -> int:
    """Bytes of the state of `numel` parameters that whole chunks put into host memory for `fraction` of them."""
    chunks = _chunks(numel, state_nbytes, chunk_elements)
    return sum(chunks[: first_chunks(chunks, fraction)])


def records_nbytes_on_storage(numel: int, state_nbytes: float, chunk_elements: int, in_host: float) -> int:
    """Bytes of the records of the chunks that are left beside those of `state_nbytes_in_host`: whole pages each."""
    chunks = _chunks(numel, state_nbytes, chunk_elements)
    return sum(round_up(nbytes, PAGE_NBYTES) for nbytes in chunks[first_chunks(chunks, in_host) :])


def _chunks(numel: int, state_nbytes: float, chunk_elements: int) -> list[int]:
    whole, rest = divmod(numel, chunk_elements)
    chunks = [math.ceil(chunk_elements * state_nbytes)] * whole
    return chunks + ([math.ceil(rest * state_nbytes)] if rest else [])


@dataclass(frozen=True)
class LeastDevice:
    """Of the device's memory, what streaming needs: slots, one gradient buffer, and the root. In bytes."""

    root_nbytes: int
    """Parameters and gradients."""
    n_slots: int
    slot_nbytes: int
    grad_nbytes: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.root_nbytes + self.n_slots * self.slot_nbytes + self.grad_nbytes

    @classmethod
    def of(cls, blocks: Sequence[BlockBytes], root: BlockBytes) -> LeastDevice:
        """What these blocks need."""
        return cls(
            root.slot_nbytes + root.grad_nbytes,
            min(2, len(blocks)),
            max((b.slot_nbytes for b in blocks), default=0),
            max((b.grad_nbytes for b in blocks), default=0),
        )

    def lacking(self, device_nbytes: int, *, staying_nbytes: int, own_nbytes: int) -> str:
        """What to say where `device_nbytes` are less; the others are beside them, and named where there are any."""
        beside = staying_nbytes + own_nbytes
        said = (
            f"device_memory={_gb(device_nbytes + beside)} but at least {_gb(self.nbytes + beside)} is needed: root "
            f"{_gb(self.root_nbytes)} + {self.n_slots} block slots of {_gb(self.slot_nbytes)} + one gradient buffer of "
            f"{_gb(self.grad_nbytes)}"
        )
        if staying_nbytes:
            said += f" + {_gb(staying_nbytes)} for optimizer state that stays there and its parameters"
        if own_nbytes:
            said += f" + {_gb(own_nbytes)} for the libraries of the device, buffers and scales of quantized weights"
        return said


def _refuse_what_cannot_fit(
    least: LeastDevice,
    device_nbytes: int,
    *,
    staying_nbytes: int,
    own_nbytes: int,
    host_nbytes: int,
    least_host_nbytes: int,
    has_storage: bool,
) -> None:
    problems = []
    if device_nbytes < least.nbytes:
        problems.append(least.lacking(device_nbytes, staying_nbytes=staying_nbytes, own_nbytes=own_nbytes))
    if host_nbytes < least_host_nbytes:
        what = (
            "staging" if has_storage else "staging and all training state, since storage=[] means DRAM only"
        )
        problems.append(
            f"host_memory={_gb(host_nbytes)} but at least {_gb(least_host_nbytes)} is needed for {what}"
        )
    if problems:
        raise BudgetError(
            "does not fit: "
            + "; ".join(problems)
            + f". Smallest that would do: device_memory='{least.nbytes + staying_nbytes + own_nbytes}', "
            f"host_memory='{least_host_nbytes}' (bytes)"
            + ("" if has_storage else ", and beside it what waits for backward; or give storage=[directory]")
        )


def _more_activation_staging_nbytes(left_nbytes: int) -> int:
    """A small share, in whole pages twice over: two pieces, one filled while the other is written."""
    wanted = min(ACTIVATION_STAGING_NBYTES_MAX, int(max(0, left_nbytes) * ACTIVATION_STAGING_SHARE))
    return wanted // (2 * PAGE_NBYTES) * (2 * PAGE_NBYTES)


def fill_host(
    blocks: list[BlockBytes], root: BlockBytes, left: int, deferred: bool, *, params_elsewhere: bool = False
) -> tuple[list[bool], list[bool], list[int], int]:
    """(parameters in host, waiting gradients in host, state chunks in host, bytes left), most saving first."""
    params_in_host = [False] * len(blocks)
    grads_in_host = [False] * len(blocks)
    host_chunks = [0] * (len(blocks) + 1)
    for i, block in enumerate(blocks):
        if block.slot_nbytes <= left and not params_elsewhere:
            params_in_host[i] = True
            left -= block.slot_nbytes
    if deferred:
        for i, block in enumerate(blocks):
            if block.grad_nbytes <= left:
                grads_in_host[i] = True
                left -= block.grad_nbytes
    for i, chunk_nbytes in state_order([*(b.state_chunk_nbytes for b in blocks), root.state_chunk_nbytes]):
        if chunk_nbytes > left:
            break
        host_chunks[i] += 1
        left -= chunk_nbytes
    return params_in_host, grads_in_host, host_chunks, left


def state_order(chunk_nbytes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Chunks of optimizer state, of each block and of the root at last, in the order in which host memory takes them:
    (whose, bytes). The root's, whose update nothing hides; those of the first block that has any, whose gradients come
    last and which forward needs first; then the same share of every other, so that storage has work for the whole of
    backward, while the CPU updates what is in host memory."""
    *blocks, root = chunk_nbytes
    first = next((i for i, block in enumerate(blocks) if sum(block)), -1)
    rest = sorted(
        ((k + 1) / len(block), i, k)
        for i, block in enumerate(blocks)
        if i != first
        for k in range(len(block))
    )
    order = [(len(blocks), nbytes) for nbytes in root]
    order += [(first, nbytes) for nbytes in (blocks[first] if first >= 0 else ())]
    return order + [(i, blocks[i][k]) for _, i, k in rest]
