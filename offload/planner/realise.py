"""Turns a point of the search into a plan: which block, which tensor, and what it is expected to take."""

from __future__ import annotations

import numpy as np

from offload.planner.activations import spread, spread_order
from offload.planner.cost_model import Cost, CostModel, Load
from offload.planner.memory import activation_staging_nbytes, samples_of_micro_batch
from offload.planner.plan import INPUT, Budgets, Outcome, Plan, Prediction
from offload.planner.points import Chosen, Search
from offload.planner.tables import Needs, state_pieces, waiting_in_host


def plan_of(search: Search, chosen: Chosen, budgets: Budgets) -> Plan:
    """Turn a point into a plan: which block, which tensor."""
    tables = search.tables
    needs = tables.needs(chosen.shape, budgets)
    at_waiting, at_saved, at_host, _ = chosen.index
    n_blocks = len(search.workload.blocks)
    n_deferred, grads_share = tables.waiting[at_waiting]
    deferred = spread(n_blocks, n_deferred)
    grads_in_host = set(waiting_in_host(deferred, grads_share))
    load = needs.load.at(chosen.index, needs.fits.shape)
    params_in_host, states_in_host = _placed(search, load)
    activations = _activations(search, chosen, needs, at_saved, at_host, budgets)
    return Plan(
        model=search.workload.name,
        hardware=search.hardware.name,
        batch_samples=search.model.batch,
        tokens_per_sample=search.workload.tokens_per_sample,
        state_format=search.model.format,
        micro_batches=chosen.shape.micro_batches,
        n_slots=chosen.shape.n_slots,
        n_grad_buffers=chosen.shape.n_grad_buffers,
        params_on_device=bool(load.params_stay),
        grads_once=bool(search.model.grads_once(chosen.shape.micro_batches, n_deferred)),
        durable_steps=search.model.durable_steps,
        held_blocks=_held_blocks(search, load, states_in_host),
        boundary_on_device=chosen.shape.boundary_on_device,
        deferred_blocks=tuple(deferred),
        params_in_host=params_in_host,
        grads_in_host=tuple(i in grads_in_host for i in range(n_blocks)),
        states_in_host=states_in_host,
        activations=activations,
        activation_staging_nbytes=_staging_nbytes(search, chosen, activations),
        activations_host_nbytes=int(load.swapped_host_nbytes),
        predicted=_prediction(search, needs, load, chosen.index),
    )


def _held_blocks(search: Search, load: Load, states_in_host: tuple[float, ...]) -> tuple[int, ...]:
    """The last ones, over a bus; else the last but one, where its update can be held and has something to move."""
    n_blocks = len(search.workload.blocks)
    if not search.model.rates.shares_host:
        first = n_blocks - search.model.n_streamed
        return tuple(range(max(first, n_blocks - int(load.held)), n_blocks))
    block = n_blocks - 2
    moves = load.held and (search.model.durable_steps or states_in_host[block] < 1)
    return (block,) if moves else ()


def _placed(search: Search, load: Load) -> tuple[tuple[bool, ...], tuple[float, ...]]:
    """Which block's parameters and how much of whose state, in the bytes of host memory set aside for each."""
    model, order = search.model, spread_order(len(search.workload.blocks))
    params_in_host, left = [False] * len(order), int(load.params_host_nbytes)
    for block in order:
        params_in_host[block] = model.slot_nbytes[block] <= left
        left -= model.slot_nbytes[block] * params_in_host[block]
    root = model.format.state_of(search.workload.root_stored_numel)
    held, left = [0] * (len(order) + 1), int(load.states_host_nbytes + load.root_states_host_nbytes)
    for whose, nbytes in state_pieces(model.state_nbytes, root):
        if nbytes > left:
            break
        held[whose], left = held[whose] + nbytes, left - nbytes
    fractions = [
        nbytes / whole if whole else 1.0
        for nbytes, whole in zip(held, [*model.state_nbytes, root], strict=True)
    ]
    return tuple(params_in_host), tuple(fractions)


def _activations(
    search: Search, chosen: Chosen, needs: Needs, at_saved: int, at_host: int, budgets: Budgets
) -> tuple[dict[str, Outcome], ...]:
    tables = search.tables
    order = tables.order(chosen.shape.boundary_on_device)
    spare = budgets.device_nbytes - needs.device_nbytes
    kept_at = int(tables.kept_positions(order, spare, chosen.shape)[at_saved])
    to_host = order.to_host[at_saved, at_host]
    saved = tables.saved[at_saved]
    outcomes: list[dict[str, Outcome]] = [{} for _ in search.workload.blocks]
    for position, (block, name, _) in enumerate(order.units):
        if name != INPUT and (block, name) not in saved:
            outcomes[block][name] = "recompute"
            continue
        if name == INPUT and search.space.inputs != "auto":
            outcomes[block][name] = search.space.inputs  # type: ignore[assignment]  # checked by space_of
            continue
        may_stay = name != INPUT or chosen.shape.boundary_on_device
        if position < kept_at and may_stay:
            outcomes[block][name] = "device"
        else:
            outcomes[block][name] = "host" if to_host[position] else "storage"
    return tuple(outcomes)


def _staging_nbytes(search: Search, chosen: Chosen, activations: tuple[dict[str, Outcome], ...]) -> int:
    """For what a micro-batch of one block sends to storage."""
    samples = samples_of_micro_batch(search.model.batch, chosen.shape.micro_batches)
    return activation_staging_nbytes(
        samples
        * max(
            sum(nbytes for name, nbytes in block.nbytes_by_tensor().items() if outcomes[name] == "storage")
            for block, outcomes in zip(search.workload.blocks, activations, strict=True)
        )
    )


def _prediction(search: Search, needs: Needs, load: Load, index: tuple[int, ...]) -> Prediction:
    shape = needs.fits.shape
    peaks = {
        "device": needs.device_nbytes + float(needs.kept_nbytes[index[1], index[2]]),
        "host": float(np.broadcast_to(needs.host_nbytes + needs.placed_nbytes, shape)[index]),
        "storage": float(np.broadcast_to(needs.storage_nbytes, shape)[index]),
    }
    return predict(search.model, load, {tier: int(nbytes) for tier, nbytes in peaks.items()})


def predict(model: CostModel, load: Load, peak_nbytes: dict[str, int]) -> Prediction:
    """What the cost model says of one load."""
    cost: Cost = model.cost(load)
    phases = cost.traffic
    step_s = float(cost.step_s)
    seconds = {name: float(cost.forward[name] + cost.backward[name]) for name in cost.forward}
    longest = {
        phase_s: max(phase, key=lambda name: float(phase[name]))
        for phase_s, phase in ((float(cost.forward_s), cost.forward), (float(cost.backward_s), cost.backward))
    }
    return Prediction(
        step_s=step_s,
        forward_s=float(cost.forward_s),
        backward_s=float(cost.backward_s),
        tail_s=float(cost.tail_s),
        lower_bound_s=float(cost.lower_bound_s),
        tokens_per_s=model.batch * model.workload.tokens_per_sample / step_s,
        model_flops=float(model.forward_flops + model.backward_flops),
        hardware_flops=float(model.forward_flops + model.backward_flops + load.recompute_flops),
        forward_seconds={name: float(value) for name, value in cost.forward.items()},
        backward_seconds={name: float(value) for name, value in cost.backward.items()},
        exposed_seconds={name: float(value) for name, value in cost.exposed.items()},
        bytes={
            "read": float(sum(t.read for t in phases)),
            "written": float(sum(t.written for t in phases)),
            "h2d": float(sum(t.h2d for t in phases)),
            "d2h": float(sum(t.d2h for t in phases)),
            "dram": sum(float(t.dram(model.update_dram_nbytes, model.rates.shares_host)) for t in phases),
        },
        peak_nbytes=peak_nbytes,
        binding=longest[max(longest)] if longest else max(seconds, key=lambda name: seconds[name]),
    )
