"""Hugging Face model directories as models whose parameters stay in their files until somebody needs them.

`build_model` makes the module without memory for its parameters. Each one is a `StoredParameter`: asking for its
`data` reads it from the file, setting its `data` makes it an ordinary parameter. `offload.wrap` asks once for each,
moves the bytes where they belong and sets the data, so at no time more than one tensor is on its way.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from offload.errors import ConfigError
from offload.model import diffusion, disk_names

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
SINGLE_FILE = f"model{SUFFIX}"
HEADER_NBYTES_MAX = 100_000_000
"""The limit of the format."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: `nbytes` at `offset` of `path`."""

    path: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: str) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises ConfigError for a file that is damaged or not safetensors."""
    try:
        file_nbytes = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            header_nbytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= header_nbytes <= min(HEADER_NBYTES_MAX, file_nbytes - 8):
                raise ConfigError(f"{path}: not a safetensors file, or cut short ({file_nbytes} bytes)")
            header = json.loads(file.read(header_nbytes))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: its safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: its safetensors header is no JSON object")
    entries = {n: _entry(path, n, d, 8 + header_nbytes) for n, d in header.items() if n != "__metadata__"}
    end = 8 + header_nbytes
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end or entry.offset + entry.nbytes > file_nbytes:
            raise ConfigError(f"{path}: tensor {name} overlaps another one or lies outside the file")
        end = entry.offset + entry.nbytes
    return entries


def _entry(path: str, name: str, description: Any, data_start: int) -> Entry:
    try:
        dtype = _DTYPES.get(description["dtype"])
        shape = tuple(int(n) for n in description["shape"])
        begin, end = (int(n) for n in description["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: the description of tensor {name} is damaged") from error
    if dtype is None:
        raise ConfigError(
            f"{path}: tensor {name} has dtype {description['dtype']}, which cannot be trained from"
        )
    if begin < 0 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
        raise ConfigError(f"{path}: tensor {name} has shape {shape} but {end - begin} bytes")
    return Entry(path, data_start + begin, end - begin, dtype, shape)


class TensorFiles:
    """The tensors of a model directory (one safetensors file, or shards with an index), read one at a time."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        for path in _safetensors_paths(directory):
            self.entries.update(read_header(path))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> torch.Tensor:
        """A fresh CPU tensor in the file's dtype. Raises ConfigError when the file ends early."""
        entry = self.entries[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            view = raw.numpy().data
            while view.nbytes:  # one read moves 2 GiB at most
                n_read = file.readinto(view)
                if not n_read:
                    raise ConfigError(f"{entry.path}: ends inside tensor {name}")
                view = view[n_read:]
            os.posix_fadvise(file.fileno(), entry.offset, entry.nbytes, os.POSIX_FADV_DONTNEED)
        return raw.view(entry.dtype).view(entry.shape)


def stem_of(model: nn.Module) -> str:
    """What its files of weights are called, without what says which and of what kind."""
    return diffusion.STEM if diffusion.is_of_diffusers(model) else "model"


def _safetensors_paths(directory: str) -> list[str]:
    stems = [os.path.join(directory, stem) for stem in ("model", diffusion.STEM)]
    single_path = next((stem + SUFFIX for stem in stems if os.path.exists(stem + SUFFIX)), None)
    if single_path is not None:
        return [single_path]
    index_path = next((stem + INDEX_SUFFIX for stem in stems if os.path.exists(stem + INDEX_SUFFIX)), None)
    if index_path is None:
        raise ConfigError(
            f"{directory} has neither {SINGLE_FILE} nor model{INDEX_SUFFIX}: offload loads safetensors directories; "
            "save the model with the save_pretrained of transformers or diffusers first"
        )
    try:
        with open(index_path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index_path}: cannot be understood: {error}") from error
    if any(os.path.basename(name) != name for name in names):
        raise ConfigError(f"{index_path}: names files outside its directory")
    return [os.path.join(directory, name) for name in names]


class StoredParameter(nn.Parameter):
    """A parameter that is still in its file. Takes no memory; becomes an ordinary Parameter when its data is set."""

    _read: Callable[[], torch.Tensor]

    @staticmethod
    def make(shape: torch.Size, dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> StoredParameter:
        """A parameter of `shape` and `dtype` whose content `read()` brings, in whatever dtype it is stored in."""
        hole = torch.full((1,), float("nan")).to(dtype).expand(max(1, shape.numel()))
        parameter = StoredParameter(hole.as_strided(shape, (0,) * len(shape)), requires_grad=True)
        parameter._read = read
        return parameter

    @property
    def data(self) -> torch.Tensor:
        """The content, read anew each time, in the dtype of the file."""
        return self._read()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.__class__ = nn.Parameter  # type: ignore[assignment]  # as torch's own UninitializedParameter does
        self.__dict__.pop("_read", None)
        self.data = value


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Inside, modules register their parameters on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stored_name(name: str, names: TensorFiles, model: nn.Module, aliases: list[str]) -> str | None:
    """Under which name the files hold parameter `name`: its own, a tied one's, or without the base model's prefix.

    None when they hold it under none of these.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in [name, *aliases]:
        if candidate in names:
            return candidate
        if prefix and candidate.startswith(prefix + ".") and candidate[len(prefix) + 1 :] in names:
            return candidate[len(prefix) + 1 :]
    return None


def _content_of(
    names: list[str], files: TensorFiles, model: nn.Module, sources: dict[str, disk_names.Source]
) -> tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]:
    """(where it is, shape, how to read it) of the parameter that the model calls by `names`."""
    stored = stored_name(names[0], files, model, names[1:])
    if stored is not None:
        entry = files.entries[stored]
        return f"{entry.path}: tensor {stored}", entry.shape, lambda: files.read(stored)
    source = next((sources[name] for name in names if name in sources), None)
    if source is None:
        raise ConfigError(
            f"{files.directory} holds no tensor for {type(model).__name__}.{names[0]}: the checkpoint is incomplete or "
            "names its tensors in an unknown way; load it with transformers' from_pretrained, save it with "
            "save_pretrained, and use that"
        )

    def shape_only(name: str) -> torch.Tensor:
        return torch.empty(files.entries[name].shape, dtype=files.entries[name].dtype, device="meta")

    try:
        shape = tuple(source.read(model, shape_only).shape)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{files.directory}: {source.name} cannot be made of {source.parts[0][0]} and {len(source.parts) - 1} more "
            f"tensors: {error}"
        ) from error
    return f"{files.directory}: tensor {source.parts[0][0]}", shape, lambda: source.read(model, files.read)


def _store_parameters(model: nn.Module, files: TensorFiles) -> None:
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    sources = disk_names.sources(model, files.entries)
    stored: dict[nn.Parameter, StoredParameter] = {}
    for parameter, names in aliases.items():
        where, shape, read = _content_of(names, files, model, sources)
        if shape != tuple(parameter.shape):
            raise ConfigError(f"{where} has shape {shape}, the model wants {tuple(parameter.shape)}")
        stored[parameter] = StoredParameter.make(parameter.shape, parameter.dtype, read)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = stored[held]
    for name, buffer in model.named_buffers():
        if name in files:
            buffer.copy_(files.read(name))
        elif name in sources:
            buffer.copy_(sources[name].read(model, files.read))


def build_model(directory: str, dtype: str | torch.dtype = "auto") -> nn.Module:
    """The model of a directory of transformers or diffusers, with every parameter a `StoredParameter`.

    `dtype`: what it computes in; "auto" takes the config's, so that bf16 checkpoints train in bf16. An fp32 file keeps
    its full value as the master. Raises ConfigError when a tensor is missing or has another shape.
    """
    files = TensorFiles(directory)
    diffuses = diffusion.config_of(directory)
    if diffuses is not None:
        return _build_diffusion_model(diffuses, files, dtype)
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{directory} is quantized: fine-tuning all parameters needs the unquantized model")
    wanted = dtype if isinstance(dtype, torch.dtype) else dtype_of(dtype) or config.dtype or torch.float32
    architectures = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    with _parameters_without_memory():
        maker = (
            transformers.AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
        )
        model = cast(nn.Module, maker(config, dtype=wanted))
    _store_parameters(model, files)
    if os.path.exists(os.path.join(directory, "generation_config.json")):
        settings = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
        model.generation_config = settings  # type: ignore[assignment]  # HF attribute
    return model.train()


def _build_diffusion_model(config: dict[str, Any], files: TensorFiles, dtype: str | torch.dtype) -> nn.Module:
    """Its configuration says no dtype: bf16 where all files are, else fp32."""
    wanted = dtype if isinstance(dtype, torch.dtype) else dtype_of(dtype)
    if wanted is None:
        stored = {entry.dtype for entry in files.entries.values()}
        wanted = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
    with _parameters_without_memory():
        model = diffusion.make(config, wanted)
    _store_parameters(model, files)
    return model.train()


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype meant by "auto" (None), "bfloat16" or "float32". Raises ConfigError for anything else."""
    dtypes = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in dtypes:
        raise ConfigError(f"dtype {name!r} not understood; write auto, bfloat16 or float32")
    return dtypes[name]


def load_gguf(path: str) -> tuple[nn.Module, Any]:
    """(model in fp32, tokenizer) of a GGUF file, dequantized by transformers; held in memory as a whole.

    Needs the packages `gguf` and `accelerate`.
    """
    import transformers

    directory, name = os.path.split(os.path.abspath(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=name, local_files_only=True)
    options: dict[str, Any] = {"gguf_file": name, "dtype": torch.float32, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # newer versions leave the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    return model.train(), tokenizer
