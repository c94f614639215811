"""The options that several commands have, with their help, and the panels that help shows them in."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL, MEMORY, TRAINING, RESULT = "Model and data", "Memory and storage", "Training", "Result"
MACHINE = "Machine"

SEED = typer.Option(
    min=-(1 << 63), max=(1 << 63) - 1, help="Order of the data, dropout.", rich_help_panel=TRAINING
)
Optimizer = Annotated[
    str,
    typer.Option(
        help="adamw, lion, sgd (with momentum 0.9) or adafactor. Their bytes differ: docs/optimizers.md.",
        rich_help_panel=TRAINING,
    ),
]
OptimizerState = Annotated[
    str,
    typer.Option(
        help="What moments are kept in between steps: fp32, bf16 or 8bit. Less to read, write and store.",
        rich_help_panel=TRAINING,
    ),
]
ModelSource = Annotated[
    str,
    typer.Option(
        "--model",
        help="Model directory, config.json, or a shape such as 7b, 13b, 70b, 175b.",
        rich_help_panel=MODEL,
    ),
]
HardwareSource = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="Profile of the machine: a name such as rtx4090-12ssd, or a JSON file. Default: what `offload probe` has "
        "stored.",
        rich_help_panel=MACHINE,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="Change one figure of the profile, name=value; repeatable.",
        rich_help_panel=MACHINE,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences a step.", rich_help_panel=TRAINING)]
Tokens = Annotated[
    int, typer.Option("--sequence-length", min=1, help="Tokens a sequence.", rich_help_panel=TRAINING)
]
Clip = Annotated[
    bool,
    typer.Option(
        "--clip",
        help="Gradients are clipped by their global norm: every update is deferred.",
        rich_help_panel=TRAINING,
    ),
]
DeviceMemory = Annotated[
    str,
    typer.Option(help="Device memory to use: 22GB, 95% (of the profile's) or -2GB.", rich_help_panel=MEMORY),
]
HostMemory = Annotated[
    str,
    typer.Option(help="Host memory to use: 64GB, 90% (of the profile's) or -8GB.", rich_help_panel=MEMORY),
]
StorageLimit = Annotated[
    str | None,
    typer.Option(help="Most bytes on storage. Default: what the drives hold.", rich_help_panel=MEMORY),
]
WrittenLimit = Annotated[
    str | None,
    typer.Option(help="Most bytes written to storage a step, to spare the drives.", rich_help_panel=MEMORY),
]
Durability = Annotated[
    str,
    typer.Option(
        help="What survives a kill: none, checkpoint or step (all state lies on storage twice, all of it is written "
        "in every step).",
        rich_help_panel=MEMORY,
    ),
]
Directories = Annotated[
    list[str] | None,
    typer.Option(
        help="Directory that a run would use, one on each drive of the profile; repeatable. What is free there limits "
        "what lies on storage, and the drives are asked for the endurance that is left.",
        rich_help_panel=MEMORY,
    ),
]
Fix = Annotated[
    list[str] | None,
    typer.Option(
        "--fix",
        help="Fix one choice of the planner, name=value; repeatable. Names: micro_batches, update, prefetch_blocks, "
        "grad_buffers, activations, params_host_fraction and others: a wrong one lists them.",
        rich_help_panel=TRAINING,
    ),
]
