"""What every benchmark shares: the machine's description, fio as the storage limit, rows written as JSON."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def machine(directory: str) -> dict[str, Any]:
    """Commit, processor, memory, kernel and file system of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    file_system = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True)
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    total_kib = next(
        (int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    return {
        "commit": commit.stdout.strip(),
        "processor": model,
        "cores": os.cpu_count(),
        "dram_bytes": total_kib * 1024,
        "kernel": platform.release(),
        "file_system": file_system.stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    with open(path) as file:
        return file.readlines()


def median(values: Sequence[float]) -> float:
    """Median, so that one disturbed round does not decide."""
    return statistics.median(values)


def fio(
    directory: str,
    mode: str,
    *,
    nbytes: int = 1 << 29,
    block: int = 1 << 20,
    depth: int = 32,
    read_percent: int = 50,
):
    """Measured rate of the drive under `directory` in bytes/s, read plus written. `mode` is read, write or rw."""
    path = os.path.join(directory, "fio.bin")
    command = [
        "fio",
        "--name=floor",
        f"--filename={path}",
        f"--rw={mode}",
        f"--bs={block}",
        f"--iodepth={depth}",
        "--ioengine=io_uring",
        "--direct=1",
        f"--size={nbytes}",
        f"--rwmixread={read_percent}",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fio failed: {done.stderr or done.stdout}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    runtime_s = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    return (job["read"]["io_bytes"] + job["write"]["io_bytes"]) / runtime_s


def need_fio() -> None:
    """Stop with the command to run when fio is missing."""
    if shutil.which("fio") is None:
        raise SystemExit("this benchmark measures the drive with fio; run: sudo apt-get install fio")


def write_rows(path: str | None, rows: list[dict[str, Any]], **about: Any) -> None:
    """Print each row; write `{"rows": [...], **about}` to `path` when given."""
    for row in rows:
        print(json.dumps(row))
    if path:
        pathlib.Path(path).write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")
