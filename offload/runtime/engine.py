"""The composition root: `OffloadEngine` ties blocks, hooks, scheduler and optimizer together."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from offload.config import Config
from offload.cut_short import MayBeCutShort, begun_or_not, whole, whole_but_for_waits
from offload.errors import UsageError
from offload.model.blocks import Cut
from offload.model.blocks import cut as cut_model
from offload.model.flat import FlatBuffer
from offload.model.on_device import move_what_stays
from offload.model.quantized import prepare_quantized
from offload.recompute.block_function import run_block
from offload.recompute.forward_state import states_of
from offload.recompute.recipe import Recipe
from offload.runtime import hooks, taken_gradients, wiring
from offload.runtime.assembly import Assembly, assemble
from offload.runtime.chosen_device import steps_aside
from offload.runtime.early_root import EarlyRoot
from offload.runtime.gradient_norms import GradientNorms
from offload.runtime.gradients import look_at_forward, refuse_updated
from offload.runtime.late_plan import LatePlan, is_open
from offload.runtime.open_run import CLOSED, OpenRun
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.planning import NoPlan, RunPlan
from offload.runtime.recording import computing, named, recording
from offload.runtime.resident import with_adapters
from offload.runtime.saves import SavesBeside
from offload.runtime.state_dicts import StateDicts
from offload.runtime.trained_parameters import TrainedParameters
from offload.runtime.training_state import Stateful
from offload.runtime.written_parameters import WrittenParameters, let_go
from offload.stores.activations import Tier
from offload.stores.block_store import BlockRecord
from offload.telemetry import Span, SpanLog, Stalls


class OffloadEngine(OpenRun):
    """What `model.offload` is: counters, stalls, `no_sync()`, `flush()` and `close()`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OffloadOptimizer,
        config: Config,
        blocks: object,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.keeps_graph = config.activations == "keep"
        self.stalls = Stalls(functools.partial(named, "wait for"))
        self.uses_recipes = not config.compile_blocks
        self.spans = SpanLog()
        self.last_step: dict[str, Any] = {}
        self._sync = True
        self._backward_open = False
        self._handles: list[Any] = []
        self._state_handles: list[Any] = []
        """These stay after `close`, to refuse."""
        self._modules: list[nn.Module] = []
        cut = cut_model(model, blocks)
        device = wiring.make_device(model, config)
        self.device = device.torch_device
        self.config = config = config.beside(self.device.type)
        try:
            rule = optimizer.rule
            self.aside = steps_aside(cut, config, device, dtype, rule)
            if self.aside:
                cut = cut.all_root()
            planned, cuts = None, [cut]
            if not self.aside:
                planned = wiring.make_run_plan(model, config, blocks, dtype, device, rule)
                cuts = with_adapters(cut, config, device, planned is not None)
            self._planned: RunPlan | NoPlan = planned or NoPlan(config.saved_activations, config.deferred)
            self.plan = self._planned.plan
            self.micro_batches = config.micro_batches if self.plan is None else self.plan.micro_batches
            parts = self._assembly = assemble(cuts, config, dtype, device, self.spans, self.plan, rule)
        except BaseException:
            device.close()
            raise
        self.root, self.blocks, self.placement = parts.root, parts.blocks, parts.placement
        self._optimizer = weakref.ref(optimizer)
        self._whole_gradients = rule.whole_gradients
        """Whether an update needs all gradients of the root at once."""
        holds = self.plan is None or bool(self.plan.held_blocks)
        self._scheduler = wiring.make_scheduler(parts, self.stalls, self.spans, pin=config.pin, holds=holds)
        self._gradients = self._scheduler.gradients
        self.saves = SavesBeside(self._scheduler)
        self._early_root = EarlyRoot(self.root, config.chunk_elements)
        self._emptied = taken_gradients.Emptied()
        self.tracked: dict[str, Stateful] = {}
        self.commits = wiring.make_commits(model, parts, config, self.tracked, self._scheduler)
        self._durable = wiring.make_durable_steps(self.commits, parts, config, self._scheduler, self.stalls)
        judged, limit = self.commits is not None, config.max_grad_norm
        self._norms = GradientNorms(model, self.root, self.blocks, limit, judged, self._gradients)
        may_plan = not self.aside and is_open(config)
        self._late_plan = LatePlan(model, config, blocks, parts) if may_plan else None
        self.activations = wiring.make_activations(
            parts, config, self.stalls, self.spans, self.plan is not None
        )
        self._step_start_s = time.perf_counter()
        try:
            self._attach(parts.cut)
        except BaseException:
            self._detach()
            for handle in self._state_handles:
                handle.remove()
            parts.resources.abandon()
            raise
        self._finalizer = weakref.finalize(model, parts.resources.close)

    def _attach(self, cut: Cut) -> None:
        """Take over the model: its blocks' forward, its gradients, its buffers."""
        self._modules = [module for _, module in cut.blocks]
        self._trained = TrainedParameters([*self.blocks, self.root])
        states = states_of(self.model, [block.name for block in self.blocks], self._modules)
        for block, module, state in zip(self.blocks, self._modules, states, strict=True):
            block.trains = any(parameter.requires_grad for parameter in module.parameters())
            run = functools.partial(run_block, block, state, self)
            hooks.replace_forward(module, run, self.config.compile_blocks)
            self._handles += hooks.on_gradient(block, self._gradients.accumulate)
        self._handles += hooks.on_gradient(self.root, self._receive_root_gradient)
        owners = {name.rpartition(".")[0] for name, _ in cut.root}
        modules = dict(self.model.named_modules())
        self._owning = [self.model, *(modules[name] for name in owners)]
        self._handles += hooks.before_forward(self._owning, self._root_needed)
        self._handles += prepare_quantized(self.model)
        self._written = WrittenParameters(
            self.model,
            [*self.blocks, self.root],
            shares_host=self._assembly.resources.device.shares_host,
            by_kernels=not self._live_optimizer().adafactor,
        )
        owner = StateDicts(self.model, self._scheduler, self.refuse_what_is_lost)
        self._state_handles = hooks.on_state_dict(self.model, owner)
        move_what_stays(self.model, self.device)
        self._scheduler.hold_root()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            hooks.restore_forward(module)
        self.model.__dict__.pop("zero_grad", None)
        taken_gradients.give_back(self.model.parameters())
        let_go(s.parameter for r in [*self.blocks, self.root] for b in r.layout.buffers for s in b.segments)

    # ---- called by blocks and hooks --------------------------------------------------------------------------

    def _may_be_cut_short(self) -> list[MayBeCutShort]:
        return [self, self._scheduler, self._gradients, self.activations]

    @whole_but_for_waits
    def _root_needed(self) -> None:
        self.refuse_cut_short()
        self._measure_parameters()
        self._scheduler.hold_root()
        if self.root.written:  # noted when it was bound; every module that owns a part of it comes by here
            self._written.refuse_of(self.root)

    def _measure_parameters(self) -> None:
        """Before the first step with an optimizer that scales by the size of parameters."""
        optimizer = self._optimizer()
        adafactor = None if optimizer is None else optimizer.adafactor
        if adafactor is not None and adafactor.needs_start():
            layouts = [block.layout for block in [self.root, *self.blocks]]
            adafactor.start(layouts, itertools.chain.from_iterable(self.iter_blocks()))

    @whole
    def _receive_root_gradient(
        self, block: BlockRecord, buffer: FlatBuffer, position: int, parameter: nn.Parameter
    ) -> None:
        self._open_backward()
        self._early_root.received(parameter)
        self._gradients.accumulate(block, buffer, position, parameter)

    def sees_batch(self, n_samples: int, tensors: list[torch.Tensor]) -> None:
        """A block is about to run forward with these inputs."""
        if self._late_plan is not None:
            self._late_plan.saw(n_samples, tensors)

    @whole_but_for_waits
    def begin_forward(self, block: BlockRecord, *, ends_there: bool = False) -> None:
        """Before the block's forward. `ends_there`: no backward follows."""
        self.refuse_unless_open()
        self._written.refuse_of(block)
        look_at_forward(block)
        if block.awaiting_backward:
            self._gradients.will_accumulate()
        if self.commits is not None:
            self.commits.next_forward(self._live_optimizer())
        with begun_or_not(block):
            self._scheduler.begin(block, "forward", ends_there=ends_there)

    @whole
    def end_forward(self, block: BlockRecord) -> None:
        """After the block's forward."""
        self._scheduler.end(block, "forward")
        self._written.refuse_of(block)

    @whole
    def begin_backward(self, block: BlockRecord) -> None:
        """Before the block's backward."""
        self._open_backward()
        if self._early_root.blocks_begin():
            self._update_root_early()
        self._scheduler.begin(block, "backward")
        self._gradients.begin(block)

    @whole
    def last_backward(self, block: BlockRecord) -> None:
        """The last micro-batch of the block's backward comes now."""
        self._gradients.last_come(block, updates=self._updates_now(block))

    @whole
    def end_backward(self, block: BlockRecord) -> None:
        """After the block's backward: its gradients leave at once."""
        self._dispatch_gradients(block)
        self._scheduler.end(block, "backward")

    def _defers(self, block: BlockRecord) -> bool:
        """Whether the block's update waits for `optimizer.step()`."""
        return self.config.deferred or self._planned.defers(None if block.is_root else block.index)

    def _updates_now(self, block: BlockRecord) -> bool:
        """Whether the gradients of a block whose last micro-batch is in backward, or has been, go to its update."""
        return self._sync and not self._defers(block) and not block.awaiting_backward

    def _dispatch_gradients(self, block: BlockRecord) -> None:
        if not block.touched or block.grad_buffer is None:
            self._gradients.drop(block)
            return
        updates = self._updates_now(block)
        if updates:
            self._previous_step_durable()
        self._norms.ended(block, complete=self._sync)
        if not updates:
            self._gradients.park(block)
            return
        if not self._scheduler.hold(block):
            self._scheduler.update_now(block, self._hyper_of)
        block.updated_since_step = True

    def input_tier(self, block: BlockRecord) -> Tier | None:
        """Where the block's input waits for backward; None: where there is room."""
        return self._planned.input_tier(block.index)

    def given_tensors(self, block: BlockRecord) -> list[torch.Tensor]:
        """What a block's operations may read besides its inputs: parameters (the root's too) and buffers."""
        module = self._modules[block.index]
        return [*self.model.parameters(), *module.buffers(), *self.model.buffers()]

    def tiers_of_saved(self, block: BlockRecord, recipe: Recipe) -> dict[int, Tier]:
        """Which results of the block's operations are kept for backward, and where; all others are recomputed."""
        return self._planned.tiers_of_saved(block.index, recipe)

    def _open_backward(self) -> None:
        if self._backward_open:
            return
        self._emptied.settle([*self.blocks, self.root], self.discard_gradients)
        with contextlib.suppress(RuntimeError):  # outside a backward, as when a test sets .grad by hand
            hooks.at_end_of_backward(self._backward_ended)
            self._backward_open = True
            self._early_root.begin()

    def _update_root_early(self) -> None:
        """Update what the blocks' backward does not use or change; see runtime/early_root.py."""
        if not self._sync or self._defers(self.root) or self._whole_gradients or self.root.on_device:
            return
        final, chunks = self._early_root.take()
        if not final:
            return
        refuse_updated(self.root)
        self._previous_step_durable()
        self._norms.note(self.root, final)
        self._scheduler.update_early(final, chunks, self._hyper_of)
        self.root.updated_since_step = True

    @whole
    def _backward_ended(self) -> None:
        self._backward_open = False
        self._scheduler.update_held(self._hyper_of)
        if self._sync and not self._defers(self.root) and self._scheduler.root_is_due():
            if not self._early_root.has_updated:
                refuse_updated(self.root)
            self._previous_step_durable()
            self._scheduler.wait_resident(self.root)
            self._norms.note(self.root, more=self._early_root.has_updated)
            self._scheduler.update_now(self.root, self._hyper_of)
            self.root.updated_since_step = True
        self._early_root.end()

    # ---- called by the optimizer -----------------------------------------------------------------------------

    def _previous_step_durable(self) -> None:
        if self._durable is not None:
            self._durable.before_update(self._live_optimizer())

    def wait_committed(self) -> None:
        """With durability 'step': until the last step is on the drives. Raises StoreError."""
        if self._durable is not None:
            self._durable.wait(self._live_optimizer())

    def check_step(self) -> None:
        """Raise UsageError where a step cannot be made, or would leave out a parameter that has been unfrozen."""
        self.refuse_what_is_lost()
        self._trained.refuse_unfrozen()
        self._emptied.settle([*self.blocks, self.root], self.discard_gradients)

    @whole
    def optimizer_step(self) -> None:
        """Decide the updates of this step that have not been made during backward."""
        optimizer = self._live_optimizer()
        self._backward_open = False  # a backward that failed midway leaves it open
        store = self._assembly.resources.store
        if store is not None:
            store.check_intact()
        self._scheduler.update_held(self._hyper_of)  # of a backward that failed midway
        if any(b.pending_update for b in [*self.blocks, self.root]):
            self._scheduler.flush()  # a block was skipped by this step's forward
        waiting = [b for b in self.blocks if b.touched]
        self._previous_step_durable()
        self.wait_committed()
        scale = self._norms.scale(optimizer)
        discarded = self._durable is not None and self._durable.discards(optimizer)
        if discarded:
            self.discard_gradients()
            waiting = []
        optimizer.grad_scale = scale
        for block in waiting:
            self._scheduler.update_later(block, self._hyper_of)
            block.updated_since_step = True
        if self._scheduler.root_is_due():
            self._scheduler.update_now(self.root, self._hyper_of)
        optimizer.grad_scale = 1.0
        for block in [*self.blocks, self.root]:
            block.end_step(made=not discarded)
        self._scheduler.rewind()
        self._scheduler.prefetch()
        self._plan_late()
        self._show_what_stays()
        now = time.perf_counter()
        self.last_step = {
            "step_s": now - self._step_start_s,
            "stall_s": self.stalls.reset(),
            "discarded": discarded,
        }
        self._step_start_s = now
        if self.commits is not None:
            self.commits.step_ended(optimizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """What `model.zero_grad` is: the optimizer's."""
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.zero_grad(set_to_none)

    def _plan_late(self) -> None:
        """The first step is over, and its batch is known; see runtime/late_plan.py."""
        late, self._late_plan = self._late_plan, None
        if late is not None and (planned := late.make(self._modules, self.activations)) is not None:
            self._planned, self.plan = planned, planned.plan
            self.activations.allow_on_device(wiring.left_to_compute_nbytes(self._assembly))

    @whole
    def discard_gradients(self) -> None:
        """Forget gradients that no step has consumed."""
        self._backward_open = False
        self._scheduler.drop_undone()
        for block in [*self.blocks, self.root]:
            if block.pending_update:
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

    def computing(self, kind: str, block: BlockRecord) -> contextlib.AbstractContextManager[object]:
        """Record what the device computes inside."""
        return computing(self._assembly.resources.device, self.spans, kind, block)

    def record(self) -> contextlib.AbstractContextManager[list[Span]]:
        """Record the steps made inside; the list that is given holds their spans afterwards.

        Resources are those of the simulator (compute, h2d, d2h, read, write, cpu), so that
        `offload.schedule.trace` draws both alike. Ends with a flush.
        """
        return recording(self._assembly, self.spans, self.flush)

    @property
    def parts(self) -> Assembly:
        """The tiers and everything in them, for who saves, restores or removes them."""
        return self._assembly

    def at_step_boundary(self, wish: str) -> OffloadOptimizer:
        """Finish every decided update; the optimizer. Raises UsageError, naming `wish`, in a step or after close."""
        optimizer = self._optimizer()
        if self._closed or optimizer is None:
            raise UsageError(f"{wish}: {CLOSED}")
        self.refuse_what_is_not_kept()
        self.wait_saved()
        self._scheduler.flush()
        for block in [*self.blocks, self.root]:
            if block.touched or block.grads_waiting or block.updated_since_step:
                raise UsageError(
                    f"{wish}: block {block.name} has gradients that no optimizer.step() has used: call it between two "
                    "steps, after step()"
                )
        self.wait_committed()
        return optimizer

    def begin_replacing_state(self) -> None:
        """All parameters and optimizer states are about to be written to where they live."""
        self.drop_copies()
        if self.commits is not None:
            self.commits.replace()

    @whole
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
        self._show_what_stays()

    def _show_what_stays(self) -> None:
        """Where nothing is streamed, parameters can be read and written to between steps, as in memory."""
        if self.aside:
            self._scheduler.hold_root()

    @whole_but_for_waits
    def flush(self) -> None:
        """Finish every decided update; afterwards the store holds the parameters of the last step."""
        self._scheduler.flush()

    def iter_blocks(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Parameters as computed with, block by block, the root first; valid until the next one. In host memory."""
        self.refuse_what_is_not_kept()
        self.flush()
        for block in [self.root, *self.blocks]:
            with self._scheduler.reading(block):
                yield block.values()

    def close(self, *, remove: bool = False) -> None:
        """Finish what is in flight, drop the hooks and remove the store. The parameters are gone then.

        Wherever they were, using the model again (forward, step, state dict) raises UsageError. With durability 'step'
        the last step is committed and the store stays, for `offload.resume`, unless `remove`.
        """
        if self._closed:
            return
        self._closed = True
        store = self._assembly.resources.store
        if remove and store is not None:
            store.keep = False
        try:
            if not any(part.is_cut_short for part in self._may_be_cut_short()):
                self.flush()
                if self.commits is not None and not remove:
                    self.wait_committed()
            self.wait_saved()
        finally:
            self.saves.end()
            if self.commits is not None:
                self.commits.join()
            self._detach()
            for undo in self._undo:
                undo()
            hooks.before_forward([*self._owning, *self._modules], self.refuse_unless_open)
            self._finalizer()
