"""Who runs the programs of participation.py: the engine (`Streamed`), or plain torch (`Plain`).

The oracle is torch's autograd over a model in memory: every call of a block computes with aliases of its parameters,
whose gradients are added up in the order in which they come, in fp32, and steps are made by the kernels, parameter by
parameter, whose arithmetic tests/unit/test_update_rules.py compares with torch's.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile

import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import offload
from offload import _C
from offload.update_rules import callback_rule, kernel_rule
from tests.integration.participation import DECAY, LR, Model, groups_of, made
from tests.unit.test_update_rules import Side


class Heavy(offload.ElementwiseOptimizer):
    """In operations that round alike wherever a piece is cut; its sum of squares does not begin at zero."""

    state_names = ("heavy", "squares")

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def init_state(self, param, state, group):
        state["squares"].fill_(0.125)

    def update(self, param, grad, state, step, group):
        state["heavy"].mul_(0.5).add_(grad)
        state["squares"].add_(grad * grad)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(state["heavy"] / state["squares"].sqrt() * (group["lr"] / step))


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "sgd": (torch.optim.SGD, {}),
    "lion": (offload.Lion, {"betas": (0.9, 0.98), "weight_decay": 0.0}),
    "elementwise": (Heavy, {}),
}
RULES = {
    "adamw": ("adamw", {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}),
    "momentum": ("sgd", {"momentum": 0.9, "dampening": 0.1}),
    "sgd": ("sgd", {}),
    "lion": ("lion", {"beta1": 0.9, "beta2": 0.98}),
}


def rule_of(program):
    """(the kernel's rule, its options)."""
    if program.optimizer == "elementwise":
        return callback_rule("Heavy", Heavy.state_names), {}
    name, options = RULES[program.optimizer]
    return kernel_rule(name, program.moments, has_momentum=program.optimizer != "sgd"), options


def is_saved(settings):
    """Whether the run can be."""
    return settings.get("durability") != "none"


class InPython(Side):
    """Updated by `Heavy`."""

    def update(self, grad, hyper):
        master = self.master().clone()
        group = {"lr": hyper.lr, "weight_decay": hyper.weight_decay}
        planes = dict(zip(Heavy.state_names, self.planes, strict=True))
        Heavy([torch.zeros(1)], lr=LR).apply(master, grad * hyper.grad_scale, planes, hyper.step, group)
        self.put(master)


class Streamed:
    """Through the engine. `later`: settings of after a restart; None for those of before it."""

    def __init__(self, program, settings, later=None):
        self.program, self.settings, self.later = program, settings, later
        self.n_starts = 0
        self.directory = tempfile.TemporaryDirectory()
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
        self.saves = None

    def zero_grad(self):
        self.optimizer.zero_grad(set_to_none=not self.program.zeroes)

    def restart(self):
        """From a checkpoint; where every step is durable, from the store that the run leaves; not where neither is."""
        if not is_saved(self.settings):
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
        self.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.75
        norm = self.optimizer.grad_norm
        return None if norm is None else float(norm)

    def read(self):
        return {name: value.cpu().clone() for block in self.engine.iter_blocks() for name, value in block}

    def visit(self, kind):
        """One of `VISITS` that is no forward; what it reads."""
        checkpoints = f"{self.directory.name}/checkpoints"
        if kind == "state dict":
            return self.model.state_dict()
        if kind == "first block":
            blocks = self.engine.iter_blocks()
            return {name: value.clone() for name, value in next(blocks)}
        if kind == "masters":
            with tempfile.TemporaryDirectory() as directory:
                (file,) = offload.export(self.model, directory, dtype=torch.float32)
                return load_file(file)
        if kind == "changes":
            offload.change(self.model, lambda name, values: values.mul_(0.5))
        elif kind == "saves beside" and is_saved(self.settings):
            self.saves = offload.save(self.model, checkpoints, wait=False)
        elif kind == "goes back" and self.saves is not None:
            offload.resume(self.model, self.saves)
        return None


class Plain(Model):
    """By plain torch, in memory. `micro_batches` as in the settings: each call's rows come in so many parts. Where
    nothing is to be streamed, gradients of several calls in one backward are added up by torch."""

    def __init__(self, program, settings):
        torch.manual_seed(0)
        super().__init__(program)
        self.__dict__["model"] = self  # no part of itself
        self.no_sync = contextlib.nullcontext
        self.program = program
        self.is_whole = settings["step_aside"] == "always"
        self.micro_batches = settings.get("micro_batches", 1)
        self.limit = settings.get("max_grad_norm")
        self.discards = settings.get("durability") == "step" and settings.get("update") == "backward"
        self.sums, self.n_updates, self.lr, self.saved = {}, {}, 1.0, None
        self.saves = is_saved(settings)
        rule, _ = rule_of(program)
        self.sides = {}
        for parameter in nn.Module.parameters(self):
            codec = "split_bf16" if parameter.dtype == torch.bfloat16 else "fp32"
            master = parameter.detach().float().flatten()
            kind = InPython if program.optimizer == "elementwise" else Side
            self.sides[parameter] = kind(rule, codec, master, [torch.zeros_like(master) for _ in rule.planes])
        self.trained = list(self.sides)
        for number, parameter in enumerate(self.trained):
            parameter.requires_grad_(number not in program.frozen)
        in_groups = [p for group in groups_of(self) for p in group["params"]]
        self.number_of = {parameter: number for number, parameter in enumerate(in_groups)}
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
                step=self.n_updates[parameter], noise_seed=self.number_of[parameter], **options,
            )  # fmt: skip
            self.sides[parameter].update(grad.flatten(), hyper)
            self.show(parameter)
        self.sums.clear()
        self.lr *= 0.75
        return norm

    def show(self, parameter):
        """Let it have what its side has."""
        parameter.copy_(self.sides[parameter].param.view(parameter.dtype).view(parameter.shape))

    def restart(self):
        """Nothing but that what was saved in the run before is not gone back to."""
        if self.saves:
            self.saved = None

    def read(self):
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def visit(self, kind):
        frozen = [p for p in self.trained if p not in self.number_of]
        if kind == "masters":
            side_of = {name: self.sides[p] for name, p in self.named_parameters() if p in self.number_of}
            masters = {
                name: side_of[name].master().clone().view(p.shape)
                for name, p in self.read().items()
                if name in side_of
            }
            return {**{name: value.float() for name, value in self.read().items()}, **masters}
        if kind in ("state dict", "first block"):
            return {name: value.clone() for name, value in self.state_dict().items()}
        if kind == "changes":
            for parameter in self.number_of:
                side = self.sides[parameter]
                side.put(side.master() * 0.5)
                self.show(parameter)
            for parameter in frozen:
                parameter.mul_(0.5)
        elif kind == "saves beside" and self.saves:
            values = {parameter: parameter.detach().clone() for parameter in frozen}
            sides = [copy.deepcopy(self.sides[parameter]) for parameter in self.number_of]
            self.saved = values, sides, dict(self.n_updates), self.lr
        elif kind == "goes back" and self.saved is not None:
            values, sides, n_updates, self.lr = self.saved
            self.n_updates = dict(n_updates)
            for parameter, value in values.items():
                parameter.copy_(value)
            for parameter, side in zip(self.number_of, sides, strict=True):
                self.sides[parameter] = copy.deepcopy(side)
                self.show(parameter)
        return None
