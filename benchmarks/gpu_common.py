"""What the GPU benchmarks share: a device that may be emulated, models made fast, floors, and rows that survive a kill.

[Note: floors] A row's floors are the seconds that each resource would need for what the step did if it were alone:
FLOPs over the matrix products' rate, bytes over the bus, the drives and DRAM, updated parameters over AdamW's rate,
all of them rates of the profile that `gpu_rates.py` measured on the same machine. `of_floor` is the largest floor over
the step's seconds. Where computing is the largest, a perfect run stays below 1: its floor is matrix products alone, and
a model does more. `of_best` has in its place what plain torch takes for the same tokens, layers recomputed, with all
state on the device: 1 is perfect.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import ROOT, about, command_line

sys.path.insert(0, str(ROOT))

import psutil
import torch
from torch import nn

from offload.errors import OffloadError
from offload.planner.cost_model import CostModel, Traffic
from offload.planner.hardware import Hardware, load_hardware
from offload.planner.plan import state_format_of
from offload.planner.workload import Workload


class Device:
    """The few calls in which a CUDA device differs from the emulated one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = name.startswith("cuda")
        if self.is_cuda and not torch.cuda.is_available():
            raise SystemExit("no CUDA device, or no CUDA build of torch; or try --device emulated --tiny")
        self.torch_device = torch.device("cpu")
        if self.is_cuda:
            index = torch.device(name).index
            self.torch_device = torch.device("cuda", torch.cuda.current_device() if index is None else index)

    @property
    def card(self) -> str:
        """What the rows call it."""
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else self.name

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def start_counting(self) -> None:
        """Give back what earlier rows left, and forget their peaks."""
        gc.collect()
        with contextlib.suppress(OSError):  # not everywhere allowed: then the peak is that of all rows so far
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def memory(self) -> dict[str, int | None]:
        """Peaks of torch's allocator in bytes, and how often it has asked the driver or had to try again."""
        if not self.is_cuda:
            return dict.fromkeys(("reserved_peak", "allocated_peak", "driver_allocations", "retries"))
        stats = torch.cuda.memory_stats(self.torch_device)
        return {
            "reserved_peak": torch.cuda.max_memory_reserved(self.torch_device),
            "allocated_peak": torch.cuda.max_memory_allocated(self.torch_device),
            "driver_allocations": stats.get("num_device_alloc", 0) + stats.get("num_device_free", 0),
            "retries": stats.get("num_alloc_retries", 0),
        }


def process_age_s() -> float:
    """Seconds since this process began: what imports have taken of a script's time, too."""
    return time.time() - psutil.Process().create_time()


def rss_peak_nbytes() -> int:
    """The process's most resident memory since `Device.start_counting`."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """`make()` in `dtype`, without memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return make()
    finally:
        torch.set_default_dtype(before)


def with_random_weights(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """`make()` in host memory in `dtype`, weights from N(0, 0.02), norms one; no second copy of it exists at any time.

    Its buffers have to be made in forward. One block of random numbers is used over and over, each parameter from
    another place of it, since drawing billions on a CPU takes longer than the steps that are measured.
    """
    model = on_meta(make, dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty((1 << 22) + 4093).normal_(0.0, 0.02, generator=generator).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            shift = index * 7919 % numbers.numel()
            turned = torch.cat((numbers[shift:], numbers[:shift]))
            for start in range(0, flat.numel(), turned.numel()):
                part = flat[start : start + turned.numel()]
                part.copy_(turned[: part.numel()])
    return model


def copies_of(engine: Any) -> Any:
    """Who counts the bytes over the bus."""
    return engine.parts.resources.copies


def counted(engine: Any) -> dict[str, int]:
    """Bytes moved so far, by way."""
    copies = copies_of(engine)
    return {**engine.counters(), "h2d_bytes": copies.h2d_bytes, "d2h_bytes": copies.d2h_bytes}


def floors(
    hardware: Hardware | None, workload: Workload, batch: int, hardware_flops: float, moved: dict[str, float]
) -> dict[str, float]:
    """Seconds by resource that a step of these FLOPs and bytes takes at least. See [Note: floors]."""
    if hardware is None:
        return {}
    model = CostModel(workload, hardware, state_format_of(workload), batch)
    updated = moved.get("updated", 0.0)
    traffic = Traffic(
        flops=hardware_flops,
        h2d=moved.get("h2d_bytes", 0.0),
        d2h=moved.get("d2h_bytes", 0.0),
        read=moved.get("read_bytes", 0.0),
        written=moved.get("written_bytes", 0.0),
        updated=updated,
    )
    seconds = {name: float(s) for name, s in model.seconds(traffic).items()}
    if not updated:  # plain torch on the device: host memory and its cores have no part in it
        seconds = {"compute": seconds["compute"]}
    return seconds


def with_floors(row: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    """`row` with its floors and the fraction of the largest that it reaches."""
    if not found:
        return row
    largest = max(found, key=lambda name: found[name])
    return {
        **row,
        "floor_s": found,
        "largest_floor": largest,
        "of_floor": found[largest] / row["step_s"],
    }


def with_best(row: dict[str, Any], plain_step_s: float) -> dict[str, Any]:
    """`row` with the fraction it reaches of plain torch's step or of the largest floor but computing's, whichever is
    longer. See [Note: floors]."""
    others = [seconds for name, seconds in row.get("floor_s", {}).items() if name != "compute"]
    return {**row, "of_best": max([plain_step_s, *others]) / row["step_s"]}


def profile_of(path: str | None) -> Hardware | None:
    """The measured profile; None without one."""
    return load_hardware(path) if path and os.path.exists(path) else None


class Rows:
    """Rows as they are made: each is printed as one line of a table, and the file has all so far at any time."""

    def __init__(self, options: argparse.Namespace, script: str, directory: str, device: Device) -> None:
        self._path = options.json
        self._facts = about(
            directory, device=device.card, command=command_line(script, sys.argv[1:]), **_versions(device)
        )
        self._columns: Sequence[str] = ()
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], columns: Sequence[str]) -> None:
        """Print `row`'s `columns` and keep all of it."""
        if tuple(columns) != tuple(self._columns):
            self._columns = columns
            print("  ".join(["name".ljust(44), *(c.rjust(max(12, len(c))) for c in columns)]))
        cells = [_cell(row.get(column)).rjust(max(12, len(column))) for column in columns]
        print("  ".join([str(row["name"]).ljust(44), *cells]), flush=True)
        if "error" in row or "not_run" in row:
            print(f"    {row.get('error') or row.get('not_run')}", flush=True)
        self.rows.append({**row, **self._facts})
        if self._path:
            file = pathlib.Path(self._path)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
            temporary.replace(file)


def _versions(device: Device) -> dict[str, Any]:
    if not device.is_cuda:
        return {}
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "default"
    return {"cuda": torch.version.cuda, "allocator": allocator}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{k} {v:.2g}" for k, v in value.items() if v >= 0.005) or "none"
    return str(value)


FAILURES = (RuntimeError, ValueError, OSError, OffloadError, AssertionError, ImportError)
"""What may go wrong in one row without ending the others: out of memory, a refused budget, a peer's assertion."""


def failure(error: BaseException) -> str:
    """One line of it."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400]


def tiny(options: argparse.Namespace, **settings: Any) -> None:
    """With --tiny: sizes with which the whole script takes seconds without a GPU."""
    if options.tiny:
        for name, value in settings.items():
            setattr(options, name, value)


def replaced(shape: Any, **sizes: Any) -> Any:
    """The shape with other sizes."""
    return dataclasses.replace(shape, **sizes)


class Clock:
    """Shares the script's time, of which `used_s` are gone, among the rows that are still to be made."""

    def __init__(self, options: argparse.Namespace, n_rows: int, used_s: float = 0.0) -> None:
        self._end_s = time.monotonic() + options.seconds - used_s
        self._row_seconds = options.row_seconds
        self._n_rows = n_rows

    @property
    def left_s(self) -> float:
        """Of the script's time."""
        return self._end_s - time.monotonic()

    def made(self, row: dict[str, Any], options: argparse.Namespace) -> None:
        """Let the next rows know how much of their time goes before their first step: as much as for any so far."""
        options.construction_s = max(options.construction_s, row.get("construction_s", 0.0))

    def next_row(self, options: argparse.Namespace) -> bool:
        """Give `options.row_seconds` this row's share; whether there is time for one at all."""
        left_s = self.left_s
        options.row_seconds = min(self._row_seconds, left_s / self._n_rows)
        self._n_rows -= 1
        return left_s > 3.0
