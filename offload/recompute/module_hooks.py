"""Hooks around the forward of modules, as far as running a block again needs to know of them or to add one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn

_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def before_submodules(modules: Mapping[str, nn.Module], call: Callable[[str], None]) -> Iterator[None]:
    """Inside, `call(name)` comes before each of `modules` runs, ahead of its other hooks, but in what is compiled."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            if not torch.compiler.is_compiling():
                call(name)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(name), prepend=True) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooks_of_all_modules() -> list[Callable[..., Any]]:
    """Those that torch calls around the forward of every module there is."""
    of_all = torch.nn.modules.module
    return [*of_all._global_forward_pre_hooks.values(), *of_all._global_forward_hooks.values()]


def numbers_of(modules: Sequence[nn.Module]) -> int:
    """A sum of the numbers of hooks around the forward of `modules`; none is given twice, so that others show."""
    of_all = torch.nn.modules.module
    n_all = sum(of_all._global_forward_pre_hooks) + sum(of_all._global_forward_hooks)
    return n_all + sum(map(sum, chain.from_iterable(map(_hooks, modules))))
