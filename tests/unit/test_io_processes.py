"""The engine among what a process has of its system: locked memory, threads, and children that are forked from it."""

from __future__ import annotations

import errno
import os
import resource

import pytest

from offload import _C
from offload._C import Arena
from tests.child import run
from tests.unit.test_io_engine import MIB, make_engine, make_files

# The extension alone: a child then starts in a moment.
ALONE = """
import importlib.machinery, importlib.util, os, re, resource, sys, time
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
C = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(C)
"""


def pinned_nbytes():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmPin"))


def test_closing_unlocks_registered_memory_before_it_returns(tmp_path):
    before = pinned_nbytes()
    engine, arena = make_engine(make_files(tmp_path, 1, MIB), "uring"), Arena(16 * MIB)
    if not engine.register_buffer(arena.address, arena.nbytes):
        pytest.skip("the kernel refuses to register buffers here (ulimit -l)")
    assert pinned_nbytes() >= before + arena.nbytes
    engine.close()
    assert pinned_nbytes() <= before


LIMITED = f"""{ALONE}
os.chdir(sys.argv[2])
arena = C.Arena(4 << 20)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (arena.nbytes + (1 << 20),) * 2)
if os.getuid() == 0: os.setuid(65534)  # root may lock any amount
engine = C.Engine(["drive0"], direct=False)
if not engine.register_buffer(arena.address, arena.nbytes): sys.exit(7)
engine.reopen(["drive1"])
time.sleep(0.2)  # what is still locked for the first file, if anything, goes
print(re.search("VmPin:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])
"""


def test_buffers_stay_registered_with_other_files_where_they_can_be_locked_only_once(tmp_path):
    for path in make_files(tmp_path, 2, MIB):
        os.chmod(path, 0o666)
    os.chmod(tmp_path, 0o777)
    status, out, err = run(LIMITED, _C.__file__, tmp_path)
    if status == 7:
        pytest.skip("the kernel refuses to register buffers here")
    assert status == 0, err
    assert int(out) >= 4096


CROWDED = f"""{ALONE}
used_nbytes = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used_nbytes + int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    C.Engine([sys.argv[2]], backend="posix")
except OSError as error:
    print(error.errno)
"""


def test_an_engine_that_gets_only_some_of_its_threads_is_an_error(tmp_path):
    (path,) = make_files(tmp_path, 1, MIB)
    stack_nbytes = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack_nbytes == resource.RLIM_INFINITY:
        pytest.skip("the stack of a thread has no known size here")
    status, out, err = run(CROWDED, _C.__file__, path, 5 * stack_nbytes // 2)
    assert (status, out.strip()) == (0, str(errno.EAGAIN)), err
