"""What the GPU benchmarks make of what they measure. The scripts themselves run in integration/test_benchmarks.py."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_common
import gpu_giant
import gpu_rates
import gpu_touch
import gpu_train
import torch

from offload.planner.hardware import Drive, load_hardware, save_hardware
from offload.telemetry import Span


def test_a_layers_predicted_update_is_that_of_its_own_step_alone():
    """The step before leaves the second chunk of layer 1 and all of layer 0 to this step's forward."""
    spans = [
        Span("cpu", "update 1", 0.0, 0.4),
        Span("cpu", "update 0", 0.4, 1.0),
        Span("compute", "forward 0.0", 1.0, 1.5),
        Span("compute", "forward 1.0", 1.5, 2.0),
        Span("compute", "forward", 2.0, 2.1),
        Span("compute", "backward", 2.1, 2.3),
        *(
            Span("compute", f"{kind} 1.0", at, at + 0.5)
            for kind, at in (("recompute", 2.3), ("backward", 2.8))
        ),
        *(
            Span("compute", f"{kind} 0.0", at, at + 0.5)
            for kind, at in (("recompute", 3.3), ("backward", 3.8))
        ),
        Span("cpu", "update 1", 3.3, 3.6),
        Span("cpu", "update 1", 3.6, 4.0),
        Span("cpu", "update 0", 4.3, 5.0),
    ]
    found = gpu_giant.predictions("predicted_", SimpleNamespace(step_s=3.3, spans=spans))
    assert found == pytest.approx(
        {
            "predicted_step_s": 3.3,
            "predicted_forward_s": 0.5,
            "predicted_backward_s": 1.0,
            "predicted_update_s": 0.7,
        }
    )
    assert gpu_giant.layer_seconds(spans)["update"] > 4  # with both steps' updates in one


def a_case(directory, *more):
    """One of the tiny training benchmark, without a GPU."""
    options = gpu_train.parser().parse_args(
        ["--device", "emulated", "--tiny", "--storage", str(directory), *more]
    )
    gpu_common.tiny(options, **gpu_train.TINY)
    return next(gpu_train.cases(options, gpu_common.Device("emulated"), str(directory)))


def planned_engine():
    """A run's engine whose plan says 100 FLOPs a step."""
    return SimpleNamespace(
        plan=SimpleNamespace(predicted=SimpleNamespace(hardware_flops=100.0)),
        last_step={"stall_s": {}},
        parts=SimpleNamespace(resources=SimpleNamespace(copies=SimpleNamespace(h2d_bytes=0, d2h_bytes=0))),
        counters=dict,
    )


@pytest.mark.parametrize("model_runs_its_loss_again", [False, True])
def test_hardware_flops_count_the_heads_second_run_wherever_the_model_makes_it(
    tmp_path, model_runs_its_loss_again
):
    case = a_case(tmp_path)
    blocks = case.batch * sum(b.flops_per_sample for b in case.workload.blocks)
    root = case.batch * case.workload.root_flops_per_sample
    case.family.recomputes_loss = model_runs_its_loss_again
    again = root if model_runs_its_loss_again else 0
    assert case.flops(recomputes=False) == pytest.approx((3 * (blocks + root), 3 * (blocks + root) + again))
    assert case.flops(recomputes=True)[1] == pytest.approx(3 * (blocks + root) + blocks + again)
    run = gpu_train.Run(lambda tokens: torch.zeros(()), planned_engine())
    gpu_train.timed_steps(run, case, time.perf_counter())
    assert run.facts["planned_hardware_flops"] == pytest.approx(100.0 + again)


@pytest.mark.parametrize(
    ("plain_s", "storage_s", "best_s"),
    [(2.0, 1.5, 2.0), (2.0, 3.0, 3.0)],
    ids=["computing is longest", "the drive is"],
)
def test_the_best_of_a_row_is_what_plain_torch_takes_or_its_bytes_do_and_never_its_products_alone(
    plain_s, storage_s, best_s
):
    floors = {"compute": 1.6, "storage": storage_s, "bus": 0.2}
    row = gpu_common.with_floors({"step_s": 4.0}, floors)
    assert gpu_common.with_best(row, plain_s)["of_best"] == pytest.approx(best_s / 4.0)
    assert gpu_common.with_best({"step_s": 4.0}, plain_s)["of_best"] == pytest.approx(plain_s / 4.0)


def with_drive(case):
    """The case on a drive on which a step with all state on it takes four seconds."""
    drive = Drive(read_bytes_per_s=7.0 * case.numel, write_bytes_per_s=6.0 * case.numel)
    every = dict.fromkeys(f"storage_{kind}_bytes_per_s" for kind in ("read", "write", "mixed"))
    hardware = load_hardware("h100").model_copy(update={"drives": (drive,), **every})
    return dataclasses.replace(case, hardware=hardware)


def test_what_making_the_model_took_is_taken_from_the_time_of_a_rows_steps(tmp_path):
    case = a_case(tmp_path, "--row-seconds", "10")
    case.options.steps = 50
    run = gpu_train.Run(lambda tokens: torch.zeros(()))
    assert gpu_train.timed_steps(run, case, time.perf_counter())["n_steps"] == 50
    assert gpu_train.timed_steps(run, case, time.perf_counter() - 20)["n_steps"] == 1


def test_a_row_leaves_more_of_its_state_in_host_memory_where_making_the_model_takes_long(tmp_path):
    """Ten seconds for a row, and a drive on which a step with all state on it takes four."""
    case = a_case(tmp_path, "--row-seconds", "10")
    case = with_drive(case)
    clock = gpu_common.Clock(case.options, 2)
    assert gpu_train.host_share_within(case) == pytest.approx(1 - 2.5 / 4, abs=0.02)
    clock.made({"construction_s": 6.0}, case.options)
    clock.made({"error": "out of memory"}, case.options)
    assert gpu_train.host_share_within(case) == pytest.approx(1 - 1.0 / 4, abs=0.02)
    clock.made({"construction_s": 60.0}, case.options)
    assert gpu_train.host_share_within(case) == pytest.approx(1 - 2.5 / 4 / 4, abs=0.02)


def test_a_row_with_all_state_on_storage_is_left_out_where_its_steps_take_longer_than_there_is_time(
    tmp_path, monkeypatch
):
    made, told = [], []
    rows = SimpleNamespace(add=lambda row, columns: told.append(row))
    monkeypatch.setattr(
        gpu_train, "row_of", lambda case, placement: made.append(placement) or {"name": placement}
    )
    for seconds in (10, 20):  # two for the first state's way to the drive and four a step
        case = with_drive(a_case(tmp_path))
        case.options.seconds = seconds
        gpu_train.rows_of(case, ["storage+all"], rows, gpu_common.Clock(case.options, 1))
    assert "takes 14 s at least" in told[0]["not_run"]
    assert made == ["storage+all"]


def test_rows_with_state_on_storage_can_be_left_out_at_few_tokens_a_step(tmp_path):
    case = a_case(tmp_path)
    wanted = ["gpu", "host", "storage", "storage+all", "host+plan"]
    assert gpu_train.placements_of(case, wanted) == wanted
    case.options.storage_from_tokens = 128
    assert gpu_train.placements_of(case, wanted) == wanted
    case.options.storage_from_tokens = 129
    assert gpu_train.placements_of(case, wanted) == ["gpu", "host", "host+plan"]


def test_a_drive_that_is_slow_at_both_directions_at_once_is_measured_again_and_the_better_kept():
    """Reads at 3 and writes at 1.5 GB/s take equal parts at 2 GB/s one after the other."""
    good, doubtful, worse = (
        Drive(read_bytes_per_s=3e9, write_bytes_per_s=1.5e9, mixed_bytes_per_s=m * 1e9)
        for m in (2.0, 1.3, 0.9)
    )
    assert gpu_rates.of_alone(good) == pytest.approx(1.0)
    assert gpu_rates.better(good, lambda: pytest.fail("measured again")) is good
    assert gpu_rates.better(doubtful, lambda: good) is good
    assert gpu_rates.better(doubtful, lambda: worse) is doubtful


def test_the_probes_file_is_at_most_a_quarter_of_what_is_free(monkeypatch):
    free = SimpleNamespace(free=40e9)
    monkeypatch.setattr(gpu_rates.shutil, "disk_usage", lambda directory: free)
    assert gpu_rates.written_nbytes_max(".", 16.0) == pytest.approx(3.75 * 10e9)
    assert gpu_rates.written_nbytes_max(".", 4.0) == pytest.approx(3.75 * 4e9)


def test_the_emulated_device_of_a_giant_has_memory_of_its_own_with_a_profile_of_a_cpu_too(tmp_path):
    path = str(tmp_path / "cpu.json")
    save_hardware(
        load_hardware("h100").model_copy(update={"shares_host": True, "h2d_bytes_per_s": None}), path
    )
    hardware = gpu_giant.rates_for(gpu_common.Device("emulated"), path)
    assert not hardware.shares_host
    assert hardware.h2d_bytes_per_s == hardware.dram_bytes_per_s


GB = 10**9


@pytest.mark.parametrize(
    ("total_gb", "comes"),
    [([8, 8, 8, 16], True), ([8], False), ([8, 9, 9], False), ([128], True)],
    ids=["grows", "does not", "grows too little", "is all there"],
)
def test_memory_that_a_machine_is_given_as_it_is_used_is_waited_for_and_no_other(
    monkeypatch, total_gb, comes
):
    """7 GB are in use, and 2 GB more are wanted of which a tenth of all is to be left."""
    monkeypatch.setattr(gpu_touch, "LOOK_AGAIN_S", 0.005)
    looks = iter(total_gb)

    def memory():
        memory.total = next(looks, memory.total)
        return memory.total * GB, (memory.total - 7) * GB

    memory.total = 0
    begin_s = time.monotonic()
    assert gpu_touch.comes_in(2 * GB, 0.9, 0.1, begin_s + 60.0, memory) == comes
    assert time.monotonic() - begin_s < 10.0
    assert not gpu_touch.comes_in(2 * GB, 0.9, 0.1, begin_s - 1.0, memory)  # its time is over


@pytest.mark.parametrize(("seconds", "n_steps"), [(100.0, 4), (9.0, 2), (0.0, 1)])
def test_a_giants_row_has_as_many_steps_as_there_is_time_for_beside_those_that_follow(seconds, n_steps):
    """Each takes 2 s, and two more follow."""
    left = [seconds]

    def step():
        left[0] -= 2.0
        return 2.0

    assert len(gpu_giant.steps_in_time(step, 4, 2, lambda: left[0] + 0.5)) == n_steps
