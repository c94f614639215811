"""Every single operation on files fails once: reads, writes, flushes, renames, and what makes files and directories.

A run of two steps with a checkpoint after each (level `checkpoint`) or with durable steps (level `step`), from nothing
or from what an earlier run has left. In turn each of its operations fails, of every engine it opens: the store's, those
of checkpoints being written, and those that read. It ends with the documented error or with the right numbers, within
the watchdog's time; and what it leaves opens, verifies and goes on with the right numbers.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import threading
from collections import Counter

import pytest

import offload
from offload._C import Engine
from offload.checkpoint import kept_store, read
from offload.checkpoint.directory import checkpoints_in
from offload.errors import CheckpointError
from offload.tiers import storage
from tests.fault.test_every_io import names_the_store
from tests.fault.training import GIVEN_UP
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(900)]

saving = importlib.import_module("offload.checkpoint.save")  # in the package, a function has this name

WATCHDOG_S = 60
N_STEPS = 2
LEFT_BY = 1
"""Steps that the earlier run has made, where there is one."""
SYSTEM_CALLS = ["fsync", "rename", "posix_fallocate", "ftruncate", "mkdir"]


class Failing:
    """Counts operations on files under `place`, by kind, and lets one fail: the `nth` of `kind`.

    Kinds are (i, "read") and (i, "write") of the i-th engine opened, "fdatasync" of all engines, and `SYSTEM_CALLS`.
    """

    def __init__(self, place, kind=None, nth=0):
        self.place, self.kind, self.nth = str(place), kind, nth
        self.engines, self.seen, self.hit = [], Counter(), False

    def counted(self):
        """How many operations of each kind there were."""
        for i, engine in enumerate(self.engines):
            for op in ("read", "write"):
                self.seen[i, op] = engine.counters()[f"{op}_ops"]
        return {kind: n for kind, n in self.seen.items() if n}

    def _passes(self, kind, path):
        if self.place not in path:
            return
        self.seen[kind] += 1
        if kind == self.kind and self.seen[kind] == self.nth:
            self.hit = True
            named = [path] if kind in ("rename", "mkdir") else []  # the others are given a descriptor
            raise OSError(errno.EIO, os.strerror(errno.EIO), *named)

    def _engine(self, paths, **options):
        failing = self

        class Counting(Engine):
            def sync(self):
                if failing.kind == "fdatasync":
                    try:
                        failing._passes("fdatasync", paths[0])
                    except OSError as error:  # as the engine has it
                        raise OSError(error.errno, f"fdatasync of {paths[0]}: {error.strerror}") from None
                else:
                    failing._passes("fdatasync", paths[0])
                super().sync()

        index = len(self.engines)
        faults = None
        if self.kind in ((index, "read"), (index, "write")):
            faults = {"fail_nth": self.nth, "errno": errno.EIO, "op": self.kind[1]}
        self.engines.append(Counting(paths, inject=faults, **options))
        return self.engines[-1]

    @contextlib.contextmanager
    def installed(self):
        with pytest.MonkeyPatch.context() as patch:
            for module in (storage, saving, read, kept_store):
                patch.setattr(module, "Engine", self._engine)
            for name in SYSTEM_CALLS:
                patch.setattr(os, name, self._call(name, getattr(os, name)))
            yield

    def _call(self, name, original):
        def call(first, *rest, **options):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            self._passes(name, path)
            return original(first, *rest, **options)

        return call


def make_run(place, level):
    place.mkdir(exist_ok=True)
    run = Run(storage=[str(place / "store")], durability=level, layers=2, **BUDGETS)
    run.model.offload.track(**run.tracked)
    return run


BUDGETS: dict[str, int] = {}
"""The smallest, once they are known: the same in every run."""


class Life:
    """One run, and what it has been told was done."""

    def __init__(self, place, level, resumes):
        self.place, self.level, self.resumes = place, level, resumes
        self.losses, self.saved, self.error = [], [], None
        self.begun = LEFT_BY if resumes else 0

    def live(self):
        run = None
        try:
            run = make_run(self.place, self.level)
            if self.resumes:
                run.resume(self.place / ("store" if self.level == "step" else "saved"))
            for number in range(N_STEPS):
                self.losses.append(run.step())
                if self.level == "checkpoint":
                    self._save(run, wait=number % 2 == 1)
            run.close()
        except GIVEN_UP as error:
            self.error = error
            if run is not None:
                with contextlib.suppress(*GIVEN_UP):
                    run.close()

    def _save(self, run, wait):
        """Two in all: the first goes on beside training until the second begins."""
        if wait:
            run.model.offload.wait_saved()
            self.saved.append(self.begun + len(self.losses) - 1)
        run.save(self.place / "saved", keep_last=1, wait=wait)
        if wait:
            self.saved.append(self.begun + len(self.losses))


def watched(function, what):
    """Run it in a thread, so that a hang is seen; its exceptions are raised here."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WATCHDOG_S)
    assert not thread.is_alive(), f"{what}: hangs"
    if raised:
        raise raised[0]


def goes_on(life, expected, what):
    """What is left opens, verifies, has lost nothing that was promised, and continues with the right numbers."""
    store, saved = life.place / "store", life.place / "saved"
    if life.level == "checkpoint":
        assert not store.exists() or os.listdir(store) == [], f"{what}: leaves its store"
        for path in checkpoints_in(str(saved)):
            assert offload.inspect(path, verify=True).damage == [], what
        assert not saved.exists() or not any(name.startswith(".partial") for name in os.listdir(saved)), (
            f"{what}: leaves half a checkpoint"
        )
    run = make_run(life.place, life.level)
    done, least = 0, max([life.begun, *life.saved])
    if life.level == "step":
        least = max(life.begun, life.begun + len(life.losses) - 1)
    try:
        done = run.resume(store if life.level == "step" else saved).step
    except CheckpointError as error:
        assert "holds no checkpoint" in str(error) or "no step had been" in str(error), f"{what}: {error}"
    assert done >= least, f"{what}: step {least} had been promised, {done} is there"
    assert run.steps(len(expected) - done) == expected[done:], f"{what}: goes on with wrong numbers"
    run.model.offload.close(remove=True)


def check(place, origin, level, expected, kind, nth):
    """One fault, from a fresh directory. Whether it was hit, and ended the run."""
    what = f"{kind} number {nth}"
    if origin is not None:
        shutil.copytree(origin, place)
    place.mkdir(exist_ok=True)
    life, failing = Life(place, level, origin is not None), Failing(place, kind, nth)
    with failing.installed():
        watched(life.live, what)
    assert life.losses == expected[life.begun :][: len(life.losses)], f"{what}: a wrong number, nothing said"
    if life.error is None:
        assert len(life.losses) == N_STEPS
    else:
        assert names_the_store(life.error, place), f"{what}: {life.error!r} names no file"
    watched(lambda: goes_on(life, expected, what), f"{what}, afterwards")
    shutil.rmtree(place)
    return life.error is not None


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses of an undisturbed run, long enough for every one here to go on a step."""
    BUDGETS.clear()
    run = Run(storage=[str(tmp_path_factory.mktemp("ideal"))], durability="step", layers=2)
    config = run.model.offload.config
    BUDGETS.update(device_memory=config.device_memory, host_memory=config.host_memory)
    losses = run.steps(LEFT_BY + N_STEPS + 1)
    run.model.offload.close(remove=True)
    return losses


@pytest.mark.parametrize("begins", ["from nothing", "from what was left"])
@pytest.mark.parametrize("level", ["checkpoint", "step"])
def test_every_failing_operation_ends_in_the_documented_error_or_in_the_right_numbers(
    tmp_path, expected, level, begins
):
    origin = None
    if begins == "from what was left":
        origin = tmp_path / "origin"
        first = make_run(origin, level)
        first.steps(LEFT_BY)
        if level == "checkpoint":
            first.save(origin / "saved")
        first.close()
    place = tmp_path / "count"
    if origin is not None:
        shutil.copytree(origin, place)
    undisturbed, counting = Life(place, level, origin is not None), Failing(place)
    with counting.installed():
        undisturbed.live()
    assert undisturbed.error is None, undisturbed.error
    assert undisturbed.losses == expected[undisturbed.begun :][:N_STEPS]
    counted = counting.counted()
    assert {op for kind in counted if isinstance(kind, tuple) for op in kind[1:]} == {"read", "write"}
    assert {"fdatasync"} <= counted.keys() if level == "step" else {"fsync", "rename"} <= counted.keys()
    shutil.rmtree(place)
    ended = Counter()
    for kind, n in counted.items():
        for nth in range(1, n + 1):
            ended[kind] += check(tmp_path / "run", origin, level, expected, kind, nth)
    print(
        f"{level}, {begins}: {sum(counted.values())} operations, {sum(ended.values())} end the run: {counted}"
    )
    for kind in counted.keys() & {"fsync", "fdatasync", "rename"}:
        assert ended[kind] == counted[kind], (
            f"{kind} fails, and nobody is told: {ended[kind]} of {counted[kind]}"
        )
    transfers = sum(n for kind, n in counted.items() if isinstance(kind, tuple))
    assert sum(n for kind, n in ended.items() if isinstance(kind, tuple)) >= 0.8 * transfers
