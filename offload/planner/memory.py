"""Bytes of device and host memory that a choice needs before anything is kept there by choice."""

from __future__ import annotations

from dataclasses import dataclass

from offload.config import CHUNK_ELEMENTS
from offload.model.causal_lm_loss import chunk_rows
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN, HOST_SLOTS
from offload.planner.plan import StateFormat
from offload.planner.workload import Workload, peak_of
from offload.stores.record_size import record_room_nbytes
from offload.types import PAGE_NBYTES, round_up

KERNEL_SCRATCH_NBYTES = 1 << 20
"""What kernels allocate for themselves, which no trace sees: attention on a CPU takes some 100 kB a thread."""


@dataclass(frozen=True)
class Shape:
    """The choices that set the working memory."""

    micro_batches: int
    n_slots: int
    n_grad_buffers: int
    boundary_on_device: bool


@dataclass(frozen=True)
class DeviceNeed:
    """Device memory by use, in bytes."""

    root: int
    """With all whose optimizer state stays on the device."""
    slots: int
    grad_buffers: int
    working: int
    """Tensors of the micro-batch that computes, and of the one that is being swapped."""
    boundary: int
    """What flows between blocks, and its gradient."""
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.root + self.slots + self.grad_buffers + self.working + self.boundary + self.logits


def samples_of_micro_batch(batch_samples: int, micro_batches: int) -> int:
    """Samples of the largest micro-batch."""
    return -(-batch_samples // micro_batches)


def device_need(
    workload: Workload, state: StateFormat, batch_samples: int, shape: Shape, *, shares_host: bool = False
) -> DeviceNeed:
    """Root with its gradients, slots, gradient buffers, two micro-batches of the largest block's tensors (one
    computing, one in transfer) with two temporaries, the boundary, and what the root computes with when no block does:
    at least logits with their gradient for one sample.

    Where the device shares the host's memory no micro-batch is in transfer: then a block's share is what was traced to
    be alive too (`BlockWork.working`).
    """
    samples = samples_of_micro_batch(batch_samples, shape.micro_batches)
    largest = workload.largest
    slot = state.param_nbytes * largest.slot_numel
    grad = state.grad_nbytes * largest.stored_numel
    widest = largest.input_nbytes_per_sample
    root_numel = workload.root_stored_numel + workload.root_frozen_numel
    working = samples * 2 * (largest.micro_nbytes_per_sample + largest.tensor_nbytes_per_sample)
    working += 2 * largest.saved_fixed_nbytes
    boundary = 2 * widest * (batch_samples if shape.boundary_on_device else samples)
    logits = 2 * workload.logits_nbytes_per_sample
    if shares_host and is_traced(workload):
        working = _with_root_nbytes(workload, peak_of(largest.working, samples), batch_samples)
        boundary = boundary_nbytes(workload, batch_samples, shape.micro_batches)
        logits = max(0, root_working_nbytes(workload, batch_samples) - working - boundary)
    else:
        logits = max(logits, _own_device_root_nbytes(workload, batch_samples) - working - boundary)
    return DeviceNeed(
        root=state.param_nbytes * root_numel
        + state.grad_nbytes * workload.root_stored_numel
        + workload.on_device_nbytes,
        slots=shape.n_slots * slot,
        grad_buffers=shape.n_grad_buffers * grad,
        working=working,
        boundary=boundary,
        logits=logits,
    )


def _own_device_root_nbytes(workload: Workload, batch_samples: int) -> int:
    """Bytes alive in the root's forward, loss and backward on a device of its own, where what kernels take for
    themselves is in `Budgets.device_own_nbytes`: as traced; or, with the loss in chunks, the fp32 sum of the head's
    gradient, with two fp32 buffers of logits and one in the parameters' dtype, and then with its copy in that dtype."""
    if workload.whole_logits:
        return peak_of(workload.root_working, batch_samples) or 0
    tokens = batch_samples * workload.tokens_per_sample
    words = max(1, workload.logits_nbytes_per_sample // (workload.tokens_per_sample * workload.param_nbytes))
    rows = min(tokens, chunk_rows(words, workload.head_numel // words, own_memory=True))
    logits_nbytes = (8 + workload.param_nbytes) * rows * words
    return 4 * workload.head_numel + max(logits_nbytes, workload.param_nbytes * workload.head_numel)


def is_traced(workload: Workload) -> bool:
    """Whether it is known what is alive in backward, for every block and the root."""
    return bool(workload.root_working) and bool(workload.largest.working or not workload.blocks)


def block_working_nbytes(workload: Workload, index: int, batch_samples: int, samples: float) -> int:
    """Bytes alive while a micro-batch of a block goes backward, with what the root holds meanwhile (traced ones)."""
    return _with_root_nbytes(workload, workload.blocks[index].working_nbytes(samples), batch_samples)


def _with_root_nbytes(workload: Workload, own_nbytes: int | None, batch_samples: int) -> int:
    """A block's `own_nbytes` with what else is alive meanwhile."""
    return (own_nbytes or 0) + (peak_of(workload.root_held, batch_samples) or 0) + KERNEL_SCRATCH_NBYTES


def root_working_nbytes(workload: Workload, batch_samples: int) -> int:
    """Bytes alive in the root's forward, loss and backward, which take the whole batch at once (traced ones)."""
    return (peak_of(workload.root_working, batch_samples) or 0) + KERNEL_SCRATCH_NBYTES


def read_ahead_nbytes(workload: Workload, samples: int, *, shares_host: bool) -> int:
    """At most so many bytes of the micro-batch that backward takes next, where some of it comes back from storage and
    the working memory is that of one micro-batch."""
    if not (shares_host and is_traced(workload)):
        return 0
    return samples * workload.largest.micro_nbytes_per_sample


def boundary_nbytes(workload: Workload, batch_samples: int, micro_batches: int) -> int:
    """The gradients of a block's output and input for the whole batch; with one micro-batch they are in `working`."""
    return 2 * workload.largest.input_nbytes_per_sample * batch_samples if micro_batches > 1 else 0


def activation_staging_nbytes(micro_nbytes: float) -> int:
    """Host memory through which tensors go to storage and back, `micro_nbytes` of them a micro-batch: two of these, one
    that is filled while the other is written."""
    return max(ACTIVATION_STAGING_NBYTES_MIN, 2 * round_up(int(micro_nbytes), PAGE_NBYTES))


def durable_nbytes(workload: Workload, state: StateFormat) -> int:
    """Storage of a run whose every step is durable (docs/durability.md): all parameters and state twice, wherever they
    are used from, and two commit records."""
    blocks = workload.blocks
    numels = [*(b.stored_numel for b in blocks), workload.root_stored_numel]
    trainable = sum(numels)
    frozen = sum(b.frozen_numel for b in blocks) + workload.root_frozen_numel
    record = record_room_nbytes(
        len(numels),
        sum(-(-numel // CHUNK_ELEMENTS) for numel in numels),
        len(workload.trainable_shapes),
        workload.statistics_nbytes,
    )
    return 2 * (state.stored_of(trainable) + state.param_nbytes * frozen + record)


def host_need(
    workload: Workload,
    state: StateFormat,
    batch_samples: int,
    shape: Shape,
    *,
    staging_nbytes: int,
    shares_host: bool,
    has_storage: bool,
    activation_staging: int | None = None,
) -> int:
    """Host memory for staging: the update pipeline's; three fetched blocks, two planes of gradients and the root's
    parameters and gradients on their way over the bus; two micro-batches of tensors on their way to storage
    (`activation_staging` bytes; None: all that a block saves); and the boundary where it is not on the device."""
    largest = workload.largest
    samples = samples_of_micro_batch(batch_samples, shape.micro_batches)
    need = staging_nbytes
    if not shares_host:
        slot = state.param_nbytes * largest.slot_numel
        grad = state.grad_nbytes * largest.stored_numel
        root = state.param_nbytes * (workload.root_stored_numel + workload.root_frozen_numel)
        root += state.grad_nbytes * workload.root_stored_numel
        need += root + 2 * grad + (HOST_SLOTS * slot if has_storage else 0)
    if has_storage:
        need += (
            activation_staging_nbytes(samples * largest.micro_nbytes_per_sample)
            if activation_staging is None
            else activation_staging
        )
    if not shape.boundary_on_device:
        need += 2 * batch_samples * largest.input_nbytes_per_sample
    return need
