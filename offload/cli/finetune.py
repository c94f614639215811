"""`offload finetune`: a model directory and a text file in, a trained model directory out."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from offload.checkpoint import export, load, resume, save
from offload.cli import optimizers
from offload.cli.data import TokenStream
from offload.cli.output import Output, StepReport
from offload.cli.planned import Planning, Request, planning_of
from offload.cli.settings import Settings, check
from offload.cli.stop import StopSignals
from offload.cli.totals import Totals, summary_of
from offload.config import parse_budget
from offload.errors import ConfigError, OffloadError
from offload.model.causal_lm_loss import why_not_chunked
from offload.model.loading import dtype_of, load_gguf
from offload.planner.floor import FloorMeter, StorageRates
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.shutdown import abandon, forget_frames
from offload.runtime.wrap import wrap
from offload.schedule.trace import draw_timeline, write_trace
from offload.tiers.rates import measure_rates

RECORDED_STEP = 3
"""Steady: the first writes what later ones follow, the second fills what they find."""


class _BudgetUsed(Exception):
    """The next step would write more than --write-budget allows."""


class Interrupted(Exception):
    """The run was stopped; the message says after which step."""


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate in step `step`, counted from 0; the last step still learns."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule]


def _optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    everything = [p for p in parameters if p.requires_grad]
    matrices = [p for p in everything if p.dim() >= 2]
    vectors = [p for p in everything if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return optimizers.make(settings.optimizer, [g for g in groups if g["params"]], settings.lr)


def _tokenizer(settings: Settings) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {settings.model}: no usable tokenizer: {error}") from error


def _planning(settings: Settings, output: Output) -> Planning:
    request = Request(
        batch_samples=settings.batch_size,
        tokens_per_sample=settings.sequence_length,
        storage=settings.storage,
        device=settings.device,
        hardware=settings.hardware,
        plan=settings.plan,
        save_plan=settings.save_plan,
        activations=settings.activations,
        saved_activations=settings.saved_activations,
        micro_batches=settings.micro_batches,
        written_per_step=settings.written_per_step,
    )
    return planning_of(request, output.note)


def _wrap(
    settings: Settings, planning: Planning, model: nn.Module | None
) -> tuple[nn.Module, OffloadOptimizer]:
    """Stream the directory into the store; or wrap `model`, fp32 and in memory already."""
    budgets: dict[str, Any] = {
        "storage": settings.storage,
        "host_memory": settings.host_memory,
        "device_memory": settings.device_memory,
        "step_aside": settings.step_aside,
        "max_grad_norm": settings.max_grad_norm,
        "durability": settings.durability,
        "optimizer_state": settings.optimizer_state,
        **planning.settings,
    }
    if model is None:
        return load(settings.model, lambda p: _optimizer(p, settings), dtype=settings.dtype, **budgets)
    compute_dtype = None if dtype_of(settings.dtype) == torch.float32 else torch.bfloat16
    return wrap(
        model,
        _optimizer(model.parameters(), settings),
        compute_dtype=compute_dtype,
        chunked_loss=why_not_chunked(model) is None,
        **budgets,
    )


def _measure_rates(settings: Settings, output: Output) -> StorageRates | None:
    """Rates of the storage directories; None without storage, or where they cannot be measured (said in a note)."""
    if not settings.storage:
        return None
    try:
        read, written = measure_rates(settings.storage)
    except (OffloadError, OSError) as error:
        output.note(f"the drives' rates are not measured, the floor counts arithmetic alone: {error}")
        return None
    output.note(f"storage reads {read / 1e9:.2f} GB/s and writes {written / 1e9:.2f} GB/s")
    return StorageRates(read, written)


@contextlib.contextmanager
def _recorded(engine: Any, settings: Settings, step: int, output: Output) -> Iterator[None]:
    """Record the step inside when it is the one to draw: the third, or the last of fewer."""
    if step != min(RECORDED_STEP, settings.steps) or not (settings.trace or settings.plot):
        yield
        return
    with engine.record() as spans:
        yield
    title = f"measured {settings.model}, batch {settings.batch_size}, step {step}"
    if settings.trace is not None:
        write_trace(settings.trace, spans, process=title)
    if settings.plot is not None:
        draw_timeline(settings.plot, spans, title=title)
    output.note(f"step {step} is drawn in {' and '.join(p for p in (settings.trace, settings.plot) if p)}")


class _Checkpoints:
    """When to save, and going on from what was saved."""

    def __init__(self, model: nn.Module, tracked: dict[str, Any], settings: Settings, output: Output) -> None:
        self._model, self._tracked, self._settings, self._output = model, tracked, settings, output
        self.written_nbytes = 0

    @property
    def next_nbytes(self) -> int:
        """Bytes that one more checkpoint would write; 0 when none is wanted."""
        if self._settings.checkpoints is None:
            return 0
        engine: Any = self._model.offload
        layouts = [block.layout for block in [engine.root, *engine.blocks]]
        return sum(layout.slot_nbytes + layout.state_nbytes for layout in layouts)

    def resume(self) -> int:
        """Steps made already."""
        if self._settings.resume is None:
            return 0
        found = resume(self._model, self._settings.resume, state=self._tracked)
        self._output.note(f"resumed from {found.path}, after step {found.step}")
        return found.step

    def after_step(self, step: int, stopping: bool) -> bool:
        """Save when it is due. Whether it was."""
        every = self._settings.save_every
        if self._settings.checkpoints is None:
            return False
        if not stopping and step != self._settings.steps and (every is None or step % every):
            return False
        path = save(
            self._model, self._settings.checkpoints, state=self._tracked, keep_last=self._settings.keep_last
        )
        self._output.note(f"saved {path}")
        self.written_nbytes += sum(entry.stat().st_size for entry in os.scandir(path))
        return True


def _train(
    model: Any,
    optimizer: OffloadOptimizer,
    stream: TokenStream,
    settings: Settings,
    output: Output,
    totals: Totals,
    meter: FloorMeter,
    signals: StopSignals,
) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, settings.schedule, settings.warmup_steps, settings.steps),
    )
    batches = stream.batches(settings.batch_size, settings.seed)
    tracked = {"scheduler": scheduler, "data": batches}
    model.offload.track(**tracked)
    checkpoints = _Checkpoints(model, tracked, settings, output)
    start = checkpoints.resume()
    if settings.checkpoints is not None:
        signals.finish_step(
            lambda: output.note("stopping: this step ends and is saved; once more to stop at once")
        )
    budget_nbytes = None if settings.write_budget is None else parse_budget(settings.write_budget, 0)
    counted = model.offload.counters()
    start_s = time.perf_counter()
    for step in range(start + 1, settings.steps + 1):
        batch = {name: tensor.to(model.offload.device) for name, tensor in next(batches).items()}
        with _recorded(model.offload, settings, step, output):
            loss = model(**batch).loss
            loss.backward()
            learning_rate = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise OffloadError(
                f"the loss of step {step} is {value}: lower --lr, add --warmup-steps, or clip with --max-grad-norm 1.0"
            )
        now_s, before = time.perf_counter(), counted
        counted = model.offload.counters()
        step_s = now_s - start_s
        stall_s = model.offload.last_step.get("stall_s", {})
        moved = {name: counted[name] - before[name] for name in ("read_bytes", "written_bytes")}
        floor = meter.step(step_s, sum(stall_s.values()), moved["read_bytes"], moved["written_bytes"])
        report = StepReport(
            step=step,
            steps=settings.steps,
            loss=value,
            learning_rate=learning_rate,
            step_s=step_s,
            tokens_per_s=settings.batch_size * settings.sequence_length / step_s,
            floor_s=floor.floor_s,
            floor_fraction=floor.fraction,
            stall_s=stall_s,
            read_bytes=moved["read_bytes"],
            written_bytes=moved["written_bytes"],
            grad_norm=None if optimizer.grad_norm is None else float(optimizer.grad_norm),
        )
        totals.add(report)
        output.step(report)
        totals.written_by_drive = model.offload.written_by_drive()
        used_up = (
            budget_nbytes is not None
            and step < settings.steps
            and (
                sum(totals.written_by_drive.values())
                + checkpoints.written_nbytes
                + checkpoints.next_nbytes
                + totals.most_written_nbytes
                > budget_nbytes
            )
        )
        if checkpoints.after_step(step, signals.requested or used_up):
            totals.saved_step = step
            totals.checkpoint_nbytes = checkpoints.written_nbytes
            counted = model.offload.counters()  # what a checkpoint read and wrote is not the next step's
        if used_up:
            raise _BudgetUsed
        start_s = time.perf_counter()
        signals.check()


def _run(settings: Settings, output: Output, totals: Totals, signals: StopSignals) -> dict[str, Any]:
    """Load, train and export; the store is gone when it returns or raises."""
    planning = _planning(settings, output)
    totals.hardware = planning.hardware
    output.note(f"loading {settings.model}")
    in_memory = None
    if settings.model.endswith(".gguf"):
        in_memory, tokenizer = load_gguf(settings.model)
    else:
        tokenizer = _tokenizer(settings)
    stream = TokenStream(settings.data, tokenizer, settings.sequence_length)  # before anything is written
    rates = _measure_rates(settings, output)
    model, optimizer = _wrap(settings, planning, in_memory)
    engine: Any = model.offload
    try:
        planning.report(engine.plan, output.note)
        totals.expected_step_s = planning.expected_step_s(engine.plan)
        totals.trainable_numel = engine.trainable_numel
        output.note(
            f"{engine.trainable_numel / 1e6:.1f} M trainable parameters; {stream.n_tokens:,} tokens in "
            f"{settings.data}, {settings.steps * settings.batch_size / stream.n_sequences:.2f} epochs"
        )
        try:
            _train(model, optimizer, stream, settings, output, totals, FloorMeter(rates), signals)
        except _BudgetUsed:
            output.note(
                f"stopped after step {totals.step}: the next would exceed --write-budget {settings.write_budget}"
            )
            engine.close()
            return summary_of(settings, totals, "write budget used")
        engine.flush()
        if settings.output is not None:
            output.note(f"writing {settings.output}")
            export(model, settings.output, tokenizer=tokenizer)
        engine.close(remove=True)
    except BaseException:
        signals.cleaning_up()
        abandon(engine)  # the step was cut in the middle: only files matter now
        raise
    return summary_of(settings, totals, "done")


def finetune(settings: Settings, output: Output) -> dict[str, Any]:
    """Run the whole job. Returns the summary that was printed. Raises Interrupted after Ctrl-C, the store removed."""
    check(settings)
    torch.manual_seed(settings.seed)
    totals = Totals()
    with StopSignals() as signals:
        try:
            summary = _run(settings, output, totals, signals)
        except BaseException as error:
            signals.cleaning_up()
            forget_frames(error)
            if not isinstance(error, KeyboardInterrupt):
                raise
            output.summary(summary_of(settings, totals, "interrupted"))
            when = f"after step {totals.step}" if totals.step else "before the first step ended"
            saved = (
                f"; step {totals.saved_step} is saved in {settings.checkpoints}" if totals.saved_step else ""
            )
            store = "the store has been removed, nothing was exported"
            if settings.durability == "step" and totals.step:
                store = f"every step but the last is safe: go on with --resume {settings.storage[0]}"
            raise Interrupted(f"{when}; {store}{saved}") from None
    output.summary(summary)
    return summary
