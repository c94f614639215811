"""What `offload finetune` was told, checked before anything is read or written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from offload.checkpoint.directory import checkpoints_in
from offload.cli.data import check_kind
from offload.cli.optimizers import rule_of
from offload.cli.results import can_be_made, check_file
from offload.config import Config, host_total_nbytes, parse_budget, parse_nbytes
from offload.errors import ConfigError
from offload.model.loading import dtype_of
from offload.runtime.chosen_device import torch_device_named
from offload.schedule.trace import check_picture

SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class Settings:
    """What `offload finetune` was told; the meanings are in its --help. None: not told."""

    model: str
    data: str
    storage: list[str] = field(default_factory=list)
    host_memory: str = "50%"
    device_memory: str = "50%"
    activations: str | None = None
    saved_activations: str | None = None
    step_aside: str = "auto"
    device: str = "auto"
    hardware: str | None = None
    plan: str | None = None
    save_plan: str | None = None
    written_per_step: str | None = None
    dtype: str = "auto"
    steps: int = 100
    batch_size: int = 8
    sequence_length: int = 512
    micro_batches: int | None = None
    lr: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    optimizer_state: str = "fp32"
    max_grad_norm: float | None = None
    seed: int = 0
    output: str | None = None
    trace: str | None = None
    plot: str | None = None
    checkpoints: str | None = None
    save_every: int | None = None
    keep_last: int | None = None
    resume: str | None = None
    durability: str = "checkpoint"
    write_budget: str | None = None

    def for_wrap(self) -> dict[str, Any]:
        """Those that `offload.wrap` takes as they are."""
        names = (
            "storage", "host_memory", "device_memory", "step_aside", "max_grad_norm", "durability", "optimizer_state"
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def _check_for_wrap(settings: Settings) -> None:
    """What `offload.wrap` would refuse once the model is loaded."""
    planned = {
        name: getattr(settings, name) for name in ("activations", "saved_activations", "micro_batches")
    }
    given = {**settings.for_wrap(), **{name: value for name, value in planned.items() if value is not None}}
    Config.checked(device=settings.device, **given)
    if settings.device not in ("auto", "emulated"):
        torch_device_named(settings.device)


def check(settings: Settings) -> None:
    """Raises ConfigError for a path that cannot be used and for options that contradict each other."""
    if settings.schedule not in SCHEDULES:
        raise ConfigError(
            f"--schedule {settings.schedule} not understood; write one of {', '.join(SCHEDULES)}"
        )
    rule_of(settings.optimizer, settings.optimizer_state)
    dtype_of(settings.dtype)
    for option in ("device_memory", "host_memory", "written_per_step", "write_budget"):
        value = getattr(settings, option) or 0
        try:
            if option.startswith("wr"):
                parse_nbytes(value)
            else:
                parse_budget(value, host_total_nbytes())
        except ConfigError as error:
            raise ConfigError(f"--{option.replace('_', '-')}: {error}") from error
    for directory in settings.storage:
        if os.path.exists(directory) and not os.path.isdir(directory):
            raise ConfigError(f"--storage {directory} is a file: name a directory")
    if not os.path.exists(settings.model):
        raise ConfigError(
            f"--model {settings.model}: no such directory or file; a model of the Hugging Face hub is fetched first: "
            "hf download NAME --local-dir DIR"
        )
    if settings.output is not None and os.path.isdir(settings.output) and os.listdir(settings.output):
        raise ConfigError(f"--output {settings.output} is not empty: choose another directory")
    if settings.output is not None and not can_be_made(settings.output):
        raise ConfigError(
            f"--output {settings.output} cannot be written by this user: choose another directory"
        )
    if settings.durability == "step" and not settings.storage:
        raise ConfigError("--durability step keeps every step on storage: give --storage DIR")
    if settings.write_budget is not None and settings.checkpoints is None and settings.durability != "step":
        raise ConfigError(
            "--write-budget stops the run where it can go on later: give --checkpoints DIR or --durability step"
        )
    if settings.save_every is not None and settings.checkpoints is None:
        raise ConfigError("--save-every needs --checkpoints DIR: where the checkpoints are to be written")
    if settings.checkpoints is not None and not can_be_made(settings.checkpoints):
        raise ConfigError(
            f"--checkpoints {settings.checkpoints} cannot be written by this user: choose another directory"
        )
    if settings.checkpoints is not None and settings.resume is None:
        earlier = checkpoints_in(settings.checkpoints)
        if earlier:
            raise ConfigError(
                f"--checkpoints {settings.checkpoints} holds those of an earlier run, {os.path.basename(earlier[-1])} "
                f"among them: go on from it with --resume {settings.checkpoints}, or choose another directory"
            )
    if settings.resume is not None and not os.path.isdir(settings.resume):
        raise ConfigError(f"--resume {settings.resume}: no such directory")
    for option in ("trace", "plot", "save_plan"):
        check_file(f"--{option.replace('_', '-')}", getattr(settings, option))
    if settings.plot is not None:
        check_picture(settings.plot)
    check_kind(settings.data)
    _check_for_wrap(settings)
