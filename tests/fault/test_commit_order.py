"""In which order a durable step reaches the drive: data, flush, record, flush, and only then what overwrites."""

from __future__ import annotations

import threading
import time

import pytest

from offload.runtime.commits import StepCommits
from offload.stores.sides import Sides
from tests.fault.test_durable_steps import durable

pytestmark = pytest.mark.fault


def test_no_committed_byte_changes_before_the_next_record_is_on_the_drives(tmp_path, monkeypatch):
    """The drive takes its time to flush step 3: meanwhile step 4 is computed up to its first writes, and the sides of
    step 2, which it will overwrite, are as they were."""
    run = durable(tmp_path / "d", head_width=160)
    run.steps(2)
    commits, engine = run.model.offload.commits, run.model.offload
    (path,) = (tmp_path / "d").glob("*.store")
    run.step()
    engine.flush()
    commits.wait()
    assert commits.sequence == 2
    before = path.read_bytes()
    flushing, go_on, real = threading.Event(), threading.Event(), StepCommits._sync

    def slow(self):
        flushing.set()
        assert go_on.wait(60)
        real(self)

    monkeypatch.setattr(StepCommits, "_sync", slow)
    chunks = engine.parts.resources.pipeline.stats()["chunks"]
    stepping = threading.Thread(target=run.step)
    stepping.start()
    assert flushing.wait(60)
    deadline_s = time.monotonic() + 60
    while engine.parts.resources.pipeline.stats()["chunks"] == chunks and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.2)
    assert engine.parts.resources.pipeline.stats()["chunks"] > chunks, "nothing is computed meanwhile"
    assert stepping.is_alive()
    during = path.read_bytes()
    for block in [engine.root, *engine.blocks]:
        sides = block.sides
        for side in (0, 1):
            for begin, nbytes in [
                (sides.param_offsets[side], block.layout.slot_nbytes),
                *((sides.state_offsets[i][side], b.state_nbytes) for i, b in enumerate(block.layout.buffers)),
            ]:
                assert during[begin : begin + nbytes] == before[begin : begin + nbytes], (block.name, side)
    go_on.set()
    stepping.join()
    run.model.offload.close(remove=True)


def test_a_commit_is_flushed_before_its_record_and_after_it(tmp_path, monkeypatch):
    """Data, flush, record, flush; only then is the step the one that counts."""
    run = durable(tmp_path / "d")
    run.step()
    commits = run.model.offload.commits
    commits.wait()
    done, flush, make_current = [], StepCommits._sync, Sides.commit

    class Noted:
        """The engine, whose writes of records are noted once they have completed."""

        def __init__(self, engine):
            self.engine = engine

        def __getattr__(self, name):
            return getattr(self.engine, name)

        def write(self, address, nbytes, offset, **more):
            ticket = self.engine.write(address, nbytes, offset, **more)
            if offset in commits._slots:
                ticket.wait()
                done.append("record")
            return ticket

    def flushed(self):
        flush(self)
        done.append("flush")

    def current(self, *committed):
        make_current(self, *committed)
        done.append("current")

    monkeypatch.setattr(StepCommits, "_sync", flushed)
    monkeypatch.setattr(Sides, "commit", current)
    monkeypatch.setattr(commits._store, "engine", Noted(commits._store.engine))
    run.step()
    commits.wait()
    n_sides = sum(block.sides is not None for block in commits._blocks)
    assert done == ["flush", "record", "flush", *["current"] * n_sides]
    monkeypatch.undo()
    run.model.offload.close(remove=True)


def test_a_record_that_a_killed_run_left_is_on_the_drives_before_its_store_goes_on(tmp_path, monkeypatch):
    """The run may have been killed between its last record and the flush; then the next update overwrites the step
    before, and a power loss would take both."""
    first = durable(tmp_path / "d")
    first.steps(3)
    first.close()
    second = durable(tmp_path / "d")
    written, flushed, flush = second.model.offload.counters()["written_bytes"], [], StepCommits._sync

    def noted(self):
        flush(self)
        flushed.append((list(self._store.paths), second.model.offload.counters()["written_bytes"]))

    monkeypatch.setattr(StepCommits, "_sync", noted)
    kept = [str(path) for path in (tmp_path / "d").glob("*.store")]
    assert second.resume(tmp_path / "d").step == 3
    ((paths, written_before),) = flushed
    assert set(paths) < set(kept)  # the other one was the new run's own
    assert written_before == written
    monkeypatch.undo()
    second.model.offload.close(remove=True)
