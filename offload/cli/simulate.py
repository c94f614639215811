"""`offload simulate`: one steady step of a plan in simulated time, as figures, a picture and a trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TextIO

from offload.cli import sources
from offload.cli.plan import load_plan
from offload.cli.results import check_file
from offload.cli.stages import stages
from offload.config import CHUNK_ELEMENTS
from offload.errors import ConfigError
from offload.planner.hardware import Hardware
from offload.planner.peers import lohan_plan, lohan_workload
from offload.planner.plan import Budgets, Plan, state_format_of
from offload.planner.workload import Workload
from offload.schedule.fastest import make_simulated_plan
from offload.schedule.run import SimulatedStep, simulate_plan
from offload.schedule.trace import LANE_TITLES, check_picture, draw_timeline, write_trace

GB = 1e9


@dataclass(frozen=True)
class SimulateSettings:
    """What the command was told."""

    model: str
    hardware: str | None
    overrides: list[str]
    batch: int
    tokens: int
    budgets: sources.BudgetTexts
    fixed: list[str]
    plan: str | None
    policy: str
    plot: str | None
    trace: str | None
    as_json: bool
    optimizer: str = "adamw"
    optimizer_state: str = "fp32"


def _plan(
    settings: SimulateSettings, plan: Plan | None, work: Workload, machine: Hardware, budgets: Budgets
) -> Plan:
    """The saved `plan`, where it is one for this model, or one that is made."""
    if plan is not None:
        if len(plan.activations) != len(work.blocks):
            raise ConfigError(
                f"{settings.plan} is a plan for {len(plan.activations)} blocks, but {work.name} has {len(work.blocks)}"
            )
        if plan.policy == "offload" and (difference := plan.differs_from(work)):
            raise ConfigError(
                f"{settings.plan} is a plan for {plan.model}, another model than {work.name}: {difference}; give the "
                "--model that it was made with"
            )
        wanted = state_format_of(work)
        if plan.policy == "offload" and plan.state_format != wanted:
            raise ConfigError(
                f"{settings.plan} is a plan for state as {plan.state_format.name}, {work.name} here has "
                f"{wanted.name}: give the --model and --optimizer that it was made with"
            )
        return plan
    if settings.policy == "lohan":
        return lohan_plan(
            work, machine, batch_samples=settings.batch, host_memory_nbytes=budgets.host_memory_nbytes
        )
    if settings.policy != "offload":
        raise ConfigError(f"policy {settings.policy!r} is not known; there are offload and lohan")
    fixed = sources.fixed_choices(settings.fixed)
    return make_simulated_plan(
        work, machine, budgets, fixed, batch_samples=settings.batch, chunk_elements=CHUNK_ELEMENTS
    )


def summary(plan: Plan, step: SimulatedStep) -> dict[str, Any]:
    """What `--json` prints: the figures without spans."""
    return {
        "model": plan.model,
        "hardware": plan.hardware,
        "policy": plan.policy,
        "batch_samples": plan.batch_samples,
        "tokens_per_sample": plan.tokens_per_sample,
        "micro_batches": plan.micro_batches,
        "update": plan.update,
        "step_s": step.step_s,
        "predicted_step_s": plan.predicted.step_s if plan.predicted else None,
        "tokens_per_s": step.tokens_per_s,
        "model_tflops": step.model_tflops,
        "hardware_tflops": step.hardware_tflops,
        "stall_s": step.stall_s,
        "busy_s": step.busy_s,
        "read_bytes": step.read_nbytes,
        "written_bytes": step.written_nbytes,
        "h2d_bytes": step.h2d_nbytes,
        "d2h_bytes": step.d2h_nbytes,
        "peak_bytes": step.peak_nbytes,
        "endurance_steps": step.endurance_steps,
        "endurance_years": step.endurance_years,
    }


def lines(plan: Plan, step: SimulatedStep) -> list[str]:
    """The figures in words."""
    stalls = sorted(step.stall_s.items(), key=lambda item: -item[1])
    waits = ", ".join(f"{cause} {s:.2f} s ({s / step.step_s:.0%})" for cause, s in stalls if s >= 0.005)
    busy = ", ".join(
        f"{title} {step.busy_s[lane] / step.step_s:.0%}"
        for lane, title in LANE_TITLES.items()
        if lane in step.busy_s
    )
    peaks = ", ".join(f"{tier} {nbytes / GB:.2f} GB" for tier, nbytes in step.peak_nbytes.items())
    found = [
        f"{plan.model} on {plan.hardware}, {plan.policy}: "
        f"batch {plan.batch_samples} x {plan.tokens_per_sample} tokens, "
        f"{plan.micro_batches} micro-batches, update {plan.update}",
        f"step            {step.step_s:.2f} s",
        f"throughput      {step.tokens_per_s:,.1f} tokens/s",
        f"FLOPs           {step.model_tflops:.1f} model TFLOPS, {step.hardware_tflops:.1f} hardware TFLOPS "
        "(with recomputation)",
        f"device waits    {waits or 'for nothing'}",
        f"busy            {busy}",
        f"storage         read {step.read_nbytes / GB:.1f} GB, written {step.written_nbytes / GB:.1f} GB a step",
        f"bus             to the device {step.h2d_nbytes / GB:.1f} GB, from it {step.d2h_nbytes / GB:.1f} GB a step",
        f"peak            {peaks}",
    ]
    if step.endurance_steps is not None and step.endurance_years is not None:
        found.append(
            f"endurance       {step.endurance_steps:,.0f} steps, {step.endurance_years:.2f} years without a pause"
        )
    return found


def run_simulate(settings: SimulateSettings, out: TextIO) -> SimulatedStep:
    """Plan (or load a plan), simulate, print, draw and write."""
    if settings.plot:
        check_picture(settings.plot)
    check_file("--plot", settings.plot)
    check_file("--trace", settings.trace)
    machine = sources.hardware(settings.hardware, settings.overrides)
    machine = sources.worn(machine, settings.budgets.directories)
    saved = None if settings.plan is None else load_plan(settings.plan)
    tokens = settings.tokens if saved is None else saved.tokens_per_sample
    with stages(f"tracing {settings.model}") as tell:
        work = sources.workload(settings.model, tokens, settings.optimizer, settings.optimizer_state)
        if settings.policy == "lohan":
            work = lohan_workload(work)
        tell("looking for the fastest plan")
        plan = _plan(settings, saved, work, machine, settings.budgets.of(machine, work))
        tell("simulating a step")
        step = simulate_plan(plan, work, machine)
    if settings.plot:
        title = (
            f"{plan.model} on {plan.hardware}, {plan.policy}, batch {plan.batch_samples}: {step.step_s:.1f} s"
        )
        draw_timeline(settings.plot, step.spans, step.memory, title=title)
    if settings.trace:
        write_trace(
            settings.trace, step.spans, step.memory, process=f"simulated {plan.model} on {plan.hardware}"
        )
    if settings.as_json:
        print(json.dumps(summary(plan, step)), file=out)
    else:
        print("\n".join(lines(plan, step)), file=out)
    return step
