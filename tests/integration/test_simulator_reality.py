"""What the simulator says of bytes is what a run on this machine does: bytes moved and bytes held, tier by tier.

The oracles are the engine's counters, the arenas, the store and torch's own allocator. Seconds depend on the clock:
they are compared by benchmarks/simulator_reality.py.
"""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

from llama_shaped import LlamaShaped, Shape
from measured_run import MeasuredRun, fixed_plan, staging_nbytes

from offload.profiling.workload import profile_model
from offload.schedule.run import simulate_plan
from tests.planning import lohan_machine

TOKENS = 64
MACHINE = lohan_machine(1).model_copy(update={"shares_host": True})
"""Rates do not matter here; that the device computes in host memory does."""
FIXED = {"activations": "recompute", "micro_batches": 1, "prefetch_blocks": 2, "grad_buffers": 2}


def llama():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaShaped(Shape(hidden=256, layers=5, intermediate=1024, heads=4, vocab=2048))
    finally:
        torch.set_default_dtype(before)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=256, n_layer=4, n_head=4, vocab_size=2048, n_positions=TOKENS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS = {
    "llama, bf16": (llama, lambda model, ids: model(ids)),
    "gpt2, fp32": (gpt2, lambda model, ids: model(input_ids=ids, labels=ids).loss),
}
CHOICES = [
    (2, {"update": "backward", "params_host_fraction": 0.0, "states_host_fraction": 0.0}),
    (8, {"update": "backward", "params_host_fraction": 0.0, "states_host_fraction": 0.5}),
    (8, {"update": "backward", "params_host_fraction": 1.0, "states_host_fraction": 1.0}),
    (2, {"update": "deferred", "params_host_fraction": 0.5, "states_host_fraction": 0.5, "grads_host_fraction": 1.0}),
    (4, {"update": "deferred", "params_host_fraction": 0.0, "states_host_fraction": 0.0, "grads_host_fraction": 0.0}),
    (4, {"update": "backward", "params_host_fraction": 0.0, "states_host_fraction": 0.0, "activations": "save"}),
    (8, {"update": "backward", "params_host_fraction": 0.0, "states_host_fraction": 0.0, "micro_batches": 4}),
]  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("batch", "chosen"), CHOICES, ids=lambda value: str(value).replace("_host_fraction", "")
)
def test_bytes_moved_and_held_are_those_of_the_simulation(tmp_path, kind, batch, chosen):
    build, loss = MODELS[kind]
    workload = profile_model(build(), TOKENS)
    plan = fixed_plan(workload, MACHINE, batch, **{**FIXED, **chosen})
    simulated = simulate_plan(plan, workload, MACHINE, staging_nbytes=staging_nbytes())
    ids = torch.randint(0, 2048, (batch, TOKENS))
    with MeasuredRun(build(), plan, str(tmp_path), lambda model: loss(model, ids)) as run:
        for _ in range(2):
            run.step()
        moved, held = run.bytes_per_step(), run.peak_nbytes()
    assert simulated.read_nbytes == pytest.approx(moved.read, rel=0.01)
    assert simulated.written_nbytes == pytest.approx(moved.written, rel=0.01)
    for tier, nbytes in held.items():
        assert nbytes <= simulated.peak_nbytes[tier] <= 1.1 * nbytes, tier
