"""Say what a checkpoint holds and whether its bytes are those that were written. Needs no model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from offload.checkpoint.directory import MANIFEST_FILE, checkpoints_in, newest
from offload.checkpoint.kept_store import manifests_in, taken_over
from offload.checkpoint.read import ChunkReader, read_manifest
from offload.errors import CorruptError
from offload.tiers.manifest import Manifest


@dataclass(frozen=True)
class Inspection:
    """Of one checkpoint or kept store: its step, sizes, and (when verified) the damage found, one sentence each."""

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


def inspect(directory: str, *, verify: bool = False, drives: Sequence[str] = ()) -> Inspection:
    """Read the manifest of a checkpoint (or of the newest one in `directory`), and every byte when `verify`.

    `directory` may be a storage directory with the store of a run that has ended (durability 'step'), whose last
    committed step is looked at; `drives` are the other directories that the run had.
    Raises CheckpointError or CorruptError when the manifest itself cannot be read; wrong chunks are listed in `damage`.
    """
    holds_checkpoint = checkpoints_in(directory) or os.path.exists(os.path.join(directory, MANIFEST_FILE))
    if not holds_checkpoint and manifests_in(directory):
        with taken_over(directory, list(drives)) as kept:
            return _inspection(kept.manifest_path, kept.manifest, kept.paths, verify, [])
    path = newest(directory)
    manifest = read_manifest(path)
    beside = checkpoints_in(os.path.dirname(os.path.abspath(path)))
    others = [p for p in beside if p != os.path.abspath(path)]
    return _inspection(path, manifest, [os.path.join(path, name) for name in manifest.files], verify, others)


def _inspection(
    path: str, manifest: Manifest, files: list[str], verify: bool, others: list[str]
) -> Inspection:
    n_verified, damage = _verified(manifest, files) if verify else (None, [])
    parameters = manifest.parameters().values()
    return Inspection(
        path=path,
        step=manifest.step,
        parameters=sum(p.numel for _, p in parameters),
        trainable=sum(p.numel for buffer, p in parameters if buffer.trainable),
        blocks=max(0, len(manifest.blocks) - 1),
        nbytes=sum(e.nbytes for x in manifest.blocks for b in x.buffers for e in (b.param, b.state) if e),
        fingerprint=manifest.fingerprint,
        tracked=_tracked(manifest.training),
        others=others,
        verified_chunks=n_verified,
        damage=damage,
    )


def _verified(manifest: Manifest, files: list[str]) -> tuple[int, list[str]]:
    """How many chunks were read, and a sentence for each that is not what was written."""
    damage: list[str] = []
    n_verified = 0
    try:
        with ChunkReader(manifest, files) as reader:
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
    return n_verified, damage


def _tracked(training: object) -> list[str]:
    """Names of what was given as `state`, as far as the encoded training state shows them."""
    pairs = dict(training["dict"]) if isinstance(training, dict) and "dict" in training else {}
    tracked = pairs.get("tracked")
    return (
        [str(name) for name, _ in tracked["dict"]] if isinstance(tracked, dict) and "dict" in tracked else []
    )
