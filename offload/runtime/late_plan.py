"""The plan of a run that was wrapped without `batch=`: made when the first step has shown its batch.

[Note: what is open then] State has been placed by budget, and micro-batches, slots and update mode are as configured:
another number of micro-batches would change the order of additions. What backward keeps or computes again changes no
bit, and is chosen now: on the device and in host memory where the budgets have room. Storage gets no tensor that it
would not get without a plan, for it would be worn by bytes that nobody asked for: only block inputs for which the
memory has no room, and never more of them. So there is a plan wherever the device holds what computes, and its
simulated step is not longer than without. Tracing a model takes about a second, so small steps are left as they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from offload.config import Config
from offload.errors import OffloadError
from offload.model.blocks import base_of
from offload.model.causal_lm_loss import has_chunked_loss
from offload.planner.hardware import Drive, Hardware, load_hardware
from offload.planner.in_room import Room, held_blocks, plans_in_room
from offload.planner.plan import Outcome, Plan, state_format_of
from offload.planner.rates import ADAM_DRAM_NBYTES, COPY_DRAM_NBYTES
from offload.planner.report import plan_lines
from offload.planner.states_on_device import streamed_by
from offload.planner.workload import Workload
from offload.profiling import compute_probe
from offload.profiling.stored import profile_path, stored_hardware
from offload.profiling.workload import profile_model
from offload.runtime import hooks
from offload.runtime.assembly import Assembly
from offload.runtime.planning import RunPlan, fixed_choices
from offload.schedule.fastest import fastest
from offload.stores.activations import ActivationStore

logger = logging.getLogger("offload")

STEP_FLOPS_MIN = 1e12
"""Steps of less arithmetic (6 FLOPs a parameter and token) are not planned for."""
_PROBE_S = 0.25
_DRIVE_BYTES_PER_S = 1e9
"""Of a drive that was never measured. It decides little of what is open; the predicted seconds depend on it."""
PCIE_BYTES_PER_S = 24.8e9
"""PCIe 4 x16, page-locked. Measuring it would take memory that the budgets have given away."""
_SUM_NBYTES = 32 << 20
_UPDATE_NUMEL = 1 << 20


def is_open(config: Config) -> bool:
    """Whether anything is left to plan once a batch is seen: nobody fixed or planned what is kept for backward."""
    planned = config.plan is not None or config.batch is not None
    fixed = "saved_activations" in config.model_fields_set or config.activations == "keep"
    return not (planned or fixed or config.compile_blocks)


class LatePlan:
    """Sees the first batch, then plans for it. Raises nothing: without a plan the run goes on as it was placed."""

    def __init__(self, model: nn.Module, config: Config, blocks: object, parts: Assembly) -> None:
        self._model, self._config, self._blocks, self._parts = model, config, blocks, parts
        self._batch: tuple[int, int] | None = None

    def saw(self, n_samples: int, tensors: Sequence[torch.Tensor]) -> None:
        """A training forward of a block with these inputs; the largest is (samples, tokens, width)."""
        if self._batch is None and tensors:
            largest = max(tensors, key=lambda tensor: tensor.numel())
            self._batch = (n_samples, int(largest.shape[1]) if largest.dim() == 3 else 0)

    def make(self, modules: list[nn.Module], activations: ActivationStore) -> RunPlan | None:
        """The plan, told line by line; None where none is worth its making, or none can be made.

        `modules` are the blocks, whose forward is the model's own while it is traced. `activations` holds what waits
        for backward: nothing now.
        """
        samples, tokens = self._batch or (0, 0)
        numel = sum(parameter.numel() for parameter in self._model.parameters())
        if 6 * numel * samples * tokens < STEP_FLOPS_MIN:
            return None
        try:
            with hooks.own_forward(modules):
                workload = profile_model(self._model, tokens, blocks=self._blocks)
            workload = replace(workload, whole_logits=not has_chunked_loss(base_of(self._model)))
            plan = self._plan(workload, samples, activations)
        except Exception as error:  # a model that we do not know may raise anything while it is traced
            level = logging.INFO if isinstance(error, OffloadError) else logging.WARNING
            logger.log(level, "what backward needs is recomputed, without a plan: %s", error)
            return None
        for line in plan_lines(plan):
            logger.info("%s", line)
        return RunPlan(plan, workload)

    def _plan(self, workload: Workload, samples: int, activations: ActivationStore) -> Plan:
        hardware = self._hardware(workload)
        placed, room = self._placed(workload, hardware, samples), self._room(workload, samples, activations)
        workload = streamed_by(placed, workload)
        inputs: Outcome | None = fixed_choices(self._config).get("inputs")
        plans = plans_in_room(placed, workload, hardware, room, inputs)
        staging_nbytes = self._parts.resources.staging.numel()
        return fastest(plans, workload, hardware, staging_nbytes=staging_nbytes)

    def _placed(self, workload: Workload, hardware: Hardware, samples: int) -> Plan:
        """The run as it is; of activations nothing is said."""
        config, parts, placement = self._config, self._parts, self._parts.placement
        numbers = range(len(parts.blocks))
        deferred = tuple(numbers) if config.deferred else ()
        plan = Plan(
            model=workload.name,
            hardware=hardware.name,
            batch_samples=samples,
            tokens_per_sample=workload.tokens_per_sample,
            state_format=state_format_of(workload),
            micro_batches=min(config.micro_batches, samples),
            n_slots=max(1, placement.n_slots),
            n_grad_buffers=max(1, placement.n_grad_buffers),
            params_on_device=placement.params_on_device,
            grads_once=parts.one_gradient_each,
            durable_steps=config.durability == "step",
            on_device_root=placement.on_device_root,
            on_device_blocks=placement.on_device_blocks,
            boundary_on_device=True,
            deferred_blocks=deferred,
            params_in_host=tuple(placement.params_in_host),
            grads_in_host=tuple(placement.grads_in_host),
            states_in_host=self._states_in_host(),
            activations=tuple({} for _ in numbers),
            activation_staging_nbytes=placement.activation_staging_nbytes,
            chunk_elements=config.chunk_elements,
        )
        if parts.resources.device.shares_host:
            held = held_blocks(plan, has_storage=bool(config.storage))
        else:
            held = tuple(numbers)[len(parts.blocks) - placement.n_held :]
        return plan.model_copy(update={"held_blocks": held})

    def _room(self, workload: Workload, samples: int, activations: ActivationStore) -> Room:
        """What the placement has left, and what the first step has had of it."""
        parts, placement = self._parts, self._parts.placement
        sizes = {samples * block.input_nbytes_per_sample for block in workload.blocks}
        unplanned_nbytes = activations.left_nbytes("device") - activations.beside_nbytes(
            max(sizes, default=0)
        )
        return Room(
            device_nbytes=parts.device_nbytes - placement.device_nbytes,
            device_unplanned_nbytes=max(0, unplanned_nbytes),
            host_nbytes=activations.left_nbytes("host"),
            host_inputs_nbytes=sum(map(activations.again_nbytes, sizes)),
            has_storage=bool(self._config.storage),
            held_nbytes={
                "device": placement.device_nbytes,
                "host": placement.host_nbytes,
                "storage": placement.storage_nbytes,
            },
        )

    def _states_in_host(self) -> tuple[float, ...]:
        """The share of every block's optimizer state, and of the root's, that is in host memory."""
        shares = []
        for record in [*self._parts.blocks, self._parts.root]:
            held = sum(e.host.numel() for e in record.states.values() if e.host is not None)
            shares.append(held / record.layout.state_nbytes if record.layout.state_nbytes else 1.0)
        return tuple(shares)

    def _hardware(self, workload: Workload) -> Hardware:
        """The machine that was named or probed; else a quick look at this one."""
        config, shares_host = self._config, self._parts.resources.device.shares_host
        if config.hardware is not None:
            return load_hardware(config.hardware)
        if os.path.isfile(profile_path()):
            stored = stored_hardware()
            if stored.shares_host == shares_host and (stored.drives or not config.storage):
                return stored
        logger.info(
            "planning with a quick look at this machine; `offload probe` measures it (and its drives) thoroughly"
        )
        return quick_look(self._model, workload, config, self._parts)


def quick_look(model: nn.Module, workload: Workload, config: Config, parts: Assembly) -> Hardware:
    """Products and DRAM measured in half a second, AdamW from DRAM, drives and bus as most machines have them."""
    device = parts.resources.device
    dtype = torch.float32 if workload.param_nbytes == 4 else torch.bfloat16
    n_tokens = 2048 if device.torch_device.type == "cuda" else 128
    rate = compute_probe.matmul_flops_per_s(
        compute_probe.matmul_shapes(model)[:2], n_tokens, dtype, device.torch_device, _PROBE_S
    )
    dram = compute_probe.dram_bytes_per_s(_PROBE_S, _SUM_NBYTES)
    on_bus = PCIE_BYTES_PER_S if device.torch_device.type == "cuda" else dram / COPY_DRAM_NBYTES
    bus = None if device.shares_host else config.bus_bytes_per_s or on_bus
    drive = Drive(read_bytes_per_s=_DRIVE_BYTES_PER_S, write_bytes_per_s=_DRIVE_BYTES_PER_S)
    own_rate = None
    if device.torch_device.type == "cuda":
        own_rate = compute_probe.device_adam_params_per_s(device, _PROBE_S / 4, _UPDATE_NUMEL)
    return Hardware(
        name="this machine, at a quick look",
        source="a quick look",
        shares_host=device.shares_host,
        device_memory_nbytes=parts.device_nbytes,
        host_memory_nbytes=parts.host_nbytes,
        matmul_flops_per_s={str(dtype).removeprefix("torch."): rate},
        h2d_bytes_per_s=bus,
        d2h_bytes_per_s=bus,
        device_adam_params_per_s=own_rate,
        dram_bytes_per_s=dram,
        adam_params_per_s=dram / ADAM_DRAM_NBYTES,
        drives=(drive,) * len(config.storage),
    )
