"""The front between a budget and the objective: one search for every bound, by any methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemojax.compress.baselines import find_within
from nemojax.compress.search import Infeasible, Search, Solution, changes
from nemojax.compress.table import Bound, Table, bounds_of
from nemojax.plots import curves


@dataclass(frozen=True)
class Point:
    """The best solution within a bound; None, and why, where there is none."""

    bound: float
    solution: Solution | None
    why: str = ""


def sweep(
    table: Table, name: str, bounds: Iterable[float], how: Search, others: Sequence[Bound] = ()
) -> list[Point]:
    """A point for each bound on `name`, with `others` held: a most for a cost, a least for a rate."""
    points = []
    for value in bounds:
        asked = bounds_of(*(({}, {name: value}) if table.time_of(name) else ({name: value}, {})))
        try:
            points.append(Point(value, find_within(table, (*others, *asked), how)[0]))
        except Infeasible as error:
            points.append(Point(value, None, str(error)))
    return points


def sweep_text(table: Table, name: str, objective: str, series: Mapping[str, Sequence[Point]]) -> str:
    """The points of each method for people: a row a bound."""
    rows = [("method", f"bound on {name}", name, objective, "changes", "")]
    for method, points in series.items():
        for point in points:
            solution = point.solution
            if solution is None:
                rows.append((method, f"{point.bound:.10g}", "-", "-", "-", "impossible"))
                continue
            note = f"gap {100 * solution.gap:.2g}%" if solution.gap else ""
            rows.append(
                (
                    method,
                    f"{point.bound:.10g}",
                    f"{solution.totals[name]:.6g}",
                    f"{solution.objective:.6g}",
                    str(changes(table, solution.chosen)),
                    note,
                )
            )
    return aligned(rows)


def plot_sweep(name: str, objective: str, series: Mapping[str, Sequence[Point]]) -> str:
    """SVG text: objective over what the solutions cost, a line a method."""
    lines = {
        method: sorted((p.solution.totals[name], p.solution.objective) for p in points if p.solution)
        for method, points in series.items()
    }
    return curves(lines, title=f"{objective} over {name}", xlabel=name, ylabel=objective)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
