"""Workloads and machines by closed formula, for tests of the planner and the simulator."""

from __future__ import annotations

from offload.planner.hardware import Drive, Hardware
from offload.planner.workload import BlockWork, SavedTensor, Workload


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


def lohan_machine(n_drives: int = 12, host_gb: int = 768) -> Hardware:
    """RTX 4090, two Xeon Gold 5320, D7-P5510 drives."""
    return Hardware(
        name=f"rtx4090-{n_drives}ssd",
        source="data sheets; adam_params_per_s and step_overhead_s as docs/planner.md says",
        shares_host=False,
        device_memory_nbytes=24 * 10**9,
        host_memory_nbytes=host_gb * 10**9,
        matmul_flops_per_s={"bfloat16": 165.2e12, "float32": 82.6e12},
        h2d_bytes_per_s=24.8e9,
        d2h_bytes_per_s=24.8e9,
        dram_bytes_per_s=300e9,
        adam_params_per_s=1.37e9,
        drives=tuple(
            Drive(
                read_bytes_per_s=6.5e9,
                write_bytes_per_s=3.4e9,
                capacity_nbytes=3840 * 10**9,
                endurance_nbytes=7e15,
            )
            for _ in range(n_drives)
        ),
        step_overhead_s=2.0,
    )
