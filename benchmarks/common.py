"""What every benchmark shares: options, the machine's description, fio as peer and limit, rows written as JSON.

[Note: fio in its fastest form] A transfer's memory decides its speed as much as its block size does: on 4 KiB pages
a 1 MiB block is up to 256 segments, which a drive's queue may cut into several requests. Our arenas are on huge pages,
so fio gets them too, through glibc's malloc (2.35 or later; no reserved pages and no root needed). With registered
buffers, a registered file and direct I/O besides, this is the fastest fio we know how to ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE_OPTIONS = {"--directory": "DIR", "--storage": "DIR", "--json": "FILE", "--peer-python": "PYTHON"}


def about(directory: str, **more: Any) -> dict[str, Any]:
    """What every row carries: machine, commit, file system and torch version of this run."""
    import torch

    commit = _output("git", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT", "unknown")
    if _output(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "csrc", "offload", "benchmarks/*.py"
    ):
        commit += "-modified"
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    dram_kib = next(
        (int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    return {
        "machine": f"{model}, {os.cpu_count()} cores, {dram_kib * 1024 / 1e9:.1f} GB, Linux {platform.release()}",
        "commit": commit,
        "file_system": _output("stat", "-f", "-c", "%T", directory),
        "torch": torch.__version__,
        **more,
    }


def backend(directory: str) -> str:
    """Which I/O backend the engine chooses for files in `directory`."""
    from offload._C import Engine

    path = os.path.join(directory, "probe.bin")
    pathlib.Path(path).write_bytes(bytes(4096))
    engine = Engine([path])
    name = engine.backend
    engine.close()
    os.unlink(path)
    return str(name)


def memory_available_nbytes() -> int:
    """What the kernel says can be had without swapping."""
    return (
        next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemAvailable"))
        * 1024
    )


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no such program here
        return ""
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    with open(path) as file:
        return file.readlines()


def parser_of_turns(description: str | None) -> argparse.ArgumentParser:
    """For a benchmark that measures several forms in turn; `description` is the script's docstring. It adds its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured, after two that are not")
    parser.add_argument("--json", help="write the rows to this file")
    return parser


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command that made the rows, places of this machine replaced by what they are."""
    words, place = ["python", f"benchmarks/{pathlib.Path(script).name}"], ""
    for word in argv:
        option, equals, _ = word.partition("=")
        words.append(
            place or (f"{option}={PLACE_OPTIONS[option]}" if equals and option in PLACE_OPTIONS else word)
        )
        place = PLACE_OPTIONS.get(word, "")
    return " ".join(words)


def median(values: Sequence[float]) -> float:
    """Median, so that one disturbed round does not decide."""
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 3) -> list[float]:
    """Least and greatest."""
    return [round(min(values), digits), round(max(values), digits)]


def need_fio() -> None:
    """Stop with the command to run when fio is missing."""
    if shutil.which("fio") is None:
        raise SystemExit("this benchmark measures the drive with fio; run: sudo apt-get install fio")


@dataclass(frozen=True)
class Transfer:
    """`nbytes` moved in `seconds`, with `cpu_s` seconds of user and system time."""

    nbytes: int
    seconds: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        """Rate, read plus written."""
        return self.nbytes / self.seconds

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds for 10^9 bytes."""
        return self.cpu_s / self.nbytes * 1e9


def fio(
    path: str,
    mode: str,
    *,
    nbytes: int = 1 << 29,
    block_nbytes: int = 1 << 20,
    queue_depth: int = 32,
    read_percent: int = 50,
    passes: int = 1,
    huge_pages: bool = True,
) -> Transfer:
    """`passes` times over `nbytes` of `path`; `mode` is read, write or rw. See [Note: fio in its fastest form]."""
    command = [
        *("fio", "--name=fio", f"--filename={path}", f"--size={nbytes}", "--overwrite=1", f"--rw={mode}"),
        *(
            f"--rwmixread={read_percent}",
            f"--bs={block_nbytes}",
            f"--iodepth={queue_depth}",
            f"--loops={passes}",
        ),
        *("--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1"),
        *("--scramble_buffers=0", "--gtod_reduce=1", "--output-format=json"),
    ]
    environment = dict(os.environ)
    if huge_pages:
        command.append("--iomem_align=2m")
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"fio failed: {done.stderr or done.stdout}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return Transfer(
        job["read"]["io_bytes"] + job["write"]["io_bytes"],
        max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3,
        (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3,
    )


def write_rows(
    path: str | None, rows: list[dict[str, Any]], command: str, *, keep_others: bool = False
) -> None:
    """Print each row; write `{"rows": [...]}` to `path` when given, each row with the command that made it.

    `keep_others` keeps the file's rows of other names, for benchmarks that can be run row by row.
    """
    rows = [row | {"command": command} for row in rows]
    for row in rows:
        print(json.dumps(row))
    if path is None:
        return
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if keep_others and file.exists():
        made = {row["name"] for row in rows}
        rows = [row for row in json.loads(file.read_text())["rows"] if row["name"] not in made] + rows
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
