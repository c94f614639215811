"""What torch's profiler sees in a steady step: gaps on the device, copies beside them, calls that wait or allocate.

Three consecutive steps are recorded and the second is looked at (trace_analysis.py), with everything in host memory and
with state on storage. In a step whose computing is the longest part, gaps between blocks are under 2 %, and the
launching thread makes no call that allocates or waits for the device. The turn of two steps, where the root is updated,
takes the same time at any batch and is counted apart.

    python benchmarks/gpu_profile.py --model 1b --tokens-per-step 32768 --profile FILE --json FILE
    python benchmarks/gpu_profile.py --device emulated --tiny
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from typing import Any

import gpu_common
import gpu_train
import torch
from gpu_common import Device, Rows
from torch.profiler import ProfilerActivity, profile, record_function
from trace_analysis import STEP, analyse

COLUMNS = (
    "step_s", "gap_share", "between_blocks_share", "turn_share", "gap_s_by_cause", "copies_beside_compute_share",
    "both_ways_s", "pageable_copies", "driver_allocations", "calls",
)  # fmt: skip
N_STEPS = 3


def recorded(
    run: gpu_train.Run, case: gpu_train.Case, directory: str
) -> tuple[list[dict[str, Any]], int | None]:
    """The trace's events of three steps after three that are not recorded, and allocations asked of the driver in them;
    nothing waits for the device in between."""
    tokens = torch.randint(0, case.family.shape.vocab, (case.batch, case.options.sequence)).to(
        case.device.torch_device
    )
    for _ in range(gpu_train.WARM_UP_STEPS + 1):
        run.step(tokens)
    case.device.synchronize()
    asked = case.device.memory()["driver_allocations"]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device.is_cuda else [])]
    with profile(activities=activities) as record:
        for _ in range(N_STEPS):
            with record_function(STEP):
                run.step(tokens)
        case.device.synchronize()
    made = case.device.memory()["driver_allocations"]
    path = os.path.join(directory, "trace.json")
    record.export_chrome_trace(path)
    with open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    if case.options.keep_trace:
        shutil.copy(path, case.options.keep_trace)
    os.unlink(path)
    return events, None if made is None or asked is None else made - asked


def row_of(case: gpu_train.Case, placement: str, directory: str) -> dict[str, Any]:
    """One placement."""
    name = f"gpu_profile_{case.family.name}_{case.batch * case.options.sequence}_{placement}"
    row: dict[str, Any] = {"name": name}
    case.device.start_counting()
    begin_s = time.perf_counter()
    try:
        run = gpu_train.make_run(case, placement)
        run.facts["construction_s"] = time.perf_counter() - begin_s
        try:
            events, driver_allocations = recorded(run, case, directory)
        finally:
            run.close()
    except gpu_common.FAILURES as error:
        return {**row, "error": gpu_common.failure(error)}
    return {**row, **run.facts, **analyse(events), "driver_allocations": driver_allocations}


def main() -> None:
    """Each placement."""
    parser = gpu_train.parser()
    parser.description = __doc__
    parser.set_defaults(placements="gpu,host,storage")
    parser.add_argument("--keep-trace", help="copy the last trace here (chrome://tracing, Perfetto)")
    options = parser.parse_args()
    gpu_common.tiny(options, **gpu_train.TINY)
    device = Device(options.device)
    directory = tempfile.mkdtemp(prefix="offload-gpu-", dir=options.storage)
    try:
        rows = Rows(options, "gpu_profile", directory, device)
        placements = options.placements.split(",")
        cases = list(gpu_train.cases(options, device, directory))
        clock = gpu_common.Clock(options, len(placements) * len(cases), gpu_common.process_age_s())
        for case in cases:
            for placement in placements:
                if clock.next_row(options):
                    row = row_of(case, placement, directory)
                    clock.made(row, options)
                    rows.add(row, COLUMNS)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
