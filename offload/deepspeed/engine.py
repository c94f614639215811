"""The engine that `initialize` returns: the methods that loops written for DeepSpeed's engine call."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from offload.deepspeed import checkpoint, elsewhere, mapping
from offload.deepspeed.accelerator import get_accelerator
from offload.deepspeed.answers import Answers
from offload.deepspeed.config import batch_sizes, get
from offload.deepspeed.loss_scale import LossScale, from_config
from offload.deepspeed.throughput import ThroughputTimer
from offload.deepspeed.weights import state_dict, write_16bit
from offload.errors import UsageError
from offload.runtime.engine import OffloadEngine
from offload.runtime.optimizer import OffloadOptimizer

logger = logging.getLogger("offload")


class DeepSpeedEngine(Answers, nn.Module):
    """A wrapped model with DeepSpeed's manners: `engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    `backward` divides the loss by the accumulation steps and multiplies it with the loss scale; `step` updates at
    the accumulation boundary and does nothing else in between. One process: rank 0 of 1.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OffloadOptimizer,
        config: Mapping[str, Any],
        training_dataloader: Any = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.optimizer = optimizer
        self.config = dict(config)
        self.lr_scheduler: Any = None
        self.training_dataloader = training_dataloader
        self._batch, self._micro, self._accumulation = batch_sizes(config)
        self._managed = bool(get(config, "managed_gradient_accumulation", True))
        self._loss_scale: LossScale = from_config(config, is_fp16=mapping.is_fp16(config))
        self._checks_overflow = mapping.checks_overflow(config)
        self._autocast_dtype = mapping.autocast_dtype(config)
        self.tput_timer = ThroughputTimer(self._batch)
        self._boundary: bool | None = None
        self._inside_no_sync = False
        self._inside_step = False
        self._backward_is_scaled = False
        self._direct_backward = contextlib.ExitStack()
        self._micro_since_step = 0
        self._step_applied = False
        self._global_grad_norm: float | None = None
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.local_rank = self.global_rank = 0
        self.world_size = self.dp_world_size = 1
        self._publish_scale()

    # ---- what loops call -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, under autocast where the configuration says fp16 or torch_autocast."""
        if self.module.training:
            self.tput_timer.start()
        if self._autocast_dtype is None:
            found = self.module(*args, **kwargs)
        else:
            # A cast weight that is cached would outlive its block's turn on the device.
            with torch.autocast(self.device.type, dtype=self._autocast_dtype, cache_enabled=False):
                found = self.module(*args, **kwargs)
        if self._accumulation != 1 or self._loss_scale.scale != 1.0:
            for leaf in torch.utils._pytree.tree_leaves(found):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._refuse_unscaled)
        return found

    def _refuse_unscaled(self, _grad: torch.Tensor) -> None:
        """Of a backward that starts at an output of forward and knows neither accumulation nor loss scale."""
        if not self._backward_is_scaled:
            raise UsageError(
                f"backward() of the loss itself, with {self._accumulation} accumulation steps and loss scale "
                f"{self._loss_scale.scale:g}: call engine.backward(loss), or engine.scale(loss).backward()"
            )

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """For `engine.scale(loss).backward()`: the loss as `backward` would take it, divided and multiplied."""
        self._begin_backward(loss)
        if self._accumulates():
            self._direct_backward.enter_context(self.offload.no_sync())
        return loss / self._accumulation * self._loss_scale.scale

    def _begin_backward(self, loss: torch.Tensor) -> None:
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UsageError("engine.backward(loss) needs a scalar tensor that requires a gradient")
        self._direct_backward.close()
        self._backward_is_scaled = True
        self._micro_since_step += 1

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Backward of a scalar loss. Returns the loss divided by the accumulation steps (`scale_wrt_gas`).

        Raises UsageError for a loss that is not a scalar with a graph, and for `retain_graph=True`: a block's graph is
        made again in backward and gone afterwards.
        """
        if retain_graph:
            raise UsageError("retain_graph=True: add the losses and call backward once")
        self._begin_backward(loss)
        if scale_wrt_gas:
            loss = loss / self._accumulation
        scaled = loss * self._loss_scale.scale if self._loss_scale.scale != 1.0 else loss
        if self._accumulates():
            with self.offload.no_sync():
                scaled.backward()
        else:
            scaled.backward()
        return loss.detach()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """The update, the schedule's step and the counters, at an accumulation boundary; else only the micro-step."""
        if self._inside_no_sync:
            raise UsageError("engine.step() inside engine.no_sync(): call it after the with block")
        self._direct_backward.close()
        self._backward_is_scaled = False
        self._step_applied = False
        self._inside_step = True
        try:
            is_boundary = self.is_gradient_accumulation_boundary()
            if is_boundary:
                self._take_step(lr_kwargs or {})
        finally:
            self._inside_step = False
        self.tput_timer.stop(global_step=is_boundary)
        self.micro_steps += 1

    def _take_step(self, lr_kwargs: dict[str, Any]) -> None:
        norm = self.offload.grad_norm()
        if norm is not None:
            self._global_grad_norm = float(norm)
        overflow = self._checks_overflow and norm is not None and not bool(torch.isfinite(norm))
        if overflow:
            self.optimizer.zero_grad()
            self.skipped_steps += 1
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._loss_scale.update(overflow)
        self._publish_scale(overflow)
        self._step_applied = not overflow
        if not overflow and self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self.global_samples += self._batch if self._managed else self._micro * self._micro_since_step
        self._micro_since_step = 0
        self._report()

    def _report(self) -> None:
        every = float(get(self.config, "steps_per_print", 0))  # accelerate writes infinity for never
        if every and self.global_steps % every == 0:
            logger.info(
                "step=%d, skipped=%d, lr=%s, mom=%s",
                self.global_steps,
                self.skipped_steps,
                self.get_lr(),
                self.get_mom(),
            )
        if get(self.config, "wall_clock_breakdown", False) and self.offload.last_step:
            last = self.offload.last_step
            stalls = ", ".join(f"{cause} {seconds:.3f} s" for cause, seconds in last["stall_s"].items())
            logger.info("step=%d: %.3f s, waited: %s", self.global_steps, last["step_s"], stalls or "nothing")

    def _accumulates(self) -> bool:
        """Whether gradients of this backward wait for more. Without managed accumulation nobody knows before `step`,
        and updates wait for it anyway."""
        if not self._managed:
            return False
        return self._inside_no_sync or not self.is_gradient_accumulation_boundary()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the present micro-step ends a step."""
        if not self._managed:
            return self._inside_step
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self._accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say yourself, before each forward, whether the micro-step that follows ends a step."""
        if not self._managed:
            raise UsageError(
                "managed_gradient_accumulation is false: every engine.step() is a boundary already"
            )
        self._boundary = is_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate."""
        before, self._inside_no_sync = self._inside_no_sync, True
        try:
            yield
        finally:
            self._inside_no_sync = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard gradients that no step has consumed."""
        self._direct_backward.close()
        self.optimizer.zero_grad(set_to_none)

    def train_batch(self, data_iter: Any = None) -> None:
        """Refused: only an engine of a PipelineModule has it."""
        raise UsageError(
            "train_batch is for a PipelineModule: loop over engine(batch), engine.backward(loss), engine.step()"
        )

    eval_batch = train_batch

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """One process: gradients are whole."""

    def empty_partition_cache(self) -> None:
        """Give memory that torch has cached back to the device; blocks keep within `device_memory` by themselves."""
        get_accelerator().empty_cache()

    def compile(self, *_args: Any, **_settings: Any) -> None:
        """Refused: the whole model cannot be compiled while its blocks move."""
        raise UsageError('engine.compile(): put {"offload": {"compile_blocks": true}} into the configuration')

    # ---- what loops ask --------------------------------------------------------------------------------------

    @property
    def offload(self) -> OffloadEngine:
        """This library's engine: counters, stalls, flush, close."""
        return self.module.offload  # type: ignore[return-value]  # set by offload.wrap

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.offload.device

    def _publish_scale(self, overflow: bool = False) -> None:
        """Where scripts look for them: `engine.optimizer` of DeepSpeed has these three."""
        published: Any = self.optimizer
        published.loss_scale = published.cur_scale = self._loss_scale.scale
        published.overflow = overflow

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A data loader over `dataset` in the order in which DeepSpeed's would go, for one process."""
        sampler = data_sampler
        if sampler is None and not isinstance(dataset, torch.utils.data.IterableDataset):
            sampler = torch.utils.data.DistributedSampler(
                dataset, num_replicas=1, rank=0, shuffle=route == "train"
            )
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=self._micro if batch_size is None else batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            pin_memory=pin_memory and self.device.type == "cuda",
            num_workers=num_local_io_workers or 0,
            drop_last=bool(get(self.config, "dataloader_drop_last", False)),
        )

    # ---- state on disk ---------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write everything training goes on from to `save_dir`/`tag` (default `global_step<n>`), streamed.

        It appears at once, when it is complete; then `save_dir`/latest names it. `client_state` is plain data and
        tensors. Frozen parameters are always in it. Raises UsageError between two accumulation boundaries.
        """
        states = {
            "engine": self._state(),
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None,
            "client_state": dict(client_state or {}),
        }
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        checkpoint.write(self.module, os.fspath(save_dir), name, states, save_latest=save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: object = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from a checkpoint (default: the one that `load_dir`/latest names). Returns (its path, client_state).

        (None, None), with a warning, when it is not there. May be called at any accumulation boundary. Raises
        CheckpointError for another model's, with `load_module_strict` and without: every checkpoint has all parameters.
        """
        if custom_load_fn is not None:
            raise UsageError("custom_load_fn: load into the module before initialize")
        found = checkpoint.read(
            self.module,
            self.optimizer,
            os.fspath(load_dir),
            None if tag is None else str(tag),
            with_optimizer=load_optimizer_states and not load_module_only,
        )
        if found is None:
            return None, None
        path, states = found
        if not load_module_only:
            self._load_state(states["engine"])
            if (
                load_lr_scheduler_states
                and self.lr_scheduler is not None
                and states["lr_scheduler"] is not None
            ):
                self.lr_scheduler.load_state_dict(states["lr_scheduler"])
        return path, states["client_state"]

    _COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._COUNTERS} | {
            "loss_scale": self._loss_scale.state_dict()
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for name in self._COUNTERS:
            setattr(self, name, int(state[name]))
        self._loss_scale.load_state_dict(state["loss_scale"])
        self._micro_since_step = 0
        self._publish_scale()

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the module's weights in 16 bit (fp16 with fp16, else bf16) to one file; one block in memory at a time.

        A name that ends in .safetensors is written in that format, any other as torch.save does.
        """
        dtype = torch.float16 if self.fp16_enabled() else torch.bfloat16
        write_16bit(
            self.module, os.fspath(save_dir), save_filename, dtype, with_frozen=not exclude_frozen_parameters
        )
        return True

    save_fp16_model = save_16bit_model

    def module_state_dict(
        self,
        destination: dict[str, torch.Tensor] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, torch.Tensor]:
        """A copy of the module's weights in host memory, which must have room for all of them, in `destination`.

        Raises UsageError for `keep_vars=True`: a parameter holds its values only while its block is in use.
        """
        if keep_vars:
            raise UsageError(
                "keep_vars=True: parameters come and go with their blocks; leave it out for copies"
            )
        held = {} if destination is None else destination
        for name, tensor in state_dict(self.module, with_frozen=not exclude_frozen_parameters).items():
            held[prefix + name] = tensor
        return held

    def _consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, torch.Tensor]:
        """`module_state_dict` at any stage, in fp16 with fp16: what scripts write at the end of a run."""
        dtype = torch.float16 if self.fp16_enabled() else None
        return state_dict(self.module, dtype=dtype, with_frozen=not exclude_frozen_parameters)

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict

    def destroy(self) -> None:
        """End the run: finish what is in flight, drop hooks and remove the store."""
        self.offload.close()

    def __getattr__(self, name: str) -> Any:
        """What the engine does not have, the module may (`engine.config` is ours, `engine.generate` the module's)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or name.startswith("__"):
                raise
            try:
                return getattr(module, name)
            except AttributeError:
                raise AttributeError(
                    f"neither this library's DeepSpeedEngine nor {type(module).__name__} has {name!r}: "
                    f"{elsewhere.engine_says(name)}"
                ) from None
