"""The order in which a step uses its blocks, wherever it is: forward through all, backward through all, and again."""

from hypothesis import given
from hypothesis import strategies as st

from offload.schedule.operations import Use, UseCursor


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
