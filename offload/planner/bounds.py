"""Seconds that no plan of a shape of working memory can take less than: what the search need not look at.

[Note: a bound without looking] For each shape, way of waiting, saved set and share of parameters in host memory all
else is taken as good as it could be: kept on the device what its memory holds, and all that host memory has left given
to swapped tensors and to optimizer state, to each. What is left to be moved is then no more than in any plan, and every
resource's seconds grow with it. Updates that give way (`CostModel.cost`) are in forward or in backward: the bound is
the larger of the step with them in neither, and of the step as one phase, which is no longer than two (the norm of a
sum is no more than the sum of norms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from offload.planner.cost_model import Load, Traffic
from offload.planner.memory import Shape
from offload.planner.overlap import overlapped
from offload.planner.placement import ACTIVATION_STAGING_NBYTES_MIN
from offload.planner.plan import Budgets
from offload.planner.tables import HOLDS_FROM_BLOCKS, Floats, Tables


def least_step_s(tables: Tables, shapes: Sequence[Shape], budgets: Budgets) -> Floats:
    """[shape, saved set]: seconds, at most those of any point that fits. See [Note: a bound without looking]."""
    bus, found = tables.model.rates.bus, np.zeros((len(shapes), len(tables.saved)))
    if bus.h2d_duplex > bus.h2d or bus.d2h_duplex > bus.d2h:
        return found  # a direction is faster beside the other: then more bytes can take less time
    for boundary in {shape.boundary_on_device for shape in shapes}:
        at = [i for i, shape in enumerate(shapes) if shape.boundary_on_device == boundary]
        with np.errstate(over="ignore"):  # at rates at which a step never ends
            found[at] = _least_of([shapes[i] for i in at], tables, budgets)
    return found


def _least_of(shapes: Sequence[Shape], tables: Tables, budgets: Budgets) -> Floats:
    """Of shapes with the boundary in the same place."""
    model = tables.model
    load, may_move, has_room = _least_load(shapes, tables, budgets)
    forward, backward, tail = model.traffic(load)
    updates = model.early_updates(load)
    moved = {name: may_move * getattr(updates, name) for name in ("read", "written", "updated")}
    less = replace(backward, **{name: getattr(backward, name) - nbytes for name, nbytes in moved.items()})
    forward_s, backward_s, less_s = (model.seconds(traffic) for traffic in (forward, backward, less))
    update_s, gradient_s, launches_s = model.exposed_s(load, less_s)
    before_s = launches_s + load.deferred_fraction * update_s
    after_s = (1 - load.deferred_fraction) * update_s + gradient_s + launches_s + model.device_update_s
    apart_s = model.phase_s(forward_s, load, before_s) + model.phase_s(less_s, load, after_s)
    both_s = {name: forward_s[name] + backward_s[name] for name in forward_s}
    both_s["storage"] = model.seconds(_together(forward, backward))["storage"]
    compute_s = both_s["compute"] + before_s + after_s
    busy_s = [compute_s, both_s["bus"], both_s["dram"], both_s["storage"], both_s["cpu"]]
    if model.rates.shares_host:  # the thread that computes makes the copies
        busy_s[:2] = [compute_s + both_s["bus"]]
    together_s = overlapped(busy_s, model.overlap_order)
    least: Floats = np.maximum(apart_s, together_s) + model.tail_s(load, tail, model.seconds(tail))
    found: Floats = np.where(has_room, least, np.inf).min(axis=(1, 3))
    return found


def _together(one: Traffic, other: Traffic) -> Traffic:
    return Traffic(**{name: value + getattr(other, name) for name, value in vars(one).items()})


def _least_load(shapes: Sequence[Shape], tables: Tables, budgets: Budgets) -> tuple[Load, Any, Any]:
    """[shape, waiting, saved set, parameters]: no more than any plan has, the share of early updates that may give way,
    and whether the parameters have room."""
    model, order = tables.model, tables.order(shapes[0].boundary_on_device)
    shares_host, has_storage = model.rates.shares_host, model.rates.storage is not None
    n_blocks = len(model.slot_nbytes)
    column = (slice(None), None, None, None)
    micro, slots, buffers = (
        np.array([getattr(shape, name) for shape in shapes])[column]
        for name in ("micro_batches", "n_slots", "n_grad_buffers")
    )
    spare = np.array([budgets.device_nbytes - tables.device_nbytes(shape) for shape in shapes])[column]
    staging = budgets.staging_nbytes, ACTIVATION_STAGING_NBYTES_MIN
    need = [tables.host_nbytes(shape, *staging) for shape in shapes]
    late = np.array([count / n_blocks for count, _ in tables.waiting])[None, :, None, None]
    grads_host, grads_stored = (nbytes[None, :, None, None] for nbytes in tables.waiting_grads)
    rest = np.maximum(0.0, budgets.host_memory_nbytes - np.array(need, dtype=np.float64)[column] - grads_host)
    keepable = order.keepable[:, -1][None, None, :, None]
    kept = np.minimum(keepable, np.maximum(0, spare)) if tables.space.keeps_on_device else 0.0
    swapped = keepable + order.always_nbytes - kept
    left = rest - tables.params_host
    storage = np.maximum(0.0, swapped - np.maximum(0.0, left))
    states = np.minimum(tables.states_cum[-1], np.maximum(0.0, left))
    root_states = np.minimum(states, tables.root_states)
    stay = np.zeros(len(tables.params_host))
    if shares_host:
        stay = np.array([tables.params_stay(shape.n_slots, budgets) for shape in shapes])[:, None, None, :]
        may_hold = (late == 0) & has_storage & (n_blocks >= HOLDS_FROM_BLOCKS)
        may_move = np.where(may_hold, 1.0 / n_blocks, 0.0)
    else:
        grad = max(model.grad_nbytes, default=0)
        all_in_host = tables.params_counts == n_blocks
        may_move = np.where((late == 0) & all_in_host & (left >= 2 * grad), 1.0, 0.0)
    load = Load(
        deferred_fraction=late,
        params_host_nbytes=tables.params_host,
        states_host_nbytes=states - root_states,
        root_states_host_nbytes=root_states,
        grads_spilled_nbytes=grads_stored,
        swapped_host_nbytes=swapped - storage,
        swapped_storage_nbytes=storage,
        recompute_flops=(model.batch * tables.candidates.recompute_flops)[None, None, :, None],
        micro_batches=micro,
        n_slots=slots,
        n_grad_buffers=buffers,
        boundary_on_device=shapes[0].boundary_on_device,
        frozen_host_nbytes=tables.frozen_host,
        params_stay=stay,
    )
    return load, may_move, left >= 0
