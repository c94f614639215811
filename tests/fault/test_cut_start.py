"""Ctrl-C while a thread is being started: what it was to do is done once, and the run can be ended and taken up."""

from __future__ import annotations

import threading
import time

import pytest

from offload.runtime.shutdown import abandon
from offload.threads import JoinableThread
from tests.conftest import slow_but
from tests.fault.test_checkpoint import assert_same_state
from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

MOMENTS = ["never begun", "yet to come", "begun"]


def cut(monkeypatch, name, moment):
    """The first start of a thread called `name` is cut by Ctrl-C at `moment`. Gives the threads that come late."""
    start, late = threading.Thread.start, []

    def cut_start(thread):
        if thread.name != name:
            return start(thread)
        monkeypatch.setattr(threading.Thread, "start", start)
        if moment == "begun":
            start(thread)
        elif moment == "yet to come":
            late.append(threading.Thread(target=lambda: (time.sleep(0.2), start(thread))))
            start(late[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", cut_start)
    return late


@pytest.mark.parametrize("moment", MOMENTS)
def test_work_of_a_thread_whose_start_was_cut_is_done_exactly_once(monkeypatch, moment):
    done = []
    thread = JoinableThread(lambda: (time.sleep(0.05), done.append(threading.current_thread())), name="mine")
    late = cut(monkeypatch, "mine", moment)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
    for _ in range(2):
        thread.join()
        assert thread.ended
        assert len(done) == 1
    assert (done[0] is thread) == (moment == "begun")
    for starter in late:
        starter.join()
        threading.Thread.join(thread)
    assert len(done) == 1


def test_work_that_fails_has_ended(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    thread = JoinableThread(lambda: 1 // 0, name="mine")
    thread.start()
    thread.join()
    assert thread.ended


@pytest.mark.parametrize("moment", slow_but(["yet to come"], MOMENTS))
def test_a_step_whose_commit_was_cut_while_starting_is_not_lost(tmp_path, monkeypatch, moment):
    ideal = Run(storage=[str(tmp_path / "ideal")])
    losses = ideal.steps(4)
    run = Run(storage=[str(tmp_path / "d")], durability="step")
    run.model.offload.track(**run.tracked)
    assert run.steps(2) == losses[:2]
    late = cut(monkeypatch, "offload-commit", moment)
    with pytest.raises(KeyboardInterrupt):
        run.steps(1)  # its forward commits the step before
    abandon(run.model.offload)
    for starter in late:
        starter.join()
    again = Run(storage=[str(tmp_path / "d")], durability="step")
    again.model.offload.track(**again.tracked)
    assert again.resume(tmp_path / "d").step == 2
    assert again.steps(2) == losses[2:]
    assert_same_state(again.save(tmp_path / "saved"), ideal.save(tmp_path / "expected"))
    again.model.offload.close(remove=True)
    ideal.close()


@pytest.mark.parametrize("moment", slow_but(["yet to come"], MOMENTS))
def test_a_save_cut_while_starting_is_waited_for(tmp_path, monkeypatch, moment):
    run = Run(storage=[str(tmp_path / "d")])
    run.steps(1)
    expected = run.save(tmp_path / "expected")
    late = cut(monkeypatch, "offload-save", moment)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path / "saved", wait=False)
    run.model.offload.wait_saved()
    for starter in late:
        starter.join()
    assert_same_state(str(tmp_path / "saved" / expected.rsplit("/", 1)[-1]), expected)
    run.close()


@pytest.mark.parametrize("moment", slow_but(["yet to come"], MOMENTS))
def test_a_run_whose_transfers_were_cut_while_starting_can_be_closed(tmp_path, monkeypatch, moment):
    run = Run(storage=[str(tmp_path / "d")], device="emulated")
    late = cut(monkeypatch, "offload-loads", moment)
    with pytest.raises(KeyboardInterrupt):
        run.steps(1)
    abandon(run.model.offload)
    for starter in late:
        starter.join()
    assert not list((tmp_path / "d").iterdir())
