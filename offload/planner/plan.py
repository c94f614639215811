"""The plan: every choice the executor needs, and what the planner expects of it. JSON in and out; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload.errors import ConfigError
from offload.planner.placement import records_nbytes_on_storage, state_nbytes_in_host
from offload.planner.workload import Workload
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import ADAMW

Outcome = Literal["device", "host", "storage", "recompute"]
"""What becomes of a tensor that backward needs: kept on the device, swapped out to a tier, or computed again."""

INPUT = "input"
"""Name of a block's input among its tensors. It can be kept or swapped out, never recomputed."""


class StateFormat(BaseModel):
    """Bytes a trainable parameter costs. `update_*` is what its AdamW update reads and writes beside the parameter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    param_nbytes: int = Field(gt=0)
    """What forward and backward read, and the update writes."""
    state_nbytes: int | float = Field(ge=0)
    """The rest: master (or its low half) and the optimizer's planes. Read and written once by each update."""
    grad_nbytes: int = Field(gt=0)
    """One gradient in its buffer and over the bus."""
    update_reads_param: bool
    """Whether the update needs the parameter itself (half of a split master). It then costs no read in backward mode,
    the parameter being in memory, and serves forward as well in deferred mode."""

    def state_of(self, numel: int) -> int:
        """Bytes of state of `numel` parameters."""
        return math.ceil(self.state_nbytes * numel)

    def stored_of(self, numel: int) -> int:
        """Bytes of `numel` parameters and their state."""
        return self.param_nbytes * numel + self.state_of(numel)

    @property
    def stored_nbytes(self) -> int | float:
        """All of it, as it lies in the store."""
        return self.param_nbytes + self.state_nbytes


GRAD_ONCE_NBYTES = 2
"""Of a gradient that comes once a step, in bf16, as the parameter is."""
SPLIT_MASTER = StateFormat(
    name="split master", param_nbytes=2, state_nbytes=10, grad_nbytes=4, update_reads_param=True
)
"""bf16 computing, DESIGN.md section 4: hi 2, lo 2, exp_avg 4, exp_avg_sq 4; gradients in fp32."""
FULL_MASTER = StateFormat(
    name="bf16 copy and fp32 master", param_nbytes=2, state_nbytes=12, grad_nbytes=2, update_reads_param=False
)
"""The usual mixed-precision AdamW (ZeRO, LoHan): 14 bytes stored, 16 read and 14 written a step."""
FP32 = StateFormat(name="fp32", param_nbytes=4, state_nbytes=8, grad_nbytes=4, update_reads_param=True)
"""fp32 computing: the parameter is the master."""


def state_format_of(workload: Workload) -> StateFormat:
    """The format this library uses for a model computed with `workload.param_nbytes` bytes a parameter, and updated by
    `workload.rule`."""
    base, codec = (FP32, "fp32") if workload.param_nbytes == 4 else (SPLIT_MASTER, "split_bf16")
    if workload.rule == ADAMW:
        return base
    nbytes = workload.rule.nbytes_per_element(codec)
    name = f"{base.name}, {workload.rule.described}"
    whole = int(nbytes) if nbytes == int(nbytes) else nbytes
    return base.model_copy(update={"name": name, "state_nbytes": whole})


@dataclass(frozen=True)
class Budgets:
    """What a run may use. None means no limit of its own (storage: the drives' capacity where it is known).

    `staging_nbytes` is host memory the update pipeline needs in any case. `clips_gradients` says that the update must
    wait for the global gradient norm, which makes every update deferred. `device_own_nbytes` of the device's memory
    are taken by its libraries.
    """

    device_memory_nbytes: int
    host_memory_nbytes: int
    storage_nbytes: int | None = None
    written_nbytes_per_step: int | None = None
    written_padding_nbytes: int = 0
    """What a step writes besides what is planned, since a run moves whole chunks and pages; part of the limit."""
    staging_nbytes: int = 4 * (1 << 18) * 14
    clips_gradients: bool = False
    durable_steps: bool = False
    """Every step is kept: all state lies on storage twice, and all of it is written in a step (docs/durability.md)."""
    device_own_nbytes: int = 0

    @property
    def device_nbytes(self) -> int:
        """Device memory for what is planned."""
        return self.device_memory_nbytes - self.device_own_nbytes


class Prediction(BaseModel):
    """What the cost model expects of one steady step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step_s: float
    forward_s: float
    backward_s: float
    tail_s: float
    """The end that nothing hides: the root's update, the last block's update, the machine's fixed overhead."""
    lower_bound_s: float
    """The busiest resource alone, over the whole step."""
    tokens_per_s: float
    model_flops: float
    """Of one step: forward and twice forward, without recomputation."""
    hardware_flops: float
    """With recomputation."""
    forward_seconds: dict[str, float]
    """By resource, each as if it were alone: compute, bus, storage, dram, cpu."""
    backward_seconds: dict[str, float]
    exposed_seconds: dict[str, float]
    """What the device waits for or does beside its FLOPs: update, gradient, launch (`cost_model.Cost`)."""
    bytes: dict[str, float]
    """Of one step: read and written (storage), h2d and d2h (bus), dram."""
    peak_nbytes: dict[str, int]
    """By tier: device, host, storage."""
    binding: str
    """The resource that makes most of the step: compute, bus, storage, dram or cpu."""

    @property
    def model_tflops(self) -> float:
        """Model FLOPs a second, in 10^12."""
        return self.model_flops / self.step_s / 1e12

    @property
    def hardware_tflops(self) -> float:
        """FLOPs a second with recomputation, in 10^12."""
        return self.hardware_flops / self.step_s / 1e12


class ModelParameters(BaseModel):
    """Numbers of parameters, by which a plan tells its model from others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: tuple[int, ...]
    root: int

    @classmethod
    def of(cls, workload: Workload) -> ModelParameters:
        """Trainable ones and frozen ones together."""
        blocks = tuple(b.trainable_numel + b.frozen_numel for b in workload.blocks)
        return cls(blocks=blocks, root=workload.root_trainable_numel + workload.root_frozen_numel)


class Plan(BaseModel):
    """Placement, micro-batches, activation policy, window and update mode for one workload on one machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    hardware: str
    policy: str = "offload"
    batch_samples: int = Field(ge=1)
    tokens_per_sample: int = Field(ge=1)
    state_format: StateFormat
    micro_batches: int = Field(ge=1)
    n_slots: int = Field(ge=1)
    """Blocks whose parameters are on the device at once; one computes, the others are the prefetch window."""
    n_grad_buffers: int = Field(ge=1)
    """Each holds the fp32 gradients of a block, or the bf16 ones of two (`grads_once`)."""
    params_on_device: bool = False
    """Parameters that are not in host memory stay in device memory that updates can be made in: never on storage."""
    grads_once: bool = False
    """Gradients come once a step, in bf16, and are used at once (runtime/gradients.py)."""
    durable_steps: bool = False
    """Whether every step is kept on storage: twice the bytes there, and all state is written in each."""
    held_blocks: tuple[int, ...] = ()
    """The next forward needs them last, so their updates give way to all others, and go on into it. Over a bus: the
    last blocks, whose gradients wait in host memory of their own. Else one, whose update is held until backward has
    ended, in its gradient buffer."""
    on_device_root: bool = False
    on_device_blocks: int = Field(default=0, ge=0)
    """Whether the root's optimizer state, and that of how many first blocks, stays in device memory with their
    parameters and is updated there (planner/states_on_device.py)."""
    boundary_on_device: bool
    """Whether what flows from block to block (all micro-batches of it) stays on the device between blocks."""
    deferred_blocks: tuple[int, ...]
    """Blocks whose update runs ahead of their next forward; the others are updated during backward."""
    params_in_host: tuple[bool, ...]
    grads_in_host: tuple[bool, ...]
    """Where a deferred block's gradients wait: in host memory, else on storage."""
    states_in_host: tuple[float, ...]
    """Fraction of each block's optimizer state in host memory; the last entry is the root's."""
    activations: tuple[dict[str, Outcome], ...]
    """Per block: outcome by tensor name; `input` is the block's input."""
    activations_host_nbytes: int = Field(default=0, ge=0)
    """Bytes of swapped-out tensors that are in host memory at the turn to backward, of the whole batch."""
    activation_staging_nbytes: int | None = Field(default=None, ge=0)
    """Host memory through which swapped-out tensors go to storage and back. None: two micro-batches of all tensors."""
    update_pieces: int = Field(default=16, ge=1)
    """In how many pieces at most the simulator cuts a block's update. The real pipeline's chunks may be finer still."""
    chunk_elements: int | None = Field(default=None, ge=2048)
    """Parameters of one chunk of state, which is placed, read, updated and written as a whole; the runtime's setting of
    that name. None: state can be cut anywhere."""
    update_buffers: int = Field(default=4, ge=1)
    """Pieces in flight at once. 1: read, update and write of a piece follow each other."""
    predicted: Prediction | None = None
    notes: tuple[str, ...] = ()
    parameters: ModelParameters | None = None
    """Of the model that it was made for. None: a plan of an older release, or one that no search has made."""

    def differs_from(self, workload: Workload) -> str:
        """What of `workload` is not as in the model that the plan was made for, or nothing."""
        for wanted, block in zip(self.activations, workload.blocks, strict=False):
            if other := sorted(wanted.keys() ^ block.nbytes_by_tensor().keys()):
                whose = "the plan's" if other[0] in wanted else workload.name
                return f"{block.name} saves {other[0]!r} for backward in {whose} alone"
        if self.parameters is None:
            return ""
        now = ModelParameters.of(workload)
        names = [*(b.name for b in workload.blocks), "the root"]
        then = (*self.parameters.blocks, self.parameters.root)
        for name, planned, found in zip(names, then, (*now.blocks, now.root), strict=True):
            if planned != found:
                return f"{name} has {planned:,} parameters there, and {found:,} in {workload.name}"
        return ""

    @property
    def grads_per_buffer(self) -> int:
        """Blocks whose gradients a gradient buffer holds."""
        return 2 if self.grads_once else 1

    @property
    def grad_nbytes(self) -> int:
        """Bytes of one gradient of a block, in its buffer and over the bus."""
        return GRAD_ONCE_NBYTES if self.grads_once else self.state_format.grad_nbytes

    def param_on_storage(self, block: int) -> bool:
        """Whether the block's parameters live on storage, and need a slot to be computed with."""
        return not (self.params_in_host[block] or self.params_on_device)

    @property
    def update(self) -> str:
        """`backward`, `deferred`, or `mixed` where some blocks do the one and some the other."""
        if not self.deferred_blocks:
            return "backward"
        return "deferred" if len(self.deferred_blocks) == len(self.activations) else "mixed"

    def state_in_host_nbytes(self, block: int, numel: int) -> int:
        """Bytes of a block's state (the last entry: the root's) in host memory."""
        fraction, width = self.states_in_host[block], self.state_format.state_nbytes
        if self.chunk_elements is None:
            return round(width * numel * fraction)
        return state_nbytes_in_host(numel, width, self.chunk_elements, fraction)

    def state_on_storage_nbytes(self, block: int, numel: int) -> int:
        """Bytes of a block's state (the last entry: the root's) on storage; in whole pages where chunks are known. What
        is kept of durable steps is all of it."""
        fraction = 0.0 if self.durable_steps else self.states_in_host[block]
        if self.chunk_elements is None:
            return self.state_format.state_of(numel) - round(
                self.state_format.state_nbytes * numel * fraction
            )
        return records_nbytes_on_storage(numel, self.state_format.state_nbytes, self.chunk_elements, fraction)

    def written_nbytes_per_step(self, workload: Workload) -> int:
        """Bytes that a step writes to storage, placed in whole chunks: parameters and state that live there, gradients
        that wait there, and what is swapped out to it, in whole pages."""
        state, blocks = self.state_format, workload.blocks
        samples = -(-self.batch_samples // self.micro_batches)
        numels = [b.stored_numel * (i >= self.on_device_blocks) for i, b in enumerate(blocks)]
        numels.append(workload.root_stored_numel * (not self.on_device_root))
        written = sum(self.state_on_storage_nbytes(i, n) for i, n in enumerate(numels))
        if self.durable_steps:
            written += state.param_nbytes * sum(numels)
        for i, block in enumerate(blocks):
            if self.param_on_storage(i) and not self.durable_steps:
                written += state.param_nbytes * block.stored_numel
            if i in self.deferred_blocks and not self.grads_in_host[i]:
                written += state.grad_nbytes * numels[i]
            sizes = block.nbytes_by_tensor()
            stored = [sizes[name] for name, outcome in self.activations[i].items() if outcome == "storage"]
            written += self.micro_batches * sum(round_up(samples * nbytes, PAGE_NBYTES) for nbytes in stored)
        return written

    @property
    def prefetch_blocks(self) -> int:
        """Blocks fetched ahead of the one that computes."""
        return self.n_slots - 1

    def fraction_in_host(self, kind: Literal["params", "grads", "states"]) -> float:
        """Share of the blocks' state of this kind that host memory holds (each block counts the same)."""
        values: tuple[float, ...] = {
            "params": self.params_in_host,
            "grads": self.grads_in_host,
            "states": self.states_in_host[:-1],
        }[kind]
        return sum(values) / len(values) if values else 0.0

    def to_json(self) -> str:
        """Text that `from_json` turns into an equal plan."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a saved plan. Raises ConfigError when it is none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"this is no saved plan, as `offload plan --save` writes: {where + ': ' if where else ''}{first['msg']}"
            ) from error
