"""What loops ask DeepSpeed's engine: its configuration, where it is, and how the last step went."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from offload.deepspeed import mapping
from offload.deepspeed.config import get
from offload.deepspeed.loss_scale import LossScale
from offload.deepspeed.throughput import ThroughputTimer
from offload.errors import ConfigError
from offload.runtime.optimizer import OffloadOptimizer


class Answers:
    """The questions, answered as DeepSpeed 0.19 answers them; the engine holds what they are answered from."""

    config: dict[str, Any]
    optimizer: OffloadOptimizer
    tput_timer: ThroughputTimer
    _batch: int
    _micro: int
    _accumulation: int
    _managed: bool
    _loss_scale: LossScale
    _step_applied: bool
    _global_grad_norm: float | None

    def get_lr(self) -> list[float]:
        """Learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """Betas of each group; of SGD its momentum, of Adafactor nothing."""
        groups = self.optimizer.param_groups
        return [group.get("momentum", tuple(group.get("betas", ()))) for group in groups]

    def get_global_grad_norm(self) -> float | None:
        """Norm of all gradients before clipping, of the last step; None where no norm is computed."""
        return self._global_grad_norm

    @property
    def cur_scale(self) -> float:
        """The loss scale that the next backward uses; 1 without fp16."""
        return self._loss_scale.scale

    def loss_scale(self) -> float:
        """`fp16.loss_scale` of the configuration: 0 means dynamic."""
        return float(get(self.config, "fp16.loss_scale", 0))

    def dynamic_loss_scale(self) -> bool:
        """Whether the scale is searched for."""
        return self.loss_scale() == 0

    def was_step_applied(self) -> bool:
        """Whether the last `step()` updated: false between boundaries and for a skipped step."""
        return self._step_applied

    def train_batch_size(self) -> int:
        """Samples a step."""
        return self._batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples a micro-batch."""
        return self._micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a step."""
        return self._accumulation

    def managed_gradient_accumulation(self) -> bool:
        """Whether the engine counts micro-steps."""
        return self._managed

    def get_batch_info(self) -> tuple[int, int, int]:
        """(samples a step, samples a micro-batch, micro-batches a step)."""
        return self._batch, self._micro, self._accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples a step by changing the accumulation steps."""
        if train_batch_size < self._micro or train_batch_size % self._micro:
            raise ConfigError(f"train_batch_size={train_batch_size} must be a multiple of {self._micro}")
        self._batch, self._accumulation = train_batch_size, train_batch_size // self._micro
        self.tput_timer.batch_size = self._batch

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples a micro-batch; the accumulation steps stay."""
        self._micro, self._batch = micro_batch_size, micro_batch_size * self._accumulation
        self.tput_timer.batch_size = self._batch

    def gradient_clipping(self) -> float:
        """Largest global norm; 0: no clipping."""
        return float(get(self.config, "gradient_clipping", 1.0))

    def zero_optimization_stage(self) -> int:
        """As the configuration has it."""
        return int(get(self.config, "zero_optimization.stage", 0))

    def zero_optimization(self) -> bool:
        """Whether the stage is above 0."""
        return self.zero_optimization_stage() > 0

    def steps_per_print(self) -> int | None:
        """As the configuration has it."""
        return get(self.config, "steps_per_print")

    def fp16_enabled(self) -> bool:
        """As the configuration has it."""
        return bool(get(self.config, "fp16.enabled", False))

    def bfloat16_enabled(self) -> bool:
        """As the configuration has it."""
        return bool(get(self.config, "bf16.enabled", False))

    def torch_autocast_enabled(self) -> bool:
        """As the configuration has it."""
        return bool(get(self.config, "torch_autocast.enabled", False))

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast around forward; None without it."""
        return mapping.autocast_dtype(self.config)

    def wall_clock_breakdown(self) -> bool:
        """As the configuration has it."""
        return bool(get(self.config, "wall_clock_breakdown", False))

    def dump_state(self) -> bool:
        """As the configuration has it."""
        return bool(get(self.config, "dump_state", False))

    def dataloader_drop_last(self) -> bool:
        """As the configuration has it."""
        return bool(get(self.config, "dataloader_drop_last", False))

    def optimizer_name(self) -> str | None:
        """As the configuration has it; None where the script made the optimizer."""
        return get(self.config, "optimizer.type")

    def optimizer_params(self) -> dict[str, Any] | None:
        """As the configuration has them."""
        return get(self.config, "optimizer.params")

    def scheduler_name(self) -> str | None:
        """As the configuration has it; None where the script made the schedule."""
        return get(self.config, "scheduler.type")

    def scheduler_params(self) -> dict[str, Any] | None:
        """As the configuration has them."""
        return get(self.config, "scheduler.params")

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether the stage is 2 or 3."""
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether the stage is 3, where scripts gather parameters before they read them."""
        return self.zero_optimization_stage() >= 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """As the configuration has it. (`save_16bit_model` writes the whole model either way.)"""
        return bool(get(self.config, "zero_optimization.stage3_gather_16bit_weights_on_model_save", False))

    def zero_offload_optimizer(self) -> SimpleNamespace | None:
        """The section `offload_optimizer`, its keys as attributes; None where there is none."""
        return _section(self.config, "zero_optimization.offload_optimizer")

    def zero_offload_param(self) -> SimpleNamespace | None:
        """The section `offload_param`, its keys as attributes; None where there is none."""
        return _section(self.config, "zero_optimization.offload_param")

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether optimizer states are to be in host memory or on storage."""
        return get(self.config, "zero_optimization.offload_optimizer.device", "none") != "none"

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer states are to be in host memory."""
        return get(self.config, "zero_optimization.offload_optimizer.device", "none") == "cpu"


def _section(config: Mapping[str, Any], path: str) -> SimpleNamespace | None:
    found = get(config, path)
    if not isinstance(found, Mapping):
        return None
    return SimpleNamespace(**{"device": "none", "nvme_path": None, "pin_memory": True, **found})
