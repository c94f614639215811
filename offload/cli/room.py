"""Whether what `offload finetune` writes after training will have room: asked before the first step, not at the end."""

from __future__ import annotations

import os

from torch import nn

from offload.checkpoint.export import export_nbytes
from offload.cli.checkpoints import Checkpoints
from offload.cli.settings import Settings
from offload.errors import StoreError
from offload.tiers.storage import free_nbytes


def check_room(model: nn.Module, settings: Settings, checkpoints: Checkpoints) -> None:
    """Raise StoreError where the model under --output, or one checkpoint, would not fit beside what is there now.

    A checkpoint on the file system of the store may share the store's extents and take nothing: it is not asked for.
    """
    wanted: list[tuple[str, str, int]] = []
    if settings.output is not None:
        wanted.append(("--output", settings.output, export_nbytes(model)))
    if settings.checkpoints is not None:
        stores = {_file_system(directory) for directory in settings.storage}
        if _file_system(settings.checkpoints) not in stores:
            wanted.append(("--checkpoints", settings.checkpoints, checkpoints.next_nbytes))
    for _, directory, _ in wanted:
        together = [entry for entry in wanted if _file_system(entry[1]) == _file_system(directory)]
        free = free_nbytes([directory])
        if free < sum(nbytes for _, _, nbytes in together):
            needed = " and ".join(f"{option} {place} {nbytes:,} bytes" for option, place, nbytes in together)
            raise StoreError(
                f"{needed} will be needed, and {free:,} are free there: free some space, or name a directory on "
                "another drive; nothing has been trained yet"
            )


def _file_system(directory: str) -> int:
    """Of `directory`, or of the nearest one above it that is there."""
    path = os.path.abspath(directory)
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return os.stat(path).st_dev
