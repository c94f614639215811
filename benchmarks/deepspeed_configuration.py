"""The DeepSpeed configuration that benchmarks and peer tests train with; DeepSpeed and this library read the same."""

from __future__ import annotations

from typing import Any


def configuration(
    storage: str,
    *,
    batch: int = 1,
    lr: float = 1e-4,
    largest_parameter: int | None = None,
    block_size: int = 1 << 20,
    queue_depth: int = 32,
    threads: int = 2,
    **zero: Any,
) -> dict[str, Any]:
    """What a user who offloads the optimizer to NVMe writes: stage 3, bf16, AdamW, clipping; `zero`: more of its keys.

    Parameters are in DRAM. With `largest_parameter`, the elements of the model's largest, they are on NVMe too, in the
    form in which that runs: no prefetch, and a buffer for every parameter that a block needs.
    """
    nvme = {"device": "nvme", "nvme_path": storage, "pin_memory": False}
    parameters: dict[str, Any] = {"device": "cpu", "pin_memory": False}
    if largest_parameter is not None:
        parameters = {**nvme, "buffer_count": 64, "buffer_size": largest_parameter, "max_in_cpu": 0}
        zero = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, **zero}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": lr}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": parameters,
            "offload_optimizer": {**nvme, "buffer_count": 8},
            **zero,
        },
        "aio": {"block_size": block_size, "queue_depth": queue_depth, "intra_op_parallelism": threads},
    }
