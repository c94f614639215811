"""Weights of a wrapped model in 16 bit, in one file, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import nn

from offload.checkpoint.export import Item, ShardWriter
from offload.runtime.engine import OffloadEngine
from offload.runtime.training_state import persistent_buffers
from offload.tiers.durable_files import replacing


def _tensors(model: nn.Module, with_frozen: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters block by block, then persistent buffers; each is valid until the next block."""
    engine: OffloadEngine = model.offload  # type: ignore[assignment]  # set by offload.wrap
    trained = {
        segment.name
        for block in [engine.root, *engine.blocks]
        for buffer in block.layout.buffers
        for segment in buffer.segments
        if buffer.trainable
    }
    for block in engine.iter_blocks():
        yield from ((name, tensor) for name, tensor in block if with_frozen or name in trained)
    yield from persistent_buffers(model).items()


def _items(model: nn.Module, dtype: torch.dtype, with_frozen: bool) -> list[Item]:
    """What `_tensors` will give, known without reading anything."""
    engine: OffloadEngine = model.offload  # type: ignore[assignment]  # set by offload.wrap
    items = [
        Item(segment.name, tuple(segment.shape), dtype)
        for block in [engine.root, *engine.blocks]
        for buffer in block.layout.buffers
        for segment in buffer.segments
        if with_frozen or buffer.trainable
    ]
    return items + [
        Item(name, tuple(t.shape), dtype if t.is_floating_point() else t.dtype)
        for name, t in persistent_buffers(model).items()
    ]


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of shared parameters, by name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def write_16bit(
    model: nn.Module, directory: str, file_name: str, dtype: torch.dtype, *, with_frozen: bool = True
) -> str:
    """Write `directory`/`file_name`. Returns its path.

    A name that ends in .safetensors holds shared tensors once; any other is what torch.save writes and holds them
    under all their names. Memory used is one block: torch.save reads what has been written before from the file.
    """
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, file_name)
    is_safetensors = file_name.endswith(".safetensors")
    streamed = path if is_safetensors else path + ".streamed"
    items = _items(model, dtype, with_frozen)
    with ShardWriter(streamed, items) as writer:
        for _, tensor in _tensors(model, with_frozen):
            writer.write(tensor)
    if is_safetensors:
        return path
    try:
        with safe_open(streamed, framework="pt") as read:
            state = {name: read.get_tensor(name) for name in read.keys()}  # noqa: SIM118  # not a dict
            state |= {alias: state[name] for alias, name in _aliases(model).items() if name in state}
        with replacing(path) as file:
            torch.save(state, file)
    finally:
        os.unlink(streamed)
    return path


def state_dict(
    model: nn.Module, *, dtype: torch.dtype | None = None, with_frozen: bool = True
) -> dict[str, torch.Tensor]:
    """A copy of all weights in host memory, as they are computed with or in `dtype`, under all their names."""
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in _tensors(model, with_frozen)
    }
    return state | {alias: state[name] for alias, name in _aliases(model).items() if name in state}
