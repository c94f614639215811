"""Ctrl-C and SIGTERM, sent to real processes, end them soon, with a sentence, and without a store left behind."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.child import end, start, wait_until
from tests.conftest import slow_but

transformers = pytest.importorskip("transformers")

from tests.fault.training import STREAMING  # noqa: E402
from tests.integration.command_line import TEXT, make_tokenizer  # noqa: E402  # needs transformers

pytestmark = [pytest.mark.fault, pytest.mark.timeout(200)]

ENDS_WITHIN_S = 15
"""Blocks in flight, the interpreter's exit, and a busy machine; finishing what is queued would take minutes."""

WAITING = """
import sys, time
from offload._C import Arena, Engine
engine = Engine([sys.argv[1]], backend=sys.argv[2], block_nbytes=4096, queue_depth=1, inject={"delay_ms": 100})
arena = Arena(1 << 20)
ticket = engine.write(arena.address, 1 << 20, 0)
print("waiting", flush=True)
start_s = time.perf_counter()
try:
    ticket.wait()
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - start_s, flush=True)
engine.cancel()
engine.close()
"""


@pytest.mark.parametrize("backend", slow_but(["posix"], ["uring", "posix"]))
def test_ctrl_c_works_while_waiting_for_a_ticket(tmp_path, backend):
    """The transfer takes 25 s."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    child = start(WAITING, path, backend)
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    status, out, err = end(child, ENDS_WITHIN_S)
    assert status == 0, err
    assert out.startswith("interrupted")
    assert float(out.split()[1]) < 3


FINETUNE = """
import os, sys
import torch
from offload.cli import main
from offload.tiers import storage
from offload._C import Engine
torch.set_num_threads(1)
made = []
def make(paths, **options):
    options["backend"] = sys.argv[1]
    made.append(paths)
    faults = eval(sys.argv[2]) if len(made) == 2 else {}  # the first one measures rates, the second is the run's
    return Engine(paths, inject=faults, **options)
storage.Engine = make
main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.conftest import build

    place = tmp_path_factory.mktemp("model")
    build("llama", layers=6).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    (place / "text.txt").write_text(TEXT)
    return place


def start_finetune(model, place, backend, *more, faults=None):
    """A run whose own store has these faults."""
    aside = ["--step-aside", "never"] if STREAMING else []
    return start(
        FINETUNE, backend, faults or {}, "finetune", "--model", model, "--data", model / "text.txt",
        "--storage", place / "store", "--host-memory", "15500KB", "--device-memory", "12MB", "--steps", 1000000,
        "--batch-size", 2, "--sequence-length", 16, "--output", place / "out", *aside, *more,
    )  # fmt: skip


def stores(place):
    directory = place / "store"
    return os.listdir(directory) if directory.exists() else []


def assert_ended_in_order(child, place, status, out, err):
    assert status == 130, err
    assert "interrupted: " in err
    assert "the store has been removed, nothing was exported" in err
    assert "Traceback" not in err
    assert stores(place) == []
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("backend", "signal_number"),
    [
        pytest.param("posix", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("uring", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("uring", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("uring", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param("posix", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_the_update_pipeline_runs_ends_finetune_in_order(
    model, tmp_path, backend, signal_number
):
    child = start_finetune(model, tmp_path, backend, "--json")
    for _ in range(3):  # three steps: updates are in flight nearly all the time
        line = child.stdout.readline()
        if not line:
            raise AssertionError(end(child))
        assert json.loads(line)["written_bytes"] > 0
    child.send_signal(signal_number)
    status, out, err = end(child, ENDS_WITHIN_S)
    assert_ended_in_order(child, tmp_path, status, out, err)
    summary = json.loads(out.splitlines()[-1])["summary"]
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 3


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        pytest.param("uring", ["--max-grad-norm", "1.0"], marks=pytest.mark.slow),
        pytest.param("posix", [], marks=pytest.mark.slow),
        pytest.param("uring", [], marks=pytest.mark.slow),
        pytest.param("posix", ["--max-grad-norm", "1.0"], marks=pytest.mark.slow),
    ],
    ids=["uring-deferred", "posix-during-backward", "uring-during-backward", "posix-deferred"],
)
def test_a_signal_while_blocked_in_a_wait_on_a_slow_drive_ends_finetune_in_order(
    model, tmp_path, backend, more
):
    """Each transfer takes 0.1 s, one after the other with io_uring: a step of some hundred takes half a minute."""
    child = start_finetune(model, tmp_path, backend, *more, faults={"delay_ms": 100})
    wait_until(lambda: "trainable parameters" in peek(child), child)
    time.sleep(2)
    child.send_signal(signal.SIGTERM)
    status, out, err = end(child, ENDS_WITHIN_S)
    assert_ended_in_order(child, tmp_path, status, out, err)


def peek(child):
    """What the child has written to stderr so far; keeps it for later."""
    os.set_blocking(child.stderr.fileno(), False)
    seen = getattr(child, "seen", "")
    try:
        seen += os.read(child.stderr.fileno(), 1 << 16).decode()
    except BlockingIOError:
        time.sleep(0.01)
    child.seen = seen
    return seen


@pytest.mark.slow
def test_a_signal_while_the_model_is_streamed_into_the_store_leaves_no_store(model, tmp_path):
    child = start_finetune(model, tmp_path, "auto", faults={"delay_ms": 300})
    wait_until(lambda: "storage reads" in peek(child), child)
    wait_until(lambda: stores(tmp_path) != [], child)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    status, out, err = end(child, ENDS_WITHIN_S)
    assert_ended_in_order(child, tmp_path, status, out, err)
    assert "before the first step ended" in err


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_cut_the_cleaning_short(model, tmp_path):
    child = start_finetune(model, tmp_path, "auto", faults={"delay_ms": 100})
    wait_until(lambda: "trainable parameters" in peek(child), child)
    time.sleep(2)
    for _ in range(5):
        child.send_signal(signal.SIGINT)
        time.sleep(0.02)
    status, out, err = end(child, ENDS_WITHIN_S)
    assert_ended_in_order(child, tmp_path, status, out, err)


@pytest.mark.slow
def test_a_failing_drive_ends_finetune_with_a_sentence_and_no_store(model, tmp_path):
    child = start_finetune(model, tmp_path, "auto", faults={"fail_nth": 300, "errno": 5})
    status, _, err = end(child)
    assert status == 1, err
    assert f"{tmp_path}/store" in err
    assert "Input/output error" in err
    assert "Traceback" not in err
    assert stores(tmp_path) == []
