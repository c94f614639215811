"""Timeline files: what Perfetto reads and what is drawn."""

from __future__ import annotations

import builtins
import json

import pytest

from offload.errors import ConfigError
from offload.schedule.trace import (
    check_picture,
    draw_side_by_side,
    draw_timeline,
    lanes_of,
    trace_events,
    write_side_by_side,
    write_trace,
)
from offload.telemetry import Span

SPANS = [
    Span("read", "fetch 0", 0.0, 0.5),
    Span("compute", "forward 0.0", 0.5, 1.25),
    Span("gpu copy engine", "load 0", 0.5, 0.75),
]
MEMORY = {"device": [(0.0, 10**9), (0.5, 3 * 10**9)]}


def test_a_trace_has_a_thread_per_resource_and_microseconds(tmp_path) -> None:
    path = tmp_path / "trace.json"
    write_trace(str(path), SPANS, MEMORY, process="simulated")
    events = json.loads(path.read_text())["traceEvents"]
    threads = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert list(threads) == ["device compute", "storage read", "gpu copy engine"]
    spans = {e["name"]: e for e in events if e["ph"] == "X"}
    assert spans["forward 0.0"]["ts"] == pytest.approx(5e5)
    assert spans["forward 0.0"]["dur"] == pytest.approx(7.5e5)
    assert spans["forward 0.0"]["tid"] == threads["device compute"]
    counters = [(e["ts"], e["args"]["GB"]) for e in events if e["ph"] == "C"]
    assert counters == [(0.0, 1.0), (5e5, 3.0)]


def test_two_runs_lie_side_by_side_in_one_file() -> None:
    events = trace_events(SPANS, process="measured", process_id=1)
    events += trace_events(SPANS, process="simulated", process_id=2)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "measured", 2: "simulated"}


def test_known_resources_come_in_the_schedules_order() -> None:
    assert lanes_of(SPANS) == ["compute", "read", "gpu copy engine"]


def test_the_picture_is_a_picture_with_something_on_it(tmp_path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "out.png"
    draw_timeline(str(path), SPANS, MEMORY, title="a step")
    pixels = imread(str(path))
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 1000
    coloured = (pixels[..., :3].max(axis=-1) - pixels[..., :3].min(axis=-1)) > 0.2
    assert coloured.mean() > 0.02


@pytest.mark.parametrize("draw", [lambda path: draw_timeline(path, SPANS), check_picture])
def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path, draw) -> None:
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"offload\[plot\]"):
        draw(str(tmp_path / "out.png"))


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ConfigError, match="no spans"):
        draw_timeline("unused.png", [])


def test_a_measured_step_is_laid_beside_a_simulated_one_from_its_own_beginning(tmp_path) -> None:
    path = tmp_path / "both.json"
    write_side_by_side(str(path), SPANS, SPANS, measured_begin_s=0.25)
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    starts = {(e["pid"], e["name"]): (e["ts"], e["dur"]) for e in events}
    assert starts[1, "fetch 0"] == pytest.approx((0.0, 2.5e5))
    assert starts[1, "forward 0.0"] == pytest.approx((2.5e5, 7.5e5))
    assert starts[2, "forward 0.0"] == pytest.approx((5e5, 7.5e5))
    picture = tmp_path / "both.png"
    draw_side_by_side(str(picture), SPANS, SPANS, 0.25)
    assert picture.read_bytes().startswith(b"\x89PNG")
