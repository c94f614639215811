"""Kills and power losses by the hundred: children are forked from a process that has torch imported and no thread.

Each child goes on from whatever the one before it left, until the run is complete; then every loss that any of them
printed, and the final state, must be those of a run that was never disturbed. Half of the kills come at uniformly
random times; the others wait for what has been hit least so far (an update, a commit, a save, a resume) and come a
random moment after it has begun. Power is lost at a uniformly random transfer or sync.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback

import torch

import offload
from offload._C import Engine
from offload.runtime.commits import StepCommits
from offload.runtime.host_slots import HostSlots
from offload.runtime.scheduler import Scheduler
from offload.tiers import storage
from offload.types import BlockState
from tests.fault.test_checkpoint import whole_state
from tests.fault.trajectory import Run

N_STEPS = 24
POWER_LOSS_STATUS = 137
PHASES = ["update", "commit", "save", "resume"]
OF_LEVEL = {"step": ["update", "commit", "resume"], "checkpoint": ["update", "save", "resume"]}
HEAD_WIDTH = 160
"""So wide that most of the head is updated before the blocks' backward."""
PLACEMENTS = {
    "storage": {},
    "host": {"host_memory": 10**8, "device_memory": 10**8},
    "deferred": {"max_grad_norm": 0.5},
    "emulated": {"device": "emulated"},
    "posix": {"backend": "posix"},
    "two drives": {"drives": 2, "stripe_nbytes": 8192},
}


class Phase:
    """What a child is doing, seen by its parent after its death."""

    def __init__(self):
        self._shared = mmap.mmap(-1, len(PHASES))

    def clear(self):
        self._shared[:] = bytes(len(PHASES))

    def seen(self):
        return {name for name, on in zip(PHASES, self._shared[:], strict=True) if on}

    def set(self, name, on):
        self._shared[PHASES.index(name)] = on

    def during(self, name, function):
        def wrapped(*arguments, **options):
            self.set(name, True)
            try:
                return function(*arguments, **options)
            finally:
                self.set(name, False)

        return wrapped

    def watch_updates(self):
        """From the first update that is submitted until none is under way."""
        submit, complete = Scheduler._submit_update, HostSlots.complete
        schedulers = {}

        def submitted(scheduler, *arguments, **options):
            schedulers[scheduler.host] = scheduler
            self.set("update", True)
            submit(scheduler, *arguments, **options)

        def completed(host, *arguments):
            complete(host, *arguments)
            if host not in schedulers:
                return  # it has updated nothing yet
            scheduler = schedulers[host]
            blocks = [*scheduler.blocks, scheduler.root]
            self.set("update", any(block.state is BlockState.UPDATING for block in blocks))

        Scheduler._submit_update, HostSlots.complete = submitted, completed


def make_run(place, level, placement, budgets):
    settings = {**budgets, **PLACEMENTS[placement]}
    drives = [str(place / f"drive{n}") for n in range(settings.pop("drives", 1))]
    return Run(storage=drives, durability=level, head_width=HEAD_WIDTH, **settings), drives[0]


def has_something(place, drive):
    return offload.checkpoint.directory.checkpoints_in(str(place / "saved")) or any(
        name.endswith(".manifest") for name in (os.listdir(drive) if os.path.exists(drive) else [])
    )


class Saves:
    """Every other one goes on beside the next steps; it is told of once it is complete."""

    def __init__(self, run, directory, phase, log):
        self._run, self._directory, self._phase, self._log = run, directory, phase, log
        self._step = None

    def begin(self, step, wait):
        self._phase.set("save", True)
        self._step = step
        self._run.save(self._directory, keep_last=2, wait=wait)
        if wait:
            self.end()

    def end(self):
        if self._step is not None:
            self._run.model.offload.wait_saved()
            os.write(self._log, f"saved {self._step}\n".encode())
            self._phase.set("save", False)
        self._step = None


def child(place, level, placement, budgets, phase, faults):
    """One life: resume, train, save; writes what it has done to `place/log`."""
    if faults:
        storage.Engine = lambda paths, **options: Engine(paths, inject=faults, **options)
    StepCommits._write = phase.during("commit", StepCommits._write)
    phase.watch_updates()
    log = os.open(place / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    run, drive = make_run(place, level, placement, budgets)
    run.model.offload.track(**run.tracked)
    done = 0
    if has_something(place, drive):
        source = drive if level == "step" else place / "saved"
        try:
            done = phase.during("resume", run.resume)(source).step
        except offload.CheckpointError as error:
            if "no step had been committed" not in str(error):
                raise
    if done and level == "step":  # what lives before this one were killed with is gone
        left = [name for name in os.listdir(drive) if name.endswith(".store")]
        assert len(left) == 1, f"stores pile up: {left}"
    os.write(log, f"resumed {done}\n".encode())
    saves = Saves(run, place / "saved", phase, log)
    for step in range(done + 1, N_STEPS + 1):
        loss = run.step()
        os.write(log, f"step {step} {loss!r}\n".encode())
        if level == "checkpoint" and step % 2 == 0:
            saves.end()
            saves.begin(step, wait=step % 4 == 0)
    saves.end()
    run.save(place / "final")
    run.model.offload.close(remove=True)


def live(function, *arguments):
    """Fork; the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def reference(place, level, placement):
    """Losses, and the final checkpoint, of an undisturbed run of every level; the smallest budgets; seconds it took."""
    run, _ = make_run(place, "checkpoint", placement, {})
    budgets = {name: getattr(run.model.offload.config, name) for name in ("device_memory", "host_memory")}
    run.close()
    begin_s = time.perf_counter()
    run, _ = make_run(place, level, placement, budgets)
    losses = run.steps(N_STEPS)
    path = run.save(place / "final")
    counted = run.model.offload.parts.resources.store.engine.counters()
    run.model.offload.close(remove=True)
    found = {
        "losses": losses,
        "path": path,
        "budgets": budgets,
        "seconds": time.perf_counter() - begin_s,
        "transfers": counted["read_ops"] + counted["write_ops"] + 2 * N_STEPS,
    }
    (place / "reference.json").write_text(json.dumps(found))


def check_log(place, level, expected):
    """Every loss is the undisturbed run's; nothing that was committed or saved has been lost. The lives it tells of."""
    last_step = saved = lives = 0
    for line in (place / "log").read_text().splitlines() if (place / "log").exists() else []:
        word, *rest = line.split()
        if word == "resumed":
            lives += 1
            # The updates of step n begin only when the record of step n - 1 is on the drives.
            least = last_step - 1 if level == "step" else saved
            assert int(rest[0]) >= least, f"resumed after step {rest[0]}, {least} had been committed"
        elif word == "step":
            last_step = max(last_step, int(rest[0]))
            told = (place / "log").read_text()
            assert float(rest[1]) == expected[int(rest[0]) - 1], f"step {rest[0]}: loss {rest[1]}\n{told}"
        elif word == "saved":
            saved = int(rest[0])
    return lives


def wait_for(phase, wanted, until_s):
    """Until the child is in a phase, or it is too late."""
    while wanted not in phase.seen() and time.monotonic() < until_s:
        time.sleep(0.0001)


def one_life(rng, place, level, placement, found, phase, wanted):
    """Returns (what it died of or None, phases at its death). `wanted`: the phase that some of the kills wait for."""
    faults = None
    by_power = rng.random() < 0.4
    delay_s, targeted = rng.uniform(0, 1.2 * found["seconds"]), rng.random() < 0.5
    if by_power:
        faults = {"power_loss_nth": rng.randint(1, found["transfers"]), "seed": rng.getrandbits(63)}
    phase.clear()
    pid = live(child, place, level, placement, found["budgets"], phase, faults)
    if not by_power and targeted:
        if wanted != "resume":
            time.sleep(rng.uniform(0, 0.6 * found["seconds"]))
        wait_for(phase, wanted, time.monotonic() + 2 * found["seconds"] + 1)
        time.sleep(rng.choice([0, rng.uniform(0, 0.003)]))
    elif not by_power:
        time.sleep(delay_s)
    if not by_power:
        os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        assert time.monotonic() < deadline_s, "a child hangs"
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None, set()
    assert code in ((POWER_LOSS_STATUS,) if by_power else (-signal.SIGKILL,)), f"a child failed with {code}"
    cause, phases = ("power" if by_power else "kill"), phase.seen()
    with open(place / "log", "a") as log:
        print("died of", cause, *sorted(phases), file=log)
    return cause, phases


def campaign(root, seed, n_kills):
    """Until `n_kills` lives have ended early, a seventh of them in each phase. What was done, as plain data."""
    rng = random.Random(seed)
    phase = Phase()
    done = {
        "seed": seed,
        "kill": 0,
        "power": 0,
        "complete_runs": 0,
        "lives": 0,
        "phases": dict.fromkeys(PHASES, 0),
    }
    references = {}
    scenarios = itertools.cycle(itertools.product(PLACEMENTS, ["step", "checkpoint"]))
    while done["kill"] + done["power"] < n_kills or min(done["phases"].values()) < n_kills // 7:
        placement, level = next(scenarios)
        place = root / f"{level}-{placement.replace(' ', '-')}"
        if (level, placement) not in references:
            ideal = root / f"ideal-{place.name}"
            ideal.mkdir()
            _, status = os.waitpid(live(reference, ideal, level, placement), 0)
            assert status == 0
            references[level, placement] = json.loads((ideal / "reference.json").read_text())
        found = references[level, placement]
        place.mkdir()
        while True:
            wanted = min(OF_LEVEL[level], key=lambda name: done["phases"][name])
            cause, phases = one_life(rng, place, level, placement, found, phase, wanted)
            check_log(place, level, found["losses"])
            if cause is None:
                break
            done[cause] += 1
            for name in phases:
                done["phases"][name] += 1
        done["lives"] += check_log(place, level, found["losses"])
        final = sorted((place / "final").iterdir())[-1]
        mine, theirs = whole_state(str(final)), whole_state(found["path"])
        for name, planes in theirs[0].items():
            assert all(torch.equal(a, b) for a, b in zip(mine[0][name], planes, strict=True)), name
        assert mine[1] == theirs[1], "the training state differs"
        done["complete_runs"] += 1
        shutil.rmtree(place)
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(campaign(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
