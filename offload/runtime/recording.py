"""What a run did when: spans in the simulator's lanes, and named ranges for torch's profiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from offload.runtime.assembly import Assembly
from offload.stores.block_store import BlockRecord
from offload.telemetry import Span, SpanLog
from offload.tiers.device import DeviceTier

_LANES = {"r": ("read", "state_in"), "u": ("cpu", "update"), "w": ("write", "state_out")}


def named(*words: str) -> contextlib.AbstractContextManager[object]:
    """A range of that name for torch's profiler. While none is on it costs next to nothing: a range takes as long to
    open and close as the launch of several operations."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(" ".join(["offload", *words]))
    return contextlib.nullcontext()


def computing(
    device: DeviceTier, spans: SpanLog, kind: str, block: BlockRecord
) -> contextlib.AbstractContextManager[object]:
    """Record what the device computes inside: for torch's profiler, and as a span while spans are recorded."""
    return _span(device, spans, kind, block) if spans.recording else named(kind, block.name)


@contextlib.contextmanager
def _span(device: DeviceTier, spans: SpanLog, kind: str, block: BlockRecord) -> Iterator[None]:
    with named(kind, block.name):
        start = device.stamp()
        yield
        end = device.stamp()
        spans.add("compute", f"{kind} {block.label}", lambda: (start(), end()))


@contextlib.contextmanager
def recording(parts: Assembly, log: SpanLog, flush: Callable[[], None]) -> Iterator[list[Span]]:
    """Record from one `flush` to the next; the list that is given holds the spans afterwards."""
    resources = parts.resources
    spans: list[Span] = []
    flush()
    resources.device.timing = True
    resources.pipeline.record_spans(True)
    log.start()
    try:
        yield spans
    finally:
        flush()
        resources.device.mark().wait()
        for block in [*parts.blocks, parts.root]:
            block.loaded.wait()
        resources.pipeline.record_spans(False)
        labels = {-1: parts.root.label, **{block.index: block.label for block in parts.blocks}}
        for kind, index, start_s, end_s in resources.pipeline.take_spans():
            lane, name = _LANES[kind]
            log.add(lane, f"{name} {labels[index]}", functools.partial(_times, start_s, end_s))
        spans += log.stop()  # waits for copies and transfers that go on
        resources.device.timing = False  # after it: whatever is recorded is timed


def _times(start_s: float, end_s: float) -> tuple[float, float]:
    return start_s, end_s
