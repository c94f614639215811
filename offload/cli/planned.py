"""What `offload finetune` plans with: which machine profile, which settings for `wrap`, and what to expect."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from offload.cli.plan import load_plan
from offload.config import NO_PLAN
from offload.errors import ConfigError
from offload.planner.hardware import Hardware, load_hardware
from offload.planner.plan import Plan
from offload.planner.report import plan_lines
from offload.profiling.stored import profile_path, stored_hardware
from offload.schedule.run import endurance_steps


@dataclass(frozen=True)
class Request:
    """What the user said about planning; None where nothing was said."""

    batch_samples: int
    tokens_per_sample: int
    storage: list[str]
    device: str = "auto"
    hardware: str | None = None
    plan: str | None = None
    save_plan: str | None = None
    activations: str | None = None
    saved_activations: str | None = None
    micro_batches: int | None = None
    written_per_step: str | None = None


@dataclass(frozen=True)
class Planning:
    """A machine profile where one is known, and what `offload.wrap` is to be told."""

    request: Request
    hardware: Hardware | None
    settings: dict[str, Any]

    def report(self, plan: Plan | None, note: Callable[[str], None]) -> None:
        """Say the plan before it runs, and save it. Raises ConfigError when the file cannot be written."""
        if plan is None:
            if self.request.save_plan is not None:
                note(
                    f"{self.request.save_plan} is not written: all state fits in memory, nothing was planned"
                )
            return
        for line in plan_lines(plan):
            note(line)
        written_nbytes = plan.predicted.bytes["written"] if plan.predicted else None
        for line in endurance_lines(self.hardware, written_nbytes):
            note(line)
        if not self._is_of_this_batch(plan):
            note(
                f"the plan is for {plan.batch_samples} x {plan.tokens_per_sample} tokens, this run has "
                f"{self.request.batch_samples} x {self.request.tokens_per_sample}: its seconds are not this run's"
            )
        if self.request.save_plan is not None:
            try:
                pathlib.Path(self.request.save_plan).write_text(plan.to_json() + "\n", encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"--save-plan {self.request.save_plan}: cannot be written: {error.strerror}"
                ) from error

    def expected_step_s(self, plan: Plan | None) -> float | None:
        """Predicted seconds of a step; None without a prediction for this batch."""
        if plan is None or plan.predicted is None or not self._is_of_this_batch(plan):
            return None
        return plan.predicted.step_s

    def _is_of_this_batch(self, plan: Plan) -> bool:
        wanted = (self.request.batch_samples, self.request.tokens_per_sample)
        return (plan.batch_samples, plan.tokens_per_sample) == wanted


def say_late_plan(plan: Plan, note: Callable[[str], None]) -> None:
    """A plan that the run has made after its first step: of what backward keeps, all else is as it was placed."""
    note(
        "what backward keeps is planned now that a step has shown its batch; without a profile, for drives of 1 GB/s:"
    )
    for line in plan_lines(plan):
        note(line)


def endurance_lines(hardware: Hardware | None, written_nbytes_per_step: float | None) -> list[str]:
    """How long the drives last at this rate, as a line of the plan's table; none where nothing is written."""
    if not written_nbytes_per_step:
        return []
    steps = None if hardware is None else endurance_steps(hardware, written_nbytes_per_step)
    lasts = (
        "the profile does not know the drives' endurance" if steps is None else f"lasts {steps:,.0f} steps"
    )
    return [f"{'endurance':<15} {written_nbytes_per_step / 1e9:.3g} GB written a step; {lasts}"]


def planning_of(request: Request, note: Callable[[str], None]) -> Planning:
    """Decide whether and with what to plan. Says in a note why not, where nobody asked for a plan.

    Raises ConfigError for a profile or plan that was asked for and cannot be had.
    """
    settings: dict[str, Any] = {"device": request.device}
    for name in ("activations", "saved_activations", "micro_batches"):
        if getattr(request, name) is not None:
            settings[name] = getattr(request, name)
    if request.written_per_step is not None:
        settings["written_per_step"] = request.written_per_step
    if request.plan is not None and request.plan != NO_PLAN:
        _check_plan_request(request)
        plan = load_plan(request.plan)  # a run that streams nothing would not read it
        hardware = _named(request) if request.hardware is not None else _stored()
        settings["plan"] = plan.to_json()
        return Planning(request, hardware, _with_bus(settings, hardware))
    hardware, why_not = _machine(request)
    settings = _with_bus(settings, hardware)
    if why_not:
        if request.save_plan is not None:
            raise ConfigError(f"--save-plan: there is no plan to save: {why_not}")
        if request.written_per_step is not None:
            raise ConfigError(f"--written-per-step is kept by planning, and there is no plan: {why_not}")
        note(f"placement by budget, without a plan: {why_not}")
        if request.plan == NO_PLAN:
            settings["plan"] = NO_PLAN
        return Planning(request, hardware, settings)
    settings["batch"] = (request.batch_samples, request.tokens_per_sample)
    settings["hardware"] = request.hardware or profile_path()
    return Planning(request, hardware, settings)


def _check_plan_request(request: Request) -> None:
    fixed = {"--activations": request.activations, "--saved-activations": request.saved_activations}
    fixed["--micro-batches"] = None if request.micro_batches is None else str(request.micro_batches)
    for option, value in fixed.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value} and --plan {request.plan}: a saved plan has its own; leave out one"
            )


def _named(request: Request) -> Hardware:
    return load_hardware(request.hardware or "")


def _stored() -> Hardware | None:
    return stored_hardware() if os.path.isfile(profile_path()) else None


def _machine(request: Request) -> tuple[Hardware | None, str]:
    """(profile, why it is not planned with; empty when it is)."""
    if request.plan == NO_PLAN:
        return (None if request.hardware is None else _named(request)), "--plan none"
    if request.hardware is not None:
        hardware = _named(request)
        if request.storage and not hardware.drives:
            raise ConfigError(
                f"--hardware {request.hardware} has no drives, but --storage is given: run `offload probe --storage "
                f"{request.storage[0]}`, or add --plan none"
            )
        return hardware, ""
    stored = _stored()
    if stored is None:
        return None, "this machine has no profile; `offload probe` would measure one and let it plan"
    if request.storage and not stored.drives:
        return stored, f"{profile_path()} has no drives; run `offload probe --storage {request.storage[0]}`"
    wanted = request.device
    has_own_memory = wanted.startswith(("emulated", "cuda")) or (
        wanted == "auto" and torch.cuda.is_available()
    )
    if stored.shares_host == has_own_memory:
        kind = "computes in host memory" if stored.shares_host else "has a device with memory of its own"
        return stored, f"{profile_path()} is of a machine that {kind}, unlike --device {wanted}"
    return stored, ""


def _with_bus(settings: dict[str, Any], hardware: Hardware | None) -> dict[str, Any]:
    """The emulated device gets the profile's bus; both directions the slower one's speed."""
    if settings["device"] != "emulated" or hardware is None:
        return settings
    rates = [rate for rate in (hardware.h2d_bytes_per_s, hardware.d2h_bytes_per_s) if rate is not None]
    return {**settings, "bus_bytes_per_s": min(rates)} if rates else settings
