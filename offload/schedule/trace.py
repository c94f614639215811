"""Spans as a trace file for Perfetto (ui.perfetto.dev, chrome://tracing) and as a picture: one lane per resource."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from offload.errors import ConfigError
from offload.schedule.operations import LANES
from offload.telemetry import Span

LANE_TITLES = {
    "compute": "device compute",
    "h2d": "bus H2D",
    "d2h": "bus D2H",
    "read": "storage read",
    "write": "storage write",
    "cpu": "CPU update",
}
PICTURE_SPANS_MAX = 200_000


def lanes_of(spans: Sequence[Span]) -> list[str]:
    """Resources in the order of the schedule's lanes, others after them by name."""
    present = {span.resource for span in spans}
    known = [lane for lane in LANES if lane in present]
    return known + sorted(present - set(known))


def trace_events(
    spans: Sequence[Span],
    memory: Mapping[str, Sequence[tuple[float, int]]] | None = None,
    *,
    process: str = "offload",
    process_id: int = 1,
) -> list[dict[str, Any]]:
    """Events of the Trace Event Format: complete events in microseconds, one thread per resource, a counter per tier.

    Give a simulated and a measured run different `process_id`s to lay them side by side in one file.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process_id, "args": {"name": process}}
    ]
    lanes = lanes_of(spans)
    for thread, lane in enumerate(lanes, start=1):
        title = LANE_TITLES.get(lane, lane)
        events.append(
            {"ph": "M", "name": "thread_name", "pid": process_id, "tid": thread, "args": {"name": title}}
        )
        events.append(
            {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": process_id,
                "tid": thread,
                "args": {"sort_index": thread},
            }
        )
    thread_of = {lane: thread for thread, lane in enumerate(lanes, start=1)}
    for span in sorted(spans, key=lambda s: (s.start_s, s.resource)):
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.name.split(" ")[0],
                "pid": process_id,
                "tid": thread_of[span.resource],
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
            }
        )
    for tier, line in (memory or {}).items():
        for at_s, nbytes in line:
            events.append(
                {
                    "ph": "C",
                    "name": f"{tier} GB",
                    "pid": process_id,
                    "ts": at_s * 1e6,
                    "args": {"GB": nbytes / 1e9},
                }
            )
    return events


def write_trace(
    path: str,
    spans: Sequence[Span],
    memory: Mapping[str, Sequence[tuple[float, int]]] | None = None,
    *,
    process: str = "offload",
) -> None:
    """Write `path` for Perfetto."""
    events = trace_events(spans, memory, process=process)
    pathlib.Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _colours(names: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    return {name: palette(i % 20) for i, name in enumerate(names)}


def _figure(**options: Any) -> Any:
    """An empty figure. Raises ConfigError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib; run: pip install 'offload[plot]'") from error
    return Figure(**options)


def check_picture(path: str) -> None:
    """Raise ConfigError where `draw_timeline` could not write this file, before anything is run for it."""
    kinds, kind = _figure().canvas.get_supported_filetypes(), pathlib.Path(path).suffix.removeprefix(".")
    if kind and kind.lower() not in kinds:
        raise ConfigError(
            f"{path}: .{kind} is no format of pictures here; write FILE.png, FILE.svg or FILE.pdf"
        )


def draw_timeline(
    path: str,
    spans: Sequence[Span],
    memory: Mapping[str, Sequence[tuple[float, int]]] | None = None,
    *,
    title: str = "",
) -> None:
    """Draw `path` (its suffix gives the format): a lane per resource, below it the bytes each tier holds.

    Raises ConfigError when matplotlib is missing or there is nothing to draw.
    """
    if not spans:
        raise ConfigError("there are no spans to draw")
    lanes = lanes_of(spans)
    kinds = sorted({span.name.split(" ")[0] for span in spans})
    figure = _figure(figsize=(14, 1.2 + 0.55 * len(lanes) + (2.2 if memory else 0)), layout="constrained")
    colours = _colours(kinds)
    ratios = [0.55 * len(lanes), 2.0] if memory else [1.0]
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for kind in kinds:
        for row, lane in enumerate(lanes):
            bars = [
                (s.start_s, s.end_s - s.start_s)
                for s in spans
                if s.resource == lane and s.name.split(" ")[0] == kind
            ]
            if bars:
                axes[0].broken_barh(bars[:PICTURE_SPANS_MAX], (row - 0.4, 0.8), facecolors=colours[kind])
        axes[0].plot([], [], color=colours[kind], linewidth=6, label=kind)
    axes[0].set_yticks(range(len(lanes)), [LANE_TITLES.get(lane, lane) for lane in lanes])
    axes[0].invert_yaxis()
    axes[0].set_title(title)
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    for tier, line in (memory or {}).items():
        axes[1].step([at for at, _ in line], [n / 1e9 for _, n in line], where="post", label=tier)
    if memory:
        axes[1].set_ylabel("GB held")
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    axes[-1].set_xlabel("seconds")
    axes[0].set_xlim(0, max(span.end_s for span in spans))
    figure.savefig(path, dpi=120)


def shifted(spans: Sequence[Span], begin_s: float) -> list[Span]:
    """The spans from `begin_s` on, which becomes zero; what began before is cut."""
    return [
        Span(s.resource, s.name, max(0.0, s.start_s - begin_s), s.end_s - begin_s)
        for s in spans
        if s.end_s > begin_s
    ]


def write_side_by_side(
    path: str, measured: Sequence[Span], simulated: Sequence[Span], measured_begin_s: float = 0.0
) -> None:
    """Write `path` for Perfetto with a measured and a simulated step as two processes that begin together."""
    events = trace_events(shifted(measured, measured_begin_s), process="measured", process_id=1)
    events += trace_events(simulated, process="simulated", process_id=2)
    pathlib.Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def draw_side_by_side(
    path: str, measured: Sequence[Span], simulated: Sequence[Span], measured_begin_s: float = 0.0
) -> None:
    """Draw each lane of a measured step above the same lane of the simulated one."""
    both = [
        Span(f"{LANE_TITLES.get(s.resource, s.resource)}, {kind}", s.name, s.start_s, s.end_s)
        for kind, spans in (("measured", shifted(measured, measured_begin_s)), ("simulated", simulated))
        for s in spans
    ]
    draw_timeline(path, both, title="measured and simulated")
