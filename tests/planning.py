"""Workloads and machines by closed formula, for tests of the planner and the simulator."""

from __future__ import annotations

from offload.planner.hardware import Drive, Hardware
from offload.planner.search import make_plan
from offload.planner.workload import BlockWork, SavedTensor, Workload

MB = 10**6
STAGING = 100_000


def gpt(
    name: str, layers: int, hidden: int, *, tokens: int = 1024, vocab: int = 50257, width: int = 2
) -> Workload:
    """GPT-2-shaped: 12 h^2 + 13 h parameters a block, tied head. Fused attention."""
    t, h = tokens, hidden
    matmul = 2.0 * t * h * h
    attention = 4.0 * t * t * h
    one = width * t * h

    def saved(name: str, source: str, nbytes: int, flops: float) -> SavedTensor:
        return SavedTensor(name, source, nbytes, flops)

    tensors = (
        saved("norm1", "layer_norm", one, 5.0 * t * h),
        saved("qkv", "linear", 3 * one, 3 * matmul),
        saved("attention", "attention", one, attention),
        saved("projected", "linear", one, matmul),
        saved("norm2", "layer_norm", one, 5.0 * t * h),
        saved("fc1", "linear", 4 * one, 4 * matmul),
        saved("gelu", "gelu", 4 * one, 8.0 * t * h),
        saved("fc2", "linear", one, 4 * matmul),
    )
    blocks = tuple(
        BlockWork(
            name=f"block{i}",
            trainable_numel=12 * h * h + 13 * h,
            frozen_numel=0,
            forward_flops_per_sample={"linear": 12 * matmul, "attention": attention},
            input_nbytes_per_sample=one,
            saved=tensors,
        )
        for i in range(layers)
    )
    return Workload(
        name=name,
        tokens_per_sample=t,
        param_nbytes=width,
        blocks=blocks,
        root_trainable_numel=vocab * h + 2 * h,
        root_frozen_numel=0,
        root_flops_per_sample=2.0 * t * h * vocab,
        logits_nbytes_per_sample=width * t * vocab,
    )


LOHAN_ADAM_PARAMS_PER_S = 1.25e9
"""The one figure of the LoHan machine that no data sheet gives: fitted to both published tables together."""


def lohan_machine(
    n_drives: int = 12, host_gb: int = 768, adam_params_per_s: float = LOHAN_ADAM_PARAMS_PER_S
) -> Hardware:
    """RTX 4090, two Xeon Gold 5320, D7-P5510 drives of 3.84 TB, from data sheets. bf16: 0.9 of 165.2 TFLOPS; DRAM: 0.8
    of 16 channels DDR4-2933; PCIe 4 x16; drives 6.5 and 3.4 GB/s, 7 PB; no fixed overhead of a step."""
    return Hardware(
        name=f"rtx4090-{n_drives}ssd",
        source="data sheets; adam_params_per_s as docs/planner.md says",
        shares_host=False,
        device_memory_nbytes=24 * 2**30,
        host_memory_nbytes=host_gb * 10**9,
        matmul_flops_per_s={"bfloat16": 148.68e12, "float32": 74.34e12},
        h2d_bytes_per_s=24.8e9,
        d2h_bytes_per_s=24.8e9,
        dram_bytes_per_s=300.3392e9,
        adam_params_per_s=adam_params_per_s,
        drives=tuple(
            Drive(
                read_bytes_per_s=6.5e9,
                write_bytes_per_s=3.4e9,
                capacity_nbytes=3840 * 10**9,
                endurance_nbytes=7e15,
            )
            for _ in range(n_drives)
        ),
    )


PUBLISHED_TFLOPS_BY_BATCH = {8: 42.8, 16: 84.3, 32: 143.1, 64: 155.8, 128: 153.8}
"""LoHan, 13B, 12 drives."""
PUBLISHED_TFLOPS_BY_DRIVES = {1: 53.1, 2: 89.7, 3: 121.7, 6: 146.3, 12: 153.9}
"""LoHan, 13B, batch 48."""
PUBLISHED_ROWS = [(batch, 12, tflops) for batch, tflops in PUBLISHED_TFLOPS_BY_BATCH.items()] + [
    (48, drives, tflops) for drives, tflops in PUBLISHED_TFLOPS_BY_DRIVES.items()
]
"""(batch, drives, hardware TFLOPS): arXiv 2403.06504, sequences of 1,024 tokens, recomputation counted."""


def small_machine(n_drives: int, shares_host: bool, dram_gb_s: float = 50.0) -> Hardware:
    """Slow enough that small models keep it busy."""
    machine = lohan_machine(n_drives)
    drives = tuple(
        d.model_copy(
            update={"read_bytes_per_s": 6.5e8, "write_bytes_per_s": 3.4e8, "capacity_nbytes": 10**12}
        )
        for d in machine.drives
    )
    return machine.model_copy(
        update={
            "name": "small",
            "drives": drives,
            "shares_host": shares_host,
            "matmul_flops_per_s": {"bfloat16": 1e12},
            "h2d_bytes_per_s": 2e9,
            "d2h_bytes_per_s": 1.5e9,
            "h2d_duplex_bytes_per_s": 1e9,
            "dram_bytes_per_s": dram_gb_s * 1e9,
            "adam_params_per_s": 2e8,
            "step_overhead_s": 0.0,
        }
    )


def step_s(work, machine, budgets, batch, fixed=None) -> float:
    plan = make_plan(work, machine, budgets, fixed, batch_samples=batch)
    assert plan.predicted is not None
    return plan.predicted.step_s
