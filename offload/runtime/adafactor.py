"""Adafactor out of core: factored second moments in host memory, masters through the pipeline.

The arithmetic is torch.optim.Adafactor's. Of a matrix it keeps the mean square of every row and column, of a vector
the variance of every element: so little that it stays in host memory beside the budget, and only what the master needs
beside the parameter is on storage. A step needs two sums over a parameter's gradients (of squares by row and column,
and of the squared update) before the first element can change; they are made when the first chunk arrives, and read
the gradients twice where these wait on storage. The root mean square of the parameter itself is that of the
masters the last update left; before the first one it is taken from the parameters as they are computed with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from offload.errors import CheckpointError, UsageError
from offload.model.flat import BlockLayout
from offload.runtime.chunk_update import CallbackHyper, PieceUpdate
from offload.runtime.whole_gradients import WholeGradients

SLAB_ELEMENTS = 1 << 20
"""Gradients that are looked at together."""


@dataclass(frozen=True)
class _Made:
    """What update `step` of a parameter left (0: none yet); none of it is changed afterwards."""

    step: int
    row: torch.Tensor
    column: torch.Tensor
    square_sum: float
    """Of the masters."""


@dataclass
class _Statistics:
    """Of one parameter. `row` and `column` of a matrix; a vector's variance is its `column`."""

    step: int
    """The update that made them, or is making them; 0: none yet."""
    row: torch.Tensor
    column: torch.Tensor
    square_sums: dict[int, float]
    """Of the masters, by the first element of each piece that was updated."""
    before: _Made | None = None
    """What the update before this one left: of the step that durable runs may still have to commit or go back to."""

    @classmethod
    def of(cls, made: _Made) -> _Statistics:
        return cls(made.step, made.row, made.column, {0: made.square_sum})

    def made(self) -> _Made:
        """As one update left them, when all pieces of it have been updated."""
        total = sum(self.square_sums[offset] for offset in sorted(self.square_sums))
        return _Made(self.step, self.row, self.column, total)

    def after(self, step: int) -> _Made:
        """What update `step`, the last or the one before, left."""
        if self.before is not None and self.before.step == step:
            return self.before
        if self.step != step:
            raise UsageError(
                f"Adafactor has statistics of update {self.step}, not of {step}; please report this"
            )
        return self.made()


@dataclass(frozen=True)
class _Prepared:
    """What every piece of one update needs."""

    root_mean_row: torch.Tensor
    step_size: float


def _matrix(parameter: torch.Tensor) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter; a vector is one matrix of one row."""
    shape = parameter.shape
    if len(shape) < 2:
        return 1, 1, parameter.numel()
    return parameter.numel() // max(1, shape[-1] * shape[-2]), shape[-2], shape[-1]


class AdafactorUpdater:
    """Its state by parameter; `numbers` are the parameters' places in the optimizer's groups."""

    def __init__(self, numbers: dict[torch.nn.Parameter, int]) -> None:
        self._numbers = numbers
        self._statistics: dict[torch.nn.Parameter, _Statistics] = {}
        self._prepared: dict[torch.nn.Parameter, tuple[int, _Prepared]] = {}
        self._lock = threading.Lock()

    # ---- state -----------------------------------------------------------------------------------------------

    def needs_start(self) -> bool:
        """Whether the parameters have not been measured yet."""
        return not self._statistics

    def start(self, layouts: list[BlockLayout], values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Before the first step: measure every trainable parameter; `values` are the present ones by name."""
        by_name = {s.name: s.parameter for layout in layouts for s in layout.trainable_segments}
        for name, value in values:
            if name in by_name:
                self._start(by_name[name], value)

    def _start(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        n_matrices, rows, columns = _matrix(value)
        is_matrix = value.dim() > 1
        total = sum(float(part.double().square().sum()) for part in value.reshape(-1).split(SLAB_ELEMENTS))
        row = torch.zeros(n_matrices, rows if is_matrix else 0, device="cpu")
        column = torch.zeros(n_matrices, columns, device="cpu")
        self._statistics[parameter] = _Statistics.of(_Made(0, row, column, total))

    def state(self, steps: Mapping[int, int]) -> dict[str, Any]:
        """To be saved: as it was when parameters had been updated so many times (by id()): now, or one update ago."""
        with self._lock:
            made = {p: held.after(steps.get(id(p), 0)) for p, held in self._statistics.items()}
        return {
            str(self._numbers[parameter]): {
                "step": held.step,
                "row": held.row,
                "column": held.column,
                "square_sum": held.square_sum,
            }
            for parameter, held in made.items()
        }

    def roll_back(self, steps: Mapping[int, int]) -> None:
        """Undo the updates of a step: parameters have been updated so many times (by id()), now or one update ago."""
        with self._lock:
            for parameter, held in self._statistics.items():
                step = steps.get(id(parameter), 0)
                if held.step != step:
                    self._statistics[parameter] = _Statistics.of(held.after(step))
            self._prepared.clear()

    def set_state(self, state: dict[str, Any], where: str) -> None:
        """Undo what has happened since `state`. Raises CheckpointError for another model's."""
        found: dict[torch.nn.Parameter, _Statistics] = {}
        for parameter, number in self._numbers.items():
            held = state.get(str(number))
            if held is None:
                continue
            n_matrices, rows, columns = _matrix(parameter)
            row, column = held["row"], held["column"]
            rows = rows if len(parameter.shape) > 1 else 0
            if tuple(row.shape) != (n_matrices, rows) or tuple(column.shape) != (n_matrices, columns):
                raise CheckpointError(f"{where}: its Adafactor state is of other parameters")
            made = _Made(int(held["step"]), row.clone(), column.clone(), float(held["square_sum"]))
            found[parameter] = _Statistics.of(made)
        if len(found) != len(state):
            raise CheckpointError(f"{where}: its Adafactor state is of other parameters")
        self._statistics, self._prepared = found, {}

    # ---- a step ----------------------------------------------------------------------------------------------

    def update_piece(self, piece: PieceUpdate) -> None:
        """The update of a piece, after what all gradients of its parameter say."""
        hyper, param, grad, offset = piece.hyper, piece.param, piece.grad, piece.offset
        parameter, group = hyper.parameter, hyper.group
        with self._lock:
            held = self._statistics[parameter]
            step, prepared = self._prepared.get(parameter, (0, None))
            if prepared is None or step != hyper.step:
                prepared = self._prepare(held, hyper, piece.whole_grads)
                self._prepared[parameter] = (hyper.step, prepared)
        _, rows, columns = _matrix(parameter)
        at = torch.arange(offset, offset + param.numel())
        column = held.column.view(-1)[at // (rows * columns) * columns + at % columns]
        if held.row.numel():
            column = column * held.row.view(-1)[at // columns]
            column /= prepared.root_mean_row[at // (rows * columns)]
        if group.get("maximize"):
            grad.neg_()
        param.mul_(1 - group["lr"] * group["weight_decay"])
        update = column.clamp_(min=_eps(group) ** 2).rsqrt_().mul_(grad)
        param.add_(update, alpha=-prepared.step_size)
        held.square_sums[offset] = float(param.double().square().sum())

    def _prepare(self, held: _Statistics, hyper: CallbackHyper, grads: WholeGradients | None) -> _Prepared:
        group, parameter = hyper.group, hyper.parameter
        if grads is None:
            raise ValueError("Adafactor needs the gradients of a whole parameter")
        numel = max(1, parameter.numel())
        beta = hyper.step ** group["beta2_decay"]
        rho = min(group["lr"], 1 / hyper.step**0.5)
        before = held.made()
        step_size = max(group["eps"][1], (before.square_sum / numel) ** 0.5) * rho
        matrices, rows, columns = _matrix(parameter)
        squares = torch.zeros(matrices, columns, dtype=torch.float64)
        row_means = torch.zeros(matrices, rows)
        for matrix, first, part in _slabs(grads, hyper, matrices, rows, columns):
            part = part.square_()
            row_means[matrix, first : first + part.shape[0]] = part.mean(-1)
            squares[matrix] += part.sum(0, dtype=torch.float64)
        row = before.row.lerp(row_means, beta) if before.row.numel() else before.row
        column = before.column.lerp((squares / rows).float(), beta)
        eps = _eps(group)
        root_mean_row = row.mean(-1).clamp_(min=eps) if row.numel() else torch.ones(matrices)
        total = 0.0
        for matrix, first, part in _slabs(grads, hyper, matrices, rows, columns):
            variance = column[matrix][None, :]
            if row.numel():
                variance = row[matrix, first : first + part.shape[0], None] * variance
                variance = variance / root_mean_row[matrix]
            update = variance.clamp(min=eps * eps).rsqrt_().mul(part)
            total += float(update.double().square().sum())
        denominator = max(1.0, total**0.5 / (numel**0.5 * group["d"]))
        held.step, held.row, held.column, held.square_sums, held.before = hyper.step, row, column, {}, before
        return _Prepared(root_mean_row, step_size / denominator)


def _eps(group: dict[str, Any]) -> float:
    return torch.finfo(torch.float32).eps if group["eps"][0] is None else float(group["eps"][0])


def _slabs(
    grads: WholeGradients, hyper: CallbackHyper, matrices: int, rows: int, columns: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(matrix, first row, fp32 rows of the scaled gradients), a bounded number of elements at a time."""
    step = max(1, SLAB_ELEMENTS // max(1, columns))
    for matrix in range(matrices):
        for first in range(0, rows, step):
            n_rows = min(step, rows - first)
            start = hyper.start + (matrix * rows + first) * columns
            part = grads.part(start, n_rows * columns).view(n_rows, columns)
            yield matrix, first, part.mul_(hyper.grad_scale)
