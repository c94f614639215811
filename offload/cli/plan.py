"""`offload plan`: does it fit, how long will a step take, what limits it, what would help."""

from __future__ import annotations

import json
import pathlib
from dataclasses import asdict, dataclass
from typing import TextIO

from offload.cli import sources
from offload.cli.results import check_file
from offload.cli.stages import stages
from offload.config import CHUNK_ELEMENTS
from offload.errors import ConfigError
from offload.planner.explain import explain
from offload.planner.plan import Plan
from offload.planner.report import plan_lines
from offload.schedule.fastest import find_fastest


@dataclass(frozen=True)
class PlanSettings:
    """What the command was told."""

    model: str
    hardware: str | None
    overrides: list[str]
    batch: int
    tokens: int
    budgets: sources.BudgetTexts
    fixed: list[str]
    save: str | None
    as_json: bool
    optimizer: str = "adamw"
    optimizer_state: str = "fp32"


def load_plan(path: str) -> Plan:
    """A plan saved by `offload plan --save`. Raises ConfigError when it is none or cannot be read."""
    try:
        return Plan.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: this is no saved plan, as `offload plan --save` writes: {error}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def run_plan(settings: PlanSettings, out: TextIO) -> Plan:
    """Make the plan and print it with its explanation. Raises BudgetError, with what would do, when nothing fits."""
    check_file("--save", settings.save)
    machine = sources.hardware(settings.hardware, settings.overrides)
    machine = sources.worn(machine, settings.budgets.directories)
    with stages(f"tracing {settings.model}") as tell:
        work = sources.workload(settings.model, settings.tokens, settings.optimizer, settings.optimizer_state)
        budgets, fixed = settings.budgets.of(machine, work), sources.fixed_choices(settings.fixed)
        tell("looking for the fastest plan")
        found = find_fastest(
            work, machine, budgets, fixed, batch_samples=settings.batch, chunk_elements=CHUNK_ELEMENTS
        )
        plan = found.plan
        tell("looking for what would help")
        why = explain(plan, work, machine, budgets, fixed, least_s=found.least_s)
    if settings.save:
        pathlib.Path(settings.save).write_text(plan.to_json() + "\n")
    if settings.as_json:
        print(json.dumps({"plan": plan.model_dump(mode="json"), "explanation": asdict(why)}), file=out)
    else:
        print("\n".join([*plan_lines(plan), "", *why.lines(plan)]), file=out)
    return plan
