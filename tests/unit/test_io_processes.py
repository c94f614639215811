"""The engine among what a process has of its system: locked memory, threads, and children that are forked from it."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

from offload import _C
from offload._C import Arena, FileEngine, Hyper, UpdateJob, UpdatePipeline
from tests.child import run
from tests.unit.test_io_engine import BACKENDS, MIB, make_engine, make_files

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


ENDING = f"""{ALONE}
import threading
class Last:
    def __del__(self, sleep=time.sleep): sleep(0.3)  # the interpreter is still ending when the thread comes back
last, ticket = Last(), C.Ticket()
threading.Thread(target=ticket.wait, daemon=True).start()
time.sleep(0.1)
sys.exit(3)
"""


def test_a_process_ends_with_its_own_status_while_a_daemon_thread_waits_for_a_transfer():
    status, _, err = run(ENDING, _C.__file__)
    assert status == 3, err


CROWDED = f"""{ALONE}
used_nbytes = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used_nbytes + int(sys.argv[3]), resource.RLIM_INFINITY))
n_open = len(os.listdir("/proc/self/fd"))
try:
    C.Engine([sys.argv[2]], backend=sys.argv[4])
except OSError as error:
    print(error.errno, len(os.listdir("/proc/self/fd")) - n_open)
"""


@pytest.mark.parametrize(("backend", "half_stacks"), [("posix", 5), ("uring", 1)])
def test_an_engine_that_gets_only_some_of_its_threads_is_an_error_and_leaves_nothing_open(
    tmp_path, backend, half_stacks
):
    (path,) = make_files(tmp_path, 1, MIB)
    make_engine([path], backend).close()
    stack_nbytes = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack_nbytes == resource.RLIM_INFINITY:
        pytest.skip("the stack of a thread has no known size here")
    status, out, err = run(CROWDED, _C.__file__, path, half_stacks * stack_nbytes // 2, backend)
    assert (status, out.split()) == (0, [str(errno.EAGAIN), "0"]), err


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_process_is_refused_what_nobody_would_complete(tmp_path, backend):
    (path,) = make_files(tmp_path, 1, MIB)
    engine, files = make_engine([path], backend), FileEngine(backend=backend)
    arena, params, grads = Arena(MIB), Arena(8192), Arena(8192)
    pipeline = UpdatePipeline(None, 2048, 1, 1, arena.address, arena.nbytes)
    job = UpdateJob(
        rule="sgd",
        state_planes=[],
        param_codec="fp32",
        n_elements=2048,
        param_address=params.address,
        grad_address=grads.address,
        segments=[(0, 2048, Hyper(0.1))],
    )
    asked = [
        lambda: engine.read(arena.address, 4096, 0),
        lambda: engine.write(arena.address, 4096, 0),
        lambda: engine.register_buffer(arena.address, 4096),
        lambda: engine.sync(),
        lambda: engine.reopen([path]),
        lambda: files.read(path, arena.address, 4096, 0),
        lambda: files.write(path, arena.address, 4096, 0),
        lambda: pipeline.submit(job),
    ]
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)  # ends one that waits for ever
        n_refused = 0
        for ask in asked:
            try:
                ask()
            except OSError as error:
                n_refused += f"process {parent}, which this one was forked from" in str(error)
        os._exit(n_refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(asked)
    engine.write(arena.address, 4096, 0).wait(timeout_s=20)
    pipeline.submit(job).wait(timeout_s=20)
    pipeline.close()
    engine.close()


def test_a_forked_process_has_what_is_kept_wherever_it_lies_in_a_page():
    arena = Arena(MIB)
    memory = memoryview(arena)
    first, last = (
        3 * 4096 + 512,
        5 * 4096 + 512,
    )  # as pages of ours may lie in those of a system that has larger ones
    memory[first], memory[last], memory[-1] = 7, 8, 9
    arena.keep_on_fork(first, last + 1 - first)
    child = os.fork()
    if child == 0:
        os._exit(int((memory[first], memory[last], memory[-1]) == (7, 8, 0)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
