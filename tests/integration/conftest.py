"""What tests of the command line start from, devices, and NaN in what recomputation skips."""

import pytest

from offload.recompute import by_recipe
from tests.cuda import CUDA, ready
from tests.integration.command_line import make_workplace


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A model directory and a text; no profile of this machine."""
    monkeypatch.setenv("OFFLOAD_PROFILE", str(tmp_path / "profile.json"))
    return make_workplace(tmp_path)


@pytest.fixture(params=["emulated", CUDA])
def device(request, monkeypatch):
    """Each device with memory of its own, or those a test is parametrized with (indirect), for exact comparisons."""
    with ready(request.param, monkeypatch) as name:
        yield name


@pytest.fixture
def poison(monkeypatch):
    """What recomputation skips gives NaN, so that a wrong reader is seen."""
    make = by_recipe.unread
    monkeypatch.setattr(
        by_recipe,
        "unread",
        lambda made: make(made).fill_(float("nan") if made.dtype.is_floating_point else 77),
    )
