"""Checkpoints by tag, as DeepSpeed names them, over `offload.save` and `offload.resume`."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from offload.checkpoint.directory import checkpoints_in
from offload.checkpoint.resume import resume
from offload.checkpoint.save import engine_of, save
from offload.errors import CheckpointError, UsageError
from offload.runtime.engine import OffloadEngine
from offload.runtime.optimizer import OffloadOptimizer
from offload.runtime.training_state import random_states, set_random_states
from offload.stores.block_store import BlockRecord
from offload.stores.state_image import Chunk, chunks_of, fill, state_piece
from offload.tiers.durable_files import replacing
from offload.tiers.encoding import Encoded, encode
from offload.tiers.host import HostArena
from offload.types import PAGE_NBYTES, round_up
from offload.update_rules import LO_NBYTES

logger = logging.getLogger("offload")

LATEST_FILE = "latest"


class _Held:
    """A value among what `offload.save` tracks."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def write(
    model: nn.Module, directory: str, tag: str, states: Mapping[str, Any], *, save_latest: bool
) -> None:
    """Save the training state and `states` (plain data, tensors) as `directory`/`tag`, then let `latest` name it.

    The same tag again replaces what it had, once the new one is complete.
    """
    if not tag or os.path.isabs(tag) or ".." in tag.split("/"):
        raise UsageError(f"tag={tag!r}: write a name of a directory inside {directory}")
    # what cannot be kept is refused under the name that the caller knows
    held = {name: _Held(Encoded(encode(value, name))) for name, value in states.items()}
    target = os.path.join(directory, tag)
    save(model, target, state=held, keep_last=1)
    if not save_latest:
        return
    with replacing(os.path.join(directory, LATEST_FILE)) as file:
        file.write(tag.encode())


def read(
    model: nn.Module, optimizer: OffloadOptimizer, directory: str, tag: str | None, *, with_optimizer: bool
) -> tuple[str, dict[str, Any]] | None:
    """Go on from `directory`/`tag` (default: what `latest` names). Returns its path and the states that were saved.

    None, with a warning, where there is no such checkpoint. Without `with_optimizer` only the weights are taken:
    moments and step counts are fresh, hyperparameters and random states stay. Raises CheckpointError for files of
    DeepSpeed's own: to go on without them would be to start again.
    """
    if tag is None:
        latest = os.path.join(directory, LATEST_FILE)
        if not os.path.isfile(latest):
            logger.warning("%s is not there: nothing is loaded; name a tag, or another directory", latest)
            return None
        with open(latest, encoding="utf-8") as file:
            tag = file.read().strip()
    path = os.path.join(directory, tag)
    if not checkpoints_in(path):
        if glob.glob(os.path.join(glob.escape(path), "*_states.pt")):
            raise CheckpointError(
                f"{path}: was written by DeepSpeed itself: offload.from_deepspeed({path!r}, OUT_DIR, "
                "config_from=HF_DIR) makes a model directory of its fp32 weights; initialize a model loaded from that, "
                "without load_checkpoint (moments and the schedule start afresh)"
            )
        logger.warning("%s holds no checkpoint: nothing is loaded", path)
        return None
    held = {name: _Held() for name in ("engine", "lr_scheduler", "client_state")}
    groups, random = optimizer.hyperparameters(), random_states()
    resume(model, path, state=held)
    if not with_optimizer:
        _forget_optimizer(engine_of(model), optimizer)
        optimizer.set_hyperparameters(groups, path)
        set_random_states(random)
    return path, {name: item.value for name, item in held.items()}


def _forget_optimizer(engine: OffloadEngine, optimizer: OffloadOptimizer) -> None:
    """Zero both moments of every parameter, and its step count; the master weights stay."""
    for block in [engine.root, *engine.blocks]:
        for position, buffer in enumerate(block.layout.buffers):
            if not buffer.trainable:
                continue
            for chunk in chunks_of(buffer, engine.config.chunk_elements):
                _zero_moments(engine, block, position, chunk)
            for segment in buffer.segments:
                optimizer.set_steps_of(segment.parameter, 0)
    optimizer.steps_made = 0


def _zero_moments(engine: OffloadEngine, block: BlockRecord, position: int, chunk: Chunk) -> None:
    """A record is `lo` and then the moments."""
    buffer = block.layout.buffers[position]
    begin = LO_NBYTES[buffer.codec] * chunk.n
    store = engine.parts.resources.store
    piece = state_piece(block, position, chunk)
    if piece.memory is not None:
        piece.memory[begin:].zero_()
        return
    if store is None or piece.nbytes == 0:
        return
    staging = HostArena(round_up(piece.nbytes, PAGE_NBYTES)).bytes_tensor
    store.engine.read(staging.data_ptr(), staging.numel(), piece.offset).wait()
    staging[begin : piece.nbytes].zero_()
    fill(piece, staging, store)
