"""All rows of the GPU benchmarks in one table, short enough to come back from a machine that is lent.

    python3 benchmarks/gpu_table.py RESULTS          # a directory with gpu_*.json; needs nothing but Python

Columns: seconds of a step, thousand tokens/s, hardware TFLOPS, the ratios to plain torch and to the floors
(gpu_common.py), the device's peak and budget in GB, the share of the state in host memory; then what belongs to some
rows only: a rate and its unit, predicted seconds, shares of gaps, stalls, or why a row is missing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

CHARACTERS_MAX = 11_000
"""Of the 12,000 that come back, so that the stages' last lines do too."""
NAME_MAX, WORDS_MAX = 36, 64
Row = dict[str, Any]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"


def _at(key: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: _number(None if row.get(key) is None else row[key] * scale)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("step_s", _at("step_s")),
    ("ktok/s", lambda row: _number(tokens_per_s(row))),
    ("tflops", _at("hardware_tflops")),
    ("of_gpu", _at("of_gpu")),
    ("keep", _at("of_gpu_keep")),
    ("best", _at("of_best")),
    ("floor", _at("of_floor")),
    ("longest", lambda row: row.get("largest_floor", "-")),
    ("dev", _at("device_peak_gb")),
    ("GB", _at("budget_gb")),
    ("host", _at("host_share")),
)


def tokens_per_s(row: Row) -> float | None:
    """Thousands."""
    if "tokens_per_s" in row:
        return float(row["tokens_per_s"]) / 1e3
    if "tokens_per_step" in row and "step_s" in row:
        return float(row["tokens_per_step"] / row["step_s"]) / 1e3
    return None


def words(row: Row) -> str:
    """What a row has beside the columns."""
    if "error" in row or "not_run" in row:
        return str(row.get("error") or f"not run: {row['not_run']}")
    found = []
    if "value" in row:
        found.append(f"{row['value']:.4g} {row.get('unit', '')}")
    if "predicted_step_s" in row:
        kinds = [kind for kind in ("step", "forward", "backward", "update") if f"{kind}_s" in row]
        pairs = (
            f"{kind[0]} {_number(row[f'{kind}_s'])}/{_number(row.get(f'predicted_{kind}_s'))}"
            for kind in kinds
        )
        found.append("measured/predicted " + " ".join(pairs))
    shares = {"gap": "gap_share", "between": "between_blocks_share", "turn": "turn_share"}
    found += [f"{word} {row[key]:.1%}" for word, key in shares.items() if row.get(key) is not None]
    if row.get("calls"):
        found.append("calls " + ",".join(row["calls"]))
    if "work_tflops" in row:
        found.append(" ".join(f"{work} {rate:.3g}" for work, rate in row["work_tflops"].items()))
    stalls = {
        cause: s for cause, s in (row.get("stall_s") or {}).items() if s >= 0.01 * row.get("step_s", 1.0)
    }
    if stalls:
        found.append("stall " + " ".join(f"{cause} {seconds:.2g}" for cause, seconds in stalls.items()))
    return ", ".join(found)


def rows_in(directory: pathlib.Path) -> list[Row]:
    """Of every gpu_*.json there; what is no file of rows, or half of one, has none."""
    found: list[Row] = []
    for path in sorted(directory.glob("gpu_*.json")):
        try:
            found += json.loads(path.read_text()).get("rows", [])
        except ValueError:
            continue
    return found


def table(rows: Sequence[Row], characters_max: int = CHARACTERS_MAX) -> str:
    """One line a row, columns as wide as they need to be. Where that is too long, words are cut, then rows at the end
    left out, and the last line says how many."""
    cells = [
        [str(row["name"]).removeprefix("gpu_")[-NAME_MAX:], *(of(row) for _, of in COLUMNS)] for row in rows
    ]
    lines = [["name", *(name for name, _ in COLUMNS)], *cells]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    heads = []
    for name, *others in lines:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        heads.append("  ".join([name.ljust(widths[0]), *right]))
    tails = ["", *map(words, rows)]
    for longest in (3 * WORDS_MAX, WORDS_MAX, WORDS_MAX // 2, 0):
        made = [f"{head}  {tail[:longest]}".rstrip() for head, tail in zip(heads, tails, strict=True)]
        if len("\n".join(made)) <= characters_max:
            return "\n".join(made)
    kept = characters_max // (max(map(len, made)) + 1) - 1
    return "\n".join([*made[:kept], f"... {len(made) - kept} rows more are in the files"])


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory")
    options = parser.parse_args()
    rows = rows_in(pathlib.Path(options.directory))
    print(table(rows) if rows else f"no rows in {options.directory}")


if __name__ == "__main__":
    main()
