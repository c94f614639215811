"""What durable steps and checksums cost in step time, storage-bound, and what a checkpoint costs.

Runs of the same model take turns, some steps each, in an order shuffled in every round: level `checkpoint`, the same
with a flush of the drive in every step (what a volatile cache in the drive costs whoever wants to have a step on it),
level `step` as it is by default, and level `step` verifying all that is read, nothing of it, then without any checksum.
All state is on storage, and a step has few tokens, so that the drive limits it; with little device memory, parameters
are read and written by all of them. `--drive-bytes-per-s` makes the drive one of that rate, reads and
writes together, on any file system; on tmpfs a flush takes no time, as on a drive whose cache survives a power loss.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import shutil
import statistics
import sys
import threading
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

import offload
from benchmarks.common import about, command_line, median, spread, write_rows
from benchmarks.llama_shaped import LlamaShaped, Shape
from offload._C import Engine, crc32c, crc32c_levels
from offload.tiers import storage

SHAPES = {
    "deep": Shape(256, 32, 1024, 4, 2048),  # the blocks that stay on the device are a small part of it
    "10m": Shape(256, 6, 1024, 4, 8192),
    "34m": Shape(512, 6, 2048, 8, 8192),
    "tiny": Shape(128, 4, 512, 4, 512),
}


class Side:
    """One run, its steps and their seconds."""

    def __init__(self, name: str, shape: Shape, storage: str, budgets: dict[str, str], tokens: int) -> None:
        torch.manual_seed(0)
        model = LlamaShaped(shape).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        level = "checkpoint" if name.startswith("checkpoint") else "step"
        self.model, self.optimizer = offload.wrap(
            model,
            optimizer,
            storage=[storage],
            durability=level,
            step_aside="never",
            verify_reads={"step": "auto", "step_verified": True}.get(name, False),
            **budgets,
        )
        self.name, self.storage = name, storage
        self.flushing: threading.Thread | None = None
        if name == "step_without_checksums":
            engine = self.model.offload
            for block in [engine.root, *engine.blocks]:
                block.sides.addresses = lambda _: (0, 0)
        self.batch = torch.randint(0, shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.moved_before = 0

    def moved_nbytes(self) -> int:
        """Read and written by its steps so far."""
        counted = self.model.offload.counters()
        return counted["read_bytes"] + counted["written_bytes"] - self.moved_before

    def turn(self, n_steps: int) -> None:
        """Steps one after the other, until all of their bytes are written and, where that is promised, committed."""
        begin_s = time.perf_counter()
        for _ in range(n_steps):
            if self.name == "checkpoint_flushed":
                self.flush()
            loss = self.model(self.batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(float(loss.detach()))
        engine = self.model.offload
        engine.flush()
        engine.wait_committed()
        if self.name == "checkpoint_flushed":
            self.flush()
            self.flush()
        self.seconds.append((time.perf_counter() - begin_s) / n_steps)

    def flush(self) -> None:
        """Beside what follows, as a commit does; no two at once."""
        if self.flushing is not None:
            self.flushing.join()
        self.flushing = threading.Thread(target=self.model.offload.parts.resources.store.engine.sync)
        self.flushing.start()

    def storage_nbytes(self) -> int:
        """Of its store."""
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.storage))


def crc_bytes_per_s(nbytes: int) -> float:
    """Of data in memory, one core."""
    data = torch.ones(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        begin_s = time.perf_counter()
        crc32c(data.data_ptr(), nbytes)
        seconds.append(time.perf_counter() - begin_s)
    return nbytes / statistics.median(seconds)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="34m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn, not waited for in between")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--device-memory", default="200MB")
    parser.add_argument("--host-memory", default="16MB")
    parser.add_argument("--drive-bytes-per-s", type=float, default=0, help="0: as fast as the drive is")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = os.path.join(arguments.storage, f"durability-{os.getpid()}")
    os.mkdir(place)
    budgets = {"device_memory": arguments.device_memory, "host_memory": arguments.host_memory}
    names = ["checkpoint", "checkpoint_flushed", "step", "step_verified", "step_unverified"]
    names.append("step_without_checksums")
    if arguments.drive_bytes_per_s:
        faults = {"bytes_per_s": arguments.drive_bytes_per_s}
        storage.Engine = lambda paths, **options: Engine(paths, inject=faults, **options)  # type: ignore[misc]
    shape = SHAPES[arguments.model]
    try:
        sides = [Side(name, shape, os.path.join(place, name), budgets, arguments.tokens) for name in names]
        order = random.Random(0)
        for round_index in range(arguments.rounds + 2):
            for side in order.sample(sides, len(sides)):
                side.turn(arguments.steps)
                if round_index == 1:
                    side.seconds.clear()  # the first two fill what later steps find
                    side.moved_before += side.moved_nbytes()
        if any(side.losses != sides[0].losses for side in sides):
            raise SystemExit("the runs do not have the same losses")
        rows = measured(sides, place, arguments)
        for side in sides:
            side.model.offload.close(remove=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    write_rows(arguments.json, rows, command_line(sys.argv[0], sys.argv[1:]))


def ratio(one: float, other: float) -> float | None:
    """None where nothing was measured: no byte moved, or the drive's rate is not known."""
    return round(one / other, 3) if one and other else None


def measured(sides: list[Side], place: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows."""
    common = about(
        place,
        model=arguments.model,
        backend=sides[0].model.offload.parts.resources.store.engine.backend,
        drive="as it is"
        if not arguments.drive_bytes_per_s
        else f"limited to {arguments.drive_bytes_per_s / 1e9:g} GB/s, reads and writes together",
    )
    numel = sides[0].model.offload.trainable_numel
    steps = len(sides[0].losses)
    moved = {side.name: side.moved_nbytes() / (arguments.rounds * arguments.steps) for side in sides}
    rows = []
    for side in sides:
        paired = [a / b for a, b in zip(side.seconds, sides[0].seconds, strict=True)]
        rows.append(
            common
            | {
                "name": f"level_{side.name}",
                "step_s": round(median(side.seconds), 4),
                "step_s_range": spread(side.seconds),
                "ratio_to_checkpoint": round(median(paired), 3),
                "ratio_range": spread(paired),
                "over_checkpoint_percent": round(100 * (median(paired) - 1), 1),
                "moved_bytes_per_step": round(moved[side.name]),
                "moved_ratio_to_checkpoint": ratio(moved[side.name], moved["checkpoint"]),
                "step_over_floor": ratio(
                    median(side.seconds) * arguments.drive_bytes_per_s, moved[side.name]
                ),
                "written_bytes_per_param": round(
                    side.model.offload.counters()["written_bytes"] / steps / numel, 2
                ),
                "storage_bytes_per_param": round(side.storage_nbytes() / numel, 2),
                "rounds": arguments.rounds,
            }
        )
    seconds = {side.name: side.seconds for side in sides}
    compared = [
        ("durable_over_flushed", "step", "checkpoint_flushed"),
        ("verifying_reads", "step_verified", "step_unverified"),
        ("summing_writes", "step_unverified", "step_without_checksums"),
    ]
    for name, one, other in compared:
        paired = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        rows.append(
            common
            | {
                "name": name,
                "step_ratio": round(median(paired), 3),
                "step_ratio_range": spread(paired),
                "percent": round(100 * (median(paired) - 1), 1),
            }
        )
    rows.append(
        common
        | {
            "name": "checksums",
            "kind": crc32c_levels()[-1],
            "gb_per_s_one_core": round(crc_bytes_per_s(1 << 21) / 1e9, 1),
        }
    )
    rows += [common | saving(side, os.path.join(place, "saved"), arguments) for side in (sides[0], sides[2])]
    begin_s = time.perf_counter()
    path = offload.save(sides[0].model, os.path.join(place, "saved"))
    save_s = time.perf_counter() - begin_s
    nbytes = sum(entry.stat().st_size for entry in os.scandir(path))
    begin_s = time.perf_counter()
    offload.resume(sides[0].model, path)
    resume_s = time.perf_counter() - begin_s
    rows.append(
        common
        | {
            "name": "checkpoint",
            "nbytes": nbytes,
            "bytes_per_param": round(nbytes / numel, 2),
            "save_s": round(save_s, 3),
            "resume_s": round(resume_s, 3),
            "save_in_steps": round(save_s / median(sides[0].seconds), 2),
        }
    )
    return rows


def saving(side: Side, directory: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a save adds to a turn of steps that it is waited for in, and to one that goes on beside it."""
    kinds = ["none", "waited", "beside"]
    turns: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = random.Random(1)
    for _ in range(max(2, arguments.rounds // 2)):
        for kind in order.sample(kinds, len(kinds)):
            begin_s = time.perf_counter()
            if kind != "none":
                offload.save(side.model, directory, keep_last=1, wait=kind == "waited")
            side.turn(arguments.steps)
            side.seconds.pop()
            side.model.offload.wait_saved()
            turns[kind].append(time.perf_counter() - begin_s)
    seconds = {kind: median(turns[kind]) for kind in kinds}
    return {
        "name": f"saving_{side.name}",
        "steps": arguments.steps,
        "turn_s": round(seconds["none"], 4),
        "turn_with_save_waited_s": round(seconds["waited"], 4),
        "turn_with_save_beside_s": round(seconds["beside"], 4),
        "added_waited_s": round(seconds["waited"] - seconds["none"], 4),
        "added_beside_s": round(seconds["beside"] - seconds["none"], 4),
    }


if __name__ == "__main__":
    main()
