"""The extension stands alone: no torch in it, nothing compiled at first use, liburing inside, and a fallback where
io_uring is refused."""

from __future__ import annotations

import ctypes.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import textwrap

import pytest

import offload
from offload import _C

ROOT = pathlib.Path(offload.__file__).parents[1]


def run(script, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ALONE = """
import importlib.machinery, importlib.util, json, sys
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
engine = module.Engine([sys.argv[2]])
arena = module.Arena(4096)
engine.write(arena.address, 4096, 0).wait(10)
engine.close()
with open("/proc/self/maps") as file:
    libraries = sorted({line.split()[-1] for line in file if ".so" in line})
print(json.dumps({"torch": "torch" in sys.modules, "libraries": libraries, "reason": engine.backend_reason}))
"""


def test_the_extension_works_without_torch_and_contains_liburing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    found = run(ALONE, _C.__file__, str(path))
    assert not found["torch"]
    names = [pathlib.Path(library).name for library in found["libraries"]]
    assert not [name for name in names if name.startswith(("libtorch", "libc10", "libcudart"))]
    archives = [
        pathlib.Path(directory, "liburing.a")
        for directory in (
            "/usr/lib",
            "/usr/lib64",
            "/usr/local/lib",
            f"/usr/lib/{platform.machine()}-linux-gnu",
        )
    ]
    if any(archive.exists() for archive in archives) or not ctypes.util.find_library("uring"):
        assert not [name for name in names if name.startswith("liburing")]


FIRST_USE = """
import json, os, sys
import torch  # builds for CUDA call ldconfig when imported
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in
                 ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.system") else None)
import offload
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
model, optimizer = offload.wrap(model, torch.optim.AdamW(model.parameters()), storage=[sys.argv[1]],
                                device_memory="1GB", host_memory="100MB", chunk_elements=4096)
model(torch.ones(2, 64)).sum().backward(); optimizer.step(); model.offload.close()
print(json.dumps(started))
"""


@pytest.mark.slow
def test_nothing_is_compiled_at_first_use(tmp_path):
    """A first step with no compiler in reach starts no program."""
    assert run(FIRST_USE, str(tmp_path), PATH="/nonexistent") == []


# What the headers of Ubuntu 22.04 (2.1) lack of those that are here, and those of 2.0.
LIBURING_2_1 = """
#include_next <liburing.h>
#undef IORING_SETUP_COOP_TASKRUN
#undef IORING_SETUP_SINGLE_ISSUER
#undef IORING_SETUP_DEFER_TASKRUN
#undef IORING_RSRC_REGISTER_SPARSE
#define io_uring_register_buffers_sparse not_there
#define io_uring_sqe_set_data64 not_there
"""
LIBURING_2_0 = f"""{LIBURING_2_1}
#undef IORING_FEAT_RSRC_TAGS
#define io_uring_register_buffers_tags not_there
#define io_uring_register_buffers_update_tag not_there
"""


@pytest.mark.parametrize("header", [LIBURING_2_1, LIBURING_2_0], ids=["2.1", "2.0"])
def test_the_extension_is_built_with_an_older_liburing_too(tmp_path, header):
    compiler = shutil.which("g++")
    if compiler is None or not pathlib.Path("/usr/include/liburing.h").exists():
        pytest.skip("there is no compiler here, or no liburing to build with")
    (tmp_path / "liburing.h").write_text(header, encoding="ascii")
    options = ["-std=c++17", "-fsyntax-only", "-DOFFLOAD_HAVE_URING=1", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [compiler, *options, ROOT / "csrc/io/uring_backend.cpp"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


REFUSED = """
import ctypes, json, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
LOAD, JUMP_IF_EQUAL, RETURN, ALLOW, REFUSE_EPERM = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | 1
filters = b"".join(struct.pack("HBBI", *f) for f in [
    (LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, 425), (RETURN, 0, 0, REFUSE_EPERM), (RETURN, 0, 0, ALLOW)])
buffer = ctypes.create_string_buffer(filters)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.c_void_p)]
program = Program(4, ctypes.addressof(buffer))
refused = libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0)
from offload import _C
engine = _C.Engine([sys.argv[1]])
arena = _C.Arena(4096)
engine.write(arena.address, 4096, 0).wait(10)
try:
    _C.Engine([sys.argv[1]], backend="uring")
    insisted = "taken"
except OSError as error:
    insisted = str(error)
print(json.dumps([refused, engine.backend, engine.backend_reason, insisted]))
"""


@pytest.mark.slow
def test_the_posix_backend_is_chosen_at_run_time_when_io_uring_is_refused(tmp_path):
    """As Docker's default profile does: a seccomp filter that answers io_uring_setup with EPERM."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    refused, backend, reason, insisted = run(REFUSED, str(path))
    if refused:
        pytest.skip("this kernel takes no seccomp filters")
    assert backend == "posix"
    if "without liburing" not in reason:
        assert "Operation not permitted" in reason
    assert reason in insisted
