"""The search: one choice for every layer, the least sum of scores, within any number of budgets.

A mixed-integer program (Puzzle, arXiv 2411.19146, App. B) solved by HiGHS. It needs only a table of numbers,
no model. Costs outside the blocks are `fixed` and subtracted from the budgets first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nemojax.compress.milp import Answer, Link, OutOfTime, Program, Row
from nemojax.compress.table import Bound, Table, bounds_of, load_table
from nemojax.config import field

__all__ = ["Budget", "Infeasible", "Search", "Solution", "Table", "load_table", "solve", "total"]

Method = Literal["mip", "greedy", "random", "uniform", "noop_only", "max_params"]


@dataclass(frozen=True)
class Budget:
    """What the child may cost. Keys are columns of the table: params, memory_mib, kv_mib, prefill_ms,
    decode_ms, NAME_ms and NAME_memory_mib of a scenario, and rates: prefill_tokens_per_s and so on."""

    ratio: dict[str, float] = field(
        {"params": 0.65}, "most of each cost, as a share of the parent's blocks; of tokens_per_s the least"
    )
    maximum: dict[str, float] = field({}, "most of each cost, embedding and head included")
    minimum: dict[str, float] = field({}, "least of each cost or tokens_per_s, embedding and head included")

    def bounds(self, table: Table) -> tuple[Bound, ...]:
        """Absolute bounds, the tighter of two of a kind. Each layer's choice 0 must be the parent's block."""
        maximum, minimum = dict(self.maximum), dict(self.minimum)
        for name, share in self.ratio.items():
            parent = table.total(name, [0] * len(table.layers))
            if table.time_of(name):
                minimum[name] = max(minimum.get(name, -math.inf), share * parent)
            else:
                outside = table.outside(name)
                most = (parent - outside) * share + outside
                maximum[name] = min(maximum.get(name, math.inf), most)
        return bounds_of(maximum, minimum)


@dataclass(frozen=True)
class Search:
    """How the child is searched for."""

    method: Method = field("mip", "mip, or a baseline: greedy, random, uniform, noop_only, max_params")
    minimize: str = field("score", "column of the table whose sum is least")
    maximize: str | None = field(None, "column whose sum is greatest, in place of minimize")
    max_seconds: float = field(60.0, "time limit of a solution, seconds")
    num_solutions: int = field(1, "solutions, best first; the child is the first")
    diversity: int = field(1, "layers in which any two solutions differ at least")
    prefer_runs: float = field(
        0.0, "share of the optimum given up at most for fewer changes between neighbouring layers; 0: none"
    )
    fix: tuple[str, ...] = field((), "LAYERS:GLOB of choice names: these layers take one that matches")
    exclude: tuple[str, ...] = field((), "LAYERS:GLOB of choice names: these layers take none that matches")
    seed: int = field(0, "seed of the random method")

    def __post_init__(self):
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds: expected a positive number of seconds, got {self.max_seconds:g}")
        if self.num_solutions < 1:
            raise ValueError(f"num_solutions: expected at least 1, got {self.num_solutions}")
        if not 0 <= self.prefer_runs < 1:
            raise ValueError(f"prefer_runs: expected a share from 0 up to 1, got {self.prefer_runs:g}")


@dataclass(frozen=True)
class Solution:
    """The chosen index for each layer, the sum of scores, and every constrained total. `gap`: relative
    distance to the proven optimum, 0 when optimal; None for a method that proves nothing."""

    chosen: tuple[int, ...]
    objective: float
    totals: Mapping[str, float]
    gap: float | None

    def names(self, table: Table) -> list[str]:
        return [str(options[j]["name"]) for options, j in zip(table.layers, self.chosen, strict=True)]


@dataclass(frozen=True)
class Goal:
    """What is asked of a table: the sum to make least (or greatest), and the bounds."""

    column: str
    greatest: bool = False
    bounds: tuple[Bound, ...] = ()

    def weights(self, table: Table) -> np.ndarray:
        """What to minimise, for each choice of all layers side by side."""
        timed = table.time_of(self.column)  # the highest rate is the least time
        name, greatest = (timed[0], not self.greatest) if timed else (self.column, self.greatest)
        return np.concatenate(table.column(name)) * (-1.0 if greatest else 1.0)

    def program(self, table: Table) -> Program:
        rows = []
        for bound in map(table.linear, self.bounds):
            outside = table.outside(bound.name)
            free = bound.value - outside
            low, high = (-np.inf, free) if bound.side == "max" else (free, np.inf)
            # what `Bound.holds` allows, so that both judge alike
            slack = 1e-12 * max(abs(bound.value), abs(outside))
            rows.append(Row(np.concatenate(table.column(bound.name)), low, high, slack))
        return Program([len(options) for options in table.layers], rows)

    def solution(self, table: Table, chosen: Sequence[int], gap: float | None = None) -> Solution:
        totals = {bound.name: table.total(bound.name, chosen) for bound in self.bounds}
        return Solution(tuple(chosen), table.total(self.column, chosen), totals, gap)


class Infeasible(ValueError):
    """No choice of blocks meets the bounds."""


def solve(
    table: Table,
    *,
    minimize: str = "score",
    maximize: str | None = None,
    maximum: Mapping[str, float] | None = None,
    minimum: Mapping[str, float] | None = None,
    num_solutions: int = 1,
    diversity: int = 1,
    prefer_runs: float = 0.0,
    max_seconds: float = 60.0,
) -> list[Solution]:
    """The best solutions, best first; any two differ in at least `diversity` layers.

    `maximum` and `minimum`: {column or rate: bound on its total, non-block costs included}. `prefer_runs`: a
    second solve takes the fewest changes between neighbouring layers among all solutions whose objective is
    worse by at most this share. `max_seconds` limits each solve; a gap is then what was not proven.
    `Infeasible` when no solution exists: for each bound, the nearest value possible with the others held.
    Fewer than `num_solutions` come back when there are no more.
    """
    goal = Goal(maximize or minimize, maximize is not None, bounds_of(maximum, minimum))
    return solve_goal(
        table,
        goal,
        Search(
            "mip",
            max_seconds=max_seconds,
            num_solutions=num_solutions,
            diversity=diversity,
            prefer_runs=prefer_runs,
        ),
    )


def solve_goal(table: Table, goal: Goal, how: Search) -> list[Solution]:
    """`solve` for a goal; of `how`, what concerns the integer program."""
    layers = len(table.layers)
    if how.num_solutions > 1 and not 1 <= how.diversity <= layers:
        raise ValueError(f"diversity: expected from 1 to the {layers} layers, got {how.diversity}")
    weights, program = goal.weights(table), goal.program(table)
    found: list[Solution] = []
    while len(found) < how.num_solutions:
        answer = program.minimise(weights, how.max_seconds)
        if answer is None:
            if found:
                break
            raise Infeasible(infeasible(table, goal, how.max_seconds))
        if how.prefer_runs:
            answer = _with_runs(table, program, weights, answer, how)
        found.append(goal.solution(table, answer.chosen, _gap(answer)))
        program.differ(answer.chosen, how.diversity)
    return sorted(found, key=lambda s: -s.objective if goal.greatest else s.objective)


def total(table: Table, name: str, chosen: Sequence[int]) -> float:
    """Sum of a column over the chosen blocks, plus what is fixed."""
    return table.total(name, chosen)


def changes(table: Table, chosen: Sequence[int]) -> int:
    """Neighbouring layers whose choices have different names."""
    names = [table.layers[i][j]["name"] for i, j in enumerate(chosen)]
    return sum(a != b for a, b in zip(names[:-1], names[1:], strict=True))


def _with_runs(table: Table, program: Program, weights: np.ndarray, best: Answer, how: Search) -> Answer:
    """The answer with the fewest changes that is worse than `best` by at most a share of it; `best` itself
    when time runs out first."""
    names = table.names()
    links = [
        Link(int(program.starts[i]) + a, int(program.starts[i + 1]) + b, 1.0)
        for i in range(len(names) - 1)
        for a, name in enumerate(names[i])
        for b, other in enumerate(names[i + 1])
        if name == other
    ]
    most = best.value + how.prefer_runs * abs(best.value)
    near = Program(program.sizes, [*program.rows, Row(weights, -np.inf, most, 1e-12 * abs(most))])
    try:
        answer = near.minimise(np.zeros_like(weights), how.max_seconds, links)
    except OutOfTime:
        return best
    if answer is None or changes(table, answer.chosen) >= changes(table, best.chosen):
        return best
    value = math.fsum(weights[program.places(answer.chosen)])
    return Answer(answer.chosen, value, best.bound, value <= best.bound)


def _gap(answer: Answer) -> float:
    if answer.optimal:
        return 0.0
    return max(0.0, answer.value - answer.bound) / max(abs(answer.value), 1e-12)


def infeasible(table: Table, goal: Goal, max_seconds: float) -> str:
    """For each bound the nearest total that is possible when the other bounds hold."""
    parts = []
    held = " with the others held" if len(goal.bounds) > 1 else ""
    for bound in goal.bounds:
        others = tuple(b for b in goal.bounds if b != bound)
        nearest = Goal(bound.name, greatest=bound.side == "min").weights(table)
        asked = f"{bound.name} {bound.side} {bound.value:.10g}"
        word = "least" if bound.side == "max" else "most"
        note = ""
        try:
            answer = Goal(goal.column, bounds=others).program(table).minimise(nearest, max_seconds)
            if answer is None:  # the others are at odds already: what this one could be alone
                note = "; the others alone are impossible"
                answer = Goal(goal.column).program(table).minimise(nearest, max_seconds)
        except OutOfTime:
            parts.append(f"{asked} ({word} possible{held}: not known after {max_seconds:g} s)")
            continue
        best = table.total(bound.name, answer.chosen) if answer else math.nan
        parts.append(f"{asked} ({word} possible{' alone' if note else held}: {best:.10g}{note})")
    return f"budget: expected bounds that some choice of blocks meets, got {'; '.join(parts)}; relax one"
