"""Random number generators that a block may draw from: torch's, Python's, NumPy's, and those that the block owns.

A block that runs again draws what its first run drew, and afterwards every generator is as if it had not run again.
"""

from __future__ import annotations

import _random
import ctypes
import random
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_MT19937_NBYTES = 625 * 4
"""Of its state: 624 words and the position in them."""


def _words_at(address: int) -> ctypes.Array[ctypes.c_char]:
    """The state of a generator as it lies there; its `raw` is a copy in a fraction of a microsecond."""
    return (ctypes.c_char * _MT19937_NBYTES).from_address(address)


class _NumPy:
    """NumPy's global generator, whose state takes 30 microseconds to read. As long as its raw words are the same, and
    it holds no second normal number back, nobody has drawn from it."""

    def __init__(self) -> None:
        self._generator: Any = None
        self._words: Any = None
        self._raw = b""
        self._state: Any = None

    def state(self) -> Any:
        """Equal objects, mostly the same one, where nobody has drawn in between."""
        generator: Any = np.random.mtrand._rand._bit_generator
        if generator is not self._generator:
            if not isinstance(generator, np.random.MT19937):
                return np.random.get_state(legacy=False)
            self._generator, self._state = generator, None
            self._words = _words_at(generator.ctypes.state_address)
        raw = self._words.raw
        if self._state is None or raw != self._raw or self._state["has_gauss"]:
            self._raw, self._state = raw, np.random.get_state(legacy=False)
        return self._state


def _words_of(generator: random.Random) -> Any:
    """Where CPython keeps the words of Python's generator: behind the head of the object, the position first. None
    where that is not so, as far as a look shows."""
    size_nbytes = object.__basicsize__ + _MT19937_NBYTES
    if sys.implementation.name != "cpython" or _random.Random.__basicsize__ < size_nbytes:
        return None
    words = _words_at(id(generator) + object.__basicsize__)
    *key, position = generator.getstate()[1]
    return words if words.raw == struct.pack("=i624I", position, *key) else None


class _Python:
    """Python's global generator, whose state, a tuple of 625 numbers, takes 20 microseconds to read and compare. As
    long as its raw words are the same, and it holds the same second normal number back, nobody has drawn from it."""

    def __init__(self) -> None:
        self._generator: Any = random._inst
        self._words = _words_of(self._generator)
        self._raw = b""
        self._state: Any = None

    def state(self) -> Any:
        """The same object where nobody has drawn in between."""
        if self._words is not None:
            raw = self._words.raw
            if raw == self._raw and self._generator.gauss_next is self._state[2]:
                return self._state
            self._raw = raw
        state = self._generator.getstate()
        if state != self._state:
            self._state = state
        return self._state


_numpy = _NumPy()
_python = _Python()


def global_states(device: torch.device) -> list[Any]:
    """Of the generators that everybody draws from; `device` is what blocks compute on."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return [torch.get_rng_state(), cuda, _python.state(), _numpy.state()]


def put_global_states(states: Sequence[Any], device: torch.device, but_of: Sequence[Any]) -> None:
    """Let those generators be so again, of Python's and NumPy's those that are not the same in the states `but_of`."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
    if states[2] is not but_of[2]:
        random.setstate(states[2])
    if states[3] is not but_of[3]:
        np.random.set_state(states[3])


def is_generator(thing: Any) -> bool:
    """Whether `state_of` and `put_state` know it."""
    return isinstance(thing, torch.Generator | random.Random | np.random.Generator | np.random.RandomState)


def state_of(generator: Any) -> Any:
    """What `put_state` gives back to it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def put_state(generator: Any, state: Any) -> None:
    """Let it be so again."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
