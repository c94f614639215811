"""Real child processes: they can be signalled, forked and killed without taking the test run with them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a Python script in a process of its own; stdout and stderr are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def end(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; a process that does not end in time is killed, and the status is -9."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return process.returncode, out, err


def run(script: str, *arguments: object, timeout_s: float = 60) -> tuple[int, str, str]:
    """`start` and `end`."""
    return end(start(script, *arguments), timeout_s)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    """Return when `condition` holds; fail when the process ends before, or after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline_s:
            status, out, err = end(process, 1)
            raise AssertionError(f"the child did not get there (status {status}):\n{out}\n{err}")
        time.sleep(0.01)
