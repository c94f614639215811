"""What each tier holds under a plan from the first step to the last."""

from __future__ import annotations

from offload.planner.memory import (
    Shape,
    boundary_nbytes,
    device_need,
    durable_nbytes,
    host_need,
    is_traced,
)
from offload.planner.plan import Plan
from offload.planner.states_on_device import streamed_by
from offload.planner.workload import Workload


def held_nbytes(
    plan: Plan, workload: Workload, *, shares_host: bool, staging_nbytes: int, has_storage: bool | None = None
) -> dict[str, int]:
    """What each tier holds throughout under `plan`: everything but activations and waiting gradients.

    `has_storage` says that the run has storage even where the plan puts no state there.
    """
    workload = streamed_by(plan, workload)
    n_slots = plan.n_slots
    if plan.params_on_device:  # a slot of its own for each block that needs one
        n_slots = min(n_slots, plan.params_in_host.count(False))
    shape = Shape(plan.micro_batches, n_slots, plan.n_grad_buffers, plan.boundary_on_device)
    state = plan.state_format
    params = [state.param_nbytes * (b.stored_numel + b.frozen_numel) for b in workload.blocks]
    numels = [b.stored_numel for b in workload.blocks] + [workload.root_stored_numel]
    states = sum(state.state_of(numel) for numel in numels)
    params_host = sum(n for n, inside in zip(params, plan.params_in_host, strict=True) if inside)
    states_host = sum(plan.state_in_host_nbytes(i, numel) for i, numel in enumerate(numels))
    params_stored = 0 if plan.params_on_device else sum(params) - params_host
    stored = params_stored + states - states_host
    if plan.durable_steps:
        stored = durable_nbytes(workload, state)
    late = {i: state.grad_nbytes * workload.blocks[i].stored_numel for i in plan.deferred_blocks}
    grads_host = sum(nbytes for i, nbytes in late.items() if plan.grads_in_host[i])
    if has_storage is None:
        has_storage = stored > 0
    need = _host_nbytes(plan, workload, shape, staging_nbytes, shares_host, has_storage)
    if not shares_host:  # gradients of updates that give way
        grad = max((state.grad_nbytes * b.stored_numel for b in workload.blocks), default=0)
        need += -(-len(plan.held_blocks) // plan.grads_per_buffer) * grad
    return {
        "device": _device_nbytes(plan, workload, shape, shares_host),
        "host": params_host + states_host + need + (grads_host if shares_host else 0),
        "storage": stored + sum(late.values()) - grads_host,
    }


def _device_nbytes(plan: Plan, workload: Workload, shape: Shape, shares_host: bool) -> int:
    """Without what comes and goes with the operations: activations, and what is alive where that was traced."""
    device = device_need(workload, plan.state_format, plan.batch_samples, shape, shares_host=shares_host)
    if shares_host and is_traced(workload):
        boundary = boundary_nbytes(workload, plan.batch_samples, plan.micro_batches)
        return device.root + device.slots + device.grad_buffers + boundary
    return device.total - device.working


def _host_nbytes(
    plan: Plan, workload: Workload, shape: Shape, staging_nbytes: int, shares_host: bool, has_storage: bool
) -> int:
    """Staging: the update pipeline's, and for tensors on their way to storage; over a bus, for all that crosses it."""
    return host_need(
        workload,
        plan.state_format,
        plan.batch_samples,
        shape,
        staging_nbytes=staging_nbytes,
        shares_host=shares_host,
        has_storage=has_storage,
        activation_staging=plan.activation_staging_nbytes,
    )
