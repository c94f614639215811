"""Thousands of small steps with random budgets, levels, saves, stops and resumes: nothing grows, no number changes."""

from __future__ import annotations

import gc
import os
import random
import secrets

import psutil
import pytest

from tests.fault.trajectory import Run

pytestmark = [pytest.mark.fault, pytest.mark.timeout(1200)]

WARM_LIVES = 8
"""Until torch, numpy and the allocator have taken what they keep."""


def held():
    """Descriptors, threads and resident bytes of this process."""
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), process.memory_info().rss


def nbytes_under(place):
    return sum(entry.stat().st_size for entry in place.rglob("*") if entry.is_file())


def settings_of(rng, place):
    """A level, a placement and budgets."""
    choices = [
        {},
        {"max_grad_norm": 1e9},
        {"device": "emulated"},
        {"backend": "posix"},
        {
            "host_memory": rng.randrange(500_000, 2_000_000),
            "device_memory": rng.randrange(200_000, 1_000_000),
        },
        {"host_memory": 10**8, "device_memory": 10**8},
    ]
    return {"storage": [str(place / "store")], **rng.choice(choices)}


def soak(place, n_steps, seed):
    """`n_steps` of one trajectory over many lives; its losses, and what was held after each life.

    A save is waited for or goes on beside the life's last steps; a durable store is now and then kept and resumed.
    """
    rng, losses, seen, kept = random.Random(seed), [], [], False
    while len(losses) < n_steps:
        level = rng.choice(["step", "checkpoint"])
        run = Run(**settings_of(rng, place), durability=level)
        run.model.offload.track(**run.tracked)
        if losses:
            assert run.resume(place / ("store" if kept else "saved")).step == len(losses)
        if kept and level != "step":  # it has been read, and is nobody's now
            for path in (place / "store").glob(kept):
                path.unlink()
        n = min(rng.randrange(1, 40), n_steps - len(losses))
        losses += run.steps(n - n // 3)
        run.save(place / "saved", keep_last=2, wait=rng.random() < 0.5)
        losses += run.steps(n // 3)
        run.model.offload.wait_saved()
        kept = False
        if n // 3 or rng.random() < 0.3:
            if level == "step" and rng.random() < 0.5:
                kept = f"offload-{run.model.offload.parts.resources.store.run_id}*"
            else:
                run.save(place / "saved", keep_last=2)
        if rng.random() < 0.5 or kept:
            run.model.offload.close(remove=not kept)
        else:  # forgotten; what a durable one leaves is removed by hand
            run.model.offload.parts.resources.store.keep = False
        del run
        if not kept:
            seen.append((*held(), nbytes_under(place)))
    if kept:
        for path in (place / "store").glob(kept):
            path.unlink()
    return losses, seen


def check(place, n_steps, seed):
    print(f"seed {seed}")
    ideal = Run(storage=[str(place / "ideal")])
    expected = ideal.steps(n_steps)
    ideal.close()
    losses, seen = soak(place, n_steps, seed)
    assert losses == expected
    warm = seen[WARM_LIVES:] or seen[-1:]
    assert len({fds for fds, *_ in warm}) == 1, seen
    counts = [threads for _, threads, *_ in warm]
    assert max(counts) <= min(counts) + 1, "more than one commit of a run that was forgotten is going on"
    assert min(counts[len(counts) // 2 :]) == min(counts), "threads pile up"
    assert (
        max(nbytes for *_, nbytes in warm) == min(nbytes for *_, nbytes in warm)
        or len(warm) < 2
        or (max(nbytes for *_, nbytes in warm) - min(nbytes for *_, nbytes in warm) < 4096 * 4)
    ), "files grow"
    first, last = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    if first:
        growth = min(rss for _, _, rss, _ in last) - max(rss for _, _, rss, _ in first)
        assert growth < 8 << 20, f"resident memory grew by {growth} bytes"
    assert os.listdir(place / "store") == []


@pytest.mark.slow
def test_three_hundred_steps_over_many_lives_change_no_number_and_leave_nothing(tmp_path):
    check(tmp_path, 300, secrets.randbits(32))


@pytest.mark.long
def test_two_thousand_steps_over_many_lives_grow_nothing(tmp_path):
    check(tmp_path, 2000, secrets.randbits(32))
