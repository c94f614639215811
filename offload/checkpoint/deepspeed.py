"""The fp32 weights of a DeepSpeed ZeRO checkpoint as a Hugging Face directory, tensor by tensor.

DeepSpeed writes pickles. They are read by torch's restricted unpickler, which calls nothing but tensor constructors;
the few DeepSpeed classes inside (loss scalers, enumerations) become empty stand-ins. Layouts: stages 1 to 3, as
`deepspeed/utils/zero_to_fp32.py` of DeepSpeed 0.19 describes them.
"""

from __future__ import annotations

import glob
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.export import TOKENIZER_FILES, Item, ShardWriter
from offload.errors import CheckpointError, ConfigError
from offload.model.loading import SINGLE_FILE
from offload.tiers.durable_files import sync_files

_FOREIGN = re.compile(r"GLOBAL (\S+) was not an allowed global")
_STAND_INS_MAX = 32


class _StandIn:
    """Takes the place of a class of DeepSpeed's; holds nothing and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __setstate__(self, _: Any) -> None:
        return


def _load(path: str) -> Any:
    """A pickle of tensors and plain containers, mapped, not read. Raises CheckpointError for anything else."""
    allowed: list[Any] = []
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            foreign = _FOREIGN.search(str(error))
            if foreign is None or not foreign[1].startswith("deepspeed.") or len(allowed) >= _STAND_INS_MAX:
                raise CheckpointError(f"{path}: holds more than tensors and plain data: {error}") from error
            allowed.append((type("StandIn", (_StandIn,), {}), foreign[1]))
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


@dataclass(frozen=True)
class _Zero:
    """What all ranks have in common, and each rank's flat fp32 groups."""

    stage: int
    shapes: list[dict[str, torch.Size]]
    """Of each optimizer group, in the order of its flat vector."""
    groups: list[list[torch.Tensor]]
    """By rank, by group."""
    shared: dict[str, str]
    buffers: dict[str, torch.Tensor]


def _folder(directory: str) -> str:
    """The folder with the shards: itself, or the one that `latest` names."""
    latest = os.path.join(directory, "latest")
    if os.path.exists(latest):
        with open(latest, encoding="utf-8") as file:
            name = file.read(256).strip()
        if os.path.basename(name) != name or not name:
            raise CheckpointError(f"{latest}: {name!r} is not a bare name")
        return os.path.join(directory, name)
    return directory


def _rank(path: str) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", os.path.basename(path))
    return int(match[1]) if match else 0


def _read(directory: str) -> _Zero:
    folder = _folder(directory)
    optim = sorted(glob.glob(os.path.join(glob.escape(folder), "*_optim_states.pt")), key=_rank)
    states = sorted(glob.glob(os.path.join(glob.escape(folder), "*_model_states.pt")), key=_rank)
    if not optim or not states:
        raise CheckpointError(
            f"{folder}: has no *_optim_states.pt and *_model_states.pt of a ZeRO checkpoint"
        )
    try:
        held = [_load(path)["optimizer_state_dict"] for path in optim]
        model = _load(states[0])
        stage = int(held[0]["zero_stage"]) if isinstance(held[0]["zero_stage"], int) else _stage(held[0])
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        count = held[0]["partition_count"]
        n_ranks = max(count) if isinstance(count, list) else count
        if n_ranks != len(optim):
            raise CheckpointError(
                f"{folder}: {n_ranks} ranks were saved, {len(optim)} of their files are here"
            )
        names = model["buffer_names"]
        return _Zero(
            stage=stage,
            shapes=[dict(group) for group in model["param_shapes"]],
            groups=[list(rank[key]) for rank in held],
            shared=dict(model.get("shared_params") or {}),
            buffers={name: t for name, t in model["module"].items() if name in names},
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{folder}: is no ZeRO checkpoint of a known layout: {error!r}") from error


def _stage(held: dict[str, Any]) -> int:
    """Which stage wrote it, by the groups it has, when the number itself is an object of DeepSpeed's."""
    return 3 if "fp32_flat_groups" in held else 2


def _tensors(zero: _Zero) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trained parameter, fp32, in the order of the shapes."""
    if zero.stage == 3:
        yield from _tensors_of_stage_3(zero)
        return
    for index, shapes in enumerate(zero.shapes):
        whole = torch.cat([rank[index] for rank in zero.groups])
        at = 0
        for name, shape in shapes.items():
            yield name, _part(whole, at, shape.numel(), name).view(shape)
            at += shape.numel()


def _tensors_of_stage_3(zero: _Zero) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter is padded to a multiple of the ranks and cut into as many parts."""
    n_ranks, at = len(zero.groups), 0
    flat = [_Concatenated(rank) for rank in zero.groups]
    for shapes in zero.shapes:
        for name, shape in shapes.items():
            part = -(-shape.numel() // n_ranks)
            joined = torch.cat([rank.narrow(at, part, name) for rank in flat])
            yield name, joined[: shape.numel()].view(shape)
            at += part


class _Concatenated:
    """Flat tensors as one vector, without a copy of it."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self._parts = parts

    def narrow(self, start: int, n: int, name: str) -> torch.Tensor:
        """Elements `start` to `start + n`. Raises CheckpointError when there are fewer."""
        found = []
        for part in self._parts:
            if start < part.numel() and n:
                taken = part[start : start + n]
                found.append(taken)
                n -= taken.numel()
                start = 0
            else:
                start -= part.numel()
        if n:
            raise CheckpointError(f"the shards end inside parameter {name}: the checkpoint is not complete")
        return torch.cat(found) if found else torch.empty(0)


def _part(whole: torch.Tensor, at: int, n: int, name: str) -> torch.Tensor:
    if at + n > whole.numel():
        raise CheckpointError(f"the shards end inside parameter {name}: the checkpoint is not complete")
    return whole[at : at + n]


def from_deepspeed(directory: str, out_dir: str, *, config_from: str | None = None) -> str:
    """Write the fp32 weights of a DeepSpeed ZeRO checkpoint as `out_dir/model.safetensors`. Returns its path.

    `directory` is what was given to `engine.save_checkpoint` (its `latest` is taken), or one folder in it.
    `config_from`: a Hugging Face directory whose config and tokenizer are copied beside, so that
    `offload.load(out_dir)` trains on with these values as masters. Memory used: one tensor (stages 1 and 2: one
    optimizer group). Frozen parameters are not in such shards: take them from the base model. Raises CheckpointError
    when shards are missing, cut or hold anything but tensors and plain data.
    """
    path = os.path.join(out_dir, SINGLE_FILE)
    if os.path.exists(path):
        raise ConfigError(f"{path} is there already: choose another directory")
    zero = _read(directory)
    items = [
        Item(name, tuple(shape), torch.float32) for group in zero.shapes for name, shape in group.items()
    ]
    buffers = [Item(name, tuple(t.shape), t.dtype) for name, t in zero.buffers.items()]
    os.makedirs(out_dir, exist_ok=True)
    with ShardWriter(path, items + buffers) as writer:
        for _, tensor in _tensors(zero):
            writer.write(tensor)
        for tensor in zero.buffers.values():
            writer.write(tensor)
    if config_from is not None:
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            source = os.path.join(config_from, name)
            if os.path.exists(source):
                shutil.copyfile(source, os.path.join(out_dir, name))
        sync_files(out_dir)
    return path
