"""What follows a recipe is nothing to compile, for whoever compiles a part of a block or the model around it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload.recompute import by_recipe
from offload.recompute.by_recipe import Keeper, Replayer
from offload.recompute.recipe import Recipe, RecordedOp

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")
    or not hasattr(TorchDispatchMode, "_should_skip_dynamo"),
    reason="this torch wraps no dispatch modes, or cannot mark code",
)


def recipe():
    ops = [
        RecordedOp(func, (), (), (), is_free=True, may_skip=False, may_keep=False)
        for func in (aten.sin.default, aten.cos.default)
    ]
    return Recipe(ops, [])


@pytest.fixture
def compiled():
    """(a function that is compiled, the operations of what the compiler made graphs of)."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    yield torch.compile(lambda x: x.sin().cos(), backend=backend), graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "follower", [lambda: Keeper(recipe(), frozenset({9})), lambda: Replayer(recipe(), {})]
)
def test_no_follower_of_a_recipe_is_compiled(compiled, follower):
    (function, graphs), x = compiled, torch.ones(4)
    for _ in range(2):
        with follower() as mode:
            function(x)
        assert mode.matches
    assert graphs == []


def test_where_torch_cannot_mark_code_its_own_wrapper_stays(monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")

    class Other(by_recipe._Follower):
        def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not hasattr(Keeper.__torch_dispatch__, "__wrapped__")
    assert hasattr(Other.__torch_dispatch__, "__wrapped__")
