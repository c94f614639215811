"""The machine's rates, which are the floors of every other row: bus, drives, DRAM, AdamW, matrix products.

Measured with the library's own probes and written as a hardware profile that the planner, and the other GPU benchmarks,
read. Rows: page-locked copies to the device and from it alone and both at once; the drive with each I/O backend; a
copy in DRAM; AdamW on all update threads; bf16 products at the shapes of each model that is trained.

A drive of a virtual machine may answer from a cache of its server, or spend what it has saved up: the file is as large
as --file-gb, a quarter of the free bytes and the seconds let it be, and the drive is measured at the beginning and at
the end. Where both directions at once reach less than 0.7 of what each alone allows, the drive is measured once more
and the better is kept.

    python benchmarks/gpu_rates.py --storage DIR --profile FILE --json FILE
    python benchmarks/gpu_rates.py --device emulated --tiny --storage DIR --profile FILE
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import gpu_common
import torch
from gpu_common import Device, Rows
from llama_shaped import SHAPES, LlamaShaped

from offload.errors import OffloadError
from offload.model.presets import DecoderShape, shape_of
from offload.planner.hardware import Drive, save_hardware
from offload.profiling import compute_probe
from offload.profiling.probe import probe
from offload.profiling.storage_probe import Backend, probe_drives

COLUMNS = ("value", "unit")
GB = 1e9
WRITES_PER_FILE = 3.75
"""How often the probe writes its file, at most."""
TRUSTED = 0.7
"""Of what reads and writes alone allow, that both at once reach on a drive that does nothing else."""


def matrices(name: str) -> tuple[tuple[int, int], ...]:
    """(in, out) of the matrices of one layer."""
    if name in SHAPES:
        with torch.device("meta"):
            return compute_probe.matmul_shapes(LlamaShaped(gpu_common.replaced(SHAPES[name], layers=2)))
    shape: DecoderShape = shape_of(name)
    width = shape.hidden // shape.heads * shape.key_value_heads
    inner = [(shape.hidden, shape.intermediate), (shape.intermediate, shape.hidden)]
    return ((shape.hidden, shape.hidden), (shape.hidden, width), *inner)


def rate(name: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    """One row."""
    return {"name": f"gpu_rates_{name}", "value": value, "unit": unit, **more}


def of_alone(drive: Drive) -> float:
    """Both directions at once, of what the same bytes would take one after the other."""
    return (
        float(drive.mixed_bytes_per_s or 0.0) * (1 / drive.read_bytes_per_s + 1 / drive.write_bytes_per_s) / 2
    )


def better(first: Drive, again: Callable[[], Drive]) -> Drive:
    """`first`, or what measuring `again` has found where `first` is doubtful and that has more of both at once."""
    if of_alone(first) >= TRUSTED:
        return first
    return max(first, again(), key=lambda drive: drive.mixed_bytes_per_s or 0.0)


def written_nbytes_max(directory: str, file_gb: float) -> int:
    """Of a probe whose file has so many GB, and at most a quarter of what is free."""
    return int(WRITES_PER_FILE * min(file_gb * GB, shutil.disk_usage(directory).free / 4))


def storage_rows(when: str, drive: Drive, rows: Rows) -> None:
    """The drive as the probe of the beginning or the end found it."""
    for kind in ("read", "write", "mixed"):
        rows.add(rate(f"storage_{when}_{kind}", getattr(drive, f"{kind}_bytes_per_s") / GB, "GB/s"), COLUMNS)


def of_profile(found: Any, rows: Rows) -> None:
    """What the profile holds."""
    for field in (
        "h2d_bytes_per_s", "d2h_bytes_per_s", "h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s", "dram_bytes_per_s",
    ):  # fmt: skip
        value = getattr(found, field)
        if value is not None:
            rows.add(rate(field.removesuffix("_bytes_per_s"), value / GB, "GB/s"), COLUMNS)
    rows.add(rate("adamw", found.adam_params_per_s / 1e9, "G parameters/s"), COLUMNS)


def drives(directory: str, seconds: float, options: argparse.Namespace, rows: Rows) -> None:
    """The drive with each backend of the I/O engine."""
    for backend in ("uring", "posix"):
        try:
            drive, is_direct = measured_drive(directory, seconds / 2, options, backend)
        except (OffloadError, OSError, RuntimeError, ValueError) as error:
            rows.add({"name": f"gpu_rates_storage_{backend}", "error": gpu_common.failure(error)}, COLUMNS)
            continue
        for kind in ("read", "write", "mixed"):
            value = getattr(drive, f"{kind}_bytes_per_s")
            rows.add(rate(f"storage_{backend}_{kind}", value / GB, "GB/s", is_direct=is_direct), COLUMNS)


def measured_drive(
    directory: str, seconds: float, options: argparse.Namespace, backend: Backend = "auto"
) -> tuple[Drive, bool]:
    """The drive and whether the page cache was avoided."""
    (drive,), _, is_direct = probe_drives(
        [directory],
        written_nbytes_max=written_nbytes_max(directory, options.file_gb),
        seconds=seconds,
        note=lambda text: None,
        backend=backend,
    )
    return drive, is_direct


def main() -> None:
    """Measure, write the profile, print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, about")
    parser.add_argument(
        "--file-gb",
        type=float,
        default=16.0,
        help="of the file on the drive at most; about four times as much is written, each of four or five times",
    )
    parser.add_argument("--micro-tokens", type=int, default=8192, help="rows of the matrix products")
    parser.add_argument("--models", default="1b,3b,gpt3-175b,llama-70b")
    parser.add_argument("--storage", default=".")
    parser.add_argument("--profile", help="file to write the profile to")
    parser.add_argument("--json")
    options = parser.parse_args()
    gpu_common.tiny(options, seconds=2.0, file_gb=0.03, micro_tokens=32, models="tiny")
    device = Device(options.device)
    storage = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage)
    try:
        rows = Rows(options, "gpu_rates", storage, device)
        names = options.models.split(",")
        found = probe(
            [storage],
            shapes=matrices(names[0]),
            n_tokens=options.micro_tokens,
            written_nbytes_max=written_nbytes_max(storage, options.file_gb),
            seconds=options.seconds / 2,
            name=device.card,
        )
        if options.profile:
            save_hardware(found, options.profile)
        of_profile(found, rows)
        storage_rows("begin", found.drives[0], rows)
        kept = better(found.drives[0], lambda: measured_drive(storage, options.seconds / 6, options)[0])
        if kept is not found.drives[0]:
            storage_rows("again", kept, rows)
            if options.profile:
                save_hardware(found.model_copy(update={"drives": (kept,)}), options.profile)
        drives(storage, options.seconds / 3, options, rows)
        for name in names:
            flops_per_s = compute_probe.matmul_flops_per_s(
                matrices(name),
                options.micro_tokens,
                torch.bfloat16,
                device.torch_device,
                2.0 if device.is_cuda else 0.2,
            )
            rows.add(rate(f"matmul_{name}", flops_per_s / 1e12, "TFLOP/s"), COLUMNS)
        storage_rows("end", measured_drive(storage, options.seconds / 6, options)[0], rows)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()
