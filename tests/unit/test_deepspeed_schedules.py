"""DeepSpeed's schedules against their closed formulas, written out here step by step."""

import math

import pytest
import torch

from offload.deepspeed import schedules
from offload.deepspeed.loss_scale import DynamicLossScale, LossScale, from_config
from offload.errors import ConfigError, UsageError


def optimizer(lr=0.1, n_groups=1):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr * (i + 1)} for i in range(n_groups)]
    return torch.optim.AdamW(groups)


def rates(name, n_steps, lr=0.1, **params):
    """The rate in force during each of the first `n_steps` steps of training, and the schedule."""
    made = optimizer(lr)
    schedule = schedules.make(name, params, made)
    found = []
    for _ in range(n_steps):
        found.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    return found, schedule


def close(found, expected):
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_warmup_lr():
    found, _ = rates(
        "WarmupLR", 9, warmup_min_lr=0.01, warmup_max_lr=0.05, warmup_num_steps=4, warmup_type="linear"
    )
    close(found, [0.01, 0.01, 0.02, 0.03, 0.04, 0.05, 0.05, 0.05, 0.05])
    found, _ = rates("WarmupLR", 7, warmup_min_lr=0.0, warmup_max_lr=0.05, warmup_num_steps=4)
    shares = [math.log(n) / math.log(4) for n in (1, 2, 3, 4)]
    close(found, [0.0, *(0.05 * share for share in shares), 0.05, 0.05])


def test_warmup_lr_goes_up_to_the_optimizers_own_rate():
    found, _ = rates("WarmupLR", 5, lr=0.3, warmup_num_steps=2, warmup_type="linear")
    close(found, [0.0, 0.0, 0.15, 0.3, 0.3])


def test_warmup_decay_lr():
    params = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.05, "warmup_num_steps": 2, "warmup_type": "linear"}
    found, _ = rates("WarmupDecayLR", 9, total_num_steps=6, **params)
    close(found, [0.01, 0.01, 0.03, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01])


def test_warmup_cosine_lr():
    params = {"warmup_min_ratio": 0.2, "warmup_num_steps": 2, "cos_min_ratio": 0.1, "warmup_type": "linear"}
    found, _ = rates("WarmupCosineLR", 9, lr=2.0, total_num_steps=6, **params)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3, 4)]
    close(found, [0.0, 0.4, 1.2, *(2.0 * share for share in cosine), 0.2, 0.2])


def test_lr_range_test():
    params = {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 3.0}
    found, _ = rates("LRRangeTest", 6, **params)
    close(found, [0.01 * (1 + 3 * t / 2) for t in range(6)])
    found, _ = rates("LRRangeTest", 6, lr_range_test_staircase=True, **params)
    close(found, [0.01 * (1 + 3 * (t // 2)) for t in range(6)])


def test_one_cycle():
    params = {
        "cycle_min_lr": 0.1,
        "cycle_max_lr": 0.5,
        "cycle_first_step_size": 4,
        "cycle_second_step_size": 2,
    }
    found, schedule = rates("OneCycle", 10, decay_lr_rate=0.5, decay_step_size=1, **params)
    cycle = [0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1]  # 4 steps up, 2 down
    close(found, [*cycle, 0.1 / 1.5, 0.1 / 2.0, 0.1 / 2.5])
    assert schedule.get_mom() == [(0.9, 0.99)]


def test_one_cycle_moves_the_first_beta_the_other_way():
    made = optimizer()
    schedule = schedules.make(
        "OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 2}, made
    )
    assert made.param_groups[0]["betas"] == (0.8, 0.99)
    found = []
    for _ in range(5):
        schedule.step()
        found.append(made.param_groups[0]["betas"][0])
    close(found, [0.85, 0.8, 0.85, 0.9, 0.9])


def test_one_cycle_on_stairs():
    params = {
        "cycle_min_lr": 0.0,
        "cycle_max_lr": 1.0,
        "cycle_first_step_size": 6,
        "cycle_first_stair_count": 2,
    }
    found, _ = rates("OneCycle", 13, **params)
    close(found, [0, 0, 0, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("WarmupLR", {"warmup_num_steps": 5}),
        ("WarmupDecayLR", {"total_num_steps": 12, "warmup_num_steps": 5}),
        ("WarmupCosineLR", {"total_num_steps": 12, "warmup_num_steps": 5}),
        ("LRRangeTest", {"lr_range_test_step_size": 3}),
        ("OneCycle", {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 4}),
    ],
)
def test_a_schedule_goes_on_where_its_state_was_saved(name, params):
    uncut, _ = rates(name, 12, **params)
    _, first = rates(name, 6, **params)
    made = optimizer()
    resumed = schedules.make(name, params, made)
    resumed.load_state_dict(first.state_dict())
    found = []
    for _ in range(6):
        found.append(made.param_groups[0]["lr"])
        resumed.step()
    close(found, uncut[6:])


def test_a_value_for_each_group():
    made = optimizer(n_groups=2)
    schedules.make("WarmupLR", {"warmup_min_lr": [0.1, 0.2], "warmup_max_lr": [1.0, 2.0]}, made)
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.2]
    with pytest.raises(ConfigError, match="3 values"):
        schedules.make("WarmupLR", {"warmup_min_lr": [0.1, 0.2, 0.3]}, made)


def test_a_schedule_of_torch_by_name():
    found, _ = rates("StepLR", 4, step_size=2, gamma=0.1)
    close(found, [0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmupLr", {}, "WarmupLR"),
        ("WarmupLR", {"warmup_steps": 3}, "warmup_steps"),
        ("WarmupLR", {"warmup_num_steps": 0}, "at least 1"),
        ("WarmupLR", {"warmup_type": "cubic"}, "linear"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "at least 1"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "positive"),
    ],
)
def test_what_is_no_schedule_is_refused(name, params, message):
    with pytest.raises(ConfigError, match=message):
        schedules.make(name, params, optimizer())


def scales(scale, overflows):
    found = []
    for overflow in overflows:
        scale.update(bool(overflow))
        found.append(scale.scale)
    return found


def test_the_loss_scale_halves_when_the_hysteresis_is_used_up_and_doubles_after_a_window():
    scale = DynamicLossScale(16.0, window=2, hysteresis=2)
    # One is used up, then each overflow halves; the third good step is the second since a good one, and doubles.
    assert scales(scale, [1, 1, 1, 0, 0, 0, 1, 1]) == [16.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 4.0]


def test_consecutive_hysteresis_is_refilled_by_any_good_step():
    assert scales(DynamicLossScale(16.0, window=9, hysteresis=2), [1, 0, 1]) == [16.0, 16.0, 8.0]
    refilled = DynamicLossScale(16.0, window=9, hysteresis=2, consecutive_hysteresis=True)
    assert scales(refilled, [1, 0, 1, 1]) == [16.0, 16.0, 16.0, 8.0]


def test_an_overflow_at_the_smallest_scale_is_an_error():
    scale = DynamicLossScale(4.0, hysteresis=1, scale_min=2.0)
    scale.update(True)
    assert scale.scale == 2.0
    with pytest.raises(UsageError, match="min_loss_scale"):
        scale.update(True)


def test_the_loss_scale_of_a_configuration():
    assert from_config({"fp16": {"enabled": True}}, is_fp16=True).scale == 65536.0
    assert from_config({"fp16": {"enabled": True, "initial_scale_power": 4}}, is_fp16=True).scale == 16.0
    fixed = from_config({"fp16": {"enabled": True, "loss_scale": 128}}, is_fp16=True)
    assert type(fixed) is LossScale
    assert scales(fixed, [1, 0]) == [128.0, 128.0]
    assert from_config({"bf16": {"enabled": True}}, is_fp16=False).scale == 1.0


def test_a_loss_scale_goes_on_where_its_state_was_saved():
    first, resumed = DynamicLossScale(16.0, window=3), DynamicLossScale(16.0, window=3)
    scales(first, [1, 1, 0, 0])
    resumed.load_state_dict(first.state_dict())
    assert scales(resumed, [0, 0, 0, 1]) == scales(first, [0, 0, 0, 1])
