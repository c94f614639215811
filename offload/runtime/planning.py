"""Between the planner and the runtime: a model and its budgets become a plan, a plan becomes placement and policies."""

from __future__ import annotations

import difflib
import logging
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from offload.config import NO_PLAN, Config, parse_budget
from offload.errors import BudgetError, ConfigError
from offload.model.blocks import base_of
from offload.model.causal_lm_loss import has_chunked_loss
from offload.planner.hardware import Hardware, load_hardware
from offload.planner.placement import (
    ACTIVATION_STAGING_NBYTES_MIN,
    HOST_SLOTS,
    BlockBytes,
    Placement,
    first_chunks,
    held_updates,
    place,
)
from offload.planner.plan import INPUT, Budgets, Plan, state_format_of
from offload.planner.workload import Workload
from offload.profiling.stored import stored_hardware
from offload.profiling.workload import profile_model
from offload.recompute.recipe import Recipe
from offload.schedule.fastest import make_simulated_plan
from offload.stores.activations import Tier
from offload.tiers.storage import free_nbytes
from offload.types import PAGE_NBYTES
from offload.update_rules import ADAMW, UpdateRule

logger = logging.getLogger("offload")

_TIERS: dict[str, Tier] = {"device": "device", "host": "host", "storage": "storage"}

_SAVED_IN: dict[str, dict[str, Any]] = {
    "recompute": {"activations": "recompute"},
    "device": {"activations": "save"},
    "host": {"activations": "save", "activations_on_device": False, "activations_host_fraction": 1.0},
    "storage": {"activations": "save", "activations_on_device": False, "activations_host_fraction": 0.0},
}
"""What `saved_activations` fixes. What finds no room on the device is swapped out."""

_PLANS_OWN = (
    "micro_batches",
    "prefetch_blocks",
    "update",
    "activations",
    "saved_activations",
    "states_on_device",
)
"""Settings that a saved plan has its own choice of."""


@dataclass(frozen=True)
class RunPlan:
    """A plan with the workload it was made for."""

    plan: Plan
    workload: Workload
    _tiers: dict[tuple[int, int], tuple[Recipe, dict[int, Tier]]] = field(default_factory=dict, compare=False)
    """What `tiers_of_saved` has answered, with the recipe it was asked for."""

    def input_tier(self, block: int) -> Tier | None:
        """Where the block's input waits for backward."""
        return _TIERS.get(self.plan.activations[block].get(INPUT, ""))

    def defers(self, block: int | None) -> bool:
        """Whether the block's update (None: the root's) waits for the end of the step."""
        if block is None:
            return len(self.plan.deferred_blocks) == len(self.plan.activations)
        return block in self.plan.deferred_blocks

    def tiers_of_saved(self, block: int, recipe: Recipe) -> dict[int, Tier]:
        """Operations of `recipe` whose results are kept, by the plan's outcome for the tensors they make.

        Both list saved tensors in the order in which forward makes them. Where the real forward saves others than the
        traced one (a kernel that does several operations at once), those of one size are taken for each other in that
        order, and what has no counterpart is recomputed.
        """
        key = (block, id(recipe))
        if key not in self._tiers:
            self._tiers[key] = (recipe, self._choose_tiers(block, recipe))
        return self._tiers[key][1]

    def _choose_tiers(self, block: int, recipe: Recipe) -> dict[int, Tier]:
        outcomes = [o for name, o in self.plan.activations[block].items() if name != INPUT]
        planned, real = self.workload.blocks[block].saved, recipe.large()
        if len(outcomes) != len(planned) or not planned or not real:
            return {}
        pairs: list[tuple[int, int]] = [(i, i) for i in range(len(real))]
        if len(planned) != len(real):
            pairs = _of_one_size([t.nbytes_per_sample for t in planned], [value.nbytes for value in real])
        tiers: dict[int, Tier] = {}
        for i, j in pairs:
            outcome, value = outcomes[i], real[j]
            if outcome != "recompute" and recipe.ops[value.op].may_keep:
                tiers[value.op] = _TIERS[outcome]
        return tiers


def _of_one_size(planned: list[int], real: list[int]) -> list[tuple[int, int]]:
    """Positions in both lists, ascending, of tensors of one size, where the largest of both are the same."""
    of_real = [round(nbytes * max(planned) / max(real)) for nbytes in real]
    matcher = difflib.SequenceMatcher(None, planned, of_real, autojunk=False)
    return [(m.a + i, m.b + i) for m in matcher.get_matching_blocks() for i in range(m.size)]


@dataclass(frozen=True)
class NoPlan:
    """The same questions answered by the settings, and by where there is room."""

    saved_activations: Literal["recompute", "device", "host", "storage"]
    deferred: bool
    plan: None = None

    def defers(self, block: int | None) -> bool:
        """All or none."""
        return self.deferred

    def input_tier(self, block: int) -> Tier | None:
        """Where there is room."""
        return None

    def tiers_of_saved(self, block: int, recipe: Recipe) -> dict[int, Tier]:
        """All that may be kept, or nothing."""
        if self.saved_activations == "recompute":
            return {}
        return {value.op: self.saved_activations for value in recipe.keepable()}


def hardware_for(config: Config, shares_host: bool) -> Hardware:
    """The machine that `config.hardware` names, or this machine's own profile.

    Raises ConfigError without one, or when its device is of another kind than the one that will compute.
    """
    hardware = load_hardware(config.hardware) if config.hardware else stored_hardware()
    if hardware.shares_host != shares_host:
        kinds = {True: "computes in host memory", False: "has a device with memory of its own"}
        raise ConfigError(
            f"the profile {hardware.name!r} is of a machine that {kinds[hardware.shares_host]}, this run "
            f"{kinds[shares_host]}: name another profile with hardware=..., or run `offload probe` here"
        )
    return hardware


def fixed_choices(config: Config) -> dict[str, Any]:
    """What the user has chosen, as the planner names it. Fields left at their defaults are the planner's to choose."""
    fixed: dict[str, Any] = {"boundary_on_device": True}
    chosen = config.model_fields_set
    if "micro_batches" in chosen:
        fixed["micro_batches"] = config.micro_batches
    if config.prefetch_blocks is not None:
        fixed["prefetch_blocks"] = config.prefetch_blocks
    if config.update != "auto":
        fixed["update"] = config.update
    if "saved_activations" in chosen:
        fixed |= _SAVED_IN[config.saved_activations]
    if config.activations == "keep":
        fixed["activations"] = "keep"
    elif config.activations != "auto":
        fixed["inputs"] = config.activations
    return fixed


def _refuse_beside_plan(config: Config) -> None:
    """A saved plan is used as it is: what the user fixes besides would contradict it unseen."""
    defaults = {name: Config.model_fields[name].default for name in _PLANS_OWN}
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} and plan=: a saved plan has its own choice; leave out one of them"
            )


def plan_run(
    model: nn.Module,
    config: Config,
    blocks: object,
    *,
    device_nbytes: int,
    host_nbytes: int,
    staging_nbytes: int,
    shares_host: bool,
    device_own_nbytes: int = 0,
    updates_faster: bool = False,
    rule: UpdateRule = ADAMW,
    compute_dtype: Any = None,
    inputs: Callable[[int], Any] | None = None,
) -> RunPlan | None:
    """The plan for `config.batch`, made or as given; None where no batch is known and nothing is to be planned.

    `compute_dtype` as in `offload.wrap`; `updates_faster` as `DeviceTier` has it. Raises BudgetError when nothing fits,
    and ConfigError for a plan of another model or dtype, for settings that contradict it, or for a machine without
    profile.
    """
    if config.plan == NO_PLAN or (config.plan is None and config.batch is None):
        return None
    given = None if config.plan is None else _read_plan(config.plan)
    tokens = given.tokens_per_sample if given is not None else (config.batch or (1, 1))[1]
    workload = profile_model(model, tokens, blocks=blocks, inputs=inputs, compute_dtype=compute_dtype)
    workload = replace(workload, rule=rule, whole_logits=not has_chunked_loss(base_of(model)))
    limit_nbytes = config.written_nbytes_per_step
    if given is not None:
        _refuse_beside_plan(config)
        if len(given.activations) != len(workload.blocks):
            raise ConfigError(
                f"the plan is for a model of {len(given.activations)} blocks, this one has {len(workload.blocks)}"
            )
        if given.durable_steps != (config.durability == "step"):
            raise ConfigError(
                f"durability={config.durability!r} and plan=: the plan is for "
                + ("durability='step'" if given.durable_steps else "another durability than 'step'")
                + ", whose bytes are others: plan again"
            )
        if given.state_format.param_nbytes != workload.param_nbytes:
            raise ConfigError(
                f"the plan is for parameters of {given.state_format.param_nbytes} bytes, this run computes with "
                f"{workload.param_nbytes}: plan again, or give the compute_dtype it was made for"
            )
        ours = state_format_of(workload)
        if given.state_format.state_nbytes != ours.state_nbytes:
            raise ConfigError(
                f"the plan is for {given.state_format.state_nbytes} bytes of optimizer state a parameter, this run has "
                f"{ours.state_nbytes} ({rule.described}): plan again, with the optimizer and optimizer_state of the run"
            )
        writes = given.written_nbytes_per_step(workload)
        if limit_nbytes is not None and writes > limit_nbytes:
            raise BudgetError(
                f"the plan has {writes} bytes written a step, written_per_step allows {limit_nbytes}: raise it, or "
                "plan again"
            )
        return RunPlan(given, workload)
    budgets = Budgets(
        device_memory_nbytes=device_nbytes + device_own_nbytes,
        device_own_nbytes=device_own_nbytes,
        host_memory_nbytes=host_nbytes,
        storage_nbytes=free_nbytes(config.storage) if config.storage else 0,
        written_nbytes_per_step=limit_nbytes,
        staging_nbytes=staging_nbytes,
        clips_gradients=config.max_grad_norm is not None,
        durable_steps=config.durability == "step",
    )
    samples = (config.batch or (1, 1))[0]
    hardware, fixed = hardware_for(config, shares_host), fixed_choices(config)
    if config.states_on_device != "auto" and not shares_host:
        fixed["states_on_device"] = parse_budget(config.states_on_device, device_nbytes)
    elif not updates_faster:
        fixed["states_on_device"] = 0

    plan = make_simulated_plan(
        workload, hardware, budgets, fixed, batch_samples=samples, chunk_elements=config.chunk_elements
    )
    return RunPlan(plan.model_copy(update={"chunk_elements": config.chunk_elements}), workload)


def _read_plan(source: str) -> Plan:
    if source.lstrip().startswith("{"):
        return Plan.from_json(source)
    try:
        return Plan.from_json(pathlib.Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"plan {source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"plan {source}: this is no saved plan: {error}") from error


def placement_of(
    plan: Plan,
    blocks: list[BlockBytes],
    root: BlockBytes,
    *,
    device_nbytes: int,
    host_nbytes: int,
    staging_nbytes: int,
    has_storage: bool,
    shares_host: bool,
    device_own_nbytes: int = 0,
    staying_nbytes: int = 0,
) -> Placement:
    """The plan's placement in whole pages and chunks, within the budgets.

    What the plan puts into host memory and page padding leaves no room for stays on storage. Raises BudgetError when
    the budgets cannot hold even the least.
    """
    slot = max((b.slot_nbytes for b in blocks), default=0)
    grad = max((b.grad_nbytes for b in blocks), default=0)
    least = place(
        blocks,
        root,
        device_nbytes=device_nbytes,
        host_nbytes=host_nbytes,
        staging_nbytes=staging_nbytes,
        has_storage=has_storage,
        deferred=bool(plan.deferred_blocks),
        prefetch_blocks=1,
        shares_host=shares_host,
        grads_per_buffer=plan.grads_per_buffer,
        device_own_nbytes=device_own_nbytes,
        staying_nbytes=staying_nbytes,
        held_max=len(plan.held_blocks),
    )
    fixed = root.slot_nbytes + root.grad_nbytes
    n_slots, n_grads = max(2, plan.n_slots), plan.n_grad_buffers
    n_slots = n_slots if has_storage else min(n_slots, len(blocks))
    while fixed + n_slots * slot + n_grads * grad > device_nbytes and n_slots > min(2, len(blocks)):
        n_slots -= 1
    if not has_storage:
        taken = fixed + n_slots * slot + n_grads * grad
        return replace(least, n_slots=n_slots, n_grad_buffers=n_grads, device_nbytes=taken)
    n_host_slots = 0 if shares_host else min(HOST_SLOTS, len(blocks))
    host = _HostFill(host_nbytes - staging_nbytes)
    if not shares_host:
        host.left -= fixed + 2 * (slot + grad)
        if n_host_slots > 2 and not host.take(slot):
            n_host_slots = 2
    staging = _activation_staging_nbytes(plan, host.left)
    host.take(staging)
    swapped = _swapped_to_host_nbytes(plan, shares_host)
    swapped = swapped if host.take(swapped) else 0  # it is taken when a tensor first needs it
    params = [
        wanted and host.take(b.slot_nbytes) for b, wanted in zip(blocks, plan.params_in_host, strict=True)
    ]
    grads = [
        i in plan.deferred_blocks and wanted and host.take(b.grad_nbytes)
        for i, (b, wanted) in enumerate(zip(blocks, plan.grads_in_host, strict=True))
    ]
    chunks = [
        host.take_first(b.state_chunk_nbytes, fraction)
        for b, fraction in zip([*blocks, root], plan.states_in_host, strict=True)
    ]
    n_held, n_held_buffers = 0, 0
    if not shares_host and all(params):
        n_held, n_held_buffers = held_updates(host.left, grad, plan.grads_per_buffer, len(plan.held_blocks))
        host.left -= n_held_buffers * grad
    stored = sum(sum(b.state_chunk_nbytes[n:]) for b, n in zip([*blocks, root], chunks, strict=True))
    stays = plan.params_on_device and 0 < params.count(False) <= n_slots
    if not stays:
        stored += sum(b.slot_nbytes for b, inside in zip(blocks, params, strict=True) if not inside)
    return Placement(
        n_slots=n_slots,
        n_grad_buffers=n_grads,
        n_host_slots=0 if all(params) else n_host_slots,
        n_host_grad_buffers=0 if shares_host else 2 + n_held_buffers,
        params_in_host=params,
        grads_in_host=grads,
        host_chunks=chunks,
        device_nbytes=fixed + n_slots * slot + n_grads * grad,
        host_nbytes=host_nbytes - host.left - swapped,
        storage_nbytes=stored,
        activation_staging_nbytes=staging,
        params_on_device=stays,
        n_held=n_held,
    )


def _swapped_to_host_nbytes(plan: Plan, shares_host: bool) -> int:
    """What the plan swaps out to host memory, in whole pages on the way from a device with memory of its own."""
    n_tensors = sum(list(outcomes.values()).count("host") for outcomes in plan.activations)
    padding = 0 if shares_host else n_tensors * plan.micro_batches * PAGE_NBYTES
    return plan.activations_host_nbytes + padding


def _activation_staging_nbytes(plan: Plan, left_nbytes: int) -> int:
    """As planned, where there is so much."""
    wanted = min(plan.activation_staging_nbytes or 0, left_nbytes)
    return max(ACTIVATION_STAGING_NBYTES_MIN, wanted // (2 * PAGE_NBYTES) * (2 * PAGE_NBYTES))


class _HostFill:
    """Host memory that is being given away."""

    def __init__(self, left_nbytes: int) -> None:
        self.left = left_nbytes

    def take(self, nbytes: int) -> bool:
        """Whether `nbytes` could be had."""
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True

    def take_first(self, chunks: tuple[int, ...], fraction: float) -> int:
        """How many of the first chunks are had, for `fraction` of all their bytes."""
        n = 0
        for chunk_nbytes in chunks[: first_chunks(chunks, fraction)]:
            if not self.take(chunk_nbytes):
                break
            n += 1
        return n
