"""What is timed of a model's own work adds up to the step, and leaves the model as it was."""

import time

import pytest
import torch

from offload.profiling.block_probe import WORK, BlockProbe, measure
from offload.profiling.compute_probe import UpdateLoop
from offload.profiling.storage_probe import DriveLoop
from offload.profiling.workload import profile_model
from tests.conftest import build

TOKENS = 32


def make(kind):
    model = build(kind, layers=3)
    ids = torch.randint(0, 256, (2, TOKENS))
    probe = BlockProbe(
        model, profile_model(model, TOKENS), 2, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss
    )
    return model, probe


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_seconds_of_the_kinds_of_work_are_those_of_the_step(kind):
    model, probe = make(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forwards = [m.forward.__func__ for m in model.modules()]
    probe.step_seconds()
    start = time.perf_counter()
    seconds = probe.step_seconds()
    step_s = time.perf_counter() - start
    assert set(seconds) == set(WORK)
    assert all(s > 0 for s in seconds.values())
    assert sum(seconds.values()) <= step_s
    assert sum(seconds.values()) >= 0.5 * step_s
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [m.forward.__func__ for m in model.modules()] == forwards


def test_rates_are_flops_over_seconds():
    _, probe = make("llama")
    workload = probe._workload
    seconds = dict.fromkeys(WORK, 0.5)
    blocks = sum(b.flops_per_sample for b in workload.blocks)
    assert probe.flops_per_s(seconds) == pytest.approx(
        {
            "forward": 4 * blocks,
            "recompute": 4 * blocks,
            "backward": 8 * blocks,
            "root_forward": 4 * workload.root_flops_per_sample,
            "root_backward": 8 * workload.root_flops_per_sample,
        }
    )


def test_a_look_at_the_machine_gives_shares_of_a_whole_and_ends_its_threads(tmp_path):
    _, probe = make("llama")
    updates, drives = UpdateLoop(), DriveLoop([str(tmp_path)], 64 << 20)
    try:
        found = measure(probe, updates, drives.stream, n_steps=1)
        rates = drives.measure(0.03)
    finally:
        updates.close()
        drives.close()
    assert 0 < found.compute_speed_beside_update <= 1
    assert 0 < found.update_speed_beside_compute <= 1
    assert 0 < found.compute_speed_beside_storage <= 1
    assert min(rates.read_bytes_per_s, rates.write_bytes_per_s, rates.mixed_bytes_per_s) > 0
    assert not list(tmp_path.iterdir())
