"""DeepSpeed itself on NVMe, swapping with its own I/O handle and with ours: the same losses, seconds a step, bytes.

    python benchmarks/deepspeed_io.py --storage DIR --peer-python VENV/bin/python --json FILE

ZeRO stage 3 of a Llama-shaped model with parameters and optimizer on NVMe, bf16; both sides are unmodified DeepSpeed
and the same script (benchmarks/deepspeed_loop.py). They run in turn, each a process of its own, `--rounds` times; the
first two steps of each are not timed. Stops when one loss of the two sides differs by a bit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from typing import Any

import common
from deepspeed_configuration import configuration
from deepspeed_script import UNTIMED_STEPS, joined, run

ZERO = {"largest_parameter": 8192 * 1024, "sub_group_size": 20_000_000}
SIDES: dict[str, tuple[str, ...]] = {"own_handle": (), "our_engine": ("--through-our-io",)}


def row_of(name: str, side: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One side's figures beside the other's."""
    timed = side["step_s"][UNTIMED_STEPS:]
    return {
        "name": f"deepspeed_io_{name}",
        "parameters": side["parameters"],
        "step_s": common.median(timed),
        "step_s_spread": common.spread(timed),
        "rss_over_baseline_bytes": side["rss_over_baseline_bytes"],
        "read_bytes_per_step": side["read_bytes_per_step"],
        "written_bytes_per_step": side["written_bytes_per_step"],
        "losses": side["losses"],
        "losses_equal_to_the_bit": side["losses"] == other["losses"],
        "speedup": common.median(other["step_s"][UNTIMED_STEPS:]) / common.median(timed),
        "moved_by_our_engine": side.get("moved_by_our_engine", {}),
    }


def main() -> None:
    """Run the sides, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", required=True)
    parser.add_argument(
        "--peer-python", required=True, help="a Python that has DeepSpeed, and can import offload"
    )
    parser.add_argument("--model", default="151m")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="deepspeed-io-", dir=options.storage)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    try:
        for _ in range(options.rounds):
            for name, more in SIDES.items():
                storage = tempfile.mkdtemp(dir=directory)
                wanted = configuration(storage, **ZERO)
                found[name].append(run(options.peer_python, "deepspeed", wanted, options, *more))
                shutil.rmtree(storage)
        about = common.about(directory, backend=common.backend(directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sides = {name: joined(rounds) for name, rounds in found.items()}
    own, ours = sides["own_handle"], sides["our_engine"]
    if own["losses"] != ours["losses"]:
        raise SystemExit(f"other losses: {own['losses']} with DeepSpeed's handle, {ours['losses']} with ours")
    rows = [row_of("own_handle", own, ours) | about, row_of("our_engine", ours, own) | about]
    common.write_rows(options.json, rows, common.command_line(__file__, sys.argv[1:]))


if __name__ == "__main__":
    main()
