"""One training step: ours against a peer and against the floor, interleaved in one run.

Each side is a process of its own that trains the same Llama-shaped model in bf16, so that its memory can be measured;
the parent asks them for a few steps in turn, with fio in between. The floor of a row is the larger of the arithmetic
alone (plain torch, everything in memory, nothing recomputed) and the bytes the row's own counters report over fio's
rate in the same run: fio's mixed rate, or its separate read and write rates, whichever is faster.

    python benchmarks/train_step.py --storage DIR --json FILE
    python benchmarks/train_step.py --storage DIR --peer deepspeed --peer-python VENV/bin/python --json FILE

Rows: `storage` (no host memory but staging), `streamed` (and a device tier too small to keep the parameters, which come
from storage twice a step), `half` (host memory for half of the state) and `1b` (a 1 B-parameter model, floor only). The
peer is run in the chosen PEER_CONFIGURATIONS beside the first two; `peer_step_s` is that of the fastest with everything
on storage (its default where the spreads overlap), `peers` has them all. Rows of other names stay in the file. The
peer's Python needs torch, deepspeed, ninja and the system's libaio; its operations compile at first use.

After timing, the parameters are compared, bit for bit, with as many steps of the same training in host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import common
from train_side import DEVICE_MEMORY, STATE_NBYTES_PER_PARAM

PEER_DEFAULT = "default_groups"
ROWS: dict[str, dict[str, str]] = {
    "storage": {},
    "streamed": {"device_memory": "420MB", "saved_activations": "recompute"},
    "half": {"host_share": "0.5"},
    "1b": {},
}
"""What each tells `train_side.py`, over its defaults."""
WITH_PEER = ("storage", "streamed")
REFERENCE_NBYTES_PER_PARAM = 17  # state, the model it starts from and the device tier, all in memory
ROUNDS_MIN = 3
WORKER = pathlib.Path(__file__).with_name("train_side.py")
# Prefetching is off and there are more buffers than by default: with either default it stops on an assertion.
PEER_CONFIGURATIONS = {
    "default_groups": {"params": "nvme", "sub_group_size": 1_000_000_000},
    "small_groups": {"params": "nvme", "sub_group_size": 50_000_000},
    "params_in_dram": {"params": "cpu", "sub_group_size": 1_000_000_000},
}


class Side:
    """One worker process and what it has answered so far."""

    def __init__(self, python: str, kind: str, model: str, directory: str, storage: str, *extra: str) -> None:
        self.kind = kind
        command = [python, str(WORKER), kind, "--model", model, f"--storage={storage}", *extra]
        handle, log = tempfile.mkstemp(prefix=f"{kind}-", suffix=".log", dir=directory)
        self._log = pathlib.Path(log)
        with os.fdopen(handle, "w") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        self.answers: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self.steps_taken = 0
        self.numel = int(self._read()["numel"])

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SideStopped(f"{self.kind} stopped:\n" + self._log.read_text()[-3000:])
        return json.loads(line)

    def _ask(self, line: str) -> dict[str, Any]:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def run(self, n_steps: int, *, keep: bool = True) -> None:
        """Take `n_steps` steps; `keep=False` for warming up."""
        self.last = self._ask(str(n_steps))
        self.steps_taken += n_steps
        if keep:
            self.answers.append(self.last)

    def digest(self) -> str:
        """Of the parameters it has now."""
        return str(self._ask("digest")["digest"])

    def all(self, key: str) -> list[float]:
        """One value a round."""
        return [answer[key] for answer in self.answers]

    def middle(self, key: str) -> float:
        """Median over the rounds."""
        return common.median(self.all(key))

    def close(self) -> None:
        """End the process, and wait for it."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class SideStopped(Exception):
    """A worker ended before it was told to."""


class Row:
    """One row of the table: its sides, the rounds and what they add up to."""

    def __init__(self, name: str, options: argparse.Namespace, directory: str) -> None:
        self.name, self.options, self.directory = name, options, directory
        self.model = "1b" if name == "1b" else options.model
        self.settings = ROWS[name]
        self.steps = min(2, options.steps) if name == "1b" else options.steps
        self.rates: dict[str, list[float]] = {"write": [], "read": [], "rw": []}
        self.peers: dict[str, Side] = {}
        self.stopped_peers: dict[str, str] = {}
        self.contents_verified: bool | None = None

    def measure(self) -> dict[str, Any]:
        """Warm up, take rounds until they are done or their time is over, verify."""
        sides: list[Side] = []
        deadline_s = time.monotonic() + self.options.row_budget_s
        try:
            told = [f"--{key.replace('_', '-')}={value}" for key, value in self.settings.items()]
            self.ours = self._side(sys.executable, "ours", *told)
            sides.append(self.ours)
            self.memory = self._side(sys.executable, "memory")
            sides.append(self.memory)
            for side in sides:
                side.run(2, keep=False)
            if self.options.peer and self.name in WITH_PEER:
                self._start_peers(sides)
            self._measure_drive(keep=False)
            shuffler = random.Random(0)
            for done in range(self.options.rounds):
                if done >= ROUNDS_MIN and time.monotonic() > deadline_s:
                    break
                turns = [*sides, None]
                shuffler.shuffle(turns)  # nobody always comes after the same other
                for side in turns:
                    if side is None:
                        self._measure_drive(keep=True)
                        continue
                    # Untimed: the step after another side's has the drive's and the machine's caches against it.
                    side.run(1, keep=False)
                    side.run(self.steps)
            result = self.ours.digest()
        finally:
            for side in sides:
                side.close()
        self._verify(result)
        return self._summary()

    def _side(self, python: str, kind: str, *extra: str, storage: str | None = None) -> Side:
        return Side(
            python, kind, self.model, self.directory, self.directory if storage is None else storage, *extra
        )

    def _start_peers(self, sides: list[Side]) -> None:
        for name in self.options.peer_configurations.split(","):
            settings = PEER_CONFIGURATIONS[name]
            extra = [
                "--peer-params",
                settings["params"],
                "--peer-sub-group-size",
                str(settings["sub_group_size"]),
            ]
            storage = os.path.join(self.directory, name)
            os.makedirs(storage)
            try:
                side = self._side(self.options.peer_python, self.options.peer, *extra, storage=storage)
                sides.append(side)
                side.run(2, keep=False)
                self.peers[name] = side
            except SideStopped as error:
                print(f"{self.options.peer} {name}: {error}", file=sys.stderr)
                self.stopped_peers[name] = str(error).strip().splitlines()[-1]
                sides[:] = [
                    each
                    for each in sides
                    if each is self.ours or each is self.memory or each in self.peers.values()
                ]

    def _measure_drive(self, *, keep: bool) -> None:
        """fio's rates over a file as large as the state, in the proportion of reads and writes that was counted."""
        last = self.ours.last
        both = last["read_bytes"] + last["written_bytes"]
        read_percent = round(100 * last["read_bytes"] / both) if both else 50
        path = os.path.join(self.directory, f"{self.name}-fio.bin")
        nbytes = self.ours.numel * STATE_NBYTES_PER_PARAM // (1 << 20) * (1 << 20)
        if not os.path.exists(path):
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        for mode, measured in self.rates.items():
            rate = common.fio(path, mode, nbytes=nbytes, read_percent=read_percent).bytes_per_s
            if keep:
                measured.append(rate)

    def _verify(self, result: str) -> None:
        """The same steps with all state in host memory, where that fits, must give the same bits."""
        if self.ours.numel * REFERENCE_NBYTES_PER_PARAM > common.memory_available_nbytes():
            return
        reference = self._side(sys.executable, "ours", storage="")
        try:
            reference.run(self.ours.steps_taken, keep=False)
            self.contents_verified = reference.digest() == result
        finally:
            reference.close()
        if not self.contents_verified:
            raise SystemExit(
                f"row {self.name}: training through storage differs from the same training in memory"
            )

    def _floor_s(self) -> tuple[float, str]:
        """max(arithmetic alone, counted bytes over fio's rate, whichever way of asking fio is faster), and which."""
        read_bytes, written_bytes = self.ours.middle("read_bytes"), self.ours.middle("written_bytes")
        rate = {mode: common.median(values) for mode, values in self.rates.items()}
        storage_s = {
            "fio, reads and writes apart": read_bytes / rate["read"] + written_bytes / rate["write"],
            "fio, mixed": (read_bytes + written_bytes) / rate["rw"],
        }
        faster = min(storage_s, key=lambda way: storage_s[way])
        return max((self.memory.middle("step_s"), "arithmetic"), (storage_s[faster], faster))

    def _summary(self) -> dict[str, Any]:
        """The row's figures: medians, with the spread of the times."""
        ours, memory = self.ours, self.memory
        step_s = ours.middle("step_s")
        floor_s, floor = self._floor_s()
        row: dict[str, Any] = {
            "name": "train_step_1b_storage" if self.name == "1b" else f"train_step_{self.model}_{self.name}",
            "parameters": ours.numel,
            "device_memory": self.settings.get("device_memory", DEVICE_MEMORY[self.model]),
            "host_share": float(self.settings.get("host_share", 0.0)),
            "step_s": step_s,
            "step_s_spread": common.spread(ours.all("step_s")),
            "floor_s": floor_s,
            "floor": floor,
            "floor_ratio": step_s / floor_s,
            "arithmetic_s": memory.middle("step_s"),
            "arithmetic_s_spread": common.spread(memory.all("step_s")),
            "fio_read_bytes_per_s": common.median(self.rates["read"]),
            "fio_write_bytes_per_s": common.median(self.rates["write"]),
            "fio_mixed_bytes_per_s": common.median(self.rates["rw"]),
            "fio_mixed_bytes_per_s_spread": common.spread(self.rates["rw"], 0),
            "rss_over_baseline_bytes": max(ours.all("rss_over_baseline_bytes")),
            "memory_rss_over_baseline_bytes": max(memory.all("rss_over_baseline_bytes")),
            "read_bytes_per_param": ours.middle("read_bytes") / ours.numel,
            "written_bytes_per_param": ours.middle("written_bytes") / ours.numel,
            "loss": ours.answers[-1]["loss"],
            "memory_loss": memory.answers[-1]["loss"],
            "rounds": len(ours.answers),
            "contents_verified": self.contents_verified,
        }
        return row | self._peer_summary(step_s)

    def _peer_summary(self, step_s: float) -> dict[str, Any]:
        if not self.peers:
            return {"peers_stopped": self.stopped_peers} if self.stopped_peers else {}
        peers = {
            name: {
                "step_s": side.middle("step_s"),
                "step_s_spread": common.spread(side.all("step_s")),
                "speedup": side.middle("step_s") / step_s,
                "rss_over_baseline_bytes": max(side.all("rss_over_baseline_bytes")),
                "read_bytes_per_param": side.middle("read_bytes") / self.ours.numel,
                "written_bytes_per_param": side.middle("written_bytes") / self.ours.numel,
                "loss": side.answers[-1]["loss"],
            }
            for name, side in self.peers.items()
        }
        on_storage = [name for name in peers if PEER_CONFIGURATIONS[name]["params"] == "nvme"]
        best = min(on_storage or list(peers), key=lambda name: peers[name]["step_s"])
        usual = peers.get(PEER_DEFAULT)
        if usual is not None and usual["step_s_spread"][0] <= peers[best]["step_s_spread"][1]:
            best = PEER_DEFAULT  # as fast, within the spreads
        return {
            "peer": f"{self.options.peer}, {best}",
            "peer_step_s": peers[best]["step_s"],
            "peer_step_s_spread": peers[best]["step_s_spread"],
            "speedup": peers[best]["speedup"],
            "peer_rss_over_baseline_bytes": peers[best]["rss_over_baseline_bytes"],
            "rss_ratio": max(self.ours.all("rss_over_baseline_bytes"))
            / peers[best]["rss_over_baseline_bytes"],
            "peers": peers,
            "peers_stopped": self.stopped_peers,
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(DEVICE_MEMORY), default="151m")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--row-budget-s",
        type=float,
        default=150,
        help=f"no round starts after it, once {ROUNDS_MIN} are done",
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps a side takes in one round")
    parser.add_argument("--storage", help="directory on the drive to measure; default: the current one")
    parser.add_argument("--peer", choices=["deepspeed"])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument(
        "--peer-configurations",
        default="small_groups,default_groups",
        help=f"comma-separated, of {', '.join(PEER_CONFIGURATIONS)}",
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    for given, known in ((options.rows, ROWS), (options.peer_configurations, PEER_CONFIGURATIONS)):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            parser.error(f"unknown: {sorted(unknown)}; known are {', '.join(known)}")
    return options


def main() -> None:
    """Measure the rows asked for, print and write them."""
    options = parse()
    common.need_fio()
    directory = tempfile.mkdtemp(prefix="offload-bench-", dir=options.storage or os.getcwd())
    rows: list[dict[str, Any]] = []
    try:
        facts = common.about(directory, backend=common.backend(directory))
        for name in options.rows.split(","):
            rows.append(facts | Row(name, options, directory).measure())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        # Also when a later row has failed: the earlier ones took minutes.
        common.write_rows(
            options.json, rows, common.command_line(sys.argv[0], sys.argv[1:]), keep_others=True
        )


if __name__ == "__main__":
    main()
