"""`offload finetune`: a model directory and a text file in, a trained model directory out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from offload.checkpoint import export, load
from offload.cli import optimizers
from offload.cli.checkpoints import Checkpoints, WriteBudget
from offload.cli.data import TokenStream
from offload.cli.output import Output, StepReport
from offload.cli.planned import Planning, Request, planning_of, say_late_plan
from offload.cli.room import check_room
from offload.cli.settings import Settings, check
from offload.cli.stop import Interrupted, StopSignals
from offload.cli.totals import Totals, summary_of
from offload.errors import ConfigError, OffloadError
from offload.model import diffusion
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

    if diffusion.config_of(settings.model) is not None:
        raise ConfigError(
            f"--model {settings.model} is a model of diffusers, and finetune trains language models on text: train it "
            "in a loop of your own with offload.load (docs/models.md)"
        )
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
    budgets = {**settings.for_wrap(), **planning.settings}
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


class _Moved:
    """Seconds since the step before, and bytes that steps moved meanwhile; what checkpoints read is not theirs."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._before, self._before_s = self._now(), time.perf_counter()

    def _now(self) -> tuple[int, int]:
        saved_nbytes = self._engine.saves.read_nbytes
        counted = self._engine.counters()
        return counted["read_bytes"] - saved_nbytes, counted["written_bytes"]

    def by_step(self) -> tuple[float, int, int]:
        """(seconds, bytes read, bytes written) since the last call."""
        before, before_s = self._before, self._before_s
        self._before, self._before_s = self._now(), time.perf_counter()
        read_nbytes, written_nbytes = (end - start for end, start in zip(self._before, before, strict=True))
        return self._before_s - before_s, read_nbytes, written_nbytes

    @property
    def stall_s(self) -> dict[str, float]:
        """Seconds waited by cause, in the last step."""
        return dict(self._engine.last_step.get("stall_s", {}))


def _report(
    step: int,
    settings: Settings,
    optimizer: OffloadOptimizer,
    meter: FloorMeter,
    moved: _Moved,
    loss: float,
    learning_rate: float,
) -> StepReport:
    """Of the step that has just ended. Raises OffloadError when its loss is not finite."""
    if not math.isfinite(loss):
        raise OffloadError(
            f"the loss of step {step} is {loss}: lower --lr, add --warmup-steps, or clip with --max-grad-norm 1.0"
        )
    step_s, read_nbytes, written_nbytes = moved.by_step()
    stall_s = moved.stall_s
    floor = meter.step(step_s, sum(stall_s.values()), read_nbytes, written_nbytes)
    return StepReport(
        step=step,
        steps=settings.steps,
        loss=loss,
        learning_rate=learning_rate,
        step_s=step_s,
        tokens_per_s=settings.batch_size * settings.sequence_length / step_s,
        floor_s=floor.floor_s,
        floor_fraction=floor.fraction,
        stall_s=stall_s,
        read_bytes=read_nbytes,
        written_bytes=written_nbytes,
        grad_norm=None if optimizer.grad_norm is None else float(optimizer.grad_norm),
    )


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
    checkpoints = Checkpoints(model, tracked, settings, output)
    check_room(model, settings, checkpoints)
    start = checkpoints.resume()
    budget = WriteBudget(settings.write_budget, checkpoints, model.offload)
    if settings.checkpoints is not None:
        signals.finish_step(
            lambda: output.note("stopping: this step ends and is saved; once more to stop at once")
        )
    moved = _Moved(model.offload)
    plan = model.offload.plan
    try:
        for step in range(start + 1, settings.steps + 1):
            batch = {name: tensor.to(model.offload.device) for name, tensor in next(batches).items()}
            with _recorded(model.offload, settings, step, output):
                loss = model(**batch).loss
                loss.backward()
                learning_rate = float(optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            report = _report(step, settings, optimizer, meter, moved, float(loss.detach()), learning_rate)
            totals.add(report)
            output.step(report)
            if model.offload.plan is not plan:
                plan = model.offload.plan
                say_late_plan(plan, output.note)
            used_up = step < settings.steps and budget.is_used_up(step)
            if step == settings.steps:
                model.offload.flush()
                totals.add_rest(*moved.by_step()[1:])
            totals.written_by_drive = model.offload.written_by_drive()
            checkpoints.after_step(step, signals.requested or used_up)
            if used_up:
                raise _BudgetUsed
            signals.check()
    except BaseException as error:
        checkpoints.settle(at_once=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        totals.saved_step, totals.checkpoint_nbytes = checkpoints.saved_step, checkpoints.written_nbytes


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
        if stream.n_left_out:
            output.note(
                f"{stream.n_left_out} of {stream.n_left_out + stream.n_sequences} sequences are left out: they lie "
                "within a prompt, and nothing of them is learned"
            )
        try:
            _train(model, optimizer, stream, settings, output, totals, FloorMeter(rates), signals)
        except _BudgetUsed:
            output.note(
                f"stopped after step {totals.step}: the next would exceed --write-budget {settings.write_budget}"
            )
            engine.close()
            return summary_of(settings, totals, "write budget used")
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
