"""Recipes of blocks that compute attention with the fused kernels of a GPU, on tensors without data: which results are
kept, and that what stands for them has the form that backward expects."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload.recompute.by_recipe import Keeper, Replayer
from offload.recompute.recipe import Recorder
from offload.runtime.planning import _of_one_size

aten = torch.ops.aten
BATCH, HEADS, TOKENS, WIDTH = 2, 4, 64, 32


def flash(q, k, v):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def efficient(q, k, v):
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, torch.is_grad_enabled(), 0.0, True)[0]


def cudnn(q, k, v):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, torch.is_grad_enabled(), 0.0, True)[0]


def block(attention, x, weight):
    q, k, v = ((x @ weight) * n for n in (1, 2, 3))
    return attention(q, k, v) @ weight


class Kernels(TorchDispatchMode):
    """Counts what is really computed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inputs():
    x = torch.empty(BATCH, HEADS, TOKENS, WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True)
    return x, torch.empty(WIDTH, WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True)


@pytest.fixture(params=[flash, efficient, cudnn], ids=lambda f: f.__name__)
def attention(request):
    return request.param


def recipe_of(attention, inputs):
    recorder = Recorder(list(inputs))
    with recorder, torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda t: t):
        block(attention, *inputs)
    return recorder.recipe()


def test_attention_may_be_kept_and_saves_the_result_and_its_sums_beside_small_things(attention, inputs):
    recipe = recipe_of(attention, inputs)
    assert recipe.why_not == ""
    (kernel,) = (i for i, op in enumerate(recipe.ops) if "attention" in str(op.func))
    assert recipe.ops[kernel].may_keep
    assert recipe.ops[kernel].may_skip
    assert len([value for value in recipe.large() if value.op == kernel]) == 2  # not seeds and counts


def test_kept_attention_is_not_computed_again_and_gives_backward_what_it_expects(attention, inputs):
    recipe = recipe_of(attention, inputs)
    kernel = next(i for i, op in enumerate(recipe.ops) if "attention" in str(op.func))
    with torch.no_grad(), Keeper(recipe, frozenset([kernel])) as keeper:
        block(attention, *inputs)
    assert keeper.matches
    shapes = [tuple(tensor.shape) for tensor in keeper.kept[kernel]]
    assert (BATCH, HEADS, TOKENS, WIDTH) in shapes
    assert any(
        shape[:3] == (BATCH, HEADS, TOKENS) for shape in shapes if len(shape) in (3, 4) and shape[-1] != WIDTH
    )
    with Kernels() as kernels, Replayer(recipe, keeper.kept):
        out = block(attention, *inputs)
    assert not any("attention" in name for name in kernels.names)
    out.backward(torch.empty_like(out))
    assert inputs[0].grad.shape == inputs[0].shape


def test_tensors_of_one_size_are_taken_for_each_other_where_a_kernel_does_several_operations_at_once():
    planned = [10, 20, 25, 5, 80, 80]  # per sample; a norm saves one that a fused one does not
    real = [40, 80, 20, 320, 320]
    assert _of_one_size(planned, real) == [(0, 0), (1, 1), (3, 2), (4, 3), (5, 4)]
