"""A look at many places at once notices what a look at each of them would put back."""

import pytest
import torch
from torch import nn

from offload.recompute.glance import Glance
from offload.recompute.reachable import Walk, look


class Counting(nn.Module):
    """All kinds of places that a block reaches."""

    of_class = 0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.count = 1000
        self.items, self.table, self.kinds = [1], {"a": 1}, {1}


def replace_forward(module):
    module.forward = lambda x: x


def another_dictionary_of_buffers(module):
    module.__dict__["_buffers"] = dict(module._buffers)


def exchange_attributes(module):
    del module.count
    module.more = 1000


CHANGES = {
    "attribute": lambda m: setattr(m, "count", m.count + 1),
    "new attribute": lambda m: setattr(m, "more", 1),
    "attribute less": lambda m: delattr(m, "count"),
    "attribute in place of another": exchange_attributes,
    "attribute of a submodule": lambda m: setattr(m.inner, "in_features", 5),
    "buffer": lambda m: setattr(m, "mean", torch.zeros(2)),
    "new buffer": lambda m: m.register_buffer("more", torch.zeros(2)),
    "buffers": another_dictionary_of_buffers,
    "forward": replace_forward,
    "class": lambda m: setattr(Counting, "of_class", Counting.of_class + 1),
    "new of the class": lambda m: setattr(Counting, "more_of_class", 1),
    "list": lambda m: m.items.append(2),
    "dictionary": lambda m: m.table.update(a=2),
    "set": lambda m: m.kinds.add(2),
}


@pytest.fixture
def module():
    yield Counting()
    Counting.of_class = 0
    if "more_of_class" in vars(Counting):
        del Counting.more_of_class


def contents_of(module):
    walk = Walk(frozenset())
    for name, each in module.named_modules():
        walk.start_module(name, each)
    return [look(place) for place in walk.finish().places]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_noticed_at_a_glance(module, change):
    contents = contents_of(module)
    glance = Glance(contents)
    assert glance.holds()
    CHANGES[change](module)
    assert not glance.holds()
    assert not all(content.holds() for content in contents)
    assert Glance(contents_of(module)).holds()


def test_a_glance_holds_again_once_all_has_been_put_back(module):
    contents = contents_of(module)
    glance = Glance(contents)
    for name in ("attribute", "attribute less", "new buffer", "buffer", "class", "list", "dictionary", "set"):
        CHANGES[name](module)
        assert not glance.holds()
        for content in contents:
            if not content.holds():
                content.put()
        assert glance.holds(), name


def test_what_torch_keeps_in_a_module_is_not_looked_at(module):
    """Its modes and hooks are looked at elsewhere (surroundings.py), and a look puts none of them back."""
    glance = Glance(contents_of(module))
    module.eval()
    assert glance.holds()


def test_a_forward_that_makes_way_for_an_attribute_is_noticed(module):
    replace_forward(module)
    glance = Glance(contents_of(module))
    assert glance.holds()
    del module.forward
    module.more = 1
    assert not glance.holds()
