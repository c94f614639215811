"""DeepSpeed's own tests of its asynchronous I/O handle, as its repository publishes them, over our handle.

They are not in its package. Give the file: `DEEPSPEED_AIO_TESTS=.../tests/unit/ops/aio/test_aio.py python -m pytest
tests/peers/test_deepspeeds_own_tests.py`, with a Python that has DeepSpeed.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest

pytestmark = [pytest.mark.peer, pytest.mark.slow, pytest.mark.timeout(900)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFTEST = '''
"""Our handle in place of DeepSpeed's, and the one function that its file writer takes from an extension without CPU
build."""
import types

import torch
from deepspeed.io import fast_file_writer

from offload.deepspeed import use_io_engine

use_io_engine()


class Utils:
    def load(self):
        return types.SimpleNamespace(cast_to_byte_tensor=lambda tensor: tensor.view(torch.uint8))


fast_file_writer.UtilsBuilder = Utils
'''
COMMON = '''
"""Theirs starts workers, in which nobody has called use_io_engine(): here the one rank is the test's own process."""
import os

import deepspeed
import pytest


class DistributedTest:
    @pytest.fixture(autouse=True)
    def one_rank(self):
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
        os.environ.update(ranks)
        deepspeed.init_distributed("gloo")
'''
NEEDS_CUDA = "torch.pin_memory is only supported in CUDA environments."


def test_deepspeeds_own_tests_of_its_handle_pass_over_ours(tmp_path):
    """Those that pin memory with CUDA skip themselves; all others pass."""
    source = os.environ.get("DEEPSPEED_AIO_TESTS")
    if not source:
        pytest.skip("DEEPSPEED_AIO_TESTS does not name DeepSpeed's test_aio.py")
    shutil.copy(source, tmp_path / "test_aio.py")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit" / "__init__.py").touch()
    (tmp_path / "unit" / "common.py").write_text(COMMON)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = sequential\n")
    modules = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_aio.py"]
    done = subprocess.run(
        [*command, "--junit-xml=results.xml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": modules},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = list(xml.etree.ElementTree.parse(tmp_path / "results.xml").iter("testcase"))
    reasons = [skipped.get("message") for case in cases for skipped in case.iter("skipped")]
    assert set(reasons) <= {NEEDS_CUDA}
    assert len(cases) - len(reasons) >= 50
