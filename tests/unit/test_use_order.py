"""The order in which a step uses its blocks, wherever it is: forward through all, backward through all, and again."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from offload.schedule.use_order import ForwardCursor, Use, UseCursor, kept_in_forwards


@given(st.integers(1, 12), st.data())
def test_what_comes_next_is_the_step_from_the_current_use_on_and_then_the_next_step(n_blocks, data):
    step = [(i, "forward") for i in range(n_blocks)] + [(i, "backward") for i in reversed(range(n_blocks))]
    now = data.draw(st.integers(0, len(step) - 1))
    cursor = UseCursor(n_blocks)
    cursor.at(Use(*step[now]))
    expected = [(step * 2)[now + 1 + i] for i in range(len(step))]
    assert [(use.block, use.phase) for use in cursor.ahead()] == expected
    assert cursor.upcoming() == list(dict.fromkeys(block for block, _ in expected))
    for block, phase in step:
        assert cursor.uses_until(block, phase) == expected.index((block, phase))


def forwards(n_blocks):
    return ForwardCursor(n_blocks, frozenset(), frozenset())


@given(st.integers(1, 12), st.data())
def test_without_backward_blocks_come_in_a_circle(n_blocks, data):
    cursor, now = forwards(n_blocks), data.draw(st.integers(0, n_blocks - 1))
    cursor.at(Use(now, "forward"))
    expected = [(now + 1 + i) % n_blocks for i in range(n_blocks)]
    assert cursor.upcoming() == expected
    assert [(use.block, use.phase) for use in cursor.ahead()] == [(block, "forward") for block in expected]
    assert [cursor.uses_until(block, "forward") for block in expected] == list(range(n_blocks))
    assert cursor.ranks() == {block: rank for rank, block in enumerate(expected)}


def test_without_backward_what_came_after_a_block_comes_after_it_again():
    """An encoder of two blocks, a decoder of three that goes round."""
    cursor = forwards(5)
    for block in [0, 1, 2, 3, 4, 2, 3, 4]:
        cursor.at(Use(block, "forward"))
    assert cursor.upcoming() == [2, 3, 4, 0, 1]
    cursor.at(Use(0, "forward"))
    assert cursor.upcoming()[:4] == [1, 2, 3, 4]


@given(st.integers(1, 40), st.integers(2, 40))
def test_all_slots_but_two_keep_blocks_evenly_spread(n_blocks, n_slots):
    candidates = list(range(100, 100 + n_blocks))
    kept = sorted(kept_in_forwards(candidates, n_slots))
    if n_slots >= n_blocks:
        assert kept == candidates
        return
    assert len(kept) == n_slots - 2
    gaps = [b - a for a, b in pairwise(kept)]
    assert not gaps or max(gaps) - min(gaps) <= 1
