"""Whether many places hold what they held, told at once where all of them do: a block is looked at three times a
micro-batch, and mostly nothing has changed. See [Note: places] in reachable.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem, is_
from typing import Any

from offload.recompute.reachable import OF_MODULE, Content

_OF_TORCH = OF_MODULE - {"_buffers", "forward"}
"""Attributes of a module that nothing here asks for: a look that finds them changed does nothing."""


class Glance:
    """At places with these contents. What modules and classes hold, nearly all there is, is compared in calls that run
    no Python: the number of attributes, and those that `Content.put` would put back."""

    def __init__(self, contents: Sequence[Content]) -> None:
        self._others: list[Content] = []
        self._dicts: list[Mapping[str, Any]] = []
        self._lengths: list[int] = []
        self._owners: list[Mapping[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        for content in contents:
            thing: Any = content.place.thing
            if content.place.of_module and type(thing) is dict:
                self._add(thing, content, [key not in _OF_TORCH for key in content.keys])
            elif isinstance(thing, type) and content.place.key is None:
                self._add(vars(thing), content, [not key.startswith("__") for key in content.keys])
            else:
                self._others.append(content)

    def _add(self, thing: Mapping[str, Any], content: Content, counts: Sequence[bool]) -> None:
        self._dicts.append(thing)
        self._lengths.append(content.n)
        for key, value, is_looked_at in zip(content.keys, content.values, counts, strict=True):
            if is_looked_at:
                self._owners.append(thing)
                self._keys.append(key)
                self._values.append(value)

    def holds(self) -> bool:
        """Whether all of them do so still."""
        if list(map(len, self._dicts)) != self._lengths:
            return False
        try:
            same = all(map(is_, map(getitem, self._owners, self._keys), self._values))
        except KeyError:
            return False
        return same and all(content.holds() for content in self._others)
