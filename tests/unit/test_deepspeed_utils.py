"""What scripts take from `deepspeed.utils`, and its count of samples a second."""

import itertools
import logging

import pytest
from torch import nn

import offload.deepspeed as deepspeed
from offload.deepspeed import throughput
from offload.deepspeed.throughput import ThroughputTimer


def test_a_loader_that_repeats_goes_on_where_another_one_ends():
    loader = deepspeed.utils.RepeatingLoader([1, 2, 3])
    assert list(itertools.islice(loader, 7)) == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(StopIteration):
        next(deepspeed.utils.RepeatingLoader([]))


def test_messages_are_logged_by_the_ranks_that_are_named(caplog):
    from offload.deepspeed.utils import log_dist, logger

    with caplog.at_level(logging.INFO, logger.name):
        for ranks in (None, [0], [-1], [1], [0, 3]):
            log_dist(f"to {ranks}", ranks=ranks)
    assert caplog.messages == [f"[Rank 0] to {ranks}" for ranks in (None, [0], [-1], [0, 3])]


def test_leaf_modules_are_found_by_class_and_by_name():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    leaves = [model[0], model[1][0]]
    assert deepspeed.utils.set_z3_leaf_modules(model, [nn.Linear]) == leaves
    assert deepspeed.utils.set_z3_leaf_modules(model, ["Linear"]) == leaves
    with pytest.raises(ValueError, match="no module of"):
        deepspeed.utils.set_z3_leaf_modules(model, [nn.Conv2d])
    assert deepspeed.utils.set_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []


def test_samples_a_second_are_those_of_the_timed_steps_over_their_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    timer = ThroughputTimer(batch_size=6)
    for step in range(5):
        seconds = 100.0 if step < 2 else float(step)  # the first two are not timed
        for micro in range(3):
            now += 50  # loading data
            timer.start()
            now += seconds
            assert step > 2 or timer.avg_samples_per_sec() == float("-inf")
            timer.stop(global_step=micro == 2)
    assert timer.avg_samples_per_sec() == pytest.approx(3 * 6 / (3 * (2 + 3 + 4)))
    assert (timer.global_step_count, timer.micro_step_count, timer.epoch_count) == (5, 15, 0)
    timer.update_epoch_count()
    assert (timer.global_step_count, timer.micro_step_count, timer.epoch_count) == (5, 0, 1)
    timer.stop(global_step=True)  # nothing has begun
    assert timer.global_step_count == 5


def test_a_script_that_compares_releases_finds_one():
    from packaging import version

    assert version.parse("0.19") <= version.parse(deepspeed.__version__) < version.parse("0.20")


@pytest.mark.parametrize("name", ["safe_get_full_grad", "groups"])
def test_what_utils_does_not_have_says_what_to_do(name):
    with pytest.raises(AttributeError, match=rf"no utils\.{name}: engine\.module_state_dict"):
        getattr(deepspeed.utils, name)
