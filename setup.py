"""Build `offload._C`. The extension needs a C++17 compiler and pybind11; liburing when its header is there, not torch.

OFFLOAD_SANITIZE=address,undefined (or thread) builds it with those sanitizers.
OFFLOAD_NO_URING=1 leaves io_uring out, as on a machine without liburing. OFFLOAD_BUILD_JOBS files are compiled at once
(default: as many as there are cores).
"""

from __future__ import annotations

import ctypes.util
import os
import pathlib
import platform

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup

ROOT = pathlib.Path(__file__).parent
INCLUDE_DIRS = ("/usr/include", "/usr/local/include")
LIBRARY_DIRS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", f"/usr/lib/{platform.machine()}-linux-gnu")


def liburing_flags() -> tuple[list[tuple[str, str]], list[str]]:
    """Macros and link arguments for liburing: the static archive where it exists, else the shared library."""
    header = any(pathlib.Path(d, "liburing.h").exists() for d in INCLUDE_DIRS)
    if not header or os.environ.get("OFFLOAD_NO_URING") == "1":
        return [], []
    for directory in LIBRARY_DIRS:
        archive = pathlib.Path(directory, "liburing.a")
        if archive.exists():
            return [("OFFLOAD_HAVE_URING", "1")], [str(archive)]
    if ctypes.util.find_library("uring"):
        return [("OFFLOAD_HAVE_URING", "1")], ["-luring"]
    return [], []


macros, link_args = liburing_flags()
compile_args = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wconversion",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# System headers, so that our warnings are about our code.
compile_args += ["-isystem", pybind11.get_include()]
sanitizers = os.environ.get("OFFLOAD_SANITIZE")
if sanitizers:
    compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
    link_args = [*link_args, f"-fsanitize={sanitizers}"]

ParallelCompile("OFFLOAD_BUILD_JOBS").install()
setup(
    ext_modules=[
        Extension(
            "offload._C",
            sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp")),
            depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")),
            include_dirs=["csrc"],
            define_macros=macros,
            extra_compile_args=compile_args,
            extra_link_args=[*link_args, "-pthread"],
            language="c++",
        )
    ],
)
