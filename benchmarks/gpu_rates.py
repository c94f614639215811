"""The machine's rates, which are the floors of every other row: bus, drives, DRAM, AdamW, matrix products.

Measured with the library's own probes and written as a hardware profile that the planner, and the other GPU benchmarks,
read. Rows: page-locked copies to the device and from it alone and both at once; the drive with each I/O backend; a
copy in DRAM; AdamW on all update threads; bf16 products at the shapes of each model that is trained.

    python benchmarks/gpu_rates.py --storage DIR --profile FILE --json FILE
    python benchmarks/gpu_rates.py --device emulated --tiny --storage DIR --profile FILE
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from typing import Any

import gpu_common
import torch
from gpu_common import Device, Rows
from llama_shaped import SHAPES, LlamaShaped

from offload.errors import OffloadError
from offload.model.presets import DecoderShape, shape_of
from offload.planner.hardware import save_hardware
from offload.profiling import compute_probe
from offload.profiling.probe import probe
from offload.profiling.storage_probe import probe_drives

COLUMNS = ("value", "unit")
GB = 1e9


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


def of_profile(found: Any, rows: Rows) -> None:
    """What the profile holds."""
    for field in (
        "h2d_bytes_per_s", "d2h_bytes_per_s", "h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s", "dram_bytes_per_s",
    ):  # fmt: skip
        value = getattr(found, field)
        if value is not None:
            rows.add(rate(field.removesuffix("_bytes_per_s"), value / GB, "GB/s"), COLUMNS)
    rows.add(rate("adamw", found.adam_params_per_s / 1e9, "G parameters/s"), COLUMNS)


def drives(directory: str, options: argparse.Namespace, rows: Rows) -> None:
    """The drive with each backend of the I/O engine."""
    for backend in ("uring", "posix"):
        try:
            (drive,), _, is_direct = probe_drives(
                [directory],
                written_nbytes_max=int(options.written_gb * 1e9),
                seconds=options.seconds / 4,
                note=lambda text: None,
                backend=backend,
            )
        except (OffloadError, OSError, RuntimeError, ValueError) as error:
            rows.add({"name": f"gpu_rates_storage_{backend}", "error": gpu_common.failure(error)}, COLUMNS)
            continue
        for kind in ("read", "write", "mixed"):
            value = getattr(drive, f"{kind}_bytes_per_s")
            rows.add(rate(f"storage_{backend}_{kind}", value / GB, "GB/s", is_direct=is_direct), COLUMNS)


def main() -> None:
    """Measure, write the profile, print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, about")
    parser.add_argument(
        "--written-gb", type=float, default=4.0, help="written to the drive at most, each time"
    )
    parser.add_argument("--micro-tokens", type=int, default=8192, help="rows of the matrix products")
    parser.add_argument("--models", default="1b,3b,gpt3-175b,llama-70b")
    parser.add_argument("--storage", default=".")
    parser.add_argument("--profile", help="file to write the profile to")
    parser.add_argument("--json")
    options = parser.parse_args()
    gpu_common.tiny(options, seconds=2.0, written_gb=0.1, micro_tokens=32, models="tiny")
    device = Device(options.device)
    storage = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage)
    try:
        rows = Rows(options, "gpu_rates", storage, device)
        names = options.models.split(",")
        found = probe(
            [storage],
            shapes=matrices(names[0]),
            n_tokens=options.micro_tokens,
            written_nbytes_max=int(options.written_gb * 1e9),
            seconds=options.seconds / 2,
            name=device.card,
        )
        if options.profile:
            save_hardware(found, options.profile)
        of_profile(found, rows)
        drives(storage, options, rows)
        for name in names:
            flops_per_s = compute_probe.matmul_flops_per_s(
                matrices(name),
                options.micro_tokens,
                torch.bfloat16,
                device.torch_device,
                2.0 if device.is_cuda else 0.2,
            )
            rows.add(rate(f"matmul_{name}", flops_per_s / 1e12, "TFLOP/s"), COLUMNS)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    main()
