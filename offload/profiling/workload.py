"""A model's workload for the planner, from one forward pass of two samples and one of three, on the meta device.

What a sample takes is the difference of the two; what does not grow with the batch is the rest. (A batch of one is a
special case: its transposes are contiguous, so copies are missing.) Nothing is allocated, so a model of any number of
parameters takes seconds.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offload.errors import ConfigError
from offload.model.blocks import Cut, cut
from offload.model.flat import TRAINABLE_DTYPES, lay_out
from offload.model.on_device import stays_nbytes
from offload.model.on_meta import model_on_meta
from offload.model.presets import Decoder, shape_of
from offload.planner.workload import BlockWork, SavedTensor, Workload
from offload.profiling.trace import ROOT, Kept, Part, trace_forward
from offload.profiling.working_set import EARLY, HELD, envelope, trace_live_bytes

logger = logging.getLogger("offload")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of the model's forward."""

TOKENS_MAX = 1 << 24
"""Of a sequence of a model that is only described. Its token ids are in memory while it is traced."""
N_SAMPLES = (2, 3)
"""Batches that are traced."""
LAYERS_TRACED = 3
"""Of a preset."""


def token_inputs(model: nn.Module, n_samples: int, tokens_per_sample: int) -> Inputs:
    """Token ids (n_samples, tokens_per_sample) for `model`, with labels where its forward takes them.

    They are on the device of the model's parameters, and real for the meta device. Raises ConfigError for a model
    that does not take `input_ids` or one positional tensor.
    """
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    ids = torch.zeros(n_samples, tokens_per_sample, dtype=torch.int64, device=device)
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        required = [p for p in names.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if len(required) != 1:
            raise ConfigError(
                f"{type(model).__name__}.forward takes {', '.join(names)}: say with `inputs` what to call it with"
            )
        return (ids,), {}
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "labels" in names:
        kwargs["labels"] = ids
    if "use_cache" in names:
        kwargs["use_cache"] = False
    return (), kwargs


@contextmanager
def _on_meta(model: nn.Module, compute_dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the model is in training mode and its parameters and buffers have shapes only; fp32 parameters are of
    `compute_dtype`, where it is given."""
    was_training = {module: module.training for module in model.modules()}
    moved: dict[int, torch.Tensor] = {}
    places = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, held in store.items():
                is_cast = isinstance(held, nn.Parameter) and held.dtype == torch.float32 and compute_dtype
                if held is None or (held.is_meta and not is_cast):
                    continue
                if id(held) not in moved:
                    shape = torch.empty_like(held, device="meta", dtype=compute_dtype if is_cast else None)
                    moved[id(held)] = (
                        nn.Parameter(shape, held.requires_grad) if isinstance(held, nn.Parameter) else shape
                    )
                places.append((store, name, held))
    model.train()
    try:
        for store, name, held in places:
            store[name] = moved[id(held)]  # type: ignore[assignment]  # Parameter for Parameter
        yield
    finally:
        for store, name, held in places:
            store[name] = held  # type: ignore[assignment]
        for module, training in was_training.items():
            module.training = training


def profile_model(
    model: nn.Module,
    tokens_per_sample: int,
    *,
    blocks: object = None,
    inputs: Callable[[int], Inputs] | None = None,
    name: str = "",
    compute_dtype: torch.dtype | None = None,
) -> Workload:
    """The workload of training `model` on sequences of `tokens_per_sample` tokens, traced without data.

    `model` may be on any device; it is left as it was. `compute_dtype` is what its fp32 parameters are computed in
    (`offload.wrap`). `inputs(n)` gives the arguments of its forward for n samples
    (floats on the meta device, integers on the CPU); by default token ids and labels. `blocks` as in
    `offload.model.blocks.find_blocks`. Raises ConfigError where the forward pass depends on data, or on the number of
    samples in other ways than linearly.
    """
    stays = stays_nbytes(model)  # before what shares memory is parted
    with _on_meta(model, compute_dtype):
        traced = trace_workload(model, tokens_per_sample, blocks=blocks, inputs=inputs, name=name)
    return replace(traced, stays_nbytes=stays)


def trace_workload(
    model: nn.Module,
    tokens_per_sample: int,
    *,
    blocks: object = None,
    inputs: Callable[[int], Inputs] | None = None,
    name: str = "",
) -> Workload:
    """As `profile_model`, but running forward for real on the device where the model is."""
    pieces = cut(model, blocks)
    make = inputs or (lambda n: token_inputs(model, n, tokens_per_sample))
    two, three = (trace_forward(model, pieces.blocks, *make(n)) for n in N_SAMPLES)
    root_flops = _per_sample_flops("the root", two[ROOT], three[ROOT])
    root_saved, _ = _per_sample_saved("the root", two[ROOT], three[ROOT])
    trainable, frozen = _numels(pieces.root)
    working, early_numel = _working_sets(model, pieces, make)
    largest = [parts[ROOT].largest_product_nbytes for parts in (two, three)]
    return Workload(
        name=name or type(model).__name__,
        tokens_per_sample=tokens_per_sample,
        param_nbytes=_param_nbytes(model),
        blocks=tuple(
            _block(pieces, i, two[i], three[i], working.get(i, ())) for i in range(len(pieces.blocks))
        ),
        root_trainable_numel=trainable,
        root_frozen_numel=frozen,
        root_flops_per_sample=sum(root_flops.values()),
        logits_nbytes_per_sample=max(0, largest[1] - largest[0]),
        root_saved=root_saved,
        root_working=working.get(ROOT, ()),
        root_padding_numel=_padding_numel(pieces.root),
        root_held=working.get(HELD, ()),
        trainable_shapes=_trainable_shapes(pieces),
        root_early_numel=early_numel,
        one_dtype=_one_dtype(pieces, _param_nbytes(model)),
        stays_nbytes=stays_nbytes(model),
    )


def _working_sets(
    model: nn.Module, pieces: Cut, make: Callable[[int], Inputs]
) -> tuple[dict[int, tuple[tuple[int, int], ...]], int]:
    """What is alive in backward, by position, and how many of the root's parameters have their gradients before the
    blocks. Empty where backward cannot run without data: the planner then counts all saved tensors twice instead."""
    try:
        two, three = (trace_live_bytes(model, pieces.blocks, *make(n)) for n in N_SAMPLES)
    except (ConfigError, NotImplementedError, RuntimeError) as error:
        logger.debug("backward of %s cannot be traced without data: %s", type(model).__name__, error)
        return {}, 0
    (early_numel,) = two.pop(EARLY)
    return {position: envelope(two[position], three[position]) for position in two}, early_numel


def _block(
    pieces: Cut, index: int, two: Part, three: Part, working: tuple[tuple[int, int], ...]
) -> BlockWork:
    name = pieces.blocks[index][0]
    trainable, frozen = _numels(pieces.block_parameters[index])
    saved, fixed_nbytes = _per_sample_saved(name, two, three)
    return BlockWork(
        name=name,
        trainable_numel=trainable,
        frozen_numel=frozen,
        forward_flops_per_sample=_per_sample_flops(name, two, three),
        input_nbytes_per_sample=three.input_nbytes - two.input_nbytes,
        saved=saved,
        saved_fixed_nbytes=fixed_nbytes,
        working=working,
        padding_numel=_padding_numel(pieces.block_parameters[index]),
    )


def _numels(parameters: list[tuple[str, nn.Parameter]]) -> tuple[int, int]:
    trainable = sum(p.numel() for _, p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for _, p in parameters) - trainable


def _trainable_shapes(pieces: Cut) -> tuple[tuple[int, ...], ...]:
    """The root's, then those of the blocks."""
    parameters = (p for held in (pieces.root, *pieces.block_parameters) for _, p in held)
    return tuple(tuple(p.shape) for p in parameters if p.requires_grad)


def _padding_numel(parameters: list[tuple[str, nn.Parameter]]) -> int:
    """What laying the trainable parameters end to end adds (`model.flat`)."""
    trainable = [(name, p) for name, p in parameters if p.requires_grad and p.dtype in TRAINABLE_DTYPES]
    padded = sum(buffer.n_elements for buffer in lay_out("", trainable, None).buffers)
    return padded - sum(p.numel() for _, p in trainable)


def _param_nbytes(model: nn.Module) -> int:
    """Bytes of a parameter in the dtype that most of them have."""
    numel: Counter[int] = Counter()
    for parameter in model.parameters():
        numel[parameter.element_size()] += parameter.numel()
    return numel.most_common(1)[0][0]


def _one_dtype(pieces: Cut, nbytes: int) -> bool:
    """Whether all trainable parameters of the blocks have elements of `nbytes`."""
    parameters = (p for block in pieces.block_parameters for _, p in block)
    return all(p.element_size() == nbytes for p in parameters if p.requires_grad)


def _per_sample_flops(name: str, two: Part, three: Part) -> dict[str, float]:
    if two.flops_by_kind.keys() != three.flops_by_kind.keys():
        raise ConfigError(f"{name}: three samples run other operations than two; the planner cannot scale it")
    grown = {kind: float(three.flops_by_kind[kind] - n) for kind, n in two.flops_by_kind.items()}
    return {kind: n_flops for kind, n_flops in grown.items() if n_flops}


def _per_sample_saved(name: str, two: Part, three: Part) -> tuple[tuple[SavedTensor, ...], int]:
    """What grows with the batch, tensor by tensor, and the bytes of the rest."""
    if [kept.name for kept in two.kept] != [kept.name for kept in three.kept]:
        difference = {kept.name for kept in two.kept} ^ {kept.name for kept in three.kept}
        raise ConfigError(
            f"{name}: backward keeps other tensors for three samples than for two ({', '.join(sorted(difference))}); "
            "the planner cannot scale it"
        )
    saved, fixed_nbytes = [], 0
    for first, second in zip(two.kept, three.kept, strict=True):
        grown_nbytes = second.nbytes - first.nbytes
        if grown_nbytes < 0:
            raise ConfigError(f"{name}: {first.name} shrinks from {first.nbytes} to {second.nbytes} bytes")
        fixed_nbytes += first.nbytes - N_SAMPLES[0] * grown_nbytes
        if grown_nbytes:
            saved.append(_saved_tensor(first, second))
    return tuple(saved), fixed_nbytes


def _saved_tensor(first: Kept, second: Kept) -> SavedTensor:
    return SavedTensor(
        first.name, first.source, second.nbytes - first.nbytes, float(max(0, second.flops - first.flops))
    )


def workload_of(source: str, tokens_per_sample: int, dtype: str = "auto") -> Workload:
    """The workload of a preset, a model directory or a `config.json`; see `offload.model.on_meta.model_on_meta`."""
    if not 0 < tokens_per_sample <= TOKENS_MAX:
        raise ConfigError(f"sequences of {tokens_per_sample} tokens: give 1 to {TOKENS_MAX}")
    name = os.path.basename(os.path.normpath(os.path.abspath(source))) if os.path.exists(source) else source
    model = model_on_meta(source, dtype, layers_max=LAYERS_TRACED)
    traced = profile_model(model, tokens_per_sample, name=name)
    return _with_all_layers(traced, model, shape_of(source).layers) if isinstance(model, Decoder) else traced


def _with_all_layers(traced: Workload, model: Decoder, n_layers: int) -> Workload:
    """The workload of a preset of `n_layers` whose first, second and last were traced: all between are as the second.
    What the first alone is given (rotary positions) counts as its, and the root keeps what the last gives."""
    n_more = n_layers - len(traced.blocks)
    if n_more <= 0:
        return traced
    first, second, last = traced.blocks
    list_name = second.name.removesuffix("1")
    shapes = tuple(tuple(p.shape) for p in model.layers[1].parameters())
    last_name = f"{list_name}{n_layers - 1}"
    return replace(
        traced,
        blocks=(
            first,
            *(replace(second, name=f"{list_name}{i}") for i in range(1, n_layers - 1)),
            replace(last, name=last_name),
        ),
        trainable_shapes=traced.trainable_shapes + n_more * shapes,
        root_saved=tuple(
            replace(t, name=t.name.replace(f"{last.name}/", f"{last_name}/")) for t in traced.root_saved
        ),
    )
