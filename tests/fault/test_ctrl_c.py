"""Ctrl-C in the middle of a run, and the loop begun again, as in a notebook: the right numbers, or a refusal."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys

import pytest
import torch

import offload
from offload.errors import UsageError
from tests.fault.training import make_run, parameters_of, steps

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

N_STEPS = 3
LAYERS = 4

WHERE_A_STEP_ENDS = os.path.join("runtime", "optimizer.py")
"""Left at the end of `step()`, it has been made, and the loop does not know."""


class Interrupt:
    """Raises KeyboardInterrupt as Ctrl-C does, when the `nth` line of the engine's code is about to run."""

    def __init__(self, nth, rooms):
        self._left, self._rooms = (
            nth,
            [os.path.join(os.path.dirname(offload.__file__), room) for room in rooms],
        )
        self.raised = False

    def _trace(self, frame, event, argument):
        path = frame.f_code.co_filename
        if not path.startswith(tuple(self._rooms)) or path.endswith(WHERE_A_STEP_ENDS):
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                self.raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(N_STEPS)]


def train(model, optimizer, begin, made):
    """From step `begin` on; what was made is appended to `made`."""
    for number in range(begin, N_STEPS):
        optimizer.zero_grad()
        model(batches()[number]).square().mean().backward()
        optimizer.step()
        made.append(number)


def begun_again(directory, nth, settings):
    """The parameters of a run that was interrupted and begun again; None: it was refused. And whether it was at all."""
    model, optimizer = make_run(directory, layers=LAYERS, **settings)
    made = []
    interrupt = Interrupt(nth, ["runtime", "stores"])
    with contextlib.suppress(KeyboardInterrupt), interrupt:
        train(model, optimizer, 0, made)
    found = None
    try:
        train(model, optimizer, len(made), made)
        found = parameters_of(model)
    except UsageError as refused:
        assert "Ctrl-C" in str(refused) or "failed midway" in str(refused)
    model.offload.close()
    assert os.listdir(directory) == []
    return found, interrupt.raised


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # what Python hears in a finalizer
@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 1e9}, {"activations": "storage"}], ids=["backward", "deferred", "swapped"]
)  # fmt: skip
def test_a_run_interrupted_anywhere_goes_on_with_the_right_numbers_or_is_refused_and_closes(
    tmp_path, settings
):
    expected = steps(*make_run(tmp_path / "whole", layers=LAYERS, **settings), N_STEPS)
    n_refused = n_right = 0
    for nth in itertools.count(7, 331):
        found, interrupted = begun_again(tmp_path / "cut", nth, settings)
        if not interrupted:
            break
        n_refused += found is None
        n_right += found is not None
        assert found is None or all(torch.equal(found[name], values) for name, values in expected.items())
    assert n_refused > 0
    assert n_right > 0


def test_ctrl_c_while_forward_waits_for_a_block_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    expected = steps(*make_run(tmp_path / "a", layers=LAYERS), 2)
    model, optimizer = make_run(tmp_path / "b", layers=LAYERS)
    steps_made = steps(model, optimizer, 0)
    assert steps_made.keys() == expected.keys()
    host = model.offload._scheduler.host
    wait = host.complete
    left = iter([False, True, False, True])

    def interrupted(block, cause):
        if block.tickets and next(left, False):
            block.tickets.insert(0, _Interrupts())
            try:
                wait(block, cause)
            finally:
                block.tickets.pop(0)
        wait(block, cause)

    monkeypatch.setattr(host, "complete", interrupted)
    monkeypatch.setattr(
        host, "settle", lambda block: None
    )  # however fast the drive: every fetch is waited for
    n_interrupted = 0
    for _ in range(4):
        try:
            with torch.no_grad():
                model(torch.ones(4, 8))
        except KeyboardInterrupt:
            n_interrupted += 1
    assert n_interrupted == 2
    monkeypatch.undo()
    got = steps(model, optimizer, 2)
    assert all(torch.equal(got[name], values) for name, values in expected.items())
    model.offload.close()


class _Interrupts:
    """Ctrl-C comes while this is waited for."""

    def done(self):
        return False

    def wait(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("nth", [9_000, 13_000, 18_000])
def test_a_durable_run_interrupted_in_the_middle_goes_on_from_its_last_committed_step(tmp_path, nth):
    expected = steps(*make_run(tmp_path / "whole", layers=LAYERS), N_STEPS)
    model, optimizer = make_run(tmp_path / "cut", layers=LAYERS, durability="step")
    interrupt = Interrupt(nth, ["runtime", "stores"])
    with contextlib.suppress(KeyboardInterrupt), interrupt:
        train(model, optimizer, 0, [])
    assert interrupt.raised
    model.offload.close()
    model, optimizer = make_run(tmp_path / "cut", layers=LAYERS, durability="step")
    train(model, optimizer, offload.resume(model, str(tmp_path / "cut")).step, [])
    got = parameters_of(model)
    assert all(torch.equal(got[name], values) for name, values in expected.items())
    model.offload.close(remove=True)
