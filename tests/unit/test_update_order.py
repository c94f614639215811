"""In which order queued updates are made: as they came, held ones after all others, at the turn as they are used."""

import torch

from offload import _C
from tests.unit.test_update_pipeline import Harness


class Queue:
    """One buffer and one thread, both kept busy by an update whose gradients do not arrive before `go`."""

    def __init__(self, directory, n_jobs=8):
        self.harness = Harness(directory, 2048, 1, n_threads=1)
        self.params = iter(torch.zeros(n_jobs, 2 * 2048).unbind())
        self.states = iter(torch.zeros(n_jobs, 2 * 2048 * 2).unbind())
        self.grad, self.gate = torch.ones(2 * 2048), _C.Ticket()
        self.kept, self.tickets = [], []
        self.harness.pipeline.record_spans(True)
        self.add(99, n_chunks=1, grad_gate=self.gate)

    def add(self, tag, n_chunks=2, **more):
        param, state, n = next(self.params), next(self.states), n_chunks * 2048
        self.kept += [param, state]
        job = _C.UpdateJob(
            param_codec="fp32", n_elements=n, param_address=param.data_ptr(), state_host_address=state.data_ptr(),
            host_chunks=n_chunks, grad_address=self.grad.data_ptr(), tag=tag,
            segments=[(0, n, _C.Hyper(1e-2, 0.9, 0.99, 1e-8, 0.0, 1))], **more,
        )  # fmt: skip
        self.tickets.append(self.harness.pipeline.submit(job))

    def go(self):
        """The tags of the chunks that were updated, in that order."""
        if not self.gate.done():
            self.gate.complete()
        for ticket in self.tickets:
            ticket.wait(timeout_s=30)
        spans = sorted(self.harness.pipeline.take_spans(), key=lambda span: span[2])
        self.harness.close()
        return [tag for kind, tag, _, _ in spans if kind == "u"][1:]


def test_held_updates_are_made_in_the_order_of_use_when_no_other_is_left(tmp_path):
    """The first chunk may have been taken when nothing else was there."""
    queue = Queue(tmp_path)
    for tag in (7, 6):
        queue.add(tag, held=True)
    for tag in (5, 4):
        queue.add(tag)
    assert queue.go() in ([7, 5, 5, 4, 4, 6, 6, 7], [5, 5, 4, 4, 6, 6, 7, 7])


def test_a_held_update_is_made_while_the_gradients_of_others_are_on_their_way(tmp_path):
    queue, late = Queue(tmp_path), _C.Ticket()
    queue.add(7, held=True)
    queue.add(5, grad_gate=late)
    queue.add(6, held=True, grad_gate=late)
    queue.gate.complete()
    queue.tickets[1].wait(timeout_s=30)
    late.complete()
    assert queue.go() == [7, 7, 5, 5, 6, 6]


def test_at_the_turn_held_updates_are_put_in_the_order_of_use_with_all_others(tmp_path):
    """But for one that has begun."""
    queue = Queue(tmp_path)
    for tag in (9, 2):
        queue.add(tag)
    for tag in (7, 3):
        queue.add(tag, held=True)
    queue.add(-1, n_chunks=1, reorders=True)
    assert queue.go() in ([9, 9, -1, 2, 2, 3, 3, 7, 7], [-1, 2, 2, 3, 3, 7, 7, 9, 9])


def test_after_the_turn_no_update_of_a_later_step_goes_before_one_that_was_held(tmp_path):
    """A later one may wait for a commit that waits for all of the step before."""
    queue, commit = Queue(tmp_path), _C.Ticket()
    for tag in (7, 6):
        queue.add(tag, held=True)
    queue.harness.pipeline.turn()
    queue.add(8, write_gate=commit)
    queue.gate.complete()
    for ticket in queue.tickets[1:3]:
        ticket.wait(timeout_s=10)
    commit.complete()
    assert sorted(queue.go()) == [6, 6, 7, 7, 8, 8]
