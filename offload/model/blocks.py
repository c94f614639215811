"""Cut a module into blocks: find the repeated stack, name everything outside it the root."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from offload.errors import ConfigError


@dataclass(frozen=True)
class Cut:
    """`blocks` in execution order as (name, module); `root` holds every other parameter by name, each once."""

    blocks: list[tuple[str, nn.Module]]
    block_parameters: list[list[tuple[str, nn.Parameter]]]
    root: list[tuple[str, nn.Parameter]]

    def all_root(self) -> Cut:
        """The same parameters without blocks: nothing will be streamed."""
        return Cut([], [], [*self.root, *(p for block in self.block_parameters for p in block)])

    def with_in_root(self, parameters: list[nn.Parameter]) -> Cut:
        """The same cut, with `parameters` in the root instead of in their blocks."""
        moved = set(parameters)
        kept = [[entry for entry in block if entry[1] not in moved] for block in self.block_parameters]
        root = [entry for block in self.block_parameters for entry in block if entry[1] in moved]
        return Cut(self.blocks, kept, [*self.root, *root])


def base_of(model: nn.Module) -> nn.Module:
    """The model that adapters were put into (by `peft`); the model itself where there are none."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) >= 2:
            kinds = {type(child) for child in module}
            alike = len(kinds) == 1 or (isinstance(module, nn.ModuleList) and _share_a_base(kinds))
            if alike and any(True for _ in module[0].parameters()):
                found.append((name, module))
    return found


def _share_a_base(kinds: set[type]) -> bool:
    """Whether layers of several classes are of one family, as attention and state-space layers of a hybrid are."""
    shared = set.intersection(*(set(kind.__mro__) for kind in kinds))
    return any(issubclass(kind, nn.Module) and kind is not nn.Module for kind in shared)


def find_blocks(model: nn.Module, blocks: object = None) -> list[tuple[str, nn.Module]]:
    """Blocks of `model`: those of the repeated stack with most parameters, or as `blocks` says.

    `blocks` may be a module class, its name, or a list of modules (nn.ModuleList too). When the model has several
    outermost stacks (an encoder and a decoder), all whose elements hold a tenth or more of the largest one's parameters
    are used.
    Raises ConfigError when nothing repeats.
    """
    names = {module: name for name, module in model.named_modules()}
    if isinstance(blocks, (list, tuple, nn.ModuleList, nn.Sequential)):
        missing = [m for m in blocks if m not in names]
        if missing:
            raise ConfigError(f"blocks contains {type(missing[0]).__name__}, which is not part of the model")
        return [(names[m], m) for m in blocks]
    if blocks is not None:
        wanted = blocks if isinstance(blocks, str) else getattr(blocks, "__name__", str(blocks))
        chosen = [(n, m) for n, m in model.named_modules() if type(m).__name__ == wanted]
        if not chosen:
            stacks = ", ".join(f"{name} of {type(stack[0]).__name__}" for name, stack in _stacks(model))
            raise ConfigError(
                f"no module of class {wanted!r} in {type(model).__name__}: blocks= takes a class, its name, or a "
                f"list of modules; its stacks are {stacks or 'none'}"
            )
        return chosen
    numel_of = {name: sum(p.numel() for p in stack.parameters()) for name, stack in _stacks(model)}
    outermost = [
        (name, stack)
        for name, stack in _stacks(model)
        if not any(name != other and name.startswith(other + ".") for other in numel_of)
    ]
    if not outermost:
        raise ConfigError(
            f"{type(model).__name__} has no repeated stack (a ModuleList or Sequential of one class, or a "
            "ModuleList of classes with a common base): "
            "name the blocks with blocks=<class> or blocks=[modules]"
        )
    largest = max(numel_of[name] for name, _ in outermost)
    return [
        (f"{name}.{i}" if name else str(i), child)
        for name, stack in outermost
        if numel_of[name] * 10 >= largest
        for i, child in enumerate(stack)
    ]


def cut(model: nn.Module, blocks: object = None) -> Cut:
    """Cut `model` into blocks and root. A parameter shared between blocks, or with the root, goes to the root."""
    chosen = find_blocks(model, blocks)
    owners: dict[nn.Parameter, set[str]] = {}
    first_name: dict[nn.Parameter, str] = {}
    prefixes = [name + "." for name, _ in chosen]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name.setdefault(parameter, name)
        owner = next((p for p in prefixes if name.startswith(p)), "")
        owners.setdefault(parameter, set()).add(owner)
    per_block: dict[str, list[tuple[str, nn.Parameter]]] = {p: [] for p in prefixes}
    root: list[tuple[str, nn.Parameter]] = []
    for parameter, owner_names in owners.items():
        entry = (first_name[parameter], parameter)
        owner = next(iter(owner_names))
        if len(owner_names) == 1 and owner:
            per_block[owner].append(entry)
        else:
            root.append(entry)
    return Cut(chosen, [per_block[p] for p in prefixes], root)
