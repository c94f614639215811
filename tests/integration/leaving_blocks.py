"""Blocks whose forward leaves something behind, in every place that Python and torch have for it, and runs of them."""

import functools
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import nn

import offload
from tests.integration.test_exactness import CHUNK

WIDTH = 16
LR = 2.0**-4
"""A power of two: an update is rounded once, in torch and here."""
MEMORY = {"device_memory": "50MB", "host_memory": "50MB", "step_aside": "never", "chunk_elements": CHUNK}
N_CALLS, SEEN = 0, []


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def left(self):
        """What is compared: numbers and tensors."""
        raise NotImplementedError


class Counted(Base):
    """A number, and one of the class."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + torch.tanh(self.mix(x)) / self.calls

    def left(self):
        return [self.calls]


class OfTheClass(Base):
    calls = 0

    def forward(self, x):
        OfTheClass.calls += 1
        return x + torch.tanh(self.mix(x)) * (1 + OfTheClass.calls % 5)

    def left(self):
        return [OfTheClass.calls]


class Global(Base):
    """Variables of the Python module."""

    def forward(self, x):
        global N_CALLS
        N_CALLS += 1
        SEEN.append(N_CALLS)
        return x + torch.tanh(self.mix(x)) / len(SEEN) * N_CALLS

    def left(self):
        return [N_CALLS, *SEEN]


class Statistics(Base):
    """Running statistics in plain tensors: one is replaced, one changed in place, one made on the way."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(WIDTH)
        self.std = torch.ones(WIDTH)
        self.last = None

    def forward(self, x):
        h = self.mix(x)
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
            self.std.mul_(0.9).add_(0.1 * h.std(0))
            self.last = h.sum(0) if self.last is None else self.last + h.sum(0)
        return x + torch.tanh(h - self.mean) / (1 + self.std) + self.last / 100

    def left(self):
        return [self.mean, self.std, self.last]


class Hidden(Base):
    """Changed through .data, which no version tells of; and in a tuple."""

    def __init__(self):
        super().__init__()
        self.std = torch.ones(WIDTH)
        self.pair = (torch.zeros(WIDTH), 1)

    def forward(self, x):
        h = self.mix(x)
        self.std.data.mul_(0.5)
        with torch.no_grad():
            self.pair[0].add_(h.mean(0))
        return x + torch.tanh(h) * self.std + self.pair[0]

    def left(self):
        return [self.std, self.pair[0]]


class Thing:
    def __init__(self):
        self.n = 0
        self.rows = []


class Slotted:
    __slots__ = ("n", "unset")

    def __init__(self):
        self.n = 0


class InSlots(Base):
    def __init__(self):
        super().__init__()
        self.thing = Slotted()

    def forward(self, x):
        self.thing.n += 1
        self.thing.unset = getattr(self.thing, "unset", 0) + 2
        return x + torch.tanh(self.mix(x)) * self.thing.unset / self.thing.n

    def left(self):
        return [self.thing.n, self.thing.unset]


class Containers(Base):
    def __init__(self):
        super().__init__()
        self.rows, self.by_name, self.names = [], {"n": 0, "inner": {"rows": []}}, set()
        self.recent, self.thing, self.array = deque(maxlen=3), Thing(), np.zeros(2)

    def forward(self, x):
        h = self.mix(x)
        n = len(self.rows)
        self.rows.append(float(h.detach().sum()))
        self.by_name["n"] += 1
        self.by_name["inner"]["rows"].append(n)
        self.by_name[f"key {n}"] = n
        self.names.add(n)
        self.recent.append(n)
        self.thing.n += 2
        self.thing.rows.append(h.detach().mean())
        self.array[0] += 1
        if not hasattr(self, "later"):
            self.later = []
        self.later.append(n)
        factor = (
            1 + n + self.by_name["n"] + len(self.names) + sum(self.recent) + self.array[0] + len(self.later)
        )
        return x + torch.tanh(h) * sum(self.rows) / factor + self.thing.rows[-1] / self.thing.n

    def left(self):
        inner = self.by_name["inner"]["rows"]
        found = [*self.rows, *inner, *self.names, *self.recent, *self.thing.rows, *self.array, *self.later]
        return [*found, self.thing.n, *self.by_name, self.by_name["n"]]


class Long(Base):
    """A list and a dictionary that grow beyond what is compared item by item."""

    def __init__(self):
        super().__init__()
        self.rows, self.known = list(range(998)), {i: i for i in range(5000)}

    def forward(self, x):
        self.rows.append(len(self.rows))
        self.known[len(self.known)] = len(self.rows)
        return x + torch.tanh(self.mix(x)) * len(self.rows) / len(self.known)

    def left(self):
        return [*self.rows, *self.known, *self.known.values()]


class Hooked(Base):
    """A user's hook on a module inside, which keeps what it sees in what it has closed over."""

    def __init__(self):
        super().__init__()
        self.rows = rows = []
        n = 0

        def hook(module, args, output):
            nonlocal n
            n += 1
            rows.append(output.detach().mean())
            return output * n

        self.mix.register_forward_hook(hook)
        self.bound = functools.partial(self.count, Thing())
        self.mix.register_forward_pre_hook(lambda *_: self.bound())
        self.n = lambda: n

    def count(self, thing):
        thing.n += 1

    def forward(self, x):
        return x + torch.tanh(self.mix(x)) * len(self.rows)

    def left(self):
        return [self.n(), self.bound.args[0].n, *self.rows]


class Outside(Base):
    """Changes a module that belongs to no block."""

    def forward(self, x):
        owner = self.owner()
        owner.n += 1
        owner.total.add_(x.detach().sum())
        owner.rows.append(owner.n)
        return x + torch.tanh(self.mix(x)) * owner.total.sigmoid() / owner.n

    def left(self):
        return [self.owner().n, self.owner().total, *self.owner().rows]


THREAD = threading.local()


class OutsideUnseen(Outside):
    """Finds that module where nobody follows."""

    def forward(self, x):
        owner = THREAD.owner
        owner.n += 1
        owner.total.add_(x.detach().sum())
        return x + torch.tanh(self.mix(x)) * owner.total.sigmoid() / owner.n


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.n, self.rows = 0, []


class Model(nn.Module):
    def __init__(self, block, calls=1):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.shared = Shared()
        self.layers = nn.ModuleList(block() for _ in range(3))
        for layer in self.layers:
            layer.owner = None if block is OutsideUnseen else weakref.ref(self.shared)
        THREAD.owner = self.shared
        self.head = nn.Linear(WIDTH, 1)
        self.calls = calls

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.calls):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)

    def left(self):
        if isinstance(self.layers[0], OutsideUnseen):
            return [self.shared.n, self.shared.total]
        return [each for layer in self.layers for each in layer.left()]


BLOCKS = [
    Counted,
    OfTheClass,
    Global,
    Statistics,
    Hidden,
    Containers,
    InSlots,
    Long,
    Hooked,
    Outside,
    OutsideUnseen,
]


def start(block, directory=None, calls=1, **settings):
    global N_CALLS
    N_CALLS, OfTheClass.calls = 0, 0
    SEEN.clear()
    torch.manual_seed(0)
    model = Model(block, calls).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if directory is None:
        return model, optimizer
    return offload.wrap(model, optimizer, storage=[str(directory)], **MEMORY, **settings)


def backward_of(model, parts=1):
    batch = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    loss = sum(model(part).square().sum() for part in batch.chunk(parts)) / 100
    loss.backward()
    return loss.item()


def train(model, optimizer, n_steps=4):
    losses = []
    for _ in range(n_steps):
        losses.append(backward_of(model))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def same(a, b):
    equal = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)]
    return all(equal)
