"""The planner counts the bytes of the optimizer that will run."""

from __future__ import annotations

import dataclasses

import pytest

from offload.cli.optimizers import rule_of
from offload.errors import ConfigError
from offload.planner.plan import Budgets, Plan, state_format_of
from offload.planner.search import make_plan
from offload.schedule.run import simulate_plan
from offload.update_rules import kernel_rule
from tests.planning import gpt, lohan_machine

# bytes of state a parameter beside a bf16 parameter, and beside an fp32 one
STATE = {
    ("adamw", "fp32"): (10, 8),
    ("adamw", "bf16"): (6, 4),
    ("adamw", "8bit"): (4 + 1 / 32, 2 + 1 / 32),
    ("lion", "fp32"): (6, 4),
    ("lion", "8bit"): (3 + 1 / 64, 1 + 1 / 64),
    ("sgd", "bf16"): (4, 2),
    ("adafactor", "fp32"): (2, 0),
}
NOTHING_IN_HOST = {"states_host_fraction": 0.0, "params_host_fraction": 0.0, "update": "backward"}


@pytest.mark.parametrize(("name", "moments"), STATE)
@pytest.mark.parametrize("width", [2, 4])
def test_a_planned_step_writes_the_state_of_its_optimizer(name, moments, width):
    """With everything on storage: the parameters of the blocks, and all state."""
    state = STATE[name, moments][width == 4]
    work = dataclasses.replace(gpt("m", 4, 256, width=width), rule=rule_of(name, moments))
    assert state_format_of(work).state_nbytes == state
    budgets = Budgets(device_memory_nbytes=10**9, host_memory_nbytes=10**9)
    plan = make_plan(work, lohan_machine(2), budgets, NOTHING_IN_HOST, batch_samples=4)
    blocks = sum(block.trainable_numel for block in work.blocks)
    expected = width * blocks + state * work.numel
    assert plan.predicted.bytes["written"] == pytest.approx(expected, abs=100)
    assert plan.written_nbytes_per_step(work) == pytest.approx(expected, abs=100)
    assert simulate_plan(plan, work, lohan_machine(2)).written_nbytes == pytest.approx(expected, abs=100)
    assert Plan.from_json(plan.to_json()) == plan


def test_gradients_on_storage_are_read_twice_more_where_sums_over_all_of_them_are_needed():
    """Plain SGD has the bytes of state that Adafactor has; its update reads a waiting gradient once."""
    budgets = Budgets(device_memory_nbytes=10**9, host_memory_nbytes=10**9)
    fixed = NOTHING_IN_HOST | {"update": "deferred", "grads_host_fraction": 0.0}
    read = []
    for rule in (rule_of("adafactor", "fp32"), kernel_rule("sgd", has_momentum=False)):
        work = dataclasses.replace(gpt("m", 4, 256), rule=rule)
        plan = make_plan(work, lohan_machine(2), budgets, fixed, batch_samples=4)
        assert not any(plan.grads_in_host)
        simulated = simulate_plan(plan, work, lohan_machine(2)).read_nbytes
        read.append((plan.predicted.bytes["read"], simulated))
    waiting = 2 * state_format_of(work).grad_nbytes * sum(block.trainable_numel for block in work.blocks)
    for of_adafactor, of_sgd in zip(*read, strict=True):
        assert of_adafactor - of_sgd == pytest.approx(waiting, abs=100)


def test_fewer_bytes_are_never_slower_where_storage_binds():
    budgets = Budgets(device_memory_nbytes=10**9, host_memory_nbytes=10**9)
    work = gpt("m", 8, 1024)

    def seconds(name, moments):
        made = dataclasses.replace(work, rule=rule_of(name, moments))
        plan = make_plan(made, lohan_machine(1), budgets, NOTHING_IN_HOST, batch_samples=1)
        return plan.predicted.step_s

    exact, half, eighth = (seconds("adamw", moments) for moments in ("fp32", "bf16", "8bit"))
    assert eighth < half < exact
    assert eighth < 0.6 * exact


def test_what_no_optimizer_has_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"--optimizer lamb.*adamw, lion, sgd, adafactor"):
        rule_of("lamb", "fp32")
    with pytest.raises(ConfigError, match=r"optimizer_state='4bit'.*fp32, bf16, 8bit"):
        rule_of("adamw", "4bit")
    with pytest.raises(ConfigError, match="adafactor keeps its state in fp32"):
        rule_of("adafactor", "8bit")


@pytest.mark.parametrize(("known", "rate"), [({"lion_fp32": 3e7}, 3e7), ({"lion_8bit": 3e7}, 2e8)])
def test_an_update_takes_what_its_own_rule_takes_on_the_machine(known, rate):
    """Slow updates of everything in host memory set a step's length; a rule whose rate is not known has AdamW's."""
    machine = lohan_machine(2, adam_params_per_s=2e8).model_copy(update={"update_params_per_s": known})
    work = dataclasses.replace(gpt("m", 8, 1024, tokens=16), rule=kernel_rule("lion"))
    budgets = Budgets(device_memory_nbytes=10**10, host_memory_nbytes=10**11)
    plan = make_plan(work, machine, budgets, {"update": "backward"}, batch_samples=1)
    blocks_s = sum(block.trainable_numel for block in work.blocks) / rate
    assert blocks_s < plan.predicted.step_s < 1.3 * work.numel / rate
    assert simulate_plan(plan, work, machine).step_s == pytest.approx(plan.predicted.step_s, rel=0.15)
