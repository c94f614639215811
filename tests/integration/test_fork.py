"""A process forked from the one that trains, as a DataLoader's workers are: it takes no copy of the run's memory."""

from __future__ import annotations

import os
import re
import traceback

import pytest
import torch

from offload._C import Engine
from offload.errors import UsageError
from offload.tiers.host import HostArena
from tests.fault.training import make_run

NBYTES = 64 << 20


def in_a_child(check):
    """Whether `check()` returned in a forked process. What it raises is printed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def private_nbytes(pid="self"):
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return 1024 * int(re.search(r"Private_Dirty: +(\d+)", file.read())[1])


@pytest.mark.parametrize("backend", ["uring", "posix"])
def test_a_fork_copies_nothing_of_an_arena_that_storage_reads_into(tmp_path, backend):
    (tmp_path / "file").touch()
    engine = Engine([str(tmp_path / "file")], backend=backend)
    arena = HostArena(NBYTES)
    arena.bytes_tensor.fill_(7)
    engine.register_buffer(arena.address, arena.nbytes)

    def check():
        assert private_nbytes() < NBYTES / 4
        assert not arena.bytes_tensor.any()

    assert in_a_child(check)
    assert bool((arena.bytes_tensor == 7).all())


def test_a_forked_process_is_told_that_it_cannot_compute_with_the_model(tmp_path):
    model, optimizer = make_run(tmp_path)
    x = torch.randn(4, 8)
    model(x).sum().backward()
    optimizer.step()

    model.offload.flush()
    embedded = model.embed(x)

    def check():
        assert torch.equal(model.embed(x), embedded)
        with pytest.raises(UsageError, match="forked from the one that trains"):
            model(x)

    assert in_a_child(check)
    model(x)
    model.offload.close()
