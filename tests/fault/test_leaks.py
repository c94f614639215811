"""Runs in a row in one process: descriptors, threads, memory and files do not pile up."""

from __future__ import annotations

import contextlib
import gc
import os
import time

import pytest

from tests.fault.training import GIVEN_UP, inject, make_run, steps

pytestmark = pytest.mark.fault


def held():
    """Each descriptor of this process with what it is open on, and each thread."""
    gc.collect()
    found = {("thread", name) for name in os.listdir("/proc/self/task")}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def assert_nothing_new_since(before):
    """Not one descriptor or thread that was not there; what earlier tests have left may go meanwhile. The system lists
    a thread for a moment after it has been joined."""
    end_s = time.monotonic() + 5.0
    while held() - before and time.monotonic() < end_s:
        time.sleep(0.05)
    assert held() - before == set()


@pytest.mark.parametrize("backend", ["uring", "posix"])
def test_50_runs_in_a_row_leave_no_descriptor_no_thread_and_no_file(tmp_path, backend):
    def run():
        model, optimizer = make_run(tmp_path, layers=2, backend=backend)
        steps(model, optimizer, 1)
        model.offload.close()

    for _ in range(3):  # torch starts its threads
        run()
    before = held()
    for _ in range(50):
        run()
    assert_nothing_new_since(before)
    assert os.listdir(tmp_path) == []


def test_runs_that_are_forgotten_without_close_leave_nothing_either(tmp_path):
    def run():
        steps(*make_run(tmp_path, layers=2), 1)

    run()
    before = held()
    for _ in range(10):
        run()
    assert_nothing_new_since(before)
    assert os.listdir(tmp_path) == []


def test_runs_that_fail_leave_nothing_either(tmp_path, monkeypatch):
    def run(nth):
        with monkeypatch.context() as patch:
            inject(patch, {"fail_nth": nth, "errno": 5})
            try:
                model, optimizer = make_run(tmp_path, layers=2)
            except GIVEN_UP:
                return
            try:
                steps(model, optimizer, 1)
                model.offload.close()
            except GIVEN_UP:
                try:
                    model.offload.close()
                except GIVEN_UP:
                    return

    run(1), run(20)
    before = held()
    for nth in range(1, 21):
        run(nth)
    assert_nothing_new_since(before)
    assert os.listdir(tmp_path) == []
