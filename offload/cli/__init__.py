"""The `offload` command: `offload finetune` and `offload doctor`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from offload.cli import doctor as doctor_room
from offload.cli.finetune import Interrupted, Settings, finetune
from offload.cli.output import JsonOutput, TextOutput
from offload.errors import ConfigError, OffloadError

app = typer.Typer(
    name="offload",
    help="Fully fine-tune models whose training state is many times larger than the memory you allow.\n\n"
    "Start with `offload doctor`, then `offload finetune --help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_MODEL, _MEMORY, _TRAINING, _RESULT = "Model and data", "Memory and storage", "Training", "Result"


@app.command("finetune")
def finetune_command(
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face directory (config.json, *.safetensors, tokenizer), or a .gguf file.",
            rich_help_panel=_MODEL,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Text to learn: FILE.txt (plain text), or FILE.jsonl with one object a line: "
            '{"text": ...}, {"prompt": ..., "completion": ...} (only the completion is learned) or {"messages": [...]} '
            "(chat; needs a tokenizer with a chat template).",
            rich_help_panel=_MODEL,
        ),
    ],
    storage: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory on an SSD for the training state; repeat it for several drives. Without it, "
            "everything must fit --host-memory.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    host_memory: Annotated[
        str,
        typer.Option(
            help="DRAM for training state and staging: 8GB, 7.5GiB, 50% or -2GB (all but 2 GB). More of it "
            "means fewer bytes read and written.",
            rich_help_panel=_MEMORY,
        ),
    ] = "50%",
    device_memory: Annotated[
        str,
        typer.Option(
            help="Memory for what is computed with: embeddings, head and a few blocks. On a machine without "
            "a GPU, this too is DRAM.",
            rich_help_panel=_MEMORY,
        ),
    ] = "50%",
    activations: Annotated[
        str,
        typer.Option(
            help="Where block inputs wait for backward: auto, host or storage.", rich_help_panel=_MEMORY
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="What to compute in: auto (as the model's config says), bfloat16 or float32. Updates are "
            "always made on fp32 masters.",
            rich_help_panel=_TRAINING,
        ),
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=_TRAINING)] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.", rich_help_panel=_TRAINING)] = 8,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens a sequence.", rich_help_panel=_TRAINING)
    ] = 512,
    micro_batches: Annotated[
        int,
        typer.Option(
            min=1,
            help="Cut the batch into so many parts inside each block: less memory for activations, "
            "same numbers, no byte more to read.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.", rich_help_panel=_TRAINING)] = 1e-5,
    schedule: Annotated[
        str,
        typer.Option(
            help="Learning rate after warm-up: constant, linear or cosine.", rich_help_panel=_TRAINING
        ),
    ] = "constant",
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=_TRAINING)
    ] = 0,
    weight_decay: Annotated[
        float, typer.Option(min=0.0, help="Decoupled, for matrices only.", rich_help_panel=_TRAINING)
    ] = 0.0,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            help="Clip the global gradient norm to this. Updates then wait for the whole backward pass and run "
            "during the next forward.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Order of the data, dropout.", rich_help_panel=_TRAINING)] = 0,
    output: Annotated[
        str | None,
        typer.Option(
            help="Write the trained model here, in bf16: a directory transformers loads.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object per step, and a summary as the last line.",
            rich_help_panel=_RESULT,
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

    Ctrl-C and SIGTERM end the run with a summary and remove the store.
    """  # fmt: skip
    settings = Settings(
        model=model, data=data, storage=storage or [], host_memory=host_memory, device_memory=device_memory,
        activations=activations, dtype=dtype, steps=steps, batch_size=batch_size, sequence_length=sequence_length,
        micro_batches=micro_batches, lr=lr, schedule=schedule, warmup_steps=warmup_steps, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, seed=seed, output=output,
    )  # fmt: skip
    finetune(settings, JsonOutput(sys.stdout) if json_lines else TextOutput(sys.stderr, sys.stdout))


@app.command("doctor")
def doctor_command(
    storage: Annotated[
        list[str] | None, typer.Option(help="Directory to look at; repeatable. Default: the current one.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what this machine has and what will be used: io_uring, O_DIRECT, drives, memory, GPU, SIMD."""
    found = doctor_room.examine(storage or ["."])
    doctor_room.show(found, sys.stdout, as_json=json_lines)


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
