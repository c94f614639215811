"""What a block's forward can change: attributes of its modules, their buffers, and the containers and objects there.

[Note: places] A *place* is something that holds values and may be changed: the attributes of a module or an object, a
list, a dictionary, a set, a deque, a variable that a function has closed over or finds among its globals. What a place
holds is compared by identity: a number, a string or a tuple that is the same object is the same, a tensor tells by its
version, and what else can be changed is a place of its own. So one look costs about a microsecond for each module.
"""

from __future__ import annotations

import enum
import functools
import logging
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from offload.errors import UsageError
from offload.recompute.generators import is_generator

logger = logging.getLogger("offload")

_ABSENT: Any = object()
"""In place of a variable without a value."""
_LEAVES = (
    int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, enum.Enum, torch.Tensor
)  # fmt: skip
_FOREIGN = (
    "torch.",
    "offload.",
    "logging.",
    "threading.",
    "concurrent.",
    "multiprocessing.",
    "asyncio.",
    "_io.",
    "_thread.",
)
"""Objects of classes of these modules are not looked into."""
_DEPTH = 4
"""How far containers and objects are followed into one another from an attribute."""
_MANY = 5000
"""Of the containers, objects and functions that a block reaches, no more are followed; nearest ones come first."""
_LONG = 1000
"""A list or dictionary with more items is taken to change at its end only; its items are not followed."""
_ARRAY_NBYTES = 1 << 16
"""NumPy arrays beyond are not looked at."""

OF_MODULE = frozenset(vars(nn.Module())) | {"forward"}
"""Attributes that torch or this library keeps in a module."""


@dataclass(frozen=True)
class Place:
    """See [Note: places]. `key`: of the one value in `thing` that counts, for a global variable."""

    path: str
    thing: Any
    key: str | None = None
    of_module: bool = False
    outside: nn.Module | None = None
    """The module outside of all blocks that it belongs to."""
    depth: int = 0


@dataclass(frozen=True)
class Named:
    """A tensor in a place."""

    path: str
    tensor: torch.Tensor
    registered: bool
    outside: nn.Module | None


@dataclass
class Content:
    """What a place held when it was looked at."""

    place: Place
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    n: int
    tensors: list[Named] = field(default_factory=list)

    def holds(self) -> bool:
        """Whether it does so still."""
        place = self.place
        thing = place.thing
        if place.of_module:
            if len(thing) != self.n:
                return False
            return not self.n or all(map(is_, thing.values(), self.values))
        if place.key is not None:
            return thing.get(place.key, _ABSENT) is self.values[0]
        if isinstance(thing, types.CellType):
            return _in_cell(thing) is self.values[0]
        if isinstance(thing, np.ndarray):
            return thing.tobytes() == self.values[0]
        if isinstance(thing, type):
            thing = vars(thing)
        if len(thing) != self.n:
            return False
        if not self.n or _is_long(thing):
            return True
        if isinstance(thing, Mapping):
            return all(map(is_, thing.values(), self.values)) and all(map(is_, thing, self.keys))
        return all(map(is_, thing, self.values))

    def with_copies(self, copies: Mapping[int, torch.Tensor]) -> Content:
        """The same with these in place of tensors, by id()."""
        return replace(self, values=tuple(_with_copies(value, copies) for value in self.values))

    def put(self) -> None:
        """Let the place hold it again. Raises UsageError for a long list of which items have been taken."""
        place, thing = self.place, self.place.thing
        if place.key is not None:
            _put_key(thing, place.key, self.values[0])
        elif isinstance(thing, types.CellType):
            if self.values[0] is _ABSENT:
                del thing.cell_contents
            else:
                thing.cell_contents = self.values[0]
        elif isinstance(thing, np.ndarray):
            thing[...] = np.frombuffer(self.values[0], thing.dtype).reshape(thing.shape)
        elif isinstance(thing, dict | _Slots):
            self._put_into_dict(thing)
        elif isinstance(thing, type):
            self._put_into_class(thing)
        elif isinstance(thing, set):
            thing.clear()
            thing.update(self.values)
        elif isinstance(thing, list):
            self._check_long(thing)
            del thing[self.n - len(self.values) :]
            thing.extend(self.values)
        else:
            thing.clear()
            thing.extend(self.values)

    def _put_into_dict(self, thing: MutableMapping[Any, Any]) -> None:
        if self.place.of_module:  # torch's own attributes stay as they are
            before = dict(zip(self.keys, self.values, strict=True))
            for key in [k for k in thing if k not in before and k not in OF_MODULE]:
                del thing[key]
            for key, value in before.items():
                if key not in OF_MODULE and thing.get(key, _ABSENT) is not value:
                    thing[key] = value
            return
        self._check_long(thing)
        for key in list(thing)[self.n - len(self.values) :]:
            del thing[key]
        thing.update(zip(self.keys, self.values, strict=True))

    def _put_into_class(self, thing: type) -> None:
        before = dict(zip(self.keys, self.values, strict=True))
        for key in [key for key in vars(thing) if key not in before and not key.startswith("__")]:
            delattr(thing, key)
        for key, value in before.items():
            if vars(thing).get(key, _ABSENT) is not value and not key.startswith("__"):
                setattr(thing, key, value)

    def _check_long(self, thing: Any) -> None:
        if len(thing) < self.n - len(self.values):
            raise UsageError(
                f"forward takes items out of {self.place.path}, which holds more than {_LONG}: it runs again in "
                "backward and needs them. Keep fewer, or keep the graph, with activations='keep'"
            )


class _Slots(MutableMapping[str, Any]):
    """Attributes of an object that has no dictionary of them."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        kinds = [kind.__dict__.get("__slots__", ()) for kind in type(owner).__mro__]
        self._names = [n for names in kinds for n in ((names,) if isinstance(names, str) else names)]

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if hasattr(self._owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _with_copies(value: Any, copies: Mapping[int, torch.Tensor]) -> Any:
    if not isinstance(value, tuple):
        return copies.get(id(value), value)
    items = [_with_copies(item, copies) for item in value]
    if all(map(is_, items, value)):
        return value
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def _is_long(thing: Any) -> bool:
    return isinstance(thing, list | dict) and len(thing) > _LONG


def _put_key(thing: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        thing.pop(key, None)
    else:
        thing[key] = value


def look(place: Place, since: int | None = None) -> Content:
    """What it holds now; `since`: of a long list or dictionary, the items from this one on."""
    thing, keys = place.thing, ()
    values: tuple[Any, ...]
    if place.key is not None:
        values = (thing.get(place.key, _ABSENT),)
    elif isinstance(thing, types.CellType):
        values = (_in_cell(thing),)
    elif isinstance(thing, np.ndarray):
        return Content(place, (), (thing.tobytes(),), 1)
    elif _is_long(thing):
        first = len(thing) if since is None else min(since, len(thing))
        values = tuple(list(thing.values() if isinstance(thing, dict) else thing)[first:])
        keys = tuple(list(thing)[first:]) if isinstance(thing, dict) else ()
        return Content(place, keys, values, len(thing))
    elif isinstance(thing, dict | type | _Slots):
        found = vars(thing) if isinstance(thing, type) else thing
        keys, values = tuple(found), tuple(found.values())
    else:
        values = tuple(thing)
    content = Content(place, keys, values, len(values))
    names = keys or tuple(range(len(values)))
    for name, value in zip(names, values, strict=True):
        if isinstance(value, torch.Tensor | tuple):
            content.tensors += _tensors(place, _join(place, name), value)
    return content


def _join(place: Place, name: Any) -> str:
    if isinstance(place.thing, types.CellType) or place.key is not None:
        return place.path
    return f"{place.path}.{name}" if place.of_module or isinstance(name, str) else f"{place.path}[{name}]"


def _tensors(place: Place, path: str, value: Any) -> Iterator[Named]:
    """Those that only forward changes: no parameters, no views of them, no results with a graph."""
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _tensors(place, f"{path}[{number}]", item)
    elif isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        mine = value.grad_fn is None and not isinstance(value._base, nn.Parameter)
        if mine and value.layout is torch.strided and not value.is_inference():
            yield Named(path, value, place.path.endswith(_BUFFERS), place.outside)


_BUFFERS = "\0"
"""Ends the path of the place where a module has its buffers."""


def _is_foreign(module: str | None) -> bool:
    """Whether classes and functions of it keep nothing that forward changes, as far as we know."""
    return module is None or f"{module}.".startswith((*_FOREIGN, "transformers.", "numpy.", "builtins."))


def is_leaf(value: Any) -> bool:
    """Whether nothing can be in it that has to be followed."""
    return isinstance(value, _LEAVES) or value is _ABSENT


@functools.cache
def _tell_of_many(path: str) -> None:
    logger.warning(
        "from %s on, more containers and objects can be reached than are looked at (%d): what forward changes there is "
        "changed twice a step, because backward runs blocks again. Let blocks reach less, or use activations='keep'",
        path,
        _MANY,
    )


class Walk:
    """All places that can be reached from some modules, nearest first, and generators on the way.

    `elsewhere`: modules that are not followed, those of other blocks.
    """

    def __init__(self, elsewhere: frozenset[int]) -> None:
        self.places: list[Place] = []
        self.generators: list[Any] = []
        self._elsewhere = elsewhere
        self._seen: set[int] = set()
        """Modules and classes of which there are places, and what else has been followed, by id()."""
        self._led_to: set[int] = set()
        """Modules that something has led to; their submodules are followed too."""
        self._queue: deque[tuple[str, Any, nn.Module | None, int]] = deque()

    def start_module(self, path: str, module: nn.Module, outside: bool = False) -> None:
        """Follow this module's attributes, its buffers, what its forward and hooks have closed over; no submodules."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        owner = module if outside else None
        self.places.append(Place(path, vars(module), of_module=True, outside=owner))
        self.places.append(Place(path + _BUFFERS, module._buffers, of_module=True, outside=owner))
        for name, value in vars(module).items():
            if name not in OF_MODULE:
                self._queue.append((f"{path}.{name}", value, owner, 0))
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for hook in hooks:
            self._queue.append((f"{path}.{getattr(hook, '__name__', 'hook')}", hook, owner, 0))
        for kind in type(module).__mro__:
            if not _is_foreign(kind.__module__):
                self._class(kind, owner)

    def _class(self, kind: type, outside: nn.Module | None) -> None:
        """What its modules share, and what its functions have closed over."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        self.places.append(Place(kind.__qualname__, kind, outside=outside))
        for name, value in vars(kind).items():
            if not name.startswith("__"):
                self._queue.append((f"{kind.__qualname__}.{name}", value, outside, 0))

    def has(self, module: nn.Module) -> bool:
        """Whether it has been come to."""
        return id(module) in self._seen

    def start(self, path: str, value: Any) -> None:
        """Follow this value."""
        self._queue.append((path, value, None, 0))

    def finish(self) -> Walk:
        """Follow everything."""
        n_followed = 0
        while self._queue:
            if n_followed == _MANY:
                _tell_of_many(self._queue[0][0])
                break
            path, value, outside, depth = self._queue.popleft()
            seen = self._led_to if isinstance(value, nn.Module) else self._seen
            if is_leaf(value) or id(value) in seen:
                continue
            if not isinstance(value, tuple | type):
                seen.add(id(value))
            n_followed += 1
            self._follow(path, value, outside, depth)
        return self

    def _follow(self, path: str, value: Any, outside: nn.Module | None, depth: int) -> None:
        def further(items: Iterable[tuple[str, Any]]) -> None:
            if depth < _DEPTH:
                self._queue.extend((p, v, outside, depth + 1) for p, v in items if not is_leaf(v))

        def place(thing: Any) -> None:
            self.places.append(Place(path, thing, outside=outside, depth=depth))

        if is_generator(value):
            self.generators.append(value)
        elif isinstance(value, nn.Module):
            self._other_module(path, value)
        elif isinstance(value, tuple | frozenset):
            further((f"{path}[{i}]", v) for i, v in enumerate(value))
        elif isinstance(value, dict):
            place(value)
            further((f"{path}[{k!r}]", v) for k, v in self._items(value, value.items()))
        elif isinstance(value, list | deque | set):
            place(value)
            further((f"{path}[{i}]", v) for i, v in self._items(value, enumerate(value)))
        elif isinstance(value, types.FunctionType):
            self._function(path, value, further)
        elif isinstance(value, types.MethodType):
            further([(path, value.__self__), (path, value.__func__)])
        elif isinstance(value, functools.partial):
            further([(path, value.func), (path, value.args), (path, value.keywords)])
        elif isinstance(value, weakref.ref):
            further([(path, value())])
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _ARRAY_NBYTES and not value.dtype.hasobject and value.flags.writeable:
                place(value)
        elif not isinstance(value, type | types.ModuleType) and not _is_foreign(type(value).__module__):
            attributes = getattr(value, "__dict__", None)
            for found in (attributes if isinstance(attributes, dict) else {}, _Slots(value)):
                if found or found is attributes:
                    place(found)
                    further((f"{path}.{name}", v) for name, v in list(found.items()))

    @staticmethod
    def _items(thing: Any, items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [] if len(thing) > _LONG else list(items)

    def _other_module(self, path: str, module: nn.Module) -> None:
        """One that is no submodule: another block, or the whole model, whose blocks are left out."""
        whole = id(module) in self._elsewhere
        for name, each in module.named_modules(prefix=path):
            if whole or id(each) not in self._elsewhere:
                self.start_module(name, each, outside=True)

    def _function(
        self, path: str, function: types.FunctionType, further: Callable[[Iterable[tuple[str, Any]]], None]
    ) -> None:
        """What it has closed over, its defaults, and containers and numbers among the globals that it names."""
        if _is_foreign(function.__module__):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self.places.append(Place(name, cell))
                further([(name, _in_cell(cell))])
        further((f"{path}.defaults", v) for v in function.__defaults__ or ())
        names: Mapping[str, Any] = function.__globals__
        for name in function.__code__.co_names:
            value = names.get(name, _ABSENT)
            if isinstance(value, list | dict | set | deque | int | float | torch.Tensor) or is_generator(
                value
            ):
                self.places.append(Place(name, names, key=name))
                further([(name, value)])
            elif isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
                further([(name, value)])
