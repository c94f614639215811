"""Write a wrapped model as a Hugging Face directory, one block in memory at a time."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from offload.checkpoint.adapters import Merge, has_adapters, write_adapter
from offload.checkpoint.masters import masters_of
from offload.errors import ConfigError, StoreError, UsageError
from offload.model import disk_names
from offload.model.blocks import base_of
from offload.model.diffusion import is_of_diffusers
from offload.model.loading import INDEX_SUFFIX, SUFFIX, stem_of
from offload.model.quantized import quantized_weights
from offload.runtime.engine import OffloadEngine
from offload.runtime.hooks import cache_is_stopped
from offload.runtime.training_state import persistent_buffers
from offload.stores.block_store import BlockRecord
from offload.tiers.durable_files import replacing, sync_files
from offload.tiers.storage import free_nbytes

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Item:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(items: list[Item], max_shard_nbytes: float) -> list[list[Item]]:
    """Cut `items`, in order, into shards of at most `max_shard_nbytes`; a larger tensor gets one of its own."""
    shards: list[list[Item]] = []
    left = 0.0
    for item in items:
        if not shards or item.nbytes > left:
            shards.append([])
            left = max_shard_nbytes
        shards[-1].append(item)
        left -= item.nbytes
    return shards


class ShardWriter:
    """A safetensors file whose tensors arrive one after the other; appears under its name only when complete."""

    def __init__(self, path: str, items: list[Item]) -> None:
        self._items = iter(items)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for item in items:
            offsets = [end, end + item.nbytes]
            header[item.name] = {
                "dtype": SAFETENSORS_DTYPES[item.dtype],
                "shape": list(item.shape),
                "data_offsets": offsets,
            }
            end = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._replacing = replacing(path)

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor, in the order of the items."""
        item = next(self._items)
        if tuple(tensor.shape) != item.shape:
            raise UsageError(f"{item.name}: has shape {tuple(tensor.shape)}, {item.shape} was announced")
        contiguous = tensor.detach().to("cpu", item.dtype).contiguous().reshape(-1).view(torch.uint8)
        self._file.write(contiguous.numpy().data)

    def __enter__(self) -> ShardWriter:
        self._file = self._replacing.__enter__()
        self._file.write(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replacing.__exit__(kind, error, trace)


def _items(model: nn.Module, engine: OffloadEngine, dtype: torch.dtype | None) -> list[Item]:
    """What will be written, in order. A given `dtype` is that of every parameter; buffers keep theirs."""

    quantized, dense_dtype = quantized_weights(model), dtype or _computed_in(model)

    def on_meta(block: BlockRecord) -> dict[str, torch.Tensor]:
        return {
            segment.name: torch.empty(quantized[segment.name].shape, dtype=dense_dtype, device="meta")
            if segment.name in quantized
            else torch.empty(segment.shape, dtype=dtype or buffer.dtype, device="meta")
            for buffer in block.layout.buffers
            for segment in buffer.segments
        }

    root = on_meta(engine.root)
    merge, base = Merge(model, root), base_of(model)
    blocks = (root, *map(on_meta, engine.blocks))
    items = [
        Item(name, tuple(tensor.shape), tensor.dtype)
        for block in blocks
        for name, tensor in disk_names.to_directory(base, merge(block)).items()
    ]
    buffers = disk_names.to_directory(base, persistent_buffers(base))
    return items + [Item(name, tuple(t.shape), t.dtype) for name, t in buffers.items()]


def _tensors(
    model: nn.Module, engine: OffloadEngine, with_masters: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Block by block; `with_masters`: the exact fp32 value of what is computed with in bf16."""
    base = base_of(model)
    merge: Merge | None = None
    quantized = quantized_weights(model)
    for record, block in zip([engine.root, *engine.blocks], engine.iter_blocks(), strict=True):
        held = {n: quantized[n].dequantize(t) if n in quantized else t for n, t in block}
        if with_masters:
            held.update(masters_of(engine, record))
        merge = merge or Merge(model, held)  # the root comes first, and stays
        yield from disk_names.to_directory(base, merge(held)).items()
    yield from disk_names.to_directory(base, persistent_buffers(base)).items()


def _write_tokenizer(tokenizer: Any, out_dir: str) -> None:
    if tokenizer is None:
        return
    if not isinstance(tokenizer, (str, os.PathLike)):
        tokenizer.save_pretrained(out_dir)
        return
    for name in TOKENIZER_FILES:
        source = os.path.join(tokenizer, name)
        if os.path.exists(source) and os.path.realpath(source) != os.path.realpath(
            os.path.join(out_dir, name)
        ):
            shutil.copyfile(source, os.path.join(out_dir, name))


def _computed_in(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _write_config(model: nn.Module, out_dir: str, dtype: torch.dtype | None) -> None:
    if is_of_diffusers(model):
        model.save_config(out_dir)  # type: ignore[operator]
        return
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.dtype = dtype or _computed_in(model)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # what is written is dense
        if cache_is_stopped(model):
            config.use_cache = True
        config.save_pretrained(out_dir)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(out_dir)


def export_nbytes(model: nn.Module) -> int:
    """Bytes of weights that `export` writes in the dtype computed in; known before the model is trained."""
    engine: OffloadEngine = model.offload  # type: ignore[assignment]  # set by offload.wrap
    return sum(item.nbytes for item in _items(model, engine, None))


def export(
    model: nn.Module,
    out_dir: str,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_nbytes: float = 2e9,
    adapter_only: bool = False,
) -> list[str]:
    """Write a model returned by `offload.wrap` or `offload.load` as a directory of transformers, or of diffusers where
    it is a model of theirs. Returns its weight files.

    Memory used is one block; all files are on the drive when it returns. `tokenizer`: an object with
    `save_pretrained`, or a directory to copy the tokenizer's files from; a model made by `offload.load` brings its
    own. `dtype`: of all parameters, without it the one computed in; torch.float32 writes the exact masters of what is
    computed with in bf16 (with adapters, the rounded values). Tied tensors are written once. Adapters of `peft`
    are merged into the base weights, layer by layer, and weights in 8 or 4 bits are written dense; with `adapter_only`
    a directory that peft reads is written instead, without the base.
    Raises UsageError for a model that is not wrapped, and for masters inside a step, ConfigError when `out_dir` has
    weights already, StoreError when they would not fit there.
    """
    engine = getattr(model, "offload", None)
    if not isinstance(engine, OffloadEngine):
        raise UsageError(f"{type(model).__name__} is not wrapped: call offload.wrap or offload.load first")
    engine.refuse_what_is_not_kept()
    os.makedirs(out_dir, exist_ok=True)
    present = sorted(name for name in os.listdir(out_dir) if name.endswith(".safetensors"))
    if present:
        raise ConfigError(f"{out_dir} holds {present[0]} already: choose another directory, or empty it")
    if adapter_only:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        trained = {n: t.clone() for block in engine.iter_blocks() for n, t in block if n in trainable}
        write_adapter(model, trained, out_dir)
        _write_tokenizer(tokenizer, out_dir)
        sync_files(out_dir)
        return [os.path.join(out_dir, "adapter_model.safetensors")]
    with_masters = dtype == torch.float32 and not has_adapters(model)
    if with_masters:
        engine.at_step_boundary("export with dtype=torch.float32")
    items = _items(model, engine, dtype)
    needed_nbytes = sum(item.nbytes for item in items)
    free = free_nbytes([out_dir])
    if free < needed_nbytes:
        raise StoreError(
            f"{out_dir}: the model takes {needed_nbytes:,} bytes and {free:,} are free: free some space, or export to "
            "another directory"
        )
    shards = plan_shards(items, max_shard_nbytes)
    stem = stem_of(model)
    names = [f"{stem}{SUFFIX}"]
    if len(shards) > 1:
        names = [f"{stem}-{n:05d}-of-{len(shards):05d}{SUFFIX}" for n in range(1, len(shards) + 1)]
    tensors = _tensors(model, engine, with_masters)
    for file_name, shard in zip(names, shards, strict=True):
        with ShardWriter(os.path.join(out_dir, file_name), shard) as writer:
            for item in shard:
                name, tensor = next(tensors)
                if name != item.name:
                    raise UsageError(f"expected parameter {item.name}, got {name}; please report this")
                writer.write(tensor)
    tensors.close()  # type: ignore[attr-defined]  # a generator: releases the last block
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": needed_nbytes},
            "weight_map": {i.name: n for n, shard in zip(names, shards, strict=True) for i in shard},
        }
        with open(os.path.join(out_dir, f"{stem}{INDEX_SUFFIX}"), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2, sort_keys=True)
    _write_tokenizer(tokenizer if tokenizer is not None else getattr(model, "offload_source", None), out_dir)
    _write_config(base_of(model), out_dir, dtype)
    sync_files(out_dir)
    return [os.path.join(out_dir, name) for name in names]
