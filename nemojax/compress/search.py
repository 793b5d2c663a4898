"""The search: one choice for every layer, the least sum of scores, within any number of budgets.

A mixed-integer program (Puzzle, arXiv 2411.19146, App. B) solved by HiGHS. It needs only a table of numbers,
no model. Costs outside the blocks are `fixed` and subtracted from the budgets first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Choice = Mapping[str, Any]
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Table:
    """`layers[i][j]`: {"name": text, any number of numeric columns}; `fixed`: costs outside the layers."""

    layers: tuple[tuple[Choice, ...], ...]
    fixed: Mapping[str, float]

    def column(self, name: str) -> list[np.ndarray]:
        """One column by layer. ValueError naming the cell that is missing or not a finite number."""
        return [np.array([_cell(c, name, i) for c in options]) for i, options in enumerate(self.layers)]

    def to_json(self) -> dict[str, Any]:
        return {"layers": [[dict(c) for c in options] for options in self.layers], "fixed": dict(self.fixed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        layers = tuple(tuple(options) for options in data["layers"])
        for i, options in enumerate(layers):
            if not options:
                raise ValueError(f"table: layer {i}: expected at least one choice, got none")
        return cls(layers, dict(data.get("fixed", {})))


@dataclass(frozen=True)
class Limits:
    """Bounds on totals, non-block costs included: {cost name: bound}."""

    maximum: Mapping[str, float]
    minimum: Mapping[str, float]

    def rows(self) -> list[tuple[str, str, float]]:
        """(cost, "max" or "min", bound)."""
        return [(n, "max", b) for n, b in self.maximum.items()] + [
            (n, "min", b) for n, b in self.minimum.items()
        ]


@dataclass(frozen=True)
class Solution:
    """The chosen index for each layer, the sum of scores, and every constrained total. `gap`: relative
    distance to the proven optimum, 0 when optimal."""

    chosen: tuple[int, ...]
    objective: float
    totals: Mapping[str, float]
    gap: float

    def names(self, table: Table) -> list[str]:
        return [str(options[j]["name"]) for options, j in zip(table.layers, self.chosen, strict=True)]


def load_table(path: str | os.PathLike) -> Table:
    try:
        return Table.from_json(json.loads(Path(path).read_text()))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a table ({type(error).__name__}: {error})") from error


def solve(
    table: Table,
    *,
    minimize: str = "score",
    maximum: Mapping[str, float] | None = None,
    minimum: Mapping[str, float] | None = None,
    num_solutions: int = 1,
    diversity: int = 1,
    max_seconds: float = 60.0,
) -> list[Solution]:
    """The best solutions, best first; any two differ in at least `diversity` layers.

    ValueError when no solution exists: for each bound, the nearest value possible with the others held.
    Fewer than `num_solutions` come back when there are no more.
    """
    limits = Limits(maximum or {}, minimum or {})
    found: list[Solution] = []
    while len(found) < num_solutions:
        taken = [solution.chosen for solution in found]
        answer = _optimise(table, table.column(minimize), limits, taken, diversity, max_seconds)
        if answer is None:
            if found:
                break
            raise ValueError(_infeasible(table, limits, max_seconds))
        chosen, gap = answer
        totals = {name: total(table, name, chosen) for name, _, _ in limits.rows()}
        found.append(Solution(chosen, total(table, minimize, chosen), totals, gap))
    return found


def total(table: Table, name: str, chosen: Sequence[int]) -> float:
    """Sum of a column over the chosen blocks, plus what is fixed."""
    column = table.column(name)
    return float(table.fixed.get(name, 0.0)) + math.fsum(c[j] for c, j in zip(column, chosen, strict=True))


def _optimise(
    table: Table,
    objective: Sequence[np.ndarray],
    limits: Limits,
    taken: Sequence[tuple[int, ...]],
    diversity: int,
    max_seconds: float,
) -> tuple[tuple[int, ...], float] | None:
    """(chosen, gap) of the least objective, or None when infeasible."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(options) for options in table.layers]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    count = int(starts[-1])
    owner = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(count), (owner, np.arange(count))), shape=(len(sizes), count))
    constraints = [LinearConstraint(one_each, 1, 1)]  # pyright: ignore[reportArgumentType]
    for name, side, bound in limits.rows():
        row, free = np.concatenate(table.column(name)), bound - float(table.fixed.get(name, 0.0))
        scale = max(np.abs(row).max(), abs(free), 1e-300)
        slack = TOLERANCE * max(abs(free) / scale, 1e-3)
        low, high = (-np.inf, free / scale + slack) if side == "max" else (free / scale - slack, np.inf)
        constraints.append(LinearConstraint(row / scale, low, high))
    for chosen in taken:
        row = np.zeros(count)
        row[starts[:-1] + np.array(chosen)] = 1
        constraints.append(LinearConstraint(row, -np.inf, len(sizes) - diversity))
    weights = np.concatenate(list(objective))
    result = milp(
        weights / max(np.abs(weights).max(), 1e-300),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0, "time_limit": max_seconds},
    )
    if result.x is None:
        if result.status == 1:
            raise ValueError(f"search: no solution within {max_seconds:g} s; raise the time limit")
        return None
    chosen = tuple(int(np.argmax(result.x[a:b])) for a, b in zip(starts[:-1], starts[1:], strict=True))
    return chosen, float(result.mip_gap or 0.0)


def _infeasible(table: Table, limits: Limits, max_seconds: float) -> str:
    """For each bound the nearest total that is possible when the other bounds hold."""
    parts = []
    for name, side, bound in limits.rows():
        others = Limits(
            {n: b for n, b in limits.maximum.items() if (n, "max") != (name, side)},
            {n: b for n, b in limits.minimum.items() if (n, "min") != (name, side)},
        )
        sign = 1.0 if side == "max" else -1.0
        objective = [sign * column for column in table.column(name)]
        answer = _optimise(table, objective, others, (), 0, max_seconds)
        word = "least" if side == "max" else "most"
        if answer is None:
            parts.append(f"{name} {side} {bound:.10g} (the others alone are impossible)")
        else:
            best = total(table, name, answer[0])
            held = " with the others held" if len(limits.rows()) > 1 else ""
            parts.append(f"{name} {side} {bound:.10g} ({word} possible{held}: {best:.10g})")
    return f"budget: expected bounds that some choice of blocks meets, got {'; '.join(parts)}; relax one"


def _cell(choice: Choice, name: str, layer: int) -> float:
    value = choice.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"table: layer {layer}, choice {choice.get('name', '?')!r}, column {name!r}: "
            f"expected a finite number, got {value!r}"
        )
    return float(value)
