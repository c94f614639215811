"""The composition root: `OffloadEngine` ties blocks, hooks, scheduler and optimizer together."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from offload.config import Config
from offload.errors import ConfigError, UsageError
from offload.model.blocks import Cut, base_of
from offload.model.blocks import cut as cut_model
from offload.model.causal_lm_loss import chunk_loss, why_not_chunked
from offload.model.flat import FlatBuffer
from offload.model.quantized import prepare_quantized
from offload.runtime import hooks
from offload.runtime.assembly import Assembly, assemble, choose_device, steps_aside
from offload.runtime.block_function import run_block
from offload.runtime.commits import StepCommits
from offload.runtime.early_root import EarlyRoot
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.recompute import Recipe
from offload.runtime.resident import place_adapters
from offload.runtime.training_state import Stateful, checked_stateful
from offload.runtime.wiring import make_activations, make_commits, make_run_plan, make_scheduler, move_buffers
from offload.stores.activations import Tier
from offload.stores.block_store import BlockRecord
from offload.telemetry import Span, SpanLog, Stalls

logger = logging.getLogger("offload")


class OffloadEngine:
    """What `model.offload` is: counters, stalls, `no_sync()`, `flush()` and `close()`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OffloadOptimizer,
        config: Config,
        blocks: object,
        dtype: torch.dtype | None,
    ) -> None:
        self.model = model
        self.config = config
        self.keeps_graph = config.activations == "keep"
        self.stalls = Stalls(lambda cause: torch.profiler.record_function(f"offload wait for {cause}"))
        self.uses_recipes = not config.compile_blocks
        self.spans = SpanLog()
        self.last_step: dict[str, Any] = {}
        self._closed = False
        self._sync = True
        self._backward_open = False
        self._handles: list[Any] = []
        self._modules: list[nn.Module] = []
        cut = cut_model(model, blocks)
        device = choose_device(model, config)
        self.device = device.torch_device
        try:
            self.aside = steps_aside(cut, config, device, dtype)
            if self.aside:
                cut = cut.all_root()
            self._planned = None if self.aside else make_run_plan(model, config, blocks, dtype, device)
            if not self.aside:
                cut = place_adapters(cut, config, device, self._planned is not None)
            self.plan = None if self._planned is None else self._planned.plan
            self.micro_batches = config.micro_batches if self.plan is None else self.plan.micro_batches
            parts = self._assembly = assemble(cut, config, dtype, device, self.spans, self.plan)
        except BaseException:
            device.close()
            raise
        self.root, self.blocks, self.placement = parts.root, parts.blocks, parts.placement
        self._optimizer = weakref.ref(optimizer)
        self._scheduler = make_scheduler(parts, self.stalls, self.spans, holds=self.plan is None)
        self._gradients = self._scheduler.gradients
        self._early_root = EarlyRoot(self.root, config.chunk_elements)
        self.tracked: dict[str, Stateful] = {}
        self.commits = make_commits(model, parts, config, self.tracked)
        self.activations = make_activations(parts, config, self.stalls, self.spans, self.plan is not None)
        self._step_start_s = time.perf_counter()
        try:
            self._attach(cut)
        except BaseException:
            self._detach()
            parts.resources.abandon()
            raise
        self._finalizer = weakref.finalize(model, parts.resources.close)

    def _attach(self, cut: Cut) -> None:
        """Take over the model: its blocks' forward, its gradients, its buffers."""
        self._modules = [module for _, module in cut.blocks]
        for block, module in zip(self.blocks, self._modules, strict=True):
            block.trains = any(parameter.requires_grad for parameter in module.parameters())
            hooks.replace_forward(
                module, functools.partial(run_block, block, self), self.config.compile_blocks
            )
            self._handles += hooks.on_gradient(block, self._gradients.accumulate)
        self._handles += hooks.on_gradient(self.root, self._receive_root_gradient)
        owners = {name.rpartition(".")[0] for name, _ in cut.root}
        modules = dict(self.model.named_modules())
        owning = [self.model, *(modules[name] for name in owners)]
        self._handles += hooks.before_forward(owning, self._root_needed)
        self._handles += prepare_quantized(self.model)
        move_buffers(self.model, self.device)
        self._scheduler.hold_root()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            hooks.restore_forward(module)

    # ---- called by blocks and hooks --------------------------------------------------------------------------

    def _root_needed(self) -> None:
        self._scheduler.hold_root()

    def _receive_root_gradient(
        self, block: BlockRecord, buffer: FlatBuffer, position: int, parameter: nn.Parameter
    ) -> None:
        self._open_backward()
        self._early_root.received(parameter)
        self._gradients.accumulate(block, buffer, position, parameter)

    def begin_forward(self, block: BlockRecord) -> None:
        """Before the block's forward."""
        if self._closed:
            raise UsageError("the offload engine is closed; wrap the model again")
        if block.awaiting_backward:
            self._gradients.will_accumulate()
        if self.commits is not None:
            self.commits.next_forward(self._live_optimizer())
        self._scheduler.begin(block, "forward")

    def end_forward(self, block: BlockRecord) -> None:
        """After the block's forward."""
        self._scheduler.end(block, "forward")

    def begin_backward(self, block: BlockRecord) -> None:
        """Before the block's backward."""
        self._open_backward()
        if self._early_root.blocks_begin():
            self._update_root_early()
        self._scheduler.begin(block, "backward")
        self._gradients.begin(block)

    def end_backward(self, block: BlockRecord) -> None:
        """After the block's backward: its gradients leave at once."""
        self._dispatch_gradients(block)
        self._scheduler.end(block, "backward")

    def _defers(self, block: BlockRecord) -> bool:
        """Whether the block's update waits for `optimizer.step()`."""
        if self.plan is None or self.config.deferred:
            return self.config.deferred
        if block.is_root:
            return len(self.plan.deferred_blocks) == len(self.blocks)
        return block.index in self.plan.deferred_blocks

    def _dispatch_gradients(self, block: BlockRecord) -> None:
        if not block.touched or block.grad_buffer is None:
            self._gradients.drop(block)
            return
        if self._sync and not self._defers(block) and not block.awaiting_backward:
            self._previous_step_durable()
            if self.commits is not None:
                block.grad_norms = self._norms(block)
            if not self._scheduler.hold(block):
                self._scheduler.update_now(block, self._hyper_of)
            block.updated_since_step = True
            return
        if self._sync and (self.config.max_grad_norm is not None or self.commits is not None):
            block.grad_norms = self._norms(block)
        self._gradients.park(block)

    def input_tier(self, block: BlockRecord) -> Tier | None:
        """Where the block's input waits for backward; None: where there is room."""
        return None if self._planned is None else self._planned.input_tier(block.index)

    def given_tensors(self, block: BlockRecord) -> list[torch.Tensor]:
        """What a block's operations may read besides its inputs: parameters (the root's too) and buffers."""
        module = self._modules[block.index]
        return [*self.model.parameters(), *module.buffers(), *self.model.buffers()]

    def tiers_of_saved(self, block: BlockRecord, recipe: Recipe) -> dict[int, Tier]:
        """Which results of the block's operations are kept for backward, and where; all others are recomputed."""
        where = self.config.saved_activations
        if self._planned is not None:
            return self._planned.tiers_of_saved(block.index, recipe)
        if where == "recompute":
            return {}
        return {value.op: where for value in recipe.keepable()}

    def _open_backward(self) -> None:
        if self._backward_open:
            return
        with contextlib.suppress(RuntimeError):  # outside a backward, as when a test sets .grad by hand
            hooks.at_end_of_backward(self._backward_ended)
            self._backward_open = True
            self._early_root.begin()

    def _update_root_early(self) -> None:
        """Update what the blocks' backward does not use or change; see runtime/early_root.py."""
        if not self._sync or self._defers(self.root) or self._assembly.in_device is not None:
            return
        if self.commits is not None:
            return  # the whole root goes to its other side in one update
        final, chunks = self._early_root.take()
        if not final:
            return
        self._refuse_second_backward()
        self._scheduler.update_early(final, chunks, self._hyper_of)
        self.root.updated_since_step = True

    def _refuse_second_backward(self) -> None:
        if self.root.updated_since_step:
            raise UsageError("backward ran again before optimizer.step(); use model.offload.no_sync()")

    def _backward_ended(self) -> None:
        self._backward_open = False
        self._scheduler.update_held(self._hyper_of)
        if self._sync and not self._defers(self.root) and self._scheduler.root_has_gradients():
            if not self._early_root.has_updated:
                self._refuse_second_backward()
            self._previous_step_durable()
            self._scheduler.wait_resident(self.root)
            if self.commits is not None:
                self.root.grad_norms = self._norms(self.root)
            self._scheduler.update_now(self.root, self._hyper_of)
            self.root.updated_since_step = True
        self._early_root.end()

    # ---- called by the optimizer -----------------------------------------------------------------------------

    def _hyper_of(self, parameter: nn.Parameter) -> Any:
        optimizer = self._optimizer()
        if optimizer is None:
            raise UsageError("the optimizer returned by offload.wrap has been deleted")
        return optimizer.hyper_of(parameter)

    def _norms(self, block: BlockRecord) -> list[torch.Tensor]:
        """Norm of each gradient of the block, in its order of parameters; the quickest way where nothing is clipped."""
        if block.grad_buffer is None:
            return []
        plane = block.grad_buffer.plane
        grads = [
            block.grad_view(buffer, segment, plane)
            for buffer in block.layout.buffers
            for segment in buffer.segments
            if id(segment.parameter) in block.touched
        ]
        if self.config.max_grad_norm is None and plane.dtype == torch.float32:
            return [torch.dot(grad.view(-1), grad.view(-1)).sqrt() for grad in grads]
        return [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]

    def grad_norm(self) -> torch.Tensor | None:
        """Global norm of the gradients that wait for `optimizer.step()`, divided by the loss scale.

        None without `max_grad_norm` (which may be infinite) or durability 'step', and when there is no gradient.
        """
        optimizer = self._optimizer()
        if (self.config.max_grad_norm is None and self.commits is None) or optimizer is None:
            return None
        norms = self._norms(self.root) if self.root.touched else []
        for block in [self.root, *self.blocks]:
            if block.updated_since_step or (block.touched and not block.is_root):
                norms += block.grad_norms
        if not norms:
            return None
        return torch.linalg.vector_norm(torch.stack(norms)) / optimizer.loss_scale

    def _grad_scale(self) -> float:
        """Factor that undoes the loss scale and brings the global norm to `max_grad_norm`, as
        torch.nn.utils.clip_grad_norm_ computes it."""
        optimizer, total = self._optimizer(), self.grad_norm()
        if optimizer is None:
            return 1.0
        if total is None:
            if self.commits is not None:
                optimizer.grad_norm = None  # nothing to judge the step by
            return 1.0 / optimizer.loss_scale
        optimizer.grad_norm = total
        if self.config.max_grad_norm is None:
            return 1.0 / optimizer.loss_scale
        return min(1.0, float(self.config.max_grad_norm / (total + 1e-6))) / optimizer.loss_scale

    def _live_optimizer(self) -> OffloadOptimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise UsageError("the optimizer returned by offload.wrap has been deleted")
        return optimizer

    def _previous_step_durable(self) -> None:
        """Before an update: the step before must have been committed, for the update overwrites the one before that."""
        if self.commits is None:
            return
        if self.commits.due:
            for block in self.blocks:
                if block.pending_update:  # not used in this forward
                    self._scheduler.fetch(block, must=True)
            self.commits.begin(self._live_optimizer())
        with self.stalls.waiting("commit"):
            self.commits.wait()

    def _is_to_be_discarded(self, optimizer: OffloadOptimizer) -> bool:
        """Whether the step's gradients are not finite, or above the limit that updates did not wait for."""
        if self.commits is None or optimizer.grad_norm is None:
            return False
        total, limit = float(optimizer.grad_norm), self.config.max_grad_norm
        return not math.isfinite(total) or (limit is not None and not self.config.deferred and total > limit)

    def _discard_step(self, optimizer: OffloadOptimizer, commits: StepCommits) -> None:
        """Leave the parameters and their states as the step before made them."""
        for block in [*self.blocks, self.root]:
            self._scheduler.wait_resident(block)
        for block in commits.roll_back(optimizer):
            self._scheduler.drop_copies(block)
        self.discard_gradients()
        optimizer.discarded_steps += 1
        norm = float("nan") if optimizer.grad_norm is None else float(optimizer.grad_norm)
        logger.warning("step %d is discarded: its gradients' norm is %s", optimizer.steps_made + 1, norm)

    def optimizer_step(self) -> None:
        """Decide the updates of this step that have not been made during backward."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise UsageError("the optimizer returned by offload.wrap has been deleted")
        self._backward_open = False  # a backward that failed midway leaves it open
        store = self._assembly.resources.store
        if store is not None:
            store.check_intact()
        self._scheduler.update_held(self._hyper_of)  # of a backward that failed midway
        waiting = [b for b in self.blocks if b.touched]
        if any(b.pending_update for b in [*waiting, self.root]):
            self._scheduler.flush()  # a block was skipped by this step's forward
        self._previous_step_durable()
        scale = self._grad_scale()
        discarded = self._is_to_be_discarded(optimizer)
        if discarded and self.commits is not None:
            self._discard_step(optimizer, self.commits)
            waiting = []
        optimizer.grad_scale = scale
        for block in waiting:
            self._scheduler.update_later(block, self._hyper_of)
        if self._scheduler.root_has_gradients():
            self._scheduler.update_now(self.root, self._hyper_of)
        optimizer.grad_scale = 1.0
        for block in [*self.blocks, self.root]:
            block.updated_since_step = False
            block.awaiting_backward.clear()
        self._scheduler.rewind()
        self._scheduler.prefetch()
        now = time.perf_counter()
        self.last_step = {
            "step_s": now - self._step_start_s,
            "stall_s": self.stalls.reset(),
            "discarded": discarded,
        }
        self._step_start_s = now
        if self.commits is not None:
            self.commits.step_ended(optimizer)

    def discard_gradients(self) -> None:
        """Forget gradients that no step has consumed."""
        self._backward_open = False
        self._scheduler.drop_undone()
        for block in [*self.blocks, self.root]:
            if block.pending_update or block.tickets:
                continue
            block.touched.clear()
            block.grads_waiting = False

    # ---- for the user ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate: gradients of backwards inside wait for the first backward outside (the DDP convention)."""
        self._gradients.will_accumulate()
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @contextlib.contextmanager
    def computing(self, kind: str, block: BlockRecord) -> Iterator[None]:
        """Record what the device computes inside: for torch's profiler, and as a span while spans are recorded."""
        with torch.profiler.record_function(f"offload {kind} {block.name}"):
            if not self.spans.recording:
                yield
                return
            yield from self._timed(kind, block)

    def _timed(self, kind: str, block: BlockRecord) -> Iterator[None]:
        device = self._assembly.resources.device
        start = device.stamp()
        yield
        end = device.stamp()
        self.spans.add("compute", f"{kind} {block.label}", lambda: (start(), end()))

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Span]]:
        """Record the steps made inside; the list that is given holds their spans afterwards.

        Resources are those of the simulator (compute, h2d, d2h, read, write, cpu), so that
        `offload.schedule.trace` draws both alike. Ends with a flush.
        """
        resources = self._assembly.resources
        spans: list[Span] = []
        self.flush()
        resources.device.timing = True
        resources.pipeline.record_spans(True)
        self.spans.start()
        try:
            yield spans
        finally:
            self.flush()
            resources.device.mark().wait()
            for block in [*self.blocks, self.root]:
                block.loaded.wait()
            resources.pipeline.record_spans(False)
            resources.device.timing = False
            lane_of = {"r": ("read", "state_in"), "u": ("cpu", "update"), "w": ("write", "state_out")}
            labels = {-1: self.root.label, **{block.index: block.label for block in self.blocks}}
            for kind, index, start_s, end_s in resources.pipeline.take_spans():
                lane, name = lane_of[kind]
                self.spans.add(lane, f"{name} {labels[index]}", functools.partial(_times, start_s, end_s))
            spans += self.spans.stop()

    @property
    def parts(self) -> Assembly:
        """The tiers and everything in them, for who saves, restores or removes them."""
        return self._assembly

    def at_step_boundary(self, wish: str) -> OffloadOptimizer:
        """Finish every decided update; the optimizer. Raises UsageError, naming `wish`, in a step or after close."""
        optimizer = self._optimizer()
        if self._closed or optimizer is None:
            raise UsageError(f"{wish}: the offload engine is closed; wrap the model again")
        self._scheduler.flush()
        for block in [*self.blocks, self.root]:
            if block.touched or block.grads_waiting or block.updated_since_step:
                raise UsageError(
                    f"{wish}: block {block.name} has gradients that no optimizer.step() has used: call it between two "
                    "steps, after step()"
                )
        self._previous_step_durable()
        return optimizer

    def track(self, **state: Any) -> None:
        """With durability 'step': whose state_dict() belongs to a step: LR schedulers, the position in the data."""
        self.tracked.update(checked_stateful(state))

    def begin_replacing_state(self) -> None:
        """All parameters and optimizer states are about to be written to where they live."""
        self.drop_copies()
        if self.commits is not None:
            self.commits.replace()

    def drop_copies(self) -> None:
        """Everything a block has on the device or in a slot is outdated: its home has been written anew."""
        for block in [*self.blocks, self.root]:
            self._scheduler.drop_copies(block)
        self._scheduler.rewind()

    def end_replacing_state(self) -> None:
        """They have been written, and the training state is in place."""
        self.drop_copies()
        if self.commits is not None:
            self.commits.replaced(self._live_optimizer())

    def flush(self) -> None:
        """Finish every decided update; afterwards the store holds the parameters of the last step."""
        self._scheduler.flush()

    def counters(self) -> dict[str, int]:
        """Bytes read from and written to storage so far."""
        store = self._assembly.resources.store
        if store is None:
            return {"read_bytes": 0, "written_bytes": 0}
        counted = store.engine.counters()
        return {"read_bytes": counted["read_bytes"], "written_bytes": counted["written_bytes"]}

    def written_by_drive(self) -> dict[str, int]:
        """Bytes written to each storage directory so far."""
        store = self._assembly.resources.store
        if store is None:
            return {}
        written: dict[str, int] = {}
        for path, drive in zip(store.paths, store.engine.counters()["drives"], strict=True):
            directory = os.path.dirname(path)
            written[directory] = written.get(directory, 0) + int(drive["written_bytes"])
        return written

    @property
    def trainable_numel(self) -> int:
        """Trainable parameters."""
        return sum(
            segment.numel
            for block in [*self.blocks, self.root]
            for buffer in block.layout.buffers
            if buffer.trainable
            for segment in buffer.segments
        )

    def iter_blocks(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The parameters as they are computed with, block by block, the root first; valid until the next one."""
        self.flush()
        for block in [self.root, *self.blocks]:
            block.host_in_use += 1
            try:
                self._scheduler.fetch(block, must=True)
                self._scheduler.wait_resident(block)
                yield [
                    (segment.name, segment.view(block.plane(buffer)))
                    for buffer in block.layout.buffers
                    for segment in buffer.segments
                ]
            finally:
                block.host_in_use -= 1

    def close(self, *, remove: bool = False) -> None:
        """Finish what is in flight, drop the hooks and remove the store. The parameters on storage are gone then.

        With durability 'step' the last step is committed and the store stays, for `offload.resume`, unless `remove`.
        """
        if self._closed:
            return
        self._closed = True
        store = self._assembly.resources.store
        if remove and store is not None:
            store.keep = False
        try:
            self.flush()
            if self.commits is not None and not remove:
                self._previous_step_durable()
        finally:
            if self.commits is not None:
                self.commits.join()
            self._detach()
            self._finalizer()


def _times(start_s: float, end_s: float) -> tuple[float, float]:
    return start_s, end_s


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    blocks: object = None,
    compute_dtype: torch.dtype | None = None,
    chunked_loss: bool = False,
    **settings: object,
) -> tuple[Any, OffloadOptimizer]:
    """Stream `model`'s training state between memory and storage. Returns the same model and a new optimizer.

    `optimizer` is a fresh torch.optim.AdamW or Adam over the model's parameters. `blocks` names the repeated stack
    (a class, its name, or a list of modules) where it is not found by itself. `compute_dtype=torch.bfloat16` computes
    fp32 parameters in bf16 while their exact fp32 value stays the master. `chunked_loss` lets a Hugging Face causal
    language model compute its loss in chunks of tokens, so that the logits of a whole batch never exist; the model's
    code is not changed. Other settings: `offload.config.Config`.
    Raises BudgetError before anything is written when the budgets cannot hold the model, ConfigError for settings
    that contradict each other.
    """
    config = Config.checked(**settings)
    if compute_dtype not in (None, torch.bfloat16):
        raise ConfigError(f"compute_dtype={compute_dtype} is not supported: use torch.bfloat16 or None")
    if chunked_loss and (reason := why_not_chunked(base_of(model))) is not None:
        raise ConfigError(f"chunked_loss=True: {reason}")
    wrapped = OffloadOptimizer(optimizer)
    hf_config = getattr(model, "config", None)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()  # type: ignore[operator]  # a method of Hugging Face models
        logger.info("gradient checkpointing of the model is off: blocks recompute by themselves")
    if getattr(hf_config, "use_cache", False):
        hf_config.use_cache = False  # type: ignore[union-attr]  # a cache would grow twice when a block recomputes
    engine = OffloadEngine(model, wrapped, config, blocks, compute_dtype)
    if chunked_loss:
        chunk_loss(base_of(model))
    wrapped.engine = engine
    model.offload = engine  # type: ignore[assignment]  # documented attribute
    return model, wrapped
