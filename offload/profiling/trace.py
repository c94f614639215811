"""One forward pass as a graph: which operation made which bytes, what backward keeps, where the FLOPs are.

[Note: what is traced] The pass runs once under a dispatch mode that sees every operation below autograd, with hooks
that say which module is running and a saved-tensor hook that sees what backward will need. Bytes are those of
storages: two views of one storage are one entry, and a saved slice holds all of its storage. Parameters, buffers and
a block's inputs are not counted; they are there anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offload.errors import ConfigError
from offload.profiling import flops, meta_device

ROOT = -1
"""The position of everything that is in no block."""


@dataclass
class Operation:
    """One dispatched operation with what it read."""

    source: str
    place: str
    position: int
    flops: int
    parents: list[Node]


@dataclass(eq=False)
class Node:
    """A storage, its bytes, and the operations that wrote it, in order."""

    nbytes: int
    position: int
    order: int
    operations: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class Kept:
    """A storage that backward needs, and the FLOPs that make it from what is kept or recomputed before it."""

    name: str
    source: str
    nbytes: int
    flops: int


@dataclass
class Part:
    """What was seen in one block, or in the root."""

    flops_by_kind: Counter[str] = field(default_factory=Counter)
    kept: list[Kept] = field(default_factory=list)
    input_nbytes: int = 0
    is_routed: bool = False
    largest_product_nbytes: int = 0


class Trace(TorchDispatchMode):
    """Records what runs inside. `parts` holds block i at i and the root at `ROOT`, once `finish` was called."""

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.parts = {position: Part() for position in (ROOT, *range(len(blocks)))}
        self._names = {module: name for name, module in model.named_modules()}
        self._positions = {module: i for i, (_, module) in enumerate(blocks)}
        self._block_names = [name for name, _ in blocks]
        self._modules: list[str] = [""]
        self._position = ROOT
        self._nodes: dict[int, Node] = {}
        self._alive: dict[int, Any] = {}  # storages stay, so that no address is used twice
        self._given = {self._key(t) for t in (*model.parameters(), *model.buffers())}
        self._parameters = {self._key(p) for p in model.parameters()}
        self._seen_inputs: set[int] = set()
        self._kept: dict[int, int] = {}

    def _key(self, tensor: torch.Tensor) -> int:
        if tensor.layout is not torch.strided:
            raise ConfigError(
                "the model cannot be traced, because it computes with sparse tensors: leave batch= out, and it trains "
                "without a plan"
            )
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        self._alive.setdefault(key, storage)
        return key

    def _node(self, tensor: torch.Tensor) -> Node:
        key = self._key(tensor)
        node = self._nodes.get(key)
        if node is None:
            node = Node(tensor.untyped_storage().nbytes(), self._position, len(self._nodes))
            self._nodes[key] = node
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = meta_device.run(func, args, kwargs)
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        kind, n_flops = flops.count(func, args, kwargs, result)
        part = self.parts[self._position]
        if func._overloadpacket is torch.ops.aten.topk:
            part.is_routed = True
        read_keys = {self._key(t) for t in inputs}
        if kind == flops.MATMUL and read_keys & self._parameters:
            kind = flops.LINEAR
        if n_flops:
            part.flops_by_kind[kind] += n_flops
        written = [t for t in outputs if func._schema.is_mutable or self._key(t) not in read_keys]
        if written:
            parents = [self._node(t) for t in inputs if self._key(t) not in self._given]
            source = kind or func._overloadpacket.__name__.strip("_")
            operation = Operation(source, self._modules[-1], self._position, n_flops, parents)
            for tensor in written:
                node = self._node(tensor)
                if not node.operations or node.operations[-1] is not operation:
                    node.operations.append(operation)
                if n_flops:
                    part.largest_product_nbytes = max(part.largest_product_nbytes, node.nbytes)
        return result

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A saved tensor, as autograd hands it over."""
        key = self._key(tensor)
        if key not in self._given and key not in self._seen_inputs:
            self._node(tensor)
            self._kept.setdefault(key, self._position)
        return tensor

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """`module` begins."""
        self._modules.append(self._names[module])
        position = self._positions.get(module)
        if position is None:
            return
        self._position = position
        part = self.parts[position]
        for leaf in pytree.tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                continue
            key = self._key(leaf)
            if leaf.is_floating_point() and key not in self._seen_inputs and key not in self._given:
                part.input_nbytes += leaf.untyped_storage().nbytes()
            self._seen_inputs.add(key)

    def leave(self, module: nn.Module) -> None:
        """`module` ends."""
        self._modules.pop()
        if module in self._positions:
            self._position = ROOT

    def ignore(self, tensors: Any) -> None:
        """Tensors that the caller holds: the batch."""
        self._given |= {self._key(t) for t in pytree.tree_leaves(tensors) if isinstance(t, torch.Tensor)}

    def finish(self) -> dict[int, Part]:
        """The parts, with what each keeps, in the order in which it was made."""
        spent: set[int] = set()
        for key in sorted(self._kept, key=lambda key: self._nodes[key].order):
            node, position = self._nodes[key], self._kept[key]
            n_flops = _flops_to_make(node, position, spent)
            if node.nbytes:
                source = node.operations[-1].source if node.operations else "input"
                self.parts[position].kept.append(
                    Kept(self._name(node, position), source, node.nbytes, n_flops)
                )
        for position, part in self.parts.items():
            part.kept = _merged(part.kept) if part.is_routed and position != ROOT else _numbered(part.kept)
        return self.parts

    def _name(self, node: Node, position: int) -> str:
        if not node.operations:
            return "input"
        place = node.operations[-1].place
        if position != ROOT:
            prefix = self._block_names[position]
            place = place[len(prefix) + 1 :] if place.startswith(prefix) else place
        return f"{place}/{node.operations[-1].source}" if place else node.operations[-1].source


def _flops_to_make(node: Node, position: int, spent: set[int]) -> int:
    """FLOPs behind `node` in this part. Each operation is charged once, to the first kept node that needs it: called
    in the order of their making, so what is kept before it has been charged already."""
    total, waiting = 0, [node]
    while waiting:
        for operation in waiting.pop().operations:
            if id(operation) in spent or operation.position != position:
                continue
            spent.add(id(operation))
            total += operation.flops
            waiting += operation.parents
    return total


def _numbered(kept: list[Kept]) -> list[Kept]:
    """Names made unique: the second `mlp/mul` becomes `mlp/mul#2`."""
    seen: Counter[str] = Counter()
    named = []
    for entry in kept:
        seen[entry.name] += 1
        suffix = f"#{seen[entry.name]}" if seen[entry.name] > 1 else ""
        named.append(Kept(entry.name + suffix, entry.source, entry.nbytes, entry.flops))
    return named


def _merged(kept: list[Kept]) -> list[Kept]:
    """The same tensor of every expert as one entry: same place, same operation, same FLOPs a byte."""
    groups: dict[tuple[str, str, float], list[Kept]] = {}
    for entry in kept:
        groups.setdefault((entry.name, entry.source, round(entry.flops / entry.nbytes, 6)), []).append(entry)
    return _numbered(
        [
            Kept(name, source, sum(e.nbytes for e in group), sum(e.flops for e in group))
            for (name, source, _), group in groups.items()
        ]
    )


@contextmanager
def _watched(model: nn.Module, trace: Trace) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(trace.enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(lambda m, *_: trace.leave(m), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace_forward(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, Part]:
    """Run `model(*args, **kwargs)` once with gradients and return what was seen, by position. Works on real data and
    on the meta device. See [Note: what is traced]."""
    trace = Trace(model, blocks)
    trace.ignore((args, kwargs))
    with (
        torch.enable_grad(),
        _watched(model, trace),
        torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda t: t),
        meta_device.FusedOperations(),
        trace,
    ):
        model(*args, **kwargs)
    return trace.finish()
