"""Whatever takes part in which forward, backward and step, training has the bits of plain torch in memory, and nothing
that a device does by itself comes before what it needs."""

import contextlib
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes

from offload.errors import BudgetError
from offload.runtime import chosen_device, gradients
from tests.conftest import one_thread
from tests.device_order import OrderedDevice, watching
from tests.fault.training import smallest_budgets
from tests.integration.participants import OPTIMIZERS, Plain, Streamed
from tests.integration.participation import (
    LR,
    VISITS,
    Branch,
    Call,
    Pass,
    Program,
    Step,
    Stop,
    difference,
    groups_of,
    made,
    run,
)
from tests.storage_order import follow_storage

BLOCKS_MAX = 5
N_PARAMETERS = 5 + 6 * BLOCKS_MAX
NO_ROOM = "has to wait for backward and no room is left for it"
"""What the smallest budgets may say to a step of many calls: the one refusal that a program may meet."""


def often(value, *others):
    """`value` in half of the draws, and where hypothesis shrinks to."""
    return st.one_of(st.just(value), st.sampled_from([value, *others]))


MATRICES = frozenset(5 + 6 * block + number for block in range(BLOCKS_MAX) for number in (-1, 1, 3))
"""Of blocks: where they are frozen the rest of a block is like adapters."""

frozen = st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, N_PARAMETERS - 1), max_size=20))


@st.composite
def paths(draw, n_blocks):
    chosen = draw(
        st.one_of(
            st.just(list(range(n_blocks))),
            st.sets(st.integers(0, n_blocks - 1)).map(sorted),
            st.lists(st.integers(0, n_blocks - 1), max_size=n_blocks + 1),
        )
    )
    how = often("", "detached", "no_grad")
    calls = tuple(Call(block, draw(often(False, True)), draw(how)) for block in chosen)
    return Branch(calls, draw(often(True, False)))


def passes(n_blocks):
    return st.builds(
        Pass,
        st.one_of(st.tuples(paths(n_blocks)), st.lists(paths(n_blocks), min_size=1, max_size=2).map(tuple)),
        often("sum", "apart", "first", "none"),
        st.booleans(),
        often(False, True),
        often(False, True),
    )


stops = st.builds(
    Stop,
    st.integers(0, 2),
    st.integers(0, BLOCKS_MAX),
    st.sampled_from(["forward", "inside", "backward", "again"]),
)


def steps(n_blocks):
    return st.builds(
        Step,
        passes=st.lists(passes(n_blocks), min_size=1, max_size=3).map(tuple),
        stops=st.one_of(st.none(), st.none(), st.none(), stops),
        held=often(False, True),
        backwards=st.booleans(),
        frozen=frozen,
        frozen_in_backward=st.one_of(st.none(), frozen),
        ends=st.sampled_from(["step", "step", "forgets", "goes on"]),
        looks=often(False, True),
        reads=often(False, True),
        evaluates=often(False, True),
        restarts=often(False, True),
        visits=st.lists(st.sampled_from(VISITS), max_size=3).map(tuple),
    )


@st.composite
def programs(draw):
    hidden = draw(st.lists(st.sampled_from([48, 16, 80]), min_size=3, max_size=BLOCKS_MAX).map(tuple))
    optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    return Program(
        hidden=hidden,
        tied=draw(st.booleans()),
        shared=draw(often(False, True)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        optimizer=optimizer,
        frozen=draw(st.one_of(frozen, st.just(MATRICES))),
        steps=draw(st.lists(steps(len(hidden)), min_size=2, max_size=4).map(tuple)),
        moments="fp32" if optimizer == "elementwise" else draw(often("fp32", "8bit", "bf16")),
        dropout=draw(often(0.0, 0.25)),
        halved=draw(frozen),
        autocast=draw(often(False, True)),
        mixed=draw(often(False, True)),
        turned=draw(st.frozensets(st.integers(0, BLOCKS_MAX - 1), max_size=2)),
        zeroes=draw(often(False, True)),
    )


ELSEWHERE = {
    "roomy": {"device_memory": "100MB", "host_memory": "100MB"},
    "other chunks": {"device_memory": "100MB", "host_memory": "100MB", "chunk_elements": 6144},
    "one device": {"device_memory": "100MB", "host_memory": "100MB", "device": "cpu"},
}
"""Settings that a run may go on with after a restart."""
OF_A_BUS = ("states_on_device", "bus_bytes_per_s")


@st.composite
def ways(draw):
    """Settings, where state goes, whether small gradients leave alone, and what is else after a restart."""
    chosen = {
        "device": draw(st.sampled_from(["cpu", "emulated"])),
        "update": draw(often("auto", "deferred", "backward")),
        "max_grad_norm": draw(often(None, 0.05, 1e9)),
        "durability": draw(often("checkpoint", "none", "step")),
        "activations": draw(often("auto", "keep", "device", "host", "storage")),
        "saved_activations": draw(often("recompute", "device", "host", "storage")),
        "micro_batches": draw(often(1, 2, 4)),
        "adapters": draw(often("streamed", "resident")),
        "prefetch_blocks": draw(often(None, 1, 2, 0)),
        "chunk_buffers": draw(often(4, 2)),
        "update_threads": draw(often(1, 2)),
    }
    if chosen["update"] == "backward" and chosen["max_grad_norm"] is not None:
        chosen["durability"] = "step"
    if chosen["device"] == "emulated":
        if chosen["durability"] != "step":
            chosen["states_on_device"] = draw(often("auto", 150_000, 600_000))
        chosen["bus_bytes_per_s"] = draw(often(None, 1e8))
    place = draw(st.sampled_from(["smallest", "half", "smallest", "host", "memory", "aside"]))
    if chosen["durability"] == "step" and place in ("memory", "aside"):
        place = "half"
    if place in ("memory", "aside") and "storage" in (chosen["activations"], chosen["saved_activations"]):
        place = "host"
    told = {key: value for key, value in chosen.items() if value is not None}
    return place, told, draw(st.booleans()), draw(often(None, *ELSEWHERE))


def settings_of(place, chosen, program, directory):
    """What `wrap` is told."""
    told = {
        "chunk_elements": 2048,
        "step_aside": "never",
        "plan": "none",
        "optimizer_state": program.moments,
        **chosen,
    }
    roomy = {"device_memory": "100MB", "host_memory": "100MB"}
    if place in ("memory", "aside"):
        return {**told, **roomy, "storage": [], "step_aside": "always" if place == "aside" else "never"}
    told["storage"] = [directory]
    if place == "host":
        return {**told, **roomy}
    model = made(program)
    kind, options = OPTIMIZERS[program.optimizer]
    on_device = told.pop("states_on_device", "auto")
    told |= smallest_budgets(model, kind(groups_of(model), lr=LR, **options), told)
    told["device_memory"] += 20_000  # for inputs that wait
    if on_device != "auto":
        told["device_memory"] += on_device
        told["states_on_device"] = on_device
    if place == "half":
        told["host_memory"] += 150_000
    return told


def assert_same_bits(program, way, kind=Streamed, watch=contextlib.nullcontext):
    """`watch()` is entered around the training, and gives a list of what else is wrong."""
    place, chosen, leaves_alone, elsewhere = way
    if (
        program.moments != "fp32" or program.optimizer == "elementwise"
    ):  # the device, and torch where nothing is streamed, update nothing else
        place, chosen = "memory" if place == "aside" else place, {**chosen, "states_on_device": "auto"}
    with (
        tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as patch,
        one_thread(),
    ):
        if leaves_alone:
            patch.setattr(gradients, "LEAVES_ALONE_NBYTES", 0)
        told = settings_of(place, chosen, program, directory)
        expected = run(Plain(program, told), program, told)
        later = None
        if elsewhere is not None:
            later = {**told, **ELSEWHERE[elsewhere]}
            later = {key: later[key] for key in later if later["device"] != "cpu" or key not in OF_A_BUS}
        side = kind(program, told, later)
        try:
            with watch() as conflicts:
                got = run(side, program, told)
        except BudgetError as refused:
            assume(NO_ROOM not in str(refused))
            raise
        finally:
            side.engine.close()
    wrong = difference(got, expected, told)
    assert not wrong, wrong
    assert not conflicts, conflicts[:5]


class Watched(Streamed):
    """Its training is watched; that it takes a model over, or a checkpoint, is not."""

    def restart(self):
        with _disable_current_modes():
            super().restart()


def assert_ordered(program, way):
    """On a device that checks the order of all that it, storage and updates do."""
    place, chosen, leaves_alone, _ = way
    told = {**chosen, "device": "emulated"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen_device, "EmulatedDevice", OrderedDevice)
        follow_storage(patch)
        assert_same_bits(program, (place, told, leaves_alone, None), Watched, watching)


GIVEN = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=24, **GIVEN)
@given(program=programs(), way=ways())
def test_whatever_takes_part_training_has_the_bits_of_plain_torch(program, way):
    assert_same_bits(program, way)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=300, **GIVEN)
@given(program=programs(), way=ways())
def test_whatever_takes_part_training_has_the_bits_of_plain_torch_in_many_programs(program, way):
    assert_same_bits(program, way)


@settings(max_examples=8, **GIVEN)
@given(program=programs(), way=ways())
def test_whatever_takes_part_every_hand_over_is_ordered(program, way):
    assert_ordered(program, way)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=200, **GIVEN)
@given(program=programs(), way=ways())
def test_whatever_takes_part_every_hand_over_is_ordered_in_many_programs(program, way):
    assert_ordered(program, way)
