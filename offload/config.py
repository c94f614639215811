"""User-facing settings, validated on construction, and the memory-budget grammar."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from offload.errors import ConfigError
from offload.update_rules import Moments

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS.update({"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40})
_UPDATE_THREADS_MAX = 16
"""Memory limits AdamW before more threads than this do."""
_GRAMMAR = 'write "8GB", "7GiB", "50%" or "-2GB"'
_BUDGET = re.compile(r"^\s*(-?)\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*$")


def parse_budget(text: str | int | float, total_nbytes: int) -> int:
    """Bytes meant by a budget such as `"8GB"`, `"7.5GiB"`, `"50%"`, `"-2GB"` (all but 2 GB) or a number.

    Raises ConfigError when it cannot be read or leaves nothing.
    """
    if isinstance(text, (int, float)):
        if isinstance(text, bool) or not math.isfinite(text):
            raise ConfigError(f"memory budget {text} is not understood; {_GRAMMAR}")
        nbytes = int(text)
    else:
        match = _BUDGET.match(text)
        if match is None:
            raise ConfigError(f"memory budget {text!r} not understood; {_GRAMMAR}")
        sign, number, unit = match.groups()
        if unit == "%":
            if float(number) > 100:
                raise ConfigError(f"memory budget {text!r} is more than there is; write at most 100%")
            nbytes = int(total_nbytes * float(number) / 100)
        elif unit.upper() in _UNITS:
            nbytes = int(float(number) * _UNITS[unit.upper()])
        else:
            raise ConfigError(f"memory budget {text!r}: unknown unit {unit!r}; use GB, GiB, MB, MiB or %")
        if sign:
            nbytes = total_nbytes - nbytes
    if nbytes < 0:
        raise ConfigError(f"memory budget {text!r} leaves {nbytes} bytes of {total_nbytes}")
    return nbytes


def parse_nbytes(text: str | int | float) -> int:
    """Bytes meant by `"20GB"` or a number, where there is no total that a part could be of.

    Raises ConfigError when it cannot be read, or is a part.
    """
    if isinstance(text, str) and ("%" in text or text.strip().startswith("-")):
        raise ConfigError(
            f"{text!r}: there is nothing that this is a part of; write bytes, as in 500MB or 20GB"
        )
    return parse_budget(text, 0)


_CGROUPS = (
    ("/sys/fs/cgroup", "", ("memory.max", "memory.current", "memory.stat")),
    (
        "/sys/fs/cgroup/memory",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    ),
)
"""Of both versions: where they are mounted, the controller, and the files with the limit in bytes, what is used of it,
and of what kind that is."""

_CGROUPS_OF_THIS_PROCESS = "/proc/self/cgroup"


def _text_of(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _limits() -> Iterator[tuple[int, str, str]]:
    """Every limit in bytes on this process's memory, with the files that say what is used of it.

    A batch system or systemd limits a cgroup further down than the mounted one, and all above it count too. In a
    container the mounted one may be the process's own, whose path is of outside and leads nowhere.
    """
    lines = [line.split(":", 2) for line in _text_of(_CGROUPS_OF_THIS_PROCESS).splitlines()]
    for mounted, controller, files in _CGROUPS:
        paths = [path for _, controllers, path in lines if controller in controllers.split(",")]
        inner = [part for part in "".join(paths[:1]).split("/") if part]
        for depth in range(len(inner) + 1):
            limit, used, kinds = (os.path.join(mounted, *inner[:depth], name) for name in files)
            if (text := _text_of(limit)).isdigit():
                yield int(text), used, kinds


def host_total_nbytes() -> int:
    """DRAM this process may use, in bytes: the machine's, or its cgroup's limit where that is lower."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _, _ in _limits())])


def host_available_nbytes() -> int:
    """DRAM this process may still take, in bytes: what is available of the machine's, or left to its cgroup.

    Pages of files that have not been used lately make room, and count as left.
    """
    available = [int(psutil.virtual_memory().available)]
    for limit_nbytes, used, kinds in _limits():
        if (of_used := _text_of(used)).isdigit():
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", _text_of(kinds), re.MULTILINE)
            available.append(limit_nbytes - int(of_used) + max(map(int, cached), default=0))
    return max(0, min(available))


def stays_the_same(path: str) -> str:
    """The same place whatever the working directory is by then; `~` is the user's own directory, as in a shell."""
    path = os.path.expanduser(path)
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


NO_PLAN = "none"
"""Value of `Config.plan` that places by budget alone."""

CHUNK_ELEMENTS = 1 << 18
"""Parameters whose state is read, updated and written as a whole, unless `chunk_elements` says otherwise."""


class Config(BaseModel):
    """Everything `offload.wrap` can be told. Unknown names are refused.

    Byte budgets follow `parse_budget`; `device_memory` counts parameter slots, gradient buffers, the root and
    waiting block inputs, `host_memory` counts chunk buffers and every state placed in DRAM. `device` is "auto" (the
    model's own, else a CUDA device where there is one, else the CPU), "cpu", "cuda", "cuda:1" or "emulated": a
    device in DRAM behind a bus of `bus_bytes_per_s`, for trying the path of a GPU without one. With `batch`
    (sequences a step, tokens a sequence) the planner chooses placement, micro-batches, prefetch window and what is
    kept for backward, for the machine that `hardware` names (a profile's name or file; default: what `offload
    probe` has stored); settings given explicitly stay as given. `written_per_step`: most bytes a planned step may
    write to storage, to spare the drives. Without `batch`, state is placed by budget, and what is kept for backward
    is planned after the first step, where that is worth it. `plan`: a saved plan's file, or its text, to be used as
    it is; "none": no plan. `step_aside`: when all training state takes at most half of `device_memory`, do not
    stream. `durability`: what survives a kill or a power loss: nothing, the last `offload.save`, or the last step
    (docs/durability.md has what each costs); with the last, `verify_reads` compares what is read with its checksums:
    "auto" stops when that takes more than 3 % of a step. `adapters`: whether small trainable parameters of frozen
    blocks stay in device memory. `states_on_device`: on a device with memory of its own, how much of `device_memory`
    is for optimizer state that stays there, with its blocks' parameters, and is updated there: a size, 0 for none;
    "auto" decides. `optimizer_state`: what the optimizer's moments are kept in between steps, "fp32",
    "bf16" or "8bit" (docs/optimizers.md). `compile_blocks`: compile each block's training forward with torch.compile
    (True, or the name of a backend). `pin`: page-lock host memory for a CUDA device.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    device: str = "auto"
    device_memory: str | int | float = "50%"
    host_memory: str | int | float = "50%"
    storage: list[str] = Field(default_factory=list)
    optimizer_state: Moments = "fp32"
    update: Literal["auto", "backward", "deferred"] = "auto"
    max_grad_norm: float | None = Field(default=None, gt=0)
    micro_batches: int = Field(default=1, ge=1)
    activations: Literal["auto", "device", "host", "storage", "keep"] = "auto"
    saved_activations: Literal["recompute", "device", "host", "storage"] = "recompute"
    adapters: Literal["auto", "resident", "streamed"] = "auto"
    states_on_device: str | int | float = "auto"
    compile_blocks: bool | str = False
    prefetch_blocks: int | None = Field(default=None, ge=0)
    backend: Literal["auto", "uring", "posix"] = "auto"
    direct_io: bool = True
    io_block_nbytes: int = Field(default=1 << 22, ge=4096)
    io_queue_depth: int = Field(default=32, ge=1, le=4096)
    stripe_nbytes: int = Field(default=1 << 20, ge=4096)
    chunk_elements: int = Field(default=CHUNK_ELEMENTS, ge=2048)
    chunk_buffers: int = Field(default=4, ge=2)
    update_threads: int = Field(default=max(1, min(4, (os.cpu_count() or 1) // 2)), ge=1)
    keep_store: bool = False
    durability: Literal["none", "checkpoint", "step"] = "checkpoint"
    verify_reads: bool | Literal["auto"] = "auto"
    batch: tuple[int, int] | None = None
    hardware: str | None = None
    written_per_step: str | int | float | None = None
    plan: str | None = None
    step_aside: Literal["auto", "always", "never"] = "auto"
    pin: Literal["auto", "always", "never"] = "auto"
    bus_bytes_per_s: float | None = Field(default=None, gt=0)

    @field_validator("written_per_step", mode="before")
    @classmethod
    def _nbytes(cls, value: Any) -> Any:
        """As `_budget`, but for shares."""
        if isinstance(value, (str, int, float)):
            parse_nbytes(value)
        return value

    @field_validator("device_memory", "host_memory", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        """Refused at once if it cannot be read, whatever the machine has."""
        if isinstance(value, (str, int, float)):
            parse_budget(value, 1 << 62)
        return value

    @field_validator("states_on_device", mode="before")
    @classmethod
    def _budget_or_auto(cls, value: Any) -> Any:
        """As `_budget`; "auto" is none."""
        return value if value == "auto" else cls._budget(value)

    @field_validator("storage", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """One directory, or several; strings or paths. They stay the same ones when the process goes elsewhere."""
        several = [value] if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(several, (list, tuple)):
            return several
        paths = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in several]
        return [stays_the_same(path) if isinstance(path, str) and path else path for path in paths]

    @classmethod
    def checked(cls, **settings: object) -> Config:
        """Build a Config; raises ConfigError with a sentence for each setting that pydantic refuses."""
        try:
            config = cls(**settings)  # type: ignore[arg-type]  # pydantic does the checking
        except ValidationError as error:
            raise ConfigError("; ".join(_sentence(problem) for problem in error.errors())) from error
        places = [os.path.realpath(directory) for directory in config.storage]
        if len(set(places)) < len(places):
            raise ConfigError(
                f"storage={config.storage}: a directory is named twice, and would be taken for two drives"
            )
        if config.chunk_elements % 2048:
            raise ConfigError(f"chunk_elements={config.chunk_elements} must be a multiple of 2048")
        if config.update == "backward" and config.max_grad_norm is not None and config.durability != "step":
            raise ConfigError(
                "max_grad_norm needs every gradient before the first update: use update='deferred' or 'auto', or "
                "durability='step', which discards a step whose norm is above it"
            )
        if config.durability == "step" and (not config.storage or config.step_aside == "always"):
            raise ConfigError(
                "durability='step' keeps every step on storage: give storage=[directory] and leave step_aside alone"
            )
        if config.written_per_step is not None and (
            config.plan == NO_PLAN or (config.batch is None and config.plan is None)
        ):
            raise ConfigError(
                f"written_per_step={config.written_per_step!r} is kept by planning: give batch=(sequences, tokens) too"
            )
        if config.compile_blocks and config.saved_activations != "recompute":
            raise ConfigError(
                f"saved_activations={config.saved_activations!r} picks single operations, which a compiled block does "
                "not have: leave it at 'recompute', or set compile_blocks=False"
            )
        return config

    def beside(self, device_type: str, n_cores: int | None = None) -> Config:
        """These settings for a device of that kind. Beside a GPU, `update_threads` not given explicitly are all
        `n_cores` (default: those this process may use) but one that launches and one that serves storage, at most 16,
        and there are as many chunk buffers more than threads as before."""
        if device_type != "cuda" or "update_threads" in self.model_fields_set:
            return self
        cores = len(os.sched_getaffinity(0)) if n_cores is None else n_cores
        threads = max(1, min(_UPDATE_THREADS_MAX, cores - 2))
        more = {"update_threads": threads}
        if "chunk_buffers" not in self.model_fields_set:
            more["chunk_buffers"] = max(self.chunk_buffers, threads + 4)
        chosen = set(self.model_fields_set)
        config = self.model_copy(update=more)
        config.__pydantic_fields_set__ = chosen
        return config

    @property
    def written_nbytes_per_step(self) -> int | None:
        """`written_per_step` in bytes."""
        return None if self.written_per_step is None else parse_nbytes(self.written_per_step)

    @property
    def deferred(self) -> bool:
        """Whether updates wait for `optimizer.step()` (needed for clipping by the global norm)."""
        return self.update == "deferred" or (self.update == "auto" and self.max_grad_norm is not None)


def _sentence(problem: Any) -> str:
    """What is wrong with one setting, of pydantic's description of it."""
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Config.model_fields, n=1, cutoff=0.6)
        return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "value_error":
        return f"{name}: {problem['ctx']['error']}"
    wanted = problem["msg"].removeprefix("Input should be ")
    if name == "storage":
        wanted = 'a directory, or a list of them, as in storage=["/mnt/nvme0"]'
    return f"{name}={problem['input']!r}: it should be {wanted}"
