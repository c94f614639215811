"""What each tier holds under a plan from the first step to the last."""

from __future__ import annotations

from offload.planner.memory import Shape, device_need, host_need
from offload.planner.plan import Plan
from offload.planner.workload import Workload


def held_nbytes(plan: Plan, workload: Workload, *, shares_host: bool, staging_nbytes: int) -> dict[str, int]:
    """What each tier holds throughout under `plan`: everything but activations and waiting gradients."""
    shape = Shape(plan.micro_batches, plan.n_slots, plan.n_grad_buffers, plan.boundary_on_device)
    state = plan.state_format
    device = device_need(workload, state, plan.batch_samples, shape)
    params = [state.param_nbytes * (b.trainable_numel + b.frozen_numel) for b in workload.blocks]
    numels = [b.trainable_numel for b in workload.blocks] + [workload.root_trainable_numel]
    states = [state.state_nbytes * numel for numel in numels]
    params_host = sum(n for n, inside in zip(params, plan.params_in_host, strict=True) if inside)
    states_host = sum(round(n * share) for n, share in zip(states, plan.states_in_host, strict=True))
    late = [i for i in plan.deferred_blocks if not plan.grads_in_host[i]]
    grads_stored = sum(state.grad_nbytes * workload.blocks[i].trainable_numel for i in late)
    return {
        "device": device.total - device.working,
        "host": params_host
        + states_host
        + host_need(
            workload,
            state,
            plan.batch_samples,
            shape,
            staging_nbytes=staging_nbytes,
            shares_host=shares_host,
            has_storage=params_host + states_host < sum(params) + sum(states),
        ),
        "storage": sum(params) + sum(states) - params_host - states_host + grads_stored,
    }
