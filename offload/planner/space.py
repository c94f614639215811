"""The space the planner searches: which values each choice may take, as the user's fixed choices leave them.

The grids depend on the workload and the batch alone, never on a budget: a larger budget therefore only adds
possibilities, which is why it can never make the chosen plan slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.errors import ConfigError
from offload.planner.placement import GRAD_BUFFERS_MAX
from offload.planner.plan import Budgets
from offload.planner.workload import Workload

EIGHTHS = tuple(i / 8 for i in range(9))
QUARTERS = tuple(i / 4 for i in range(5))
MICRO_BATCHES_MAX = 64
SLOTS = (2, 3, 4, 6, 8)
SLOTS_WHERE_SHARED = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24)
"""Each saves reads at both turns, and what is in memory of its own is not stored at all: worth a finer grid."""
OFF_DEVICE_MICRO_BATCHES_MIN = 4
"""Where the boundary leaves the device, a micro-batch's way out and back hides behind the others' computing; with fewer
of them it would be waited for. A user who fixes `boundary_on_device=False` may have it."""

FIXABLE = {
    "micro_batches": "number of micro-batches, 1 or more",
    "update": "'backward', 'deferred' or 'mixed'",
    "deferred_fraction": "share of the blocks whose update is deferred, 0 to 1",
    "prefetch_blocks": "blocks fetched ahead, 0 or more",
    "grad_buffers": "gradient buffers on the device, 1 or more",
    "boundary_on_device": "True or False",
    "activations": "'auto', 'recompute' (only block inputs are saved), 'save' (nothing is recomputed) or 'keep' "
    "(nothing is recomputed or leaves the device)",
    "inputs": "'auto', 'device', 'host' or 'storage': where block inputs wait for backward",
    "activations_on_device": "True, or False: nothing is kept on the device but what computes",
    "activations_host_fraction": "share of the swapped tensors that go to host memory, 0 to 1",
    "grads_host_fraction": "share of the deferred blocks whose gradients wait in host memory, 0 to 1",
    "params_host_fraction": "share of the blocks whose parameters live in host memory, 0 to 1",
    "states_host_fraction": "share of all optimizer state in host memory, 0 to 1",
    "states_on_device": "bytes of device memory for optimizer state that stays there, 0 for none",
}


@dataclass(frozen=True)
class Space:
    """Values to try for each choice. None for optimizer state means: as much as the rest of host memory holds."""

    micro_batches: tuple[int, ...]
    n_slots: tuple[int, ...]
    n_grad_buffers: tuple[int, ...]
    boundary_on_device: tuple[bool, ...]
    off_device_micro_batches_min: int
    deferred_blocks: tuple[int, ...]
    activations: str
    inputs: str
    keeps_on_device: bool
    swapped_host_fractions: tuple[float, ...]
    grads_host_fractions: tuple[float, ...]
    params_host_fractions: tuple[float, ...]
    states_host_fraction: float | None


def _fraction(fixed: Mapping[str, Any], name: str) -> float | None:
    value = fixed.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{name}={value!r}: it must be {FIXABLE[name]}")
    return float(value)


def _truth(fixed: Mapping[str, Any], name: str) -> bool | None:
    value = fixed.get(name)
    if value is None:
        return None
    if value not in (0, 1):
        raise ConfigError(f"{name}={value!r}: it must be {FIXABLE[name]}")
    return bool(value)


def _whole(fixed: Mapping[str, Any], name: str, least: int) -> int | None:
    value = fixed.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: it must be {FIXABLE[name]}")
    return value


def _of(n_all: int, fractions: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(sorted({round(f * n_all) for f in fractions}))


def _micro_batches(batch_samples: int) -> tuple[int, ...]:
    """Divisors of the batch and powers of two, as far as they give different sizes; at most 64 micro-batches unless
    one sample at a time needs more."""
    wanted = {m for m in range(1, min(batch_samples, MICRO_BATCHES_MAX) + 1) if batch_samples % m == 0}
    wanted |= {1 << i for i in range(7) if 1 << i <= batch_samples} | {batch_samples}
    by_samples: dict[int, int] = {}
    for m in sorted(wanted, reverse=True):
        by_samples[-(-batch_samples // m)] = m
    return tuple(sorted(by_samples.values()))


def _deferred(fixed: Mapping[str, Any], n_blocks: int, clips: bool, durable_steps: bool) -> tuple[int, ...]:
    """Numbers of deferred blocks. Some of them: where it is asked for, and see choice.py, [Note: when some wait]."""
    update, fraction = fixed.get("update", "auto"), _fraction(fixed, "deferred_fraction")
    if update not in ("auto", "backward", "deferred", "mixed"):
        raise ConfigError(f"update={update!r}: it must be {FIXABLE['update']}")
    if clips and durable_steps and update == "backward":
        return (0,)  # a step that turns out too large is discarded
    if clips and (update in ("backward", "mixed") or (fraction is not None and fraction < 1)):
        raise ConfigError(
            "clipping by the global gradient norm needs every gradient before the first update: use update='deferred'"
        )
    if fraction is not None:
        return (round(fraction * n_blocks),)
    if clips or update == "deferred":
        return (n_blocks,)
    if update == "backward":
        return (0,)
    return _of(n_blocks, EIGHTHS if update == "mixed" else (0.0, 1.0))


def _grad_buffers(shares_host: bool) -> tuple[int, ...]:
    """Over a bus a buffer is free again when its gradients have left; in host memory only when they have been used."""
    return tuple(range(1, (GRAD_BUFFERS_MAX if shares_host else 2) + 1))


def space_of(
    workload: Workload, budgets: Budgets, fixed: Mapping[str, Any], batch_samples: int, shares_host: bool
) -> Space:
    """Everything to try. Raises ConfigError for unknown or impossible fixed choices."""
    unknown = sorted(set(fixed) - set(FIXABLE))
    if unknown:
        raise ConfigError(
            f"unknown choice {unknown[0]!r}; what can be fixed: "
            + "; ".join(f"{name} ({what})" for name, what in FIXABLE.items())
        )
    n_blocks = len(workload.blocks)
    micro = _whole(fixed, "micro_batches", 1)
    prefetch, grad_buffers = _whole(fixed, "prefetch_blocks", 0), _whole(fixed, "grad_buffers", 1)
    boundary, keeps = _truth(fixed, "boundary_on_device"), _truth(fixed, "activations_on_device")
    activations = fixed.get("activations", "auto")
    if activations not in ("auto", "recompute", "save", "keep"):
        raise ConfigError(f"activations={activations!r}: it must be {FIXABLE['activations']}")
    inputs = "device" if activations == "keep" else fixed.get("inputs", "auto")
    if inputs not in ("auto", "device", "host", "storage"):
        raise ConfigError(f"inputs={inputs!r}: it must be {FIXABLE['inputs']}")
    if inputs == "device" and boundary is not None and not boundary:
        raise ConfigError("boundary_on_device=False and block inputs on the device contradict each other")
    if micro is not None and micro > batch_samples:
        raise ConfigError(f"micro_batches={micro} but the batch has {batch_samples} samples")
    windows = SLOTS_WHERE_SHARED if shares_host else SLOTS
    n_streamed = max(1, sum(block.stored_numel + block.frozen_numel > 0 for block in workload.blocks))
    slots = tuple(sorted({min(n, n_streamed) for n in (*windows, n_streamed)}))
    host_fraction = _fraction(fixed, "activations_host_fraction")
    grads_fraction = _fraction(fixed, "grads_host_fraction")
    params_fraction = _fraction(fixed, "params_host_fraction")
    return Space(
        micro_batches=_micro_batches(batch_samples) if micro is None else (micro,),
        n_slots=slots if prefetch is None else (min(max(2, prefetch + 1), n_streamed),),
        n_grad_buffers=_grad_buffers(shares_host) if grad_buffers is None else (grad_buffers,),
        boundary_on_device=(True,)
        if shares_host or inputs == "device"
        else (True, False)
        if boundary is None
        else (boundary,),
        off_device_micro_batches_min=OFF_DEVICE_MICRO_BATCHES_MIN if boundary is None else 1,
        deferred_blocks=_deferred(fixed, n_blocks, budgets.clips_gradients, budgets.durable_steps),
        activations=activations,
        inputs=inputs,
        keeps_on_device=keeps is not False,
        swapped_host_fractions=EIGHTHS if host_fraction is None else (host_fraction,),
        grads_host_fractions=QUARTERS if grads_fraction is None else (grads_fraction,),
        params_host_fractions=EIGHTHS if params_fraction is None else (params_fraction,),
        states_host_fraction=_fraction(fixed, "states_host_fraction"),
    )
