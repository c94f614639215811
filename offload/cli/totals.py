"""What a run of `offload finetune` adds up to."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from offload.cli.output import StepReport
from offload.cli.settings import Settings
from offload.planner.hardware import Hardware
from offload.schedule.run import endurance_steps
from offload.tiers.wear import Wear, wear_of


@dataclass
class Totals:
    """Sums over the steps made."""

    step: int = 0
    saved_step: int | None = None
    written_by_drive: dict[str, int] = field(default_factory=dict)
    checkpoint_nbytes: int = 0
    """Written by checkpoints so far."""
    trainable_numel: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    step_s: list[float] = field(default_factory=list)
    expected_step_s: float | None = None
    hardware: Hardware | None = None
    floor_fractions: list[float] = field(default_factory=list)
    stall_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    read_bytes: int = 0
    written_bytes: int = 0

    def add(self, report: StepReport) -> None:
        """Count one step in."""
        self.step, self.last_loss = report.step, report.loss
        self.first_loss = report.loss if self.first_loss is None else self.first_loss
        self.step_s.append(report.step_s)
        self.floor_fractions.append(report.floor_fraction)
        self.read_bytes += report.read_bytes
        self.written_bytes += report.written_bytes
        for cause, seconds in report.stall_s.items():
            self.stall_s[cause] += seconds

    def add_rest(self, read_nbytes: int, written_nbytes: int) -> None:
        """Count in what the last step's updates moved after its report."""
        self.read_bytes += read_nbytes
        self.written_bytes += written_nbytes


def _described(wear: Wear | str) -> str:
    return wear if isinstance(wear, str) else f"{wear.device}: {wear.used_fraction:.0%} used"


def lifetime_steps(
    hardware: Hardware | None, wears: Sequence[Wear | str], written_nbytes_per_step: float
) -> float | None:
    """Steps until the first drive has taken all the writes its maker allows; the drives are written evenly.

    `wears`: of each storage directory; what a drive says it has taken already counts, one that says nothing is new.
    None where the profile does not know, or nothing is written.
    """
    if hardware is None:
        return None
    if len(wears) != len(hardware.drives):  # it is not known which drive is which
        return endurance_steps(hardware, written_nbytes_per_step)
    left = [
        (wear if isinstance(wear, Wear) else Wear("", 0.0, 0)).steps_left(
            drive.endurance_nbytes, written_nbytes_per_step / len(wears)
        )
        for wear, drive in zip(wears, hardware.drives, strict=True)
        if drive.endurance_nbytes is not None
    ]
    return min(left) if left and written_nbytes_per_step > 0 else None


def summary_of(settings: Settings, totals: Totals, status: str) -> dict[str, Any]:
    """What is told at the end of a run, and is the last line of `--json`."""
    median_s = statistics.median(totals.step_s) if totals.step_s else None
    fractions = totals.floor_fractions
    per_step = max(1, totals.trainable_numel * totals.step)
    wears = [wear_of(directory) for directory in settings.storage]
    written_a_step = totals.written_bytes / max(1, totals.step)
    return {
        "status": status,
        "steps": totals.step,
        "first_loss": totals.first_loss,
        "last_loss": totals.last_loss,
        "saved_step": totals.saved_step,
        "trainable_parameters": totals.trainable_numel,
        "median_step_s": median_s,
        "predicted_step_s": totals.expected_step_s,
        "tokens_per_s": settings.batch_size * settings.sequence_length / median_s if median_s else None,
        "median_floor_fraction": statistics.median(fractions) if fractions else None,
        "waited_for": dict(totals.stall_s),
        "read_gb": totals.read_bytes / 1e9,
        "written_gb": totals.written_bytes / 1e9,
        "written_bytes_per_step": written_a_step,
        "written_gb_by_drive": {name: nbytes / 1e9 for name, nbytes in totals.written_by_drive.items()},
        "checkpoints_gb": totals.checkpoint_nbytes / 1e9,
        "drive_wear": dict(zip(settings.storage, map(_described, wears), strict=True)),
        "endurance_steps": lifetime_steps(totals.hardware, wears, written_a_step),
        "read_bytes_per_parameter_and_step": totals.read_bytes / per_step,
        "written_bytes_per_parameter_and_step": totals.written_bytes / per_step,
        "output": settings.output if status == "done" else None,
    }
