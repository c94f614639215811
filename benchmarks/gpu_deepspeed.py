"""The peer of gpu_train.py: DeepSpeed ZeRO-3 with optimizer state and parameters in host memory or on NVMe."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from gpu_models import Family

import offload


def zero3(
    family: Family, n_samples: int, nvme_path: str | None
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], None]]:
    """(step, close), layers recomputed; `nvme_path`: where optimizer state goes instead of to host memory.

    Raises ConfigError where DeepSpeed cannot be imported.
    """
    try:
        import deepspeed as peer
    except ImportError as error:
        raise offload.ConfigError(f"DeepSpeed cannot be imported: {error}") from error
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 1000),
    }  # fmt: skip
    where: dict[str, Any] = {"device": "cpu" if nvme_path is None else "nvme", "pin_memory": True}
    if nvme_path is not None:
        where |= {"nvme_path": nvme_path, "buffer_count": 8}
    config = {
        "train_micro_batch_size_per_gpu": n_samples,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "steps_per_print": 1 << 30,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "offload_optimizer": where,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 4},
    }
    model = family.make(recompute=True)
    engine, *_ = peer.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = family.loss(engine, tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, engine.destroy
