"""`offload inspect`: what a checkpoint holds, and whether its bytes are those that were written."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from offload.errors import CorruptError


def inspect_command(
    directory: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, a directory of them (its newest is looked at), or where a run with durable steps "
            "left its store."
        ),
    ],
    verify: Annotated[bool, typer.Option(help="Read every byte and check it against its CRC32C.")] = False,
    drive: Annotated[
        list[str] | None, typer.Option(help="Another storage directory of that run; repeat for more.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what a checkpoint holds. Exit status 1 when --verify finds bytes that are not those that were written."""
    from offload.checkpoint import inspect

    found = inspect(directory, verify=verify, drives=drive or [])
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        print(f"checkpoint        {found.path}")
        print(f"step              {found.step}")
        print(f"parameters        {found.parameters:,}, {found.trainable:,} of them trained")
        print(f"blocks            {found.blocks} and the root")
        print(f"state             {found.nbytes / 1e9:.3f} GB")
        print(f"model             {found.fingerprint[:16]}")
        print(f"tracked           {', '.join(found.tracked) or 'nothing'}")
        print(f"beside it         {len(found.others)} older or newer checkpoints")
        if found.verified_chunks is not None:
            print(f"verified          {found.verified_chunks} chunks, {len(found.damage)} damaged")
    if found.damage:
        raise CorruptError("\n".join(found.damage))
