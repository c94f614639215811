"""`OffloadTrainer`: transformers' Trainer with the model's training state in the tiers of this library.

The Trainer's own loop runs unchanged. What is different, and where: the optimizer is wrapped when it is created;
backwards that another one follows run under `no_sync`; clipping is made by the engine, which alone sees all gradients;
models are exported block by block; a checkpoint holds the complete training state. In fp16 the loss is scaled here,
because accelerate's scaler would look for gradients where they are not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from offload.deepspeed.loss_scale import DynamicLossScale
from offload.errors import ConfigError
from offload.runtime.engine import OffloadEngine
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.wrap import wrap
from offload.transformers import checkpoints

logger = logging.getLogger("offload")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def _refuse(args: TrainingArguments) -> None:
    """Raise ConfigError for arguments that cannot be kept, naming each and what to do."""
    remedies = {
        "deepspeed": (bool(args.deepspeed), "the model is offloaded already: leave it out"),
        "fsdp": (bool(args.fsdp), "this library runs in one process: leave it out"),
        "torch_compile": (
            args.torch_compile,
            'the whole model cannot be compiled while its blocks move: use offload={"compile_blocks": True}',
        ),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            'set per_device_train_batch_size, and offload={"micro_batches": n} to need less memory for it',
        ),
        "load_best_model_at_end": (
            args.load_best_model_at_end and args.save_only_model,
            "with save_only_model there is no training state to go back to: leave one of the two out",
        ),
    }
    for name, (is_set, remedy) in remedies.items():
        if is_set:
            raise ConfigError(f"OffloadTrainer: {name}={getattr(args, name)!r} is not supported: {remedy}")
    if args.world_size > 1 or args.n_gpu > 1:
        n = max(args.world_size, args.n_gpu)
        raise ConfigError(
            f"OffloadTrainer: {n} devices or processes are in use, and it runs in one process on one device: start it "
            "without torchrun, and set CUDA_VISIBLE_DEVICES=0"
        )


class OffloadMixin(_Base):
    """Put before any class derived from Trainer: `class MyTrainer(OffloadMixin, SFTTrainer): ...`.

    `offload`: the settings of `offload.wrap` (budgets, `storage`, `micro_batches`, `compute_dtype` ...).
    """

    def __init__(self, *args: Any, offload: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if offload is not None and not isinstance(offload, Mapping):
            raise ConfigError(
                f"OffloadTrainer: offload={offload!r}: write the settings of offload.wrap as a dict, such as "
                'offload={"storage": ["/mnt/nvme0"], "device_memory": "8GB"}'
            )
        self._settings = dict(offload or {})
        self._resumed_random: dict[str, Any] | None = None
        self.loss_scale: DynamicLossScale | None = None
        """What the loss is multiplied with before backward; None without fp16."""
        super().__init__(*args, **kwargs)
        _refuse(self.args)
        if "max_grad_norm" in self._settings:
            raise ConfigError(
                "OffloadTrainer: set max_grad_norm in TrainingArguments, not among offload's settings"
            )
        if self.args.gradient_checkpointing:
            logger.info("gradient_checkpointing is off: blocks recompute by themselves")
            self.args.gradient_checkpointing = False
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self.args, name):  # the Trainer would cast all parameters, for good
                logger.info("%s is off: evaluation computes in the dtype that training computes in", name)
                setattr(self.args, name, False)

    # ---- the optimizer ---------------------------------------------------------------------------------------

    @property
    def engine(self) -> OffloadEngine | None:
        """The engine of the model being trained; None before the optimizer is created."""
        found = getattr(self.model, "offload", None)
        return found if isinstance(found, OffloadEngine) else None

    @property
    def _model(self) -> nn.Module:
        model: Any = self.model
        return model

    @property
    def _own_optimizer(self) -> OffloadOptimizer:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate puts its own around it
        if not isinstance(inner, OffloadOptimizer):
            raise ConfigError(f"OffloadTrainer: the optimizer has been replaced by a {type(inner).__name__}")
        return inner

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does; with fp16 the scaling of the loss is ours."""
        precision = self.args.mixed_precision
        if precision == "fp16":
            self.loss_scale = DynamicLossScale(2.0**16, window=2000, hysteresis=1)
            self.args.mixed_precision = "no"
        super().create_accelerator_and_postprocess()
        self.args.mixed_precision = precision
        if self.loss_scale is not None:
            backward, scale = self.accelerator.backward, self.loss_scale
            self.accelerator.backward = lambda loss, **more: backward(loss * scale.scale, **more)

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """fp16 by autocast, without copies of weights that would outlive their block's turn on the device."""
        if self.loss_scale is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, dtype=torch.float16, cache_enabled=False)

    @property
    def _max_grad_norm(self) -> float | None:
        """For the engine. In fp16 updates wait in any case, for gradients that are not finite are not used."""
        return self.args.max_grad_norm or (None if self.loss_scale is None else math.inf)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The engine decides what is on the device."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as the arguments say, and hand the model's training state to the engine."""
        engine = self.engine
        if engine is None:
            super().create_optimizer(model)
            source: Any = self.optimizer
            clip = self._max_grad_norm
            _, self.optimizer = wrap(self.model, source, max_grad_norm=clip, **self._settings)  # type: ignore[arg-type]
            if self.lr_scheduler is not None and getattr(self.lr_scheduler, "optimizer", None) is source:
                self.lr_scheduler.optimizer = self.optimizer  # a scheduler of the user's own
            return self.optimizer
        if self.optimizer is None:
            raise ConfigError(
                "OffloadTrainer: the model is wrapped already: pass its optimizer too, as optimizers=(optimizer, None)"
            )
        if engine.config.max_grad_norm != self._max_grad_norm:
            raise ConfigError(
                f"OffloadTrainer: the model was wrapped with max_grad_norm={engine.config.max_grad_norm}, and "
                f"TrainingArguments need {self._max_grad_norm}: make them equal"
            )
        return self.optimizer

    def close(self) -> None:
        """Finish what is in flight and remove the store. Save the model before."""
        if self.engine is not None:
            self.engine.close()

    # ---- one step --------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward; gradients wait for the last backward of the step."""
        engine = self.engine
        if engine is None:
            raise ConfigError("OffloadTrainer: the model has been replaced since the optimizer was created")
        if self.loss_scale is not None:
            self._own_optimizer.loss_scale = self.loss_scale.scale
        with contextlib.nullcontext() if self.accelerator.sync_gradients else engine.no_sync():
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """The engine clips in `optimizer.step()`, to the same norm."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Known after `optimizer.step()`; see `_maybe_log_save_evaluate`. In fp16 the step is judged here."""
        engine, scale = self.engine, self.loss_scale
        if engine is None or scale is None:
            return
        norm = engine.grad_norm()
        overflow = norm is not None and not bool(torch.isfinite(norm))
        if overflow:
            self._own_optimizer.zero_grad()  # the step that follows finds nothing to do
            self._own_optimizer.grad_norm = norm
        accelerated: Any = self.optimizer
        accelerated._is_overflow = overflow  # the schedule waits
        scale.update(overflow)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, self._own_optimizer.grad_norm, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict by streaming, before training as well."""
        if self.engine is None:
            self.create_optimizer()
        return super().evaluation_loop(*args, **kwargs)

    # ---- files -----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model (or its adapter) as `from_pretrained` reads it, one block in memory at a time."""
        if self.engine is None:
            super()._save(output_dir, state_dict)
            return
        directory = output_dir if output_dir is not None else str(self.args.output_dir)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        checkpoints.write_model(self._model, directory, processing)
        torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save_state(self._model, output_dir, self._state_beside)

    @property
    def _state_beside(self) -> dict[str, Any]:
        """What belongs to a step besides the model's training state."""
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        return {"lr_scheduler": self.lr_scheduler, **scale}

    def _save_rng_state(self, output_dir: str) -> None:
        """Part of the training state."""

    def _save_scaler(self, output_dir: str) -> None:
        """The loss scale is part of the training state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Only checked here: the parameters come with the rest of the state, when the model is wrapped."""
        checkpoints.check_has_state(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._resumed_random = checkpoints.load_state(self._model, checkpoint, self._state_beside)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._resumed_random is not None:
            checkpoints.set_random_states(self._resumed_random)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Part of the training state."""

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            logger.info("going back to %s, of metric %s", best, self.state.best_metric)
            checkpoints.load_state(self._model, best, self._state_beside)


class OffloadTrainer(OffloadMixin, Trainer):
    """transformers' Trainer; `offload={"storage": [...], "device_memory": ..., ...}` says what may be used."""


class OffloadSeq2SeqTrainer(OffloadMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer, with generation in evaluation, in the same way."""
