"""Programs in which blocks, parameters and backwards take part now and then, and what they give when they are run.

Who runs them is in participants.py: the engine, or plain torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

WIDTH, VOCAB, BATCH, LENGTH = 32, 48, 4, 3
LR, DECAY = 2.0**-6, 0.1


@dataclass(frozen=True)
class Call:
    """Of a block: whether it uses its `extra` layer, and whether its gradients go on: "", "detached" or "no_grad"."""

    block: int
    extra: bool = False
    how: str = ""


@dataclass(frozen=True)
class Branch:
    """Calls one after the other on the embedding, then a loss, of the head or not."""

    calls: tuple[Call, ...]
    head: bool = True


@dataclass(frozen=True)
class Pass:
    """A forward; its backward is of the sum of the branches' losses, of each `apart`, of the `first` or of `none`.

    `waits`: the backward is inside of no_sync(), unless it has to be the one that ends a step. `evaluates`: between the
    two comes a forward without gradients, `reads`: all parameters are read.
    """

    branches: tuple[Branch, ...]
    backward: str = "sum"
    waits: bool = True
    evaluates: bool = False
    reads: bool = False


@dataclass(frozen=True)
class Stop:
    """An error in the call of this number among a pass's: before it (`where` is "forward"), in the block itself
    ("inside"), when the gradient of its result arrives ("backward"), or where the block runs again ("again")."""

    one: int
    call: int
    where: str


class Stopped(Exception):
    """What a program stops with."""


def stopped(_):
    raise Stopped


def turned(module, of_inputs, of_results):
    return tuple(None if grad is None else -grad for grad in of_inputs)


@dataclass(frozen=True)
class Step:
    """`held`: all forwards come before the first backward, which then come from the last to the first if `backwards`.

    `frozen`: numbers of parameters that are not trained; if `held`, and not None, `frozen_in_backward` those that are
    not from then on. `ends`: with a `step`, with nothing (it `goes on` in the next
    one) or with zero_grad() alone (it `forgets`). `looks`: at the norm before the step, `reads`: parameters after it,
    `evaluates`: a forward without gradients, `restarts`: the run is saved after the step, and goes on in a new model.
    `visits`: names of `VISITS`, what is done with the state after it.
    `stops`: an error in one of the passes ends it, and the step `forgets` what it has.
    """

    passes: tuple[Pass, ...]
    held: bool = False
    backwards: bool = False
    frozen: frozenset[int] = frozenset()
    frozen_in_backward: frozenset[int] | None = None
    ends: str = "step"
    looks: bool = False
    reads: bool = False
    evaluates: bool = False
    restarts: bool = False
    stops: Stop | None = None
    visits: tuple[str, ...] = ()


VISITS = ("saves beside", "goes back", "changes", "state dict", "masters", "first block", "evaluates often")
""" "saves beside": a checkpoint is written while training goes on. "goes back": the run resumes from it, in the model
that is there. "changes": every parameter is halved where it lives. "state dict", "masters" and "first block" read: all
by their names, as an export in fp32, or no more than the first of all. "evaluates often": several forwards without
gradients follow each other."""


@dataclass(frozen=True)
class Program:
    """The model (hidden widths of its blocks, whether embedding and head are `tied` and all `extra` layers are one that
    is `shared`, which part of what blocks add is dropped at random), what is frozen for good, the optimizer, and the
    steps. `halved`: parameters with a hook that halves their gradients; `turned`: blocks with one that turns the sign
    of those of their inputs; `autocast`: forwards are made under it; `mixed`: `gate` is of fp32 in any case;
    `zeroes`: zero_grad is called with set_to_none=False."""

    hidden: tuple[int, ...]
    tied: bool
    shared: bool
    dtype: torch.dtype
    optimizer: str
    frozen: frozenset[int]
    steps: tuple[Step, ...]
    moments: str = "fp32"
    dropout: float = 0.0
    halved: frozenset[int] = frozenset()
    autocast: bool = False
    mixed: bool = False
    turned: frozenset[int] = frozenset()
    zeroes: bool = False


class Block(nn.Module):
    """`gate` and `scale` need the result of an operation that nothing else does; `extra` is used when asked for."""

    def __init__(self, hidden, dropout):
        super().__init__()
        self.stops_in = 0
        self.dropout = nn.Dropout(dropout)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.gate = nn.Parameter(torch.ones(WIDTH))
        self.extra = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, scale, extra):
        self.stops_in -= 1
        if self.stops_in == 0:
            raise Stopped
        y = self.down(torch.tanh(self.up(x)))
        y = (y * self.gate.to(y.dtype)) * (1 + torch.tanh(scale * 2.0))
        y = self.dropout(y)
        return x + (y + self.extra(x) if extra else y)


class Model(nn.Module):
    """Blocks on any way through them, between an embedding and a head."""

    def __init__(self, program):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.scale = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(hidden, program.dropout) for hidden in program.hidden)
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not program.tied)
        if program.tied:
            self.head.weight = self.embedding.weight
        for layer in self.layers if program.shared else ():
            layer.extra = self.layers[0].extra
        for number in program.turned & set(range(len(self.layers))):
            self.layers[number].register_full_backward_hook(turned)
        self.go_on()
        self.to(program.dtype)
        for layer in self.layers if program.mixed else ():
            layer.gate.data = layer.gate.data.float()

    def go_on(self):
        """Without `stop`, where the next forward or its backward is to end."""
        self.stop = None
        for layer in self.layers:
            layer.stops_in = 0

    def call(self, number, x, scale, extra):
        return self.layers[number](x, scale, extra)

    def forward(self, tokens, branches):
        """The loss of each branch."""
        start = self.embedding(tokens)
        scale = self.scale(start)
        losses, n_calls = [], 0
        for branch in branches:
            x = start
            for call in branch.calls:
                where = self.stop.where if self.stop is not None and self.stop.call == n_calls else ""
                n_calls += 1
                if where == "forward":
                    raise Stopped
                if where in ("inside", "again"):
                    self.layers[call.block].stops_in = 1 if where == "inside" else 2
                with torch.no_grad() if call.how == "no_grad" else contextlib.nullcontext():
                    given = x.detach() if call.how == "detached" else x
                    x = self.call(call.block, given, scale, call.extra)
                if where == "backward" and x.requires_grad:
                    x.register_hook(stopped)
            x = self.last(x)
            losses.append((self.head(x) if branch.head else x * 3).float().square().mean())
        return losses


def made(program):
    torch.manual_seed(0)
    model = Model(program)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number not in program.frozen)
    return model


def groups_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() < 2) == is_vector] for is_vector in (False, True))
    groups = [{"params": matrices, "lr": LR, "weight_decay": DECAY}, {"params": vectors, "lr": LR / 2}]
    return [group for group in groups if group["params"]]


def is_deferred(settings):
    """Whether updates wait for step()."""
    update = settings.get("update", "auto")
    return update == "deferred" or (update == "auto" and settings.get("max_grad_norm") is not None)


def run(side, program, settings):
    """What the program gives, in order: ("loss", x), ("norm", x), ("parameters", by name)."""
    model, found = side.model, []
    parameters = list(model.parameters())
    generator = torch.Generator()
    eager = not is_deferred(settings)

    def backward(losses, one, ends):
        waits = (eager and not ends) or one.waits
        pieces = (
            losses if one.backward == "apart" else losses[:1] if one.backward == "first" else [sum(losses)]
        )
        pieces = [piece for piece in pieces if piece.requires_grad]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with side.no_sync() if waits or (eager and not last) else contextlib.nullcontext():
                piece.backward(retain_graph=not last)

    def freeze(numbers):
        for number, parameter in enumerate(parameters):
            parameter.requires_grad_(number not in numbers | program.frozen)

    def evaluate():
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
        every = tuple(Call(block) for block in range(len(program.hidden)))
        with torch.no_grad(), computing:
            found.append(("evaluated", model(tokens, [Branch(every)])[0].item()))

    def visit(kind):
        if kind == "evaluates often":
            for _ in range(3):
                evaluate()
        else:
            seen = side.visit(kind)
            if seen is not None:
                found.append(("parameters", seen))

    def passes(step, ends):
        waiting = []
        having = [number for number, one in enumerate(step.passes) if one.backward != "none"]
        last = (having[0] if step.held and step.backwards else having[-1]) if having else -1
        if not step.held and last < len(step.passes) - 1:
            last = -1  # a forward after an update made in backward computes with what that has changed
        for number, one in enumerate(step.passes):
            tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
            model.stop = step.stops if step.stops is not None and step.stops.one == number else None
            with computing:
                losses = model(tokens, one.branches)
            found.extend(("loss", loss.item()) for loss in losses)
            if one.evaluates:
                evaluate()
            if one.reads:
                found.append(("parameters", side.read()))
            waiting.append((losses, one, ends == "step" and number == last))
            if not step.held and one.backward != "none":
                backward(*waiting.pop())
            del losses
        if step.held and step.frozen_in_backward is not None:
            freeze(step.frozen_in_backward)
        for losses, one, is_last in reversed(waiting) if step.backwards else waiting:
            if one.backward != "none":
                backward(losses, one, is_last)

    computing = torch.autocast("cpu", torch.bfloat16, enabled=program.autocast)
    for number, step in enumerate(program.steps):
        torch.manual_seed(number)
        generator.manual_seed(number)
        freeze(step.frozen)
        ends, n_found = step.ends, len(found)
        if step.stops is None:
            passes(step, ends)
        else:
            ends = "forgets"
            with contextlib.suppress(Stopped):
                passes(step, ends)
            model.go_on()
            del found[n_found:]  # plain torch runs no block again, and stops elsewhere or not at all
        if step.looks and settings.get("max_grad_norm") is not None:
            found.append(("norm", side.grad_norm()))
        if ends == "step":
            found.append(("norm of the step", side.step()))
        elif ends == "forgets":
            side.zero_grad()
        if step.evaluates and (ends == "step" or not eager):
            evaluate()
        for kind in step.visits if ends == "step" else ():
            visit(kind)
        if step.restarts and ends == "step":
            side.restart()
            model, parameters = side.model, list(side.model.parameters())
        if step.reads and ends == "step":
            found.append(("parameters", side.read()))
    if ends != "step":
        found.append(("norm of the step", side.step()))
    found.append(("parameters", side.read()))
    return found


def difference(got, expected, settings):
    """What is not the same, in words; "" where everything is."""
    clips = settings.get("max_grad_norm") is not None
    if len(got) != len(expected):
        return f"{len(got)} results of {len(expected)}"
    for place, ((kind, one), (_, other)) in enumerate(zip(got, expected, strict=True)):
        where = f"result {place}, {kind}"
        if kind.startswith("norm"):
            if other is None or (one is None and not clips and settings.get("durability") != "step"):
                continue
            if one is None or (one != other if clips else abs(one - other) > 1e-5 * other):
                return f"{where}: {one} in place of {other}"
        elif kind == "parameters":
            wrong = [name for name in one if not torch.equal(one[name], other[name])]
            if wrong:
                return f"{where}: {wrong}"
        elif one != other:
            return f"{where}: {one} in place of {other}"
    return ""
