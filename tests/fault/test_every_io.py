"""The n-th transfer fails, for every n of a two-step run: an error with a path, or the right numbers; never a hang."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

from tests.conftest import slow_but
from tests.fault.training import GIVEN_UP, inject, make_run, parameters_of, steps

pytestmark = pytest.mark.fault

N_STEPS = 2
MODES = {
    "backward": {"update": "backward"},
    "clipping": {"max_grad_norm": 0.05},
    "activations": {"activations": "storage"},
    "activations of a device": {"activations": "storage", "device": "emulated"},
}


def two_steps(directory, **settings):
    """Parameters after a run from wrap to close."""
    model, optimizer = make_run(directory, **settings)
    try:
        return steps(model, optimizer, N_STEPS)
    finally:
        model.offload.close()


def two_steps_with_retries(model, optimizer):
    """As `steps`, by a loop that catches the error of a step and makes the step again."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(N_STEPS):
        batch = torch.randn(4, 8, generator=generator)
        for attempt in (1, 2):
            try:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                break
            except GIVEN_UP:
                if attempt == 2:
                    raise
    return parameters_of(model)


def names_the_store(error, directory):
    """Whether the error, or one it was raised while handling, gives a path in `directory`."""
    while error is not None:
        if str(directory) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def count_transfers(directory, monkeypatch, settings):
    with monkeypatch.context() as patch:
        engines = inject(patch, {})
        expected = two_steps(directory, **settings)
    counters = engines[0].counters()
    return expected, counters["read_ops"] + counters["write_ops"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", slow_but(["uring"], ["uring", "posix"]))
@pytest.mark.parametrize("mode", slow_but(["clipping"], MODES))
def test_every_failing_transfer_ends_in_an_error_with_a_path_or_in_the_right_numbers(
    tmp_path, monkeypatch, backend, mode
):
    settings = {**MODES[mode], "backend": backend}
    expected, n_transfers = count_transfers(tmp_path, monkeypatch, settings)
    assert n_transfers > 20
    failed = 0
    for nth in range(1, n_transfers + 1):
        with monkeypatch.context() as patch:
            engines = inject(patch, {"fail_nth": nth, "errno": 5})
            try:
                got = two_steps(tmp_path, **settings)
            except GIVEN_UP as error:
                failed += 1
                assert names_the_store(error, tmp_path), f"transfer {nth}: {error!r}"
            else:
                for name, tensor in expected.items():
                    assert torch.equal(got[name], tensor), (
                        f"transfer {nth}: {name} is wrong, and nothing was said"
                    )
            assert engines
        assert os.listdir(tmp_path) == [], f"transfer {nth} left the store behind"
    # Only the fate of bytes that nobody uses afterwards may go unnoticed.
    assert failed >= n_transfers * 0.8


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_goes_on_after_a_failed_transfer_never_computes_with_wrong_bytes(
    tmp_path, monkeypatch, mode
):
    """The user's loop catches the error and trains on: it fails again, or its numbers are those of a clean run."""
    settings = MODES[mode]
    expected, n_transfers = count_transfers(tmp_path, monkeypatch, settings)
    for nth in range(1, n_transfers + 1):
        with monkeypatch.context() as patch:
            inject(patch, {"fail_nth": nth, "errno": 5})
            model = got = None
            with contextlib.suppress(*GIVEN_UP):
                model, optimizer = make_run(tmp_path, **settings)
                got = two_steps_with_retries(model, optimizer)
            if model is not None:
                with contextlib.suppress(*GIVEN_UP):
                    model.offload.close()
            if got is not None:
                wrong = [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]
                assert not wrong, f"transfer {nth} failed, training went on, and these are wrong: {wrong}"


def test_short_transfers_in_every_place_change_no_number(tmp_path, monkeypatch):
    expected, _ = count_transfers(tmp_path, monkeypatch, {})
    for every in (1, 2, 3):
        with monkeypatch.context() as patch:
            inject(patch, {"short_every": every, "short_nbytes": 4096})
            got = two_steps(tmp_path)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("code", [4, 11])
def test_interruptions_of_every_transfer_change_no_number(tmp_path, monkeypatch, code):
    expected, _ = count_transfers(tmp_path, monkeypatch, {})
    with monkeypatch.context() as patch:
        inject(patch, {"fail_nth": 1, "fail_count": 40, "errno": code})
        got = two_steps(tmp_path)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("prefetch_blocks", [1, 3])
def test_a_forward_after_a_failed_fetch_fails_or_gives_the_right_output(
    tmp_path, monkeypatch, prefetch_blocks
):
    """Evaluation asks for no update, which would notice; three failures in a row reach a fetch ahead of use, too."""
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    model, _ = make_run(tmp_path, prefetch_blocks=prefetch_blocks)
    with torch.no_grad():
        expected = model(batch)
    model.offload.close()
    for nth in range(1, 7):
        with monkeypatch.context() as patch:
            inject(patch, {"fail_nth": nth, "errno": 5, "op": "read"})
            model, _ = make_run(tmp_path, prefetch_blocks=prefetch_blocks)
        for _ in range(4):
            with contextlib.suppress(*GIVEN_UP), torch.no_grad():
                assert torch.equal(model(batch), expected), f"read {nth} failed, and later output is wrong"
        with contextlib.suppress(*GIVEN_UP):
            model.offload.close()
