"""What a block computes and what backward needs of it, written down once, and what that leaves to recompute.

[Note: recipe] The first time a block is recomputed, a `Recorder` lists its operations below autograd, which storages
each reads and writes, and which tensors autograd saves. From this `Recipe` follows, for any choice of kept
operations, which others have to run: those whose results, through whatever chain, end in a saved tensor that is not
kept. All others are skipped: they return memory of the right shape that nobody reads (the last matrix product of a
layer, for one). Values and their order do not change, so neither do gradients. Where the list would not be the whole
truth (a kernel that dispatch does not see, a storage written twice) operations are run as they come, or the recipe is
not used at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
)
SMALL_NBYTES = 64
"""Tensors of so few bytes stay where they are."""
UNCOUNTED = frozenset({"detach", "alias"})
"""Comes and goes with autograd, and computes nothing."""
NO_STORAGE = -1
"""In place of a storage number: a sparse tensor has values and indices, and no storage of its own."""


@dataclass(frozen=True)
class TensorMade:
    """What memory a result takes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


Constant = bool | int | float | None
"""A result that is no tensor: sizes, and what is not there, as fused attention gives them."""


@dataclass
class RecordedOp:
    """One dispatched operation. `reads` and `writes` are storage numbers; a view is neither."""

    func: Any
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    needs: tuple[int, ...]
    """Earlier operations whose results it reads."""
    is_free: bool
    """A view or an allocation: run whatever its input holds, and no reason to run anything else."""
    may_skip: bool
    may_keep: bool
    outputs: tuple[TensorMade | Constant, ...] = ()

    @cached_property
    def tensors(self) -> list[TensorMade]:
        """Of its results."""
        return [made for made in self.outputs if isinstance(made, TensorMade)]


@dataclass(frozen=True)
class SavedValue:
    """A tensor that autograd saves, made by operation `op`; in the order in which they are made."""

    op: int
    output: int
    """Which of the operation's results it is."""
    nbytes: int
    writers: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """The `nth` time (from 1) that the block enters its submodule `module`; `op` is the next operation."""

    module: str
    nth: int
    op: int


@dataclass
class Recipe:
    """See [Note: recipe]. `why_not` says why it may not be used; empty when it may."""

    ops: list[RecordedOp]
    saved: list[SavedValue]
    entries: list[Entry] = field(default_factory=list)
    """In the order in which they came."""
    why_not: str = ""
    _runs: dict[frozenset[int], frozenset[int]] = field(default_factory=dict)
    _changed: dict[frozenset[int], bytes] = field(default_factory=dict)

    @cached_property
    def funcs(self) -> list[Any]:
        """What its operations call, in order, and None behind the last."""
        return [*(op.func for op in self.ops), None]

    def large(self) -> list[SavedValue]:
        """Saved tensors that are worth a choice; the others are seeds and counts beside them."""
        return [value for value in self.saved if value.nbytes > SMALL_NBYTES]

    def keepable(self) -> list[SavedValue]:
        """Saved tensors whose operation may be kept instead of run again."""
        return [value for value in self.saved if self.ops[value.op].may_keep]

    def must_run(self, kept: frozenset[int]) -> frozenset[int]:
        """Operations that recomputation has to run when the results of `kept` are at hand."""
        known = self._runs.get(kept)
        if known is None:
            needed: set[int] = set()
            waiting = [w for value in self.saved for w in value.writers if w not in kept]
            waiting += [i for i, op in enumerate(self.ops) if not op.may_skip and not op.is_free]
            while waiting:
                index = waiting.pop()
                if index in needed or index in kept:
                    continue
                needed.add(index)
                waiting += self.ops[index].needs
            known = self._runs[kept] = frozenset(needed)
        return known

    def changed(self, kept: frozenset[int]) -> bytes:
        """By operation: whether recomputation does not run it as it comes."""
        known = self._changed.get(kept)
        if known is None:
            runs = self.must_run(kept)
            is_changed = (i in kept or not (op.is_free or i in runs) for i, op in enumerate(self.ops))
            known = self._changed[kept] = bytes(is_changed)
        return known

    def first_changed(self, kept: frozenset[int]) -> int | None:
        """The first such operation; None: it runs all."""
        first = self.changed(kept).find(1)
        return None if first < 0 else first

    def entry_before(self, op: int) -> Entry | None:
        """The last entry that comes before the operation."""
        return next((entry for entry in reversed(self.entries) if entry.op <= op), None)


def _draws_random_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Skipping such an operation would shift the numbers of the next; attention without dropout draws none."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    position = names.index("dropout_p")
    p = kwargs.get("dropout_p", args[position] if position < len(args) else 0.0)
    return bool(p != 0.0)


def _shape_depends_on_data(func: Any, inputs: list[torch.Tensor]) -> bool:
    """Such an operation may give another shape, or send Python another way, the next time."""
    if func is torch.ops.aten.index.Tensor:  # only with a mask
        return any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1:])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


class Recorder(TorchDispatchMode):
    """Runs everything and writes the recipe down. `given` are the tensors that are there before: inputs, parameters,
    buffers. What is neither given nor made by an operation seen here makes the recipe unusable."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self._refs: dict[int, StorageWeakRef] = {}
        self._numbers: dict[int, int] = {}
        self._why_not = ""
        self._given = {NO_STORAGE, *(self._number(t) for t in given)}
        self._writers: dict[int, list[int]] = {}
        self._ops: list[RecordedOp] = []
        self._saved: dict[int, SavedValue] = {}
        self._output: dict[int, int] = {}
        self._depends_on_data = False
        self._statistics: dict[int, list[int]] = {}
        self._entries: list[Entry] = []
        self._n_entered: dict[str, int] = defaultdict(int)

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._depth = torch._C._len_torch_dispatch_stack()
        return self

    def entered(self, module: str) -> None:
        """The block enters one of its submodules."""
        self._n_entered[module] += 1
        if torch._C._len_torch_dispatch_stack() == self._depth:  # not inside a mode of the block's own
            self._entries.append(Entry(module, self._n_entered[module], len(self._ops)))

    def _number(self, tensor: torch.Tensor) -> int:
        if tensor.layout is not torch.strided:
            self.cannot("it computes with sparse tensors")
            return NO_STORAGE
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._refs:
            self._refs[key] = StorageWeakRef(
                storage
            )  # frees the bytes, keeps the address from being used twice
        return self._numbers.setdefault(key, len(self._numbers))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is not None and hooks[0] != self.save:
            self.cannot("what it saves for backward goes through hooks of its own")
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name in UNCOUNTED:
            return result
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if _shape_depends_on_data(func, inputs):
            self._depends_on_data = True
        leaves = pytree.tree_leaves(result)
        outputs = [t for t in leaves if isinstance(t, torch.Tensor)]
        reads = tuple(dict.fromkeys(self._number(t) for t in inputs))
        mutates = bool(func._schema.is_mutable)
        for position, tensor in enumerate(outputs):
            self._output[self._number(tensor)] = position
        made = tuple(dict.fromkeys(self._number(t) for t in outputs))
        fresh = [number for number in made if number not in reads]
        writes = tuple(_mutated(func, args, kwargs, self._number) if mutates else fresh)
        is_view = not mutates and bool(outputs) and not fresh
        allocates = name in _ALLOCATIONS
        if name == "lift_fresh":  # a constant made on the spot
            self._given.update(reads)
        if not is_view:
            self._check_known([number for number in reads if number not in writes])
        needs = tuple(dict.fromkeys(w for number in reads for w in self._writers.get(number, ())))
        known = all(isinstance(leaf, torch.Tensor | Constant) for leaf in leaves)
        plain = not mutates and bool(outputs) and known and len(leaves) == len(func._schema.returns)
        plain = plain and NO_STORAGE not in made
        random = _draws_random_numbers(func, args, kwargs)
        index = len(self._ops)
        self._ops.append(
            RecordedOp(
                func=func,
                reads=reads,
                writes=writes,
                needs=needs,
                is_free=is_view or allocates,
                may_skip=plain and not is_view and not allocates and not random,
                may_keep=plain and not random and not allocates and len(fresh) == len(outputs),
                outputs=tuple(
                    TensorMade(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
                    if isinstance(leaf, torch.Tensor)
                    else leaf
                    for leaf in leaves
                )
                if plain
                else (),
            )
        )
        for number in writes:
            if not allocates:
                self._writers.setdefault(number, []).append(index)
        for number in reads:
            for writer in self._statistics.get(number, ()):
                self._ops[writer].may_skip = self._ops[writer].may_keep = False
        for number in _running_statistics(func, args, kwargs, self._number):
            self._statistics.setdefault(number, []).append(index)
        return result

    def cannot(self, why: str) -> None:
        """Something was done that a recipe does not tell of."""
        self._why_not = self._why_not or why

    def read(self, tensor: torch.Tensor) -> None:
        """Backward reads `tensor`, as if autograd had saved it; of one that was there before, nothing follows."""
        if tensor.layout is not torch.strided:
            self.cannot("it computes with sparse tensors")
        elif int(tensor.untyped_storage()._cdata) in self._refs and self._writers.get(self._number(tensor)):
            self.save(tensor)

    def _check_known(self, reads: list[int]) -> None:
        for number in reads:
            if number not in self._given and not self._writers.get(number):
                self._why_not = self._why_not or "it computes with something that no visible operation made"

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd saves `tensor`; a pack hook."""
        number = self._number(tensor)
        if number in self._given or number in self._saved:
            return tensor
        writers = tuple(self._writers.get(number, ()))
        if not writers:
            self._why_not = self._why_not or "backward needs a tensor that no visible operation made"
            return tensor
        nbytes = tensor.untyped_storage().nbytes()
        self._saved[number] = SavedValue(writers[-1], self._output.get(number, 0), nbytes, writers)
        return tensor

    def recipe(self) -> Recipe:
        """What was seen."""
        if not self._saved:
            self._why_not = self._why_not or "it saves nothing for backward"
        if self._depends_on_data:
            self._why_not = self._why_not or "what it computes, or in which shape, depends on data"
        for writers in self._writers.values():
            if len(writers) > 1:  # changed in place: the kept value would not be the one that is read later
                for index in writers:
                    self._ops[index].may_keep = self._ops[index].may_skip = False
        order = sorted(self._saved.values(), key=lambda value: (value.op, value.output))
        return Recipe(self._ops, order, self._entries, self._why_not)


def _running_statistics(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: Callable[[torch.Tensor], int]
) -> list[int]:
    """Storage numbers of the running statistics that `func` may write to: schemas of older norms do not say so."""
    names = [argument.name for argument in func._schema.arguments]
    if "running_mean" not in names:
        return []
    found = []
    for name in ("running_mean", "running_var"):
        position = names.index(name)
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, torch.Tensor):
            found.append(number(value))
    return found


def _mutated(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: Callable[[torch.Tensor], int]
) -> list[int]:
    """Storage numbers of the arguments that `func` writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found += [number(t) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return list(dict.fromkeys(found))
