"""Whoever has drawn from a generator that is shared is noticed, and nobody else, however the look at it is made."""

import random

import numpy as np
import pytest
import torch

from offload.recompute import generators

CPU = torch.device("cpu")
PYTHON, NUMPY = 2, 3


@pytest.fixture(autouse=True)
def as_it_was():
    before = generators.global_states(CPU)
    bits = np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(bits)
    generators.put_global_states(before, CPU, [None] * 4)


def draw_one_normal_number_held_back():
    """Its words stay as they are: of two normal numbers that they give, the second is taken out."""
    random.gauss(0.0, 1.0)


PYTHON_DRAWS = [
    random.random,
    lambda: random.getrandbits(1),
    lambda: random.shuffle([1, 2, 3]),
    draw_one_normal_number_held_back,
    lambda: random.seed(5),
]
NUMPY_DRAWS = [
    np.random.rand,
    np.random.randn,
    lambda: np.random.seed(5),
    lambda: np.random.set_bit_generator(np.random.MT19937(7)),
    lambda: np.random.set_bit_generator(np.random.PCG64(7)),
]


@pytest.mark.parametrize("draw", PYTHON_DRAWS)
@pytest.mark.parametrize("held_back", [False, True])
def test_a_draw_from_pythons_generator_is_noticed_and_taken_back(draw, held_back):
    random.seed(1)
    if held_back:
        random.gauss(0.0, 1.0)
    before, state = generators.global_states(CPU), random.getstate()
    assert generators.global_states(CPU)[PYTHON] is before[PYTHON] == state
    draw()
    after = generators.global_states(CPU)
    assert after[PYTHON] is not before[PYTHON]
    assert after[PYTHON] == random.getstate() != state
    generators.put_global_states(before, CPU, after)
    assert random.getstate() == state


@pytest.mark.parametrize("draw", NUMPY_DRAWS)
def test_a_draw_from_numpys_generator_is_noticed_and_taken_back(draw):
    np.random.seed(1)
    kind, expected = np.random.get_bit_generator(), np.random.rand()
    np.random.seed(1)
    before = generators.global_states(CPU)
    assert generators.global_states(CPU)[NUMPY] is before[NUMPY]
    draw()
    after = generators.global_states(CPU)
    assert after[NUMPY] is not before[NUMPY]
    np.random.set_bit_generator(kind)
    generators.put_global_states(before, CPU, after)
    assert np.random.rand() == expected


def test_the_words_of_pythons_generator_are_looked_at_where_they_lie():
    assert generators._words_of(random._inst) is not None, "each look would read and compare the whole state"


def test_words_that_lie_elsewhere_are_not_looked_at():
    class Other(random.Random):
        def getstate(self):
            version, words, gauss = super().getstate()
            return version, (*words[:-1], words[-1] + 1), gauss

    assert generators._words_of(Other(3)) is None


@pytest.mark.parametrize("draw", PYTHON_DRAWS)
def test_where_the_words_are_not_found_a_draw_is_noticed_too(draw, monkeypatch):
    monkeypatch.setattr(generators._python, "_words", None)
    before = generators.global_states(CPU)
    assert generators.global_states(CPU)[PYTHON] is before[PYTHON]
    draw()
    assert generators.global_states(CPU)[PYTHON] is not before[PYTHON]
