"""The out-of-core optimizer keeps the rules of torch's, group by group, inside one block."""

from __future__ import annotations

import psutil
import pytest
import torch

from offload.config import Config
from tests.fault.training import Model, make_run, parameters_of

KINDS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
LR = 1e-2


def weights_and_biases(model, kind, **weights):
    """Every block has parameters in both groups."""
    named = list(model.named_parameters())
    biases = {"lr": LR / 4, "betas": (0.5, 0.9), "weight_decay": 0.0}
    groups = [
        {"params": [p for n, p in named if n.endswith("weight")], **weights},
        {"params": [p for n, p in named if n.endswith("bias")], **biases},
    ]
    return KINDS[kind](groups, lr=LR)


def train(model, optimizer, n_steps, scheduler_of):
    scheduler = scheduler_of(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        model(torch.randn(16, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def both(directory, kind, n_steps, scheduler_of, **weights):
    """Parameters after training through the store, and by torch in memory."""
    torch.manual_seed(0)
    reference = Model(3)
    train(reference, weights_and_biases(reference, kind, **weights), n_steps, scheduler_of)
    model, optimizer = make_run(directory, optimizer=lambda model: weights_and_biases(model, kind, **weights))
    train(model, optimizer, n_steps, scheduler_of)
    got = parameters_of(model)
    model.offload.close()
    return got, {name: p.detach() for name, p in reference.named_parameters()}


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def worst(got, expected):
    return max(float((got[name].detach() - expected[name]).abs().max()) for name in expected)


# A first Adam step moves a parameter by about lr whatever the gradient, so a last bit of a tiny gradient shows as a
# part of lr. 10 steps stay within 2 % of it; each test says how far the result is when its rule is broken.
BOUND = 0.02 * LR


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_decoupled_in_adamw_and_l2_in_adam(tmp_path, kind):
    got, expected = both(tmp_path / "a", kind, 10, constant, weight_decay=0.5)
    assert worst(got, expected) <= BOUND
    other, _ = both(tmp_path / "b", "Adam" if kind == "AdamW" else "AdamW", 10, constant, weight_decay=0.5)
    assert worst(other, expected) > 10 * BOUND


def test_each_optimizer_group_keeps_its_hyperparameters_inside_one_block(tmp_path):
    """The bias of a block has another lr, other betas and no decay; with those of the weight it ends elsewhere."""
    got, expected = both(tmp_path, "AdamW", 10, constant, weight_decay=0.5)
    biases = {name: tensor for name, tensor in expected.items() if name.endswith("bias")}
    assert worst(got, biases) <= BOUND
    torch.manual_seed(0)
    single = Model(3)
    train(single, torch.optim.AdamW(single.parameters(), lr=LR, weight_decay=0.5), 10, constant)
    assert worst(dict(single.named_parameters()), biases) > 10 * BOUND


def test_moments_are_corrected_for_their_bias_from_the_first_step_on(tmp_path):
    """Corrected, the first step of Adam moves every parameter with a gradient by lr; uncorrected, by lr / 0.32."""
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in Model(3).named_parameters()}
    got, _ = both(tmp_path, "Adam", 1, constant)
    name = "layers.1.linear.weight"
    moved = (got[name] - before[name]).abs()
    torch.testing.assert_close(moved.median(), torch.tensor(LR), rtol=0.01, atol=0)
    assert (moved <= LR * 1.01).all()


def test_the_learning_rate_may_change_between_steps(tmp_path):
    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    got, expected = both(tmp_path / "a", "AdamW", 10, halving)
    assert worst(got, expected) <= BOUND
    unchanged, _ = both(tmp_path / "b", "AdamW", 10, constant)
    assert worst(unchanged, expected) > 20 * BOUND


@pytest.mark.parametrize("update_threads", [1, 3])
def test_the_update_has_as_many_threads_as_it_is_told(tmp_path, update_threads):
    make = {"backend": "posix", "io_queue_depth": 1}  # one I/O thread
    model, _ = make_run(tmp_path / "a", update_threads=update_threads, **make)
    with_this = psutil.Process().num_threads()
    more, _ = make_run(tmp_path / "b", update_threads=update_threads + 2, **make)
    with_more = psutil.Process().num_threads()
    assert with_more - with_this == update_threads + 2 + 1
    model.offload.close(), more.offload.close()
    assert psutil.Process().num_threads() < with_this


def test_the_update_takes_at_most_four_threads_unless_told_otherwise():
    assert 1 <= Config().update_threads <= 4


@pytest.mark.parametrize(("n_cores", "threads"), [(1, 1), (2, 1), (8, 6), (16, 14), (64, 16)])
def test_beside_a_gpu_the_update_leaves_two_cores_free_and_has_a_chunk_for_every_thread(n_cores, threads):
    settings = Config().beside("cuda", n_cores)
    assert settings.update_threads == threads
    assert settings.chunk_buffers > threads
    assert settings.model_fields_set == set()  # nothing counts as the user's own choice
    chosen = Config(update_threads=3, chunk_buffers=5)
    assert chosen.beside("cuda", n_cores) is chosen
    assert Config(chunk_buffers=7).beside("cuda", n_cores).chunk_buffers == 7
    assert Config().beside("cpu", n_cores) == Config()
