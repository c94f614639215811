"""What a run prints: a live line for people, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO


@dataclass(frozen=True)
class StepReport:
    """One step: loss, rates, seconds waited by cause, bytes moved by this step, and its floor (`planner.floor`)."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    step_s: float
    tokens_per_s: float
    floor_s: float
    floor_fraction: float
    stall_s: dict[str, float]
    read_bytes: int
    written_bytes: int
    grad_norm: float | None = None

    @property
    def main_stall(self) -> str:
        """What this step waited for most, as a share of it."""
        if not self.stall_s or self.step_s <= 0:
            return "nothing"
        cause, seconds = max(self.stall_s.items(), key=lambda item: item[1])
        share = seconds / self.step_s
        return f"{cause} {share:.0%}" if share >= 0.005 else "nothing"


class Output(Protocol):
    """Where a run reports."""

    def note(self, text: str) -> None: ...
    def step(self, report: StepReport) -> None: ...
    def summary(self, summary: dict[str, Any]) -> None: ...


class JsonOutput:
    """One object a line: {"step": ...} each step, {"summary": ...} last. Notes go to stderr."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def note(self, text: str) -> None:
        """Progress in words."""
        print(text, file=sys.stderr, flush=True)

    def step(self, report: StepReport) -> None:
        """One line."""
        print(json.dumps(asdict(report)), file=self._out, flush=True)

    def summary(self, summary: dict[str, Any]) -> None:
        """The last line."""
        print(json.dumps({"summary": summary}), file=self._out, flush=True)


class TextOutput:
    """A line that is rewritten in place on a terminal, one line a step elsewhere; the summary goes to `out`."""

    def __init__(self, live: TextIO, out: TextIO) -> None:
        self._live, self._out = live, out
        self._in_place = live.isatty()
        self._width = 0

    def note(self, text: str) -> None:
        """Progress in words."""
        self._end_line()
        print(text, file=self._live, flush=True)

    def step(self, report: StepReport) -> None:
        """The live line."""
        text = (
            f"step {report.step}/{report.steps}  loss {report.loss:.4f}  {report.tokens_per_s:,.0f} tokens/s  "
            f"{report.step_s:.2f} s/step  {report.floor_fraction:.0%} of the floor  waits for {report.main_stall}  "
            f"read {report.read_bytes / 1e9:.2f} GB  written {report.written_bytes / 1e9:.2f} GB"
        )
        if not self._in_place:
            print(text, file=self._live, flush=True)
            return
        print("\r" + text.ljust(self._width), end="", file=self._live, flush=True)
        self._width = len(text)

    def _end_line(self) -> None:
        if self._width:
            print(file=self._live)
            self._width = 0

    def summary(self, summary: dict[str, Any]) -> None:
        """A small table."""
        self._end_line()
        for name, value in summary.items():
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            if value is None:
                shown = "none"
            if isinstance(value, dict):
                shown = ", ".join(f"{k} {_shown(name, v)}" for k, v in value.items()) or "nothing"
            print(f"{name.replace('_', ' '):<26} {shown}", file=self._out, flush=True)


def _shown(name: str, value: float | str) -> str:
    """An entry of a table inside the summary: seconds, GB or words."""
    if isinstance(value, str):
        return value
    return f"{value:.2f} {'GB' if 'gb' in name.split('_') else 's'}"
