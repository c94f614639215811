"""Say what a checkpoint holds and whether its bytes are those that were written. Needs no model."""

from __future__ import annotations

import os
from dataclasses import dataclass

from offload.checkpoint.directory import checkpoints_in, newest
from offload.checkpoint.read import ChunkReader, read_manifest
from offload.errors import CorruptError


@dataclass(frozen=True)
class Inspection:
    """Of one checkpoint: its step, sizes, and (when verified) the damage found, one sentence each."""

    path: str
    step: int
    parameters: int
    trainable: int
    blocks: int
    nbytes: int
    fingerprint: str
    tracked: list[str]
    others: list[str]
    """Checkpoints beside it, the oldest first."""
    verified_chunks: int | None
    damage: list[str]


def inspect(directory: str, *, verify: bool = False) -> Inspection:
    """Read the manifest of a checkpoint (or of the newest one in `directory`), and every byte when `verify`.

    Raises CheckpointError or CorruptError when the manifest itself cannot be read; wrong chunks are listed in `damage`.
    """
    path = newest(directory)
    manifest = read_manifest(path)
    damage: list[str] = []
    n_verified = 0
    if verify:
        try:
            with ChunkReader(manifest, [os.path.join(path, name) for name in manifest.files]) as reader:
                for block in manifest.blocks:
                    for buffer in block.buffers:
                        for index in range(-(-buffer.n_elements // manifest.chunk_elements)):
                            n_verified += 1
                            try:
                                reader.chunk(buffer, index)
                            except CorruptError as error:
                                damage.append(str(error))
        except CorruptError as error:
            damage.append(str(error))
    parameters = manifest.parameters().values()
    return Inspection(
        path=path,
        step=manifest.step,
        parameters=sum(p.numel for _, p in parameters),
        trainable=sum(p.numel for buffer, p in parameters if buffer.trainable),
        blocks=max(0, len(manifest.blocks) - 1),
        nbytes=manifest.nbytes,
        fingerprint=manifest.fingerprint,
        tracked=_tracked(manifest.training),
        others=[
            p for p in checkpoints_in(os.path.dirname(os.path.abspath(path))) if p != os.path.abspath(path)
        ],
        verified_chunks=n_verified if verify else None,
        damage=damage,
    )


def _tracked(training: object) -> list[str]:
    """Names of what was given as `state`, as far as the encoded training state shows them."""
    pairs = dict(training["dict"]) if isinstance(training, dict) and "dict" in training else {}
    tracked = pairs.get("tracked")
    return (
        [str(name) for name, _ in tracked["dict"]] if isinstance(tracked, dict) and "dict" in tracked else []
    )
