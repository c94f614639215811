"""`offload probe`: measure this machine once and keep the profile that the planner reads."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from offload.cli.results import can_be_made
from offload.cli.stop import Interrupted
from offload.config import parse_nbytes
from offload.errors import ConfigError
from offload.planner.hardware import Hardware, load_hardware, override, save_hardware
from offload.profiling import SECONDS
from offload.profiling.stored import profile_path

if TYPE_CHECKING:
    from torch import nn


class ProgressLine:
    """What is being measured: one line rewritten in place on a terminal, one line each elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._width = 0

    def show(self, text: str) -> None:
        """The next thing."""
        if not self._out.isatty():
            print(f"measuring {text}", file=self._out, flush=True)
            return
        line = f"measuring {text} ..."
        print("\r" + line.ljust(self._width), end="", file=self._out, flush=True)
        self._width = len(line)

    def end(self) -> None:
        """Leave the line."""
        if self._width:
            print(file=self._out, flush=True)
            self._width = 0


@contextlib.contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """SIGTERM unwinds the stack too, so that files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def probe_command(
    storage: Annotated[
        list[str] | None,
        typer.Option(help="Directory on a drive to measure; repeat it for several drives. Must exist."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Multiply matrices of this model's shapes, and on a machine without a GPU time its blocks: a preset "
            "(llama-7b), a directory or a config.json. Default: matrices of a 7 B Llama."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Write the profile here. Default: $OFFLOAD_PROFILE, or ~/.config/offload/hardware.json."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="Replace a figure: KEY=VALUE, as in drives.0.write_bytes_per_s=1.4e9 or dram_bytes_per_s=5e10. "
            "Repeatable.",
        ),
    ] = None,
    from_profile: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Do not measure: take this profile, a file or one that comes with offload (rtx4090-12ssd), with "
            "--override, and print it, or store it with --output.",
        ),
    ] = None,
    write_limit: Annotated[
        str, typer.Option(help="Write at most this much to each drive, as in 500MB or 2GB.")
    ] = "2GB",
    seconds: Annotated[float, typer.Option(help="Time to spend measuring, at most 600.")] = SECONDS,
    name: Annotated[str, typer.Option(help="The profile's name. Default: the host's.")] = "",
    json_lines: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Measure drives, memory, bus and arithmetic of this machine, in under a minute, and keep the profile.

    Example: `offload probe --storage /mnt/nvme0 --storage /mnt/nvme1 --model llama-7b`
    """
    written = output or (None if from_profile is not None else profile_path())
    if written is not None and (os.path.isdir(written) or not can_be_made(os.path.dirname(written) or ".")):
        raise ConfigError(f"--output {written}: no file can be written there; choose another")
    if from_profile is not None:
        if storage or model:
            raise ConfigError("--from takes a profile as it is: leave --storage and --model out")
        profile = load_hardware(from_profile, [*(overrides or []), *([f"name={name}"] if name else [])])
    else:
        from offload.model.on_meta import model_on_meta
        from offload.profiling.compute_probe import DEFAULT_SHAPES, matmul_shapes
        from offload.profiling.probe import probe

        wanted = None if model is None else model_on_meta(model)
        shapes = DEFAULT_SHAPES if wanted is None else matmul_shapes(wanted)
        line = ProgressLine(sys.stderr)
        try:
            with _terminate_like_ctrl_c():
                profile = probe(
                    storage or [],
                    shapes=shapes,
                    written_nbytes_max=_write_limit(write_limit),
                    seconds=seconds,
                    name=name,
                    note=line.show,
                )
                if wanted is not None and profile.shares_host:
                    profile = with_model_rates(profile, wanted, str(model), line)
        except KeyboardInterrupt:
            raise Interrupted("nothing was stored, and the probe's files are removed") from None
        finally:
            line.end()
        profile = override(profile, overrides or [])
    if written is not None:
        save_hardware(profile, written)
    if json_lines:
        print(profile.model_dump_json())
    else:
        print("\n".join([*describe(profile), *([f"stored in    {written}"] if written else [])]))


def with_model_rates(profile: Hardware, model: nn.Module, name: str, line: ProgressLine) -> Hardware:
    """`profile` with the rates of the model's own blocks; as it is, with a line that says why, where they cannot be
    measured."""
    from offload.profiling.model_probe import model_rates

    line.show(f"blocks of {name}")
    try:
        found = model_rates(model, profile.matmul_flops_per_s)
    except (ConfigError, RuntimeError, TypeError) as error:
        line.end()
        print(
            f"the blocks of {name} are not timed, plans count matrix products alone: {error}", file=sys.stderr
        )
        return profile
    sources = {**profile.sources, **dict.fromkeys(found, f"probe, blocks of {name}")}
    return profile.model_copy(update={**found, "sources": sources})


def _write_limit(text: str) -> int:
    try:
        return parse_nbytes(text)
    except ConfigError as error:
        raise ConfigError(f"--write-limit {error}") from error


def _rate(value: float | None, unit: str = "B/s") -> str:
    return "unknown" if value is None else f"{value / 1e9:.2f} G{unit}"


def describe(profile: Hardware) -> list[str]:
    """A profile in a few lines."""
    products = ", ".join(
        f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in profile.matmul_flops_per_s.items()
    )
    lines = [
        f"profile      {profile.name} ({profile.source})",
        f"device       {profile.device_memory_nbytes / 1e9:.1f} GB"
        + (" (DRAM)" if profile.shares_host else "")
        + f"; products {products}",
        f"DRAM         {profile.host_memory_nbytes / 1e9:.1f} GB, {_rate(profile.dram_bytes_per_s)}; "
        f"AdamW {_rate(profile.adam_params_per_s, ' parameters/s')}",
    ]
    if not profile.shares_host:
        lines.append(
            f"bus          H2D {_rate(profile.h2d_bytes_per_s)}, D2H {_rate(profile.d2h_bytes_per_s)}"
        )
        if profile.h2d_duplex_bytes_per_s or profile.d2h_duplex_bytes_per_s:
            both = _rate(profile.h2d_duplex_bytes_per_s), _rate(profile.d2h_duplex_bytes_per_s)
            lines.append(f"             both at once: H2D {both[0]}, D2H {both[1]}")
    if profile.work_flops_per_s:
        of = ", ".join(f"{work} {rate / 1e12:.3f}" for work, rate in profile.work_flops_per_s.items())
        lines.append(f"blocks       in {profile.work_dtype or 'any dtype'}, TFLOP/s: {of}")
    for drive in profile.drives:
        mixed = "" if drive.mixed_bytes_per_s is None else f", both {_rate(drive.mixed_bytes_per_s)}"
        lines.append(
            f"drive        {drive.name}: read {_rate(drive.read_bytes_per_s)}, "
            f"write {_rate(drive.write_bytes_per_s)}{mixed}"
        )
    if profile.storage_read_bytes_per_s or profile.storage_write_bytes_per_s:
        lines.append(
            f"all drives   read {_rate(profile.storage_read_bytes_per_s)}, "
            f"write {_rate(profile.storage_write_bytes_per_s)}, both {_rate(profile.storage_mixed_bytes_per_s)}"
        )
    return lines
