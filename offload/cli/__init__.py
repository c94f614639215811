"""The `offload` command: `finetune`, `plan`, `simulate`, `probe`, `inspect` and `doctor`.

A command imports what it runs when it is called: see offload/__init__.py, [Note: imported when used].
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from offload.cli.inspect import inspect_command
from offload.cli.options import (
    MACHINE,
    MEMORY,
    MODEL,
    RESULT,
    SEED,
    TRAINING,
    Batch,
    Clip,
    DeviceMemory,
    Directories,
    Durability,
    Fix,
    HardwareSource,
    HostMemory,
    ModelSource,
    Optimizer,
    OptimizerState,
    Overrides,
    StorageLimit,
    Tokens,
    WrittenLimit,
)
from offload.cli.output import JsonOutput, TextOutput
from offload.cli.probe import probe_command
from offload.cli.stop import Interrupted
from offload.errors import ConfigError, OffloadError

app = typer.Typer(
    name="offload",
    help="Fully fine-tune models whose training state is many times larger than the memory you allow.\n\n"
    "Start with `offload doctor` and `offload probe`, then `offload finetune --help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.command("finetune")
def finetune_command(
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face directory (config.json, *.safetensors, tokenizer), or a .gguf file.",
            rich_help_panel=MODEL,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Text to learn: FILE.txt (plain text), or FILE.jsonl with one object a line: "
            '{"text": ...}, {"prompt": ..., "completion": ...} (only the completion is learned) or {"messages": [...]} '
            "(chat; needs a tokenizer with a chat template).",
            rich_help_panel=MODEL,
        ),
    ],
    storage: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory on an SSD for the training state; repeat it for several drives. Without it, "
            "everything must fit --host-memory.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    host_memory: Annotated[
        str,
        typer.Option(
            help="DRAM for training state and staging: 8GB, 7.5GiB, 50% or -2GB (all but 2 GB). More of it "
            "means fewer bytes read and written.",
            rich_help_panel=MEMORY,
        ),
    ] = "50%",
    device_memory: Annotated[
        str,
        typer.Option(
            help="Memory for what is computed with: embeddings, head and a few blocks. On a machine without "
            "a GPU, this too is DRAM.",
            rich_help_panel=MEMORY,
        ),
    ] = "50%",
    activations: Annotated[
        str | None,
        typer.Option(
            help="Where block inputs wait for backward: auto (where there is room), device, host or storage. "
            "keep: recompute nothing, keep everything on the device. Default: as planned, else auto.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    saved_activations: Annotated[
        str | None,
        typer.Option(
            help="What becomes of tensors inside a block that backward needs: recompute, or keep them on device, "
            "host or storage. Default: as planned, else recompute.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto (CUDA where there is one), cpu, cuda, cuda:1, or emulated: memory of its own in DRAM, behind "
            "a bus as fast as the profile's.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Machine to plan for: a profile's name or file. Default: what `offload probe` has stored.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Run this saved plan. none: no plan, placement by budget alone.", rich_help_panel=MACHINE
        ),
    ] = None,
    written_per_step: Annotated[
        str | None,
        typer.Option(
            help="Most bytes a step may write to storage, such as 20GB, to spare the drives: planned for.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    step_aside: Annotated[
        str,
        typer.Option(
            help="auto: stream nothing when all training state takes at most half of --device-memory; never; always."
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="What to compute in: auto (as the model's config says), bfloat16 or float32. Updates are "
            "always made on fp32 masters.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=TRAINING)] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.", rich_help_panel=TRAINING)] = 8,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens a sequence.", rich_help_panel=TRAINING)
    ] = 512,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut the batch into so many parts inside each block: less memory for activations, "
            "same numbers, no byte more to read. Default: as planned, else 1.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.", rich_help_panel=TRAINING)] = 1e-5,
    schedule: Annotated[
        str,
        typer.Option(
            help="Learning rate after warm-up: constant, linear or cosine.", rich_help_panel=TRAINING
        ),
    ] = "constant",
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=TRAINING)
    ] = 0,
    weight_decay: Annotated[
        float, typer.Option(min=0.0, help="Decoupled, for matrices only.", rich_help_panel=TRAINING)
    ] = 0.0,
    optimizer: Optimizer = "adamw",
    optimizer_state: OptimizerState = "fp32",
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            help="Clip the global gradient norm to this. Updates then wait for the whole backward pass and run "
            "during the next forward.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[int, SEED] = 0,
    output: Annotated[
        str | None,
        typer.Option(
            help="Write the trained model here, in the dtype it was computed in: a directory transformers loads.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            help="Directory for checkpoints: one after the last step, one when the run is stopped by a signal, and "
            "those of --save-every.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="Save every so many steps, beside them.", rich_help_panel=RESULT),
    ] = None,
    keep_last: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep only the last so many checkpoints. Default: all.", rich_help_panel=RESULT
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on from the newest checkpoint in this directory, or from the last step in this storage directory "
            "of a run with --durability step, with the numbers of a run that never stopped. Memory, drives and device "
            "may be others.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    durability: Annotated[
        str,
        typer.Option(
            help="What survives a kill or a power loss: none, checkpoint (what --checkpoints has saved) or step (every "
            "step; takes twice the storage).",
            rich_help_panel=MEMORY,
        ),
    ] = "checkpoint",
    write_budget: Annotated[
        str | None,
        typer.Option(
            help="Most bytes to write to the drives, such as 40TB: the run saves and stops before a step exceeds it.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    save_plan: Annotated[
        str | None, typer.Option(help="Write the plan here, as JSON.", rich_help_panel=RESULT)
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Record the third step and write it for ui.perfetto.dev, as `offload simulate` does.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(help="Record the third step and draw it (.png, .svg).", rich_help_panel=RESULT),
    ] = None,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object per step, and a summary as the last line.",
            rich_help_panel=RESULT,
        ),
    ] = False,
) -> None:
    """Fine-tune all parameters of a causal language model, streaming its training state through SSDs.

    The numbers are those of training in memory. Example:

        offload finetune --model ./Llama-3.2-1B --data notes.jsonl --storage /mnt/nvme0 --host-memory 8GB
        --device-memory 4GB --steps 200 --output ./tuned

    The progress line says how near a step is to its floor, the least time it could take here. The floor is the larger
    of the shortest time any step so far has spent not waiting (its arithmetic), and the bytes this step read and wrote
    over the drives' rates. 100% means that no better order of work could save time. The rates are measured before
    training by moving 64 MiB a drive (half a second at most for each pass), and raised when the run shows more.

    With a profile of the machine (`offload probe`, or --hardware) it plans: micro-batches, placement, prefetch window
    and what is kept for backward. Options that are given stay as given. The plan is printed first; the summary has its
    seconds beside the measured ones, and how many steps the drives' endurance lasts.

    Ctrl-C and SIGTERM end the run with a summary and remove the store. With --checkpoints the step is finished and
    saved first; a second signal stops at once, and the last checkpoint stays as it is. With --durability step the
    store stays, with every step but the one that was being made.
    """  # fmt: skip
    from offload.cli.finetune import finetune
    from offload.cli.settings import Settings

    settings = Settings(
        model=model, data=data, storage=storage or [], host_memory=host_memory, device_memory=device_memory,
        activations=activations, saved_activations=saved_activations, step_aside=step_aside, dtype=dtype,
        device=device, hardware=hardware, plan=plan, save_plan=save_plan, written_per_step=written_per_step,
        steps=steps, batch_size=batch_size, sequence_length=sequence_length,
        micro_batches=micro_batches, lr=lr, schedule=schedule, warmup_steps=warmup_steps, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, seed=seed, output=output, trace=trace, plot=plot,
        checkpoints=checkpoints, save_every=save_every, keep_last=keep_last, resume=resume,
        durability=durability, write_budget=write_budget, optimizer=optimizer, optimizer_state=optimizer_state,
    )  # fmt: skip
    finetune(settings, JsonOutput(sys.stdout) if json_lines else TextOutput(sys.stderr, sys.stdout))


@app.command("plan")
def plan_command(
    model: ModelSource,
    hardware: HardwareSource = None,
    batch: Batch = 8,
    sequence_length: Tokens = 1024,
    optimizer: Optimizer = "adamw",
    optimizer_state: OptimizerState = "fp32",
    clip: Clip = False,
    fix: Fix = None,
    overrides: Overrides = None,
    device_memory: DeviceMemory = "95%",
    host_memory: HostMemory = "90%",
    storage_limit: StorageLimit = None,
    written_per_step: WrittenLimit = None,
    durability: Durability = "checkpoint",
    storage: Directories = None,
    save: Annotated[
        str | None, typer.Option(help="Write the plan here, as JSON.", rich_help_panel=RESULT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As one JSON object.", rich_help_panel=RESULT)
    ] = False,
) -> None:
    """Say before anything runs whether it fits, what a step will take, what limits it and what would help."""
    from offload.cli.plan import PlanSettings, run_plan
    from offload.cli.sources import BudgetTexts

    budgets = BudgetTexts(
        device_memory, host_memory, storage_limit, written_per_step, clip, durability, tuple(storage or ())
    )
    settings = PlanSettings(
        model=model, hardware=hardware, overrides=overrides or [], batch=batch, tokens=sequence_length,
        budgets=budgets, fixed=fix or [], save=save, as_json=as_json,
        optimizer=optimizer, optimizer_state=optimizer_state,
    )  # fmt: skip
    run_plan(settings, sys.stdout)


@app.command("simulate")
def simulate_command(
    model: ModelSource,
    hardware: HardwareSource = None,
    batch: Batch = 8,
    sequence_length: Tokens = 1024,
    optimizer: Optimizer = "adamw",
    optimizer_state: OptimizerState = "fp32",
    clip: Clip = False,
    fix: Fix = None,
    overrides: Overrides = None,
    device_memory: DeviceMemory = "95%",
    host_memory: HostMemory = "90%",
    storage_limit: StorageLimit = None,
    written_per_step: WrittenLimit = None,
    durability: Durability = "checkpoint",
    storage: Directories = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Simulate this saved plan, for its own batch and sequence length, instead of making one.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="Whose policy: offload, or lohan as its paper describes it.", rich_help_panel=TRAINING
        ),
    ] = "offload",
    plot: Annotated[
        str | None, typer.Option(help="Draw the timeline: FILE.png, .svg or .pdf.", rich_help_panel=RESULT)
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(help="Write a trace for ui.perfetto.dev: FILE.json.", rich_help_panel=RESULT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As one JSON object.", rich_help_panel=RESULT)
    ] = False,
) -> None:
    """Run one step of the plan in simulated time: seconds, tokens/s, TFLOPS, stalls by cause, peaks, endurance."""
    from offload.cli.simulate import SimulateSettings, run_simulate
    from offload.cli.sources import BudgetTexts

    budgets = BudgetTexts(
        device_memory, host_memory, storage_limit, written_per_step, clip, durability, tuple(storage or ())
    )
    settings = SimulateSettings(
        model=model, hardware=hardware, overrides=overrides or [], batch=batch, tokens=sequence_length,
        budgets=budgets, fixed=fix or [], plan=plan, policy=policy, plot=plot, trace=trace, as_json=as_json,
        optimizer=optimizer, optimizer_state=optimizer_state,
    )  # fmt: skip
    run_simulate(settings, sys.stdout)


@app.command("doctor")
def doctor_command(
    storage: Annotated[
        list[str] | None, typer.Option(help="Directory to look at; repeatable. Default: the current one.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what this machine has and what will be used: io_uring, O_DIRECT, drives, memory, GPU, SIMD."""
    from offload.cli import doctor

    found = doctor.examine(storage or ["."])
    doctor.show(found, sys.stdout, as_json=json_lines)


app.command("probe")(probe_command)
app.command("inspect")(inspect_command)


def main(args: list[str] | None = None) -> Any:
    """Entry point of the `offload` command. Exit status: 0 done, 1 failed, 2 refused settings, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return app(args=args)
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        sys.exit(130)
    except ConfigError as error:
        print(f"offload: {error}", file=sys.stderr)
        sys.exit(2)
    except (OffloadError, OSError) as error:
        print(f"offload: {error}", file=sys.stderr)
        sys.exit(1)


__all__ = ["app", "main"]
