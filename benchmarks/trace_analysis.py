"""What a trace of torch's profiler says of steady steps: gaps on the device, copies, calls that stop or allocate.

Pure functions over the events of a Chrome trace (`traceEvents`, microseconds), as `torch.profiler` exports it.

[Note: whose kernel] A kernel belongs to the step, and to the block, inside whose named range the call was made that
launched it (they share a correlation number). A step lasts from its first kernel's start to the next step's first
kernel's start, so what the device waits for at the turn of two steps is in it. The stream with most kernel time is the
one that computes.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

STEP = "benchmark step"
"""Name of the range around each step."""
WATCHED = (
    "cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cudaFreeHost", "cudaHostRegister",
    "cudaHostUnregister", "cudaMemcpy", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
    "cuMemCreate", "cuMemMap", "cuMemUnmap",
)  # fmt: skip
"""Calls that allocate, or that let the calling thread wait for the device."""
_BLOCK_KINDS = ("forward", "recompute", "backward")

_WAIT = "offload wait for "
_JUST_BEFORE_US = 20.0
"""Compute that waits for a copy begins within this time after it."""

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in disjoint intervals, sorted."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Of disjoint intervals, together."""
    return sum(end - start for start, end in intervals)


def intersection(ones: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Time in both of two sorted lists of disjoint intervals."""
    found: list[Interval] = []
    i = j = 0
    while i < len(ones) and j < len(others):
        start, end = max(ones[i][0], others[j][0]), min(ones[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if ones[i][1] <= others[j][1]:
            i += 1
        else:
            j += 1
    return found


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """What of sorted disjoint intervals lies in `window`."""
    return intersection(list(intervals), [window])


@dataclass(frozen=True)
class _Kernel:
    start: float
    end: float
    name: str
    stream: Any
    correlation: Any
    block: str
    """`forward`, `recompute` or `backward` and the block's name; empty for the root."""


class _Trace:
    """The events by kind. Everything is in microseconds."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        whole = [e for e in events if e.get("ph") == "X"]
        self.calls = [e for e in whole if e.get("cat") in ("cuda_runtime", "cuda_driver")]
        self.copies = [e for e in whole if e.get("cat") == "gpu_memcpy"]
        self.marks = marks = [e for e in whole if e.get("cat") == "user_annotation"]
        self.steps = sorted(_interval(e) for e in marks if e["name"] == STEP)
        self._ranges: dict[Any, list[tuple[Interval, str]]] = defaultdict(list)
        for mark in marks:
            words = str(mark["name"]).split(" ", 2)
            if words[0] == "offload" and len(words) == 3 and words[1] in _BLOCK_KINDS:
                self._ranges[mark.get("tid")].append((_interval(mark), f"{words[1]} {words[2]}"))
        self.launched_by = {_correlation(e): e for e in self.calls if _correlation(e) is not None}
        self.kernels = sorted(
            (self._kernel(e) for e in whole if _is_work(e)),
            key=lambda kernel: kernel.start,
        )

    def _kernel(self, event: dict[str, Any]) -> _Kernel:
        start, end = _interval(event)
        number = _correlation(event)
        return _Kernel(start, end, event["name"], _stream(event), number, self._block_of(number))

    def _block_of(self, correlation: Any) -> str:
        call = self.launched_by.get(correlation)
        if call is None:
            return ""
        inside = [
            (end - start, label)
            for (start, end), label in self._ranges.get(call.get("tid"), ())
            if start <= call["ts"] <= end
        ]
        return min(inside, default=(0.0, ""))[1]

    def compute_stream(self) -> Any:
        """The one with most kernel time."""
        seconds: Counter[Any] = Counter()
        for kernel in self.kernels:
            seconds[kernel.stream] += kernel.end - kernel.start
        return seconds.most_common(1)[0][0] if seconds else None

    def first_of(self, step: Interval, kernels: Sequence[_Kernel]) -> float | None:
        """When the first of the kernels launched in `step` starts."""
        for kernel in kernels:
            call = self.launched_by.get(kernel.correlation)
            if call is not None and step[0] <= call["ts"] <= step[1]:
                return kernel.start
        return None


def _is_work(event: dict[str, Any]) -> bool:
    """Kernels, and copies inside device memory."""
    within = event.get("cat") == "gpu_memcpy" and "DtoD" in event["name"]
    return within or event.get("cat") in ("kernel", "gpu_memset")


def _interval(event: dict[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0))


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _stream(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("stream")


def analyse(events: Sequence[dict[str, Any]], step: int = 1) -> dict[str, Any]:
    """Figures of one of the steps in the trace (the second, with a third after it). Seconds and counts.

    `gap_share`: time in which nothing computes, of the step; `turn_share`: that of it between the last backward of a
    block and the first forward of one in the next step, where the root is updated; `between_blocks_share`: the rest of
    it between the kernels of two blocks, or of a block and the root (both None without blocks); `gap_s_by_cause`: what
    it waited for. `calls`: those in WATCHED by the threads that launch kernels; `calls_elsewhere`: by others, which
    wait so that those need not. Raises ValueError for a trace without that step.
    """
    trace = _Trace(events)
    if len(trace.steps) <= step:
        raise ValueError(f"the trace has {len(trace.steps)} ranges named {STEP!r}; step {step} is wanted")
    found: dict[str, Any] = _calls(trace, trace.steps[step])
    stream = trace.compute_stream()
    kernels = [kernel for kernel in trace.kernels if kernel.stream == stream]
    start = trace.first_of(trace.steps[step], kernels)
    if start is None:  # nothing ran on a GPU
        return found
    following = trace.steps[step + 1] if len(trace.steps) > step + 1 else None
    end = None if following is None else trace.first_of(following, kernels)
    if end is None:
        end = max(k.end for k in kernels)
    return found | _gaps(trace, kernels, (start, end)) | _copies(trace, kernels, (start, end))


def _gaps(trace: _Trace, kernels: Sequence[_Kernel], window: Interval) -> dict[str, Any]:
    total = window[1] - window[0]
    gaps: list[tuple[float, _Kernel, str, str]] = []
    idle_times: list[Interval] = []
    busy_until, last = window[0], None
    for kernel in kernels:
        if kernel.end <= window[0] or kernel.start > window[1]:
            continue
        if last is not None and kernel.start > busy_until:
            gaps.append((kernel.start - busy_until, last, kernel.name, kernel.block))
            idle_times.append((busy_until, kernel.start))
        if kernel.end >= busy_until:
            busy_until, last = kernel.end, kernel
    if last is not None and busy_until < window[1]:
        gaps.append((window[1] - busy_until, last, "", ""))
        idle_times.append((busy_until, window[1]))
    idle = sum(gap for gap, *_ in gaps)
    between, turn = None, None
    if (blocks := _between_turns(kernels, window)) is not None:  # the window begins and ends in a turn
        at_turn = [not blocks[0] <= start < blocks[1] for start, _ in idle_times]
        turn = sum(gap for (gap, *_), is_turn in zip(gaps, at_turn, strict=True) if is_turn)
        others = [gap for gap, is_turn in zip(gaps, at_turn, strict=True) if not is_turn]
        between = sum(gap for gap, before, _, block in others if before.block != block)
    longest = sorted(gaps, key=lambda item: -item[0])[:8]
    return {
        "step_s": total / 1e6,
        "compute_s": (total - idle) / 1e6,
        "gap_share": idle / total,
        "between_blocks_share": None if between is None else between / total,
        "turn_share": None if turn is None else turn / total,
        "gap_s_by_cause": _causes(trace, idle_times),
        "longest_gaps": [
            {"seconds": gap / 1e6, "after": f"{before.block}: {before.name}", "before": f"{block}: {name}"}
            for gap, before, name, block in longest
        ],
    }


def _between_turns(kernels: Sequence[_Kernel], window: Interval) -> Interval | None:
    """From the first forward kernel of a block in `window` to the end of the last backward one: no turn of steps."""
    inside = [k for k in kernels if window[0] <= k.start < window[1]]
    begins = [k.start for k in inside if k.block.startswith("forward ")]
    ends = [k.end for k in inside if k.block.startswith("backward ")]
    return (min(begins), max(ends)) if begins and ends else None


def _causes(trace: _Trace, idle_times: Sequence[Interval]) -> dict[str, float]:
    """Seconds of the gaps by what they waited for: a copy that ended just before compute went on, a call in which the
    launching thread waited for something else (storage, an update), or the launching itself."""
    ends = {
        way: sorted(_interval(e)[1] for e in trace.copies if mark in e["name"])
        for way, mark in (("h2d", "HtoD"), ("d2h", "DtoH"))
    }
    waits = sorted(
        (_interval(mark)[1], str(mark["name"]).removeprefix(_WAIT))
        for mark in trace.marks
        if mark["name"].startswith(_WAIT)
    )
    seconds: Counter[str] = Counter()
    for start, end in idle_times:
        near = [
            (times[at - 1], way)
            for way, times in ends.items()
            if (at := bisect.bisect_right(times, end)) and times[at - 1] > max(start, end - _JUST_BEFORE_US)
        ]
        waited = [(at, cause) for at, cause in waits if start < at <= end]
        seconds[max(near)[1] if near else max(waited)[1] if waited else "launch"] += (end - start) / 1e6
    return dict(seconds)


def _copies(trace: _Trace, kernels: Sequence[_Kernel], window: Interval) -> dict[str, Any]:
    computing = clipped(union((k.start, k.end) for k in kernels), window)
    by_way: dict[str, list[Interval]] = {}
    nbytes: dict[str, float] = {}
    for way, mark in (("h2d", "HtoD"), ("d2h", "DtoH")):
        mine = [e for e in trace.copies if mark in e["name"]]
        by_way[way] = clipped(union(map(_interval, mine)), window)
        nbytes[way] = sum(e.get("args", {}).get("bytes", 0) for e in mine if _starts_in(e, window))
    both = intersection(by_way["h2d"], by_way["d2h"])
    hidden = intersection(union([*by_way["h2d"], *by_way["d2h"]]), computing)
    copying = length(union([*by_way["h2d"], *by_way["d2h"]]))
    pageable = [e for e in trace.copies if "ageable" in e["name"] and _starts_in(e, window)]
    return {
        "h2d_s": length(by_way["h2d"]) / 1e6,
        "d2h_s": length(by_way["d2h"]) / 1e6,
        "both_ways_s": length(both) / 1e6,
        "copies_beside_compute_share": length(hidden) / copying if copying else None,
        "h2d_bytes": nbytes["h2d"],
        "d2h_bytes": nbytes["d2h"],
        "pageable_copies": len(pageable),
        "pageable_bytes": sum(e.get("args", {}).get("bytes", 0) for e in pageable),
    }


def _starts_in(event: dict[str, Any], window: Interval) -> bool:
    return window[0] <= float(event["ts"]) < window[1]


def _calls(trace: _Trace, step: Interval) -> dict[str, Any]:
    launching = {e.get("tid") for e in trace.calls if "LaunchKernel" in e["name"]}
    inside = [e for e in trace.calls if e["name"] in WATCHED and step[0] <= e["ts"] <= step[1]]
    mine = [e for e in inside if e.get("tid") in launching]
    return {
        "calls": dict(Counter(e["name"] for e in mine)),
        "calls_elsewhere": dict(Counter(e["name"] for e in inside if e.get("tid") not in launching)),
        "waited_in_calls_s": sum(float(e.get("dur", 0)) for e in mine if "Synchronize" in e["name"]) / 1e6,
    }
