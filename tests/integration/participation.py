"""Programs in which blocks, parameters and backwards take part now and then, run through the engine or by plain torch.

The oracle is torch's autograd over a model in memory: every call of a block computes with aliases of its parameters,
whose gradients are added up in the order in which they come, in fp32, and steps are made by the kernels, parameter by
parameter, whose arithmetic tests/unit/test_update_rules.py compares with torch's.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

import offload
from offload import _C
from offload.update_rules import kernel_rule
from tests.unit.test_update_rules import Side

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
    two comes a forward without gradients.
    """

    branches: tuple[Branch, ...]
    backward: str = "sum"
    waits: bool = True
    evaluates: bool = False


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


@dataclass(frozen=True)
class Program:
    """The model (hidden widths of its blocks, whether embedding and head are `tied` and all `extra` layers are one that
    is `shared`, which part of what blocks add is dropped at random), what is frozen for good, the optimizer, and the
    steps. `halved`: parameters with a hook that halves their gradients; `turned`: blocks with one that turns the sign
    of those of their inputs; `autocast`: forwards are made under it; `mixed`: `gate` is of fp32 in any case."""

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


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "sgd": (torch.optim.SGD, {}),
    "lion": (offload.Lion, {"betas": (0.9, 0.98), "weight_decay": 0.0}),
}
RULES = {
    "adamw": ("adamw", {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}),
    "momentum": ("sgd", {"momentum": 0.9, "dampening": 0.1}),
    "sgd": ("sgd", {}),
    "lion": ("lion", {"beta1": 0.9, "beta2": 0.98}),
}


def rule_of(program):
    """(the kernel's rule, its options)."""
    name, options = RULES[program.optimizer]
    return kernel_rule(name, program.moments, has_momentum=program.optimizer != "sgd"), options


class Streamed:
    """Through the engine. `later`: settings of after a restart; None for those of before it."""

    def __init__(self, program, settings, later=None):
        self.program, self.settings, self.later = program, settings, later
        self.n_starts = 0
        self.start(settings)

    def start(self, settings):
        if settings["storage"]:
            settings = {**settings, "storage": [f"{settings['storage'][0]}/{self.n_starts}"]}
        self.n_starts += 1
        self.started_with = settings
        kind, options = OPTIMIZERS[self.program.optimizer]
        model = made(self.program)
        for number, parameter in enumerate(model.parameters()):
            if number in self.program.halved and parameter.requires_grad:
                parameter.register_hook(lambda grad: grad / 2)
        made_of = kind(groups_of(model), lr=LR, **options)
        self.model, self.optimizer = offload.wrap(model, made_of, **settings)
        self.no_sync = self.model.offload.no_sync
        self.engine = self.model.offload
        self.zero_grad = self.optimizer.zero_grad

    def restart(self):
        """From a checkpoint; where every step is durable, from the store that the run leaves; not where neither is."""
        if self.settings.get("durability") == "none":
            return
        before, settings = self.started_with, self.settings if self.later is None else self.later
        with tempfile.TemporaryDirectory() as directory:
            if before.get("durability") == "step":
                directory = before["storage"][0]
            else:
                offload.save(self.model, directory)
            self.engine.close()
            self.start(settings)
            offload.resume(self.model, directory)

    def grad_norm(self):
        found = self.engine.grad_norm()
        return None if found is None else float(found)

    def step(self):
        """The norm of its gradients."""
        self.optimizer.grad_norm = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.75
        norm = self.optimizer.grad_norm
        return None if norm is None else float(norm)

    def parameters(self):
        return {name: value.cpu().clone() for block in self.engine.iter_blocks() for name, value in block}


class Plain(Model):
    """By plain torch, in memory. `micro_batches` as in the settings: each call's rows come in so many parts. Where
    nothing is to be streamed, gradients of several calls in one backward are added up by torch."""

    def __init__(self, program, settings):
        torch.manual_seed(0)
        super().__init__(program)
        self.model = self
        self.no_sync = contextlib.nullcontext
        self.program = program
        self.is_whole = settings["step_aside"] == "always"
        self.micro_batches = settings.get("micro_batches", 1)
        self.limit = settings.get("max_grad_norm")
        self.discards = settings.get("durability") == "step" and settings.get("update") == "backward"
        self.sums, self.n_updates, self.lr = {}, {}, 1.0
        rule, _ = rule_of(program)
        self.sides = {}
        for parameter in nn.Module.parameters(self):
            codec = "split_bf16" if parameter.dtype == torch.bfloat16 else "fp32"
            master = parameter.detach().float().flatten()
            self.sides[parameter] = Side(rule, codec, master, [torch.zeros_like(master) for _ in rule.planes])
        self.trained = list(self.sides)
        for number, parameter in enumerate(self.trained):
            parameter.requires_grad_(number not in program.frozen)
        self.halved = {p for number, p in enumerate(self.trained) if number in program.halved}
        for name, parameter in self.named_parameters():
            if (self.is_whole or not name.startswith("layers.")) and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.received(p, p))

    def received(self, parameter, alias):
        if not parameter.requires_grad:
            alias.grad = None  # frozen since forward
            return
        grad, alias.grad = alias.grad.float(), None
        if parameter in self.halved:
            grad /= 2
        if parameter in self.sums:
            self.sums[parameter].add_(grad)
        else:
            self.sums[parameter] = grad.clone()

    def alias(self, parameter):
        alias = parameter.detach().requires_grad_(parameter.requires_grad)
        if parameter.requires_grad:
            alias.register_post_accumulate_grad_hook(lambda a: self.received(parameter, a))
        return alias

    def call(self, number, x, scale, extra):
        if self.is_whole:
            return super().call(number, x, scale, extra)
        layer, results = self.layers[number], []
        n_parts = self.micro_batches if torch.is_grad_enabled() else 1
        for part, its_scale in zip(x.chunk(n_parts), scale.chunk(n_parts), strict=True):
            aliases = {name: self.alias(p) for name, p in layer.named_parameters()}
            results.append(functional_call(layer, aliases, (part, its_scale, extra)))
        return torch.cat(results) if len(results) > 1 else results[0]

    def grad_norm(self):
        always = [p for number, p in enumerate(self.trained) if number not in self.program.frozen]
        dtypes = list(dict.fromkeys(p.dtype for p in always))
        in_order = sorted((p for p in self.trained if p in self.sums), key=lambda p: dtypes.index(p.dtype))
        norms = [torch.linalg.vector_norm(self.sums[p]) for p in in_order]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else None

    def zero_grad(self):
        self.sums.clear()

    @torch.no_grad()
    def step(self):
        norm, scale = self.grad_norm(), 1.0
        if norm is not None and self.limit is not None:
            scale = min(1.0, float(self.limit / (torch.tensor(norm) + 1e-6)))
            if self.discards and norm > self.limit:
                self.sums.clear()
        _, options = rule_of(self.program)
        for parameter, grad in self.sums.items():
            self.n_updates[parameter] = self.n_updates.get(parameter, 0) + 1
            decays = parameter.dim() >= 2
            hyper = _C.Hyper(
                lr=(LR if decays else LR / 2) * self.lr, weight_decay=DECAY if decays else 0.0, grad_scale=scale,
                step=self.n_updates[parameter], **options,
            )  # fmt: skip
            side = self.sides[parameter]
            side.update(grad.flatten(), hyper)
            parameter.copy_(side.param.view(parameter.dtype).view(parameter.shape))
        self.sums.clear()
        self.lr *= 0.75
        return norm

    def restart(self):
        """There is nothing that it would change."""

    def parameters_now(self):
        return {name: value.detach().clone() for name, value in self.named_parameters()}


def is_deferred(settings):
    """Whether updates wait for step()."""
    update = settings.get("update", "auto")
    return update == "deferred" or (update == "auto" and settings.get("max_grad_norm") is not None)


def run(side, program, settings):
    """What the program gives, in order: ("loss", x), ("norm", x), ("parameters", by name)."""
    model, found = side.model, []
    read = side.parameters_now if isinstance(side, Plain) else side.parameters
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
        if step.restarts and ends == "step":
            side.restart()
            model, parameters = side.model, list(side.model.parameters())
        if step.reads and ends == "step":
            found.append(("parameters", read()))
    if ends != "step":
        found.append(("norm of the step", side.step()))
    found.append(("parameters", read()))
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
