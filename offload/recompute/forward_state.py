"""What a block's forward leaves behind (running statistics, counters, lists, power iterations), as if it ran once.

[Note: what forward changes] A block runs again in backward. What its forward changes would be changed twice a step,
and what runs again would start from values that the first run has changed. So recomputation finds everything that the
block can reach (reachable.py) as this very call (and micro-batch) of forward found it, and leaves it as it is by then:
attributes that were replaced, numbers, items of lists, and tensors that were changed in place. Of those, copies are
needed. The first forward in a mode of training tells which they are: all are copied before it, and before later ones
those that it has changed, as their version or their values show. A block that changes nothing pays a look.

[Note: what others change] A tensor that a block may read, and that something else changes in place between its forward
and its backward (a counter of the model, in the next forward), has to be for the second run what the first one found.
Of small ones copies wait as well: of all until the block's first backward, which shows who stays as it is, and later
of those that have changed while the block did not run, and of what is beside them, since not every change leaves a
version. The second run finds the copies in their places; the tensors themselves stay as they are, for whatever changes
them in backward. Of others a change is noticed by the version, and refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from offload.errors import UsageError
from offload.recompute.generators import put_state, state_of
from offload.recompute.glance import Glance
from offload.recompute.module_hooks import hooks_of_all_modules
from offload.recompute.own_parameters import OwnParameters
from offload.recompute.reachable import Content, Named, Walk, is_leaf, look

LARGE_NBYTES = 64 << 20
"""Larger tensors are copied only where they are registered as buffers."""
KEPT_NBYTES = 64 << 10
"""Of larger tensors nothing is kept that others may change. See [Note: what others change]."""


class Seen(NamedTuple):
    """What a block can reach, before its forward; `values` are copies of the tensors that it changes, by position."""

    mode: tuple[bool, ...]
    contents: tuple[Content, ...]
    glance: Glance
    """At these contents."""
    tensors: tuple[Named, ...]
    versions: tuple[int, ...]
    values: dict[int, torch.Tensor]
    generators: tuple[tuple[Any, Any], ...]
    first: bool
    """Whether the block runs in this mode for the first time."""
    unreached: frozenset[int]
    """Modules outside, by id(), that nothing of the block leads to: it may change them, as the first run would show."""
    kept: dict[int, torch.Tensor]
    """Copies of what others may change, by position; from `now` on only of what they have changed."""

    def all_tensors(self) -> list[torch.Tensor]:
        """That forward may find in these places when it runs again."""
        return [*(named.tensor for named in self.tensors), *self.kept.values()]


@dataclass
class Now:
    """The same as it is when the block is about to run again, as far as it has not been put back."""

    contents: tuple[Content, ...]
    """The very tuple of `Seen` where nothing has changed."""
    values: dict[int, torch.Tensor]
    generators: tuple[tuple[Any, Any], ...]
    versions: dict[int, int] | None = None
    """Of the tensors with `values`, when the block had run again."""


def _copies(tensors: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    if not tensors:
        return {}
    with torch.no_grad():
        return {i: tensor.detach().clone() for i, tensor in tensors.items()}


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # of a dtype or layout that cannot be compared
        return False


def _put_values(named: Named, values: torch.Tensor) -> None:
    """Graphs that have saved the tensor do not see it: it is what it was when they need it."""
    keep_version = torch.autograd.grad_mode._unsafe_preserve_version_counter(named.tensor)
    with torch.no_grad(), keep_version:
        named.tensor.copy_(values)


class ForwardState:
    """What one block can change. See [Note: what forward changes].

    `outside` are modules outside of all blocks, which a block may change too, and `elsewhere` those of other blocks.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        outside: Sequence[tuple[str, nn.Module]] = (),
        elsewhere: frozenset[int] = frozenset(),
    ) -> None:
        self.modules = list(module.modules())
        self.parameters = OwnParameters(name, module)
        self._named = [(".".join(filter(None, (name, path))), m) for path, m in module.named_modules()]
        self._outside = outside
        self._watched: list[tuple[str, nn.Module]] = []
        """Of those, the ones that the block has changed."""
        self._elsewhere = elsewhere
        self._contents: tuple[Content, ...] = ()
        self._glance = Glance(())
        self._tensors: tuple[Named, ...] = ()
        self._generators: list[Any] = []
        self._hooks = 0
        self._unreached: frozenset[int] = frozenset()
        self._is_narrow = False
        """Whether what was found leaves out the modules outside that the block does not change."""
        self._changes: dict[tuple[bool, ...], dict[str, bool]] = {}
        """Whether forward changes a tensor in place, by which of its modules are in training."""
        self._moves: dict[str, bool] = {}
        """Whether others change it while the block does not run, where that is known."""
        self._left: tuple[tuple[Named, ...], tuple[int, ...]] = (), ()
        """Tensors, and their versions when forward had run last."""

    def look(self, mode: tuple[bool, ...], hooks: int, given: Sequence[Any] = ()) -> Seen:
        """Before forward; `mode` says which modules are in training, `hooks` changes with those that are on them,
        `given` are objects among its arguments."""
        first = mode not in self._changes
        changes = self._changes.setdefault(mode, {})
        if first or hooks != self._hooks or not self._is_narrow or not self._refresh():
            self._hooks = hooks
            self._find(first)
        contents, glance = self._contents, self._glance
        tensors, generators = self._tensors, self._generators
        if given:
            walk = Walk(self._elsewhere)
            for number, thing in enumerate(given):
                walk.start(f"argument {number}", thing)
            more = [look(place) for place in walk.finish().places]
            contents = (*contents, *more)
            glance = Glance(contents)
            tensors = (*tensors, *(named for content in more for named in content.tensors))
            generators = [*generators, *walk.generators]
        versions = tuple([named.tensor._version for named in tensors])
        self._note_moves(versions)
        changing = {
            i: named.tensor
            for i, named in enumerate(tensors)
            if changes.get(named.path, named.registered or named.tensor.nbytes <= LARGE_NBYTES)
            or self._keeps(named)
        }
        return Seen(
            mode,
            contents,
            glance,
            tensors,
            versions,
            _copies(changing),
            tuple([(g, state_of(g)) for g in generators]),
            first,
            self._unreached,
            {},
        )

    def _keeps(self, named: Named) -> bool:
        """Whether a copy waits for backward because others change it, or may."""
        moves = self._moves.get(named.path, True)
        return moves and named.tensor.nbytes <= KEPT_NBYTES and not named.tensor.requires_grad

    def _note_moves(self, versions: tuple[int, ...]) -> None:
        """Note which tensors have changed in place since forward has run last, otherwise than by it."""
        before, left = self._left
        if before is self._tensors and versions[: len(left)] == left:
            return
        known = {id(named.tensor): version for named, version in zip(before, left, strict=True)}
        for named, version in zip(
            self._tensors, versions, strict=False
        ):  # behind them come those of arguments
            if known.get(id(named.tensor), version) != version:
                self._moved(named, self._tensors)

    def _moved(self, named: Named, tensors: Sequence[Named]) -> None:
        """Others have changed it, and may change what is beside it. What forward changes is put back anyway."""
        if self._moves.get(named.path) or any(changes.get(named.path) for changes in self._changes.values()):
            return
        owner = _owner(named.path)
        self._moves.update({each.path: True for each in tensors if _owner(each.path) == owner})

    def _find(self, first: bool) -> None:
        self._unreached = frozenset()
        if first:
            reached = self._walk([])
            self._unreached = frozenset(id(module) for _, module in self._outside if not reached.has(module))
        walk = self._walk(self._outside if first else self._watched)
        self._is_narrow = not first
        self._generators = walk.generators
        self._hold([look(place) for place in walk.places])

    def _walk(self, outside: Sequence[tuple[str, nn.Module]]) -> Walk:
        """All that the block leads to, and these modules."""
        walk = Walk(self._elsewhere)
        for path, module in self._named:
            walk.start_module(path, module)
        for path, module in outside:
            walk.start_module(path, module, outside=True)
        for hook in hooks_of_all_modules():
            walk.start(getattr(hook, "__name__", "hook"), hook)
        return walk.finish()

    def _hold(self, contents: list[Content]) -> None:
        self._contents, self._glance = tuple(contents), Glance(contents)
        self._tensors = tuple(named for content in self._contents for named in content.tensors)

    def _refresh(self) -> bool:
        """Look again at the places that have changed; False where something new has to be followed."""
        if self._glance.holds():
            return True
        contents = list(self._contents)
        for number, content in enumerate(contents):
            if content.holds():
                continue
            new = look(content.place)
            known = set(map(id, content.values))
            if not all(is_leaf(value) or id(value) in known for value in new.values):
                return False
            contents[number] = new
        self._hold(contents)
        return True

    def ran(self, seen: Seen) -> None:
        """After forward: drop copies of what it leaves as it is. Raises UsageError for a change in place whose values
        before it are gone."""
        changes = self._changes[seen.mode]
        for i, named in enumerate(seen.tensors):
            values = seen.values.get(i)
            in_place = named.tensor._version != seen.versions[i]
            if named.path not in changes and values is not None and not in_place:
                in_place = not _same_values(named.tensor, values)
            known = named.path in changes
            changes[named.path] = in_place or changes.get(named.path, False)
            if in_place and values is None:
                raise _unseen(named, known)
            if values is not None and not changes[named.path]:
                del seen.values[i]
                if id(named.outside) not in seen.unreached and self._keeps(named):
                    seen.kept[i] = values
        self._left = self._tensors, tuple([named.tensor._version for named in self._tensors])
        if seen.first:
            self._watch(seen)

    def _watch(self, seen: Seen) -> None:
        """Note the modules outside that forward has changed: later looks are at those."""
        found = {id(content.place.outside) for content in seen.contents if not content.holds()}
        found |= {id(named.outside) for i, named in enumerate(seen.tensors) if i in seen.values}
        known = {id(module) for _, module in self._watched}
        self._watched += [(p, m) for p, m in self._outside if id(m) in found - known]

    def now(self, seen: Seen) -> Now:
        """Before it runs again. Raises UsageError for a tensor that has been changed in place since forward, that the
        block may have read, and of which there is no copy."""
        contents = seen.contents
        if not seen.glance.holds():
            contents = tuple(c if c.holds() else look(c.place, c.n) for c in contents)
        for i, named in enumerate(seen.tensors):
            if i in seen.values or id(named.outside) in seen.unreached:
                continue
            has_moved = named.tensor._version != seen.versions[i]
            if i not in seen.kept:
                if has_moved:
                    raise _changed_since(named)
            elif has_moved or not _same_values(named.tensor, seen.kept[i]):
                self._moved(named, seen.tensors)
            else:
                self._moves.setdefault(named.path, False)
                del seen.kept[i]
        values = _copies({i: seen.tensors[i].tensor for i in seen.values})
        return Now(contents, values, tuple([(g, state_of(g)) for g, _ in seen.generators]))

    @staticmethod
    def put(seen: Seen, now: Now | None) -> None:
        """Let everything be as forward found it; `now`: as it is, where it has not run again since."""
        if now is None or now.contents is not seen.contents:
            for i, content in enumerate(seen.contents):
                if now is None or now.contents[i] is not content:
                    content.put()
        for i, values in seen.values.items():
            _put_values(seen.tensors[i], values)
        copies = {id(seen.tensors[i].tensor): copy for i, copy in seen.kept.items()}
        for content in seen.contents if copies else ():
            if any(id(named.tensor) in copies for named in content.tensors):
                content.with_copies(copies).put()
        for generator, state in seen.generators:
            put_state(generator, state)

    @staticmethod
    def ran_again(seen: Seen, now: Now) -> None:
        """After forward has run again: all is as it was `now`, but tensors that were changed in place, which the graph
        may have saved; see `left`. What hooks of backward change from here on stays."""
        if now.contents is not seen.contents or not seen.glance.holds():
            for content in now.contents:
                if not content.holds():
                    content.put()
        for generator, state in now.generators:
            put_state(generator, state)
        now.contents = now.generators = ()
        now.versions = {i: seen.tensors[i].tensor._version for i in now.values}

    @classmethod
    def left(cls, seen: Seen, now: Now) -> None:
        """After the block's backward, or when it has failed: the rest. Raises UsageError where a copy has been changed
        in place of its tensor, by a hook of backward that forward has given it to."""
        if now.versions is None:
            cls.ran_again(seen, now)
        for i, values in now.values.items():
            if seen.tensors[i].tensor._version == (now.versions or {}).get(i):
                _put_values(seen.tensors[i], values)
        for i, copy in seen.kept.items():
            if copy._version:
                raise _changed_since(seen.tensors[i])


def states_of(model: nn.Module, names: Sequence[str], modules: Sequence[nn.Module]) -> list[ForwardState]:
    """Of all blocks of a model, by their names and modules."""
    inside = frozenset(id(each) for module in modules for each in module.modules())
    outside = [(name or "model", each) for name, each in model.named_modules() if id(each) not in inside]
    return [ForwardState(name, module, outside, inside) for name, module in zip(names, modules, strict=True)]


def _shown(path: str) -> str:
    return path.replace("\0", "")


def _owner(path: str) -> str:
    """What holds the tensor."""
    return _shown(path).rpartition(".")[0]


def _changed_since(named: Named) -> UsageError:
    return UsageError(
        f"{_shown(named.path)} was changed in place between forward and backward, and the block that holds it runs "
        "again in backward: change it after backward, give it a new tensor instead, or keep the graph, with "
        "activations='keep'"
    )


def _unseen(named: Named, known: bool) -> UsageError:
    kind = "buffer" if named.registered else "tensor"
    if known:
        return UsageError(
            f"forward has changed the {kind} {_shown(named.path)} in place, which it did not do when it ran first: it "
            "runs again in backward, and needs what it held before. Keep the graph instead, with activations='keep'"
        )
    return UsageError(
        f"forward changes the {kind} {_shown(named.path)} ({named.tensor.nbytes} bytes) in place: it runs again in "
        "backward, and needs what it held before. Make it a buffer (register_buffer), which is copied then, or keep "
        "the graph, with activations='keep'"
    )
