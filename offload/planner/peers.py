"""What a published system would do on the same machine, as a plan, for comparison in the same simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from offload.planner.activations import candidates, unit_order
from offload.planner.cost_model import CostModel, Load
from offload.planner.hardware import Hardware
from offload.planner.memory import Shape, host_need
from offload.planner.plan import FULL_MASTER, INPUT, Budgets, Outcome, Plan
from offload.planner.realise import predict
from offload.planner.workload import SavedTensor, Workload

LOHAN_UPDATE_BUFFERS = 1
"""A block's states are read, updated and written back one after the other. With one block's state in flight at a time
reads, arithmetic and writes do not overlap; the published step times over the number of drives say so: extrapolated
to infinitely many drives, 10 s more than forward remain."""


def lohan_workload(workload: Workload) -> Workload:
    """`workload` as LoHan cuts it: a block that is recomputed is recomputed whole. What no saved tensor accounts for,
    the block's last product, becomes a unit as large as the block's output (fc2 in its paper, 4h FLOPs per byte)."""
    blocks = []
    for block in workload.blocks:
        rest = block.flops_per_sample - sum(t.recompute_flops_per_sample for t in block.saved)
        saved = block.saved
        if rest > 0.01 * block.flops_per_sample:
            saved = (*saved, SavedTensor("output", "linear", block.input_nbytes_per_sample, rest))
        blocks.append(replace(block, saved=saved))
    return replace(workload, blocks=tuple(blocks))


def lohan_plan(
    workload: Workload,
    hardware: Hardware,
    *,
    batch_samples: int,
    host_memory_nbytes: int | None = None,
) -> Plan:
    """LoHan (Ratel, Fuyou; arXiv 2403.06504) as its paper describes it: 14 bytes of state a parameter, all of it on
    storage; the optimizer during backward, block by block; one micro-batch; block inputs swapped out, other tensors
    where its cost model (a phase takes as long as its busiest resource) finds that worth the bytes, FLOPs per byte
    first and least bytes among equals, to host memory first and then to storage; the rest recomputed.

    `workload` is one that `lohan_workload` has cut. The plan is not held to the device's memory: what its 24 GB
    must hold at a batch is not published.
    """
    model = CostModel(workload, hardware, FULL_MASTER, batch_samples, overlap_order=np.inf)
    host_nbytes = hardware.host_memory_nbytes if host_memory_nbytes is None else host_memory_nbytes
    shape = Shape(micro_batches=1, n_slots=3, n_grad_buffers=2, boundary_on_device=True)
    fixed_nbytes = host_need(
        workload,
        FULL_MASTER,
        batch_samples,
        shape,
        staging_nbytes=Budgets(0, 0).staging_nbytes,
        shares_host=hardware.shares_host,
        has_storage=True,
    )
    room = max(0, host_nbytes - fixed_nbytes)
    found = candidates(workload)
    swapped = model.input_nbytes + batch_samples * found.saved_nbytes
    load = Load(
        deferred_fraction=0.0,
        params_host_nbytes=0.0,
        states_host_nbytes=0.0,
        root_states_host_nbytes=0.0,
        grads_spilled_nbytes=0.0,
        swapped_host_nbytes=np.minimum(swapped, room),
        swapped_storage_nbytes=np.maximum(0.0, swapped - room),
        recompute_flops=batch_samples * found.recompute_flops,
        micro_batches=shape.micro_batches,
        n_slots=shape.n_slots,
        n_grad_buffers=shape.n_grad_buffers,
        boundary_on_device=shape.boundary_on_device,
        serial_update=LOHAN_UPDATE_BUFFERS == 1,
    )
    step_s = np.broadcast_to(model.cost(load).step_s, swapped.shape)
    at = int(np.argmax(step_s <= step_s.min() * (1 + 1e-9)))
    one = load.at((at,), swapped.shape)
    n_blocks = len(workload.blocks)
    return Plan(
        model=workload.name,
        hardware=hardware.name,
        policy="LoHan",
        batch_samples=batch_samples,
        tokens_per_sample=workload.tokens_per_sample,
        state_format=FULL_MASTER,
        micro_batches=shape.micro_batches,
        n_slots=shape.n_slots,
        n_grad_buffers=shape.n_grad_buffers,
        boundary_on_device=shape.boundary_on_device,
        deferred_blocks=(),
        params_in_host=(False,) * n_blocks,
        grads_in_host=(False,) * n_blocks,
        states_in_host=(0.0,) * (n_blocks + 1),
        activations=_outcomes(workload, found.members(at), room // batch_samples),
        update_pieces=1,
        update_buffers=LOHAN_UPDATE_BUFFERS,
        predicted=predict(model, one, {}),
    )


def _outcomes(
    workload: Workload, saved: set[tuple[int, str]], room_per_sample: int
) -> tuple[dict[str, Outcome], ...]:
    """Saved tensors into host memory in the order of forward until it is full, then to storage."""
    outcomes: list[dict[str, Outcome]] = [{} for _ in workload.blocks]
    for block, name, nbytes in sorted(unit_order(workload), key=lambda unit: unit[0]):
        if name != INPUT and (block, name) not in saved:
            outcomes[block][name] = "recompute"
        elif nbytes <= room_per_sample:
            outcomes[block][name] = "host"
            room_per_sample -= nbytes
        else:
            outcomes[block][name] = "storage"
    return tuple(outcomes)
