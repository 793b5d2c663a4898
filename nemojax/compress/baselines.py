"""What the search is measured against, behind one door: `find` takes a method's name and returns solutions.

- `mip`: the optimum (search.py).
- `greedy`: Puzzle's (arXiv 2411.19146, F.2.2). Every layer gets an equal part of each budget; layers are
  visited by ascending mean score; each takes its best affordable choice, and what it leaves goes to the next.
- `random`: a choice for every layer at random, brought within the bounds and then up to them.
- `uniform`: the same choice in every layer, as Minitron prunes (arXiv 2407.14679).
- `noop_only`: the optimum among blocks that keep or drop whole sub-blocks.
- `max_params`: the most parameters within the bounds, whatever the scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from nemojax.compress.milp import OutOfTime
from nemojax.compress.search import (
    Budget,
    Goal,
    Infeasible,
    Method,
    Search,
    Solution,
    infeasible,
    solve_goal,
)
from nemojax.compress.table import Bound, Choice, Table, bounds_of

METHODS: tuple[Method, ...] = get_args(Method)
NOTHING = ("-", "none", "noop", "no_op", "no-op")  # words for a sub-block that is not there
FULL = 0.01  # a random solution leaves at most this share of its tightest budget, where one swap can help
DRAWS = 100  # tries at a random solution that differs enough from those before


def find(
    table: Table,
    method: Method = "mip",
    *,
    minimize: str = "score",
    maximize: str | None = None,
    maximum: Mapping[str, float] | None = None,
    minimum: Mapping[str, float] | None = None,
    **options: Any,
) -> list[Solution]:
    """Solutions by any method, best first; `options` are the other fields of `Search`.

    ValueError for bad input; `Infeasible` names for each bound the nearest total that is possible.
    """
    how = Search(method, minimize, maximize, **options)
    return find_within(table, bounds_of(maximum, minimum), how)


def find_within(table: Table, budget: Budget | Sequence[Bound], how: Search) -> list[Solution]:
    """`find` for a stage's configuration. Shares of a `Budget` are of the first choices' totals."""
    bounds = tuple(budget.bounds(table) if isinstance(budget, Budget) else budget)
    goal = Goal(how.maximize or how.minimize, how.maximize is not None, bounds)
    allowed, kept = table.restrict(how.fix, how.exclude)
    match how.method:
        case "mip":
            found = solve_goal(allowed, goal, how)
        case "noop_only":
            found = _noop_only(allowed, kept, table, goal, how)
        case "max_params":
            found = _max_params(allowed, goal, how)
        case "random":
            found = _random_solutions(allowed, goal, how)
        case "greedy" | "uniform":
            if how.num_solutions > 1:
                raise ValueError(f"num_solutions: expected 1 with {how.method}, got {how.num_solutions}")
            find_one = _greedy if how.method == "greedy" else _uniform
            found = [goal.solution(allowed, find_one(allowed, goal, how))]
        case _:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {how.method!r}")
    return [
        replace(solution, chosen=tuple(kept[i][j] for i, j in enumerate(solution.chosen)))
        for solution in found
    ]


def keeps_or_drops(choice: Choice, first: Choice) -> bool:
    """Whether a choice only keeps or drops sub-blocks of its layer's first choice, which is the parent's.

    A column `noop` (true or false) says so; else the name does, `ATTENTION+FEED_FORWARD`: each half is the
    first choice's, or a word for nothing (`-`, `none`, `noop`).
    """
    if "noop" in choice:
        return choice is first or bool(choice["noop"])
    halves, own = str(choice["name"]).split("+"), str(first["name"]).split("+")
    if halves == own:
        return True
    if len(halves) == 1:
        return halves[0].lower() in NOTHING
    return len(halves) == len(own) and all(
        half == mine or half.lower() in NOTHING for half, mine in zip(halves, own, strict=True)
    )


@dataclass(frozen=True)
class _Costs:
    """The bounds as sums that must not pass `limit`: a least total is the negative of a most.

    `use`: [K, choices of all layers], `limit`: [K], `scale`: [K], what a bound's excess is divided by.
    """

    use: np.ndarray
    limit: np.ndarray
    scale: np.ndarray
    is_max: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, table: Table, goal: Goal) -> _Costs:
        rows, limits, is_max = [], [], []
        for bound in map(table.linear, goal.bounds):
            sign = 1.0 if bound.side == "max" else -1.0
            rows.append(sign * np.concatenate(table.column(bound.name)))
            limits.append(sign * (bound.value - table.outside(bound.name)))
            is_max.append(bound.side == "max")
        starts = np.concatenate([[0], np.cumsum([len(row) for row in table.layers])]).astype(int)
        use = np.array(rows).reshape(len(rows), int(starts[-1]))
        limit = np.array(limits)
        most = np.abs(use).max(axis=1, initial=0.0) * len(table.layers)
        scale = np.maximum(np.maximum(np.abs(limit), most * 1e-9), 1e-300)
        return cls(use, limit, scale, np.array(is_max, bool), starts)

    def excess(self, use: np.ndarray) -> np.ndarray:
        """Sum over bounds of how far each is passed, relative; use: [K, ...] -> [...]."""
        shape = (-1,) + (1,) * (use.ndim - 1)
        return np.maximum((use - self.limit.reshape(shape)) / self.scale.reshape(shape), 0.0).sum(axis=0)


def _greedy(table: Table, goal: Goal, how: Search) -> tuple[int, ...]:
    """Puzzle's greedy search. A layer with nothing affordable takes what overdraws least, and no layer takes
    what would leave the rest less than they need at least; neither happens where every layer may be empty."""
    costs, weights = _Costs.of(table, goal), goal.weights(table)
    spans = [slice(a, b) for a, b in zip(costs.starts[:-1], costs.starts[1:], strict=True)]
    order = sorted(range(len(spans)), key=lambda i: float(weights[spans[i]].mean()))
    share = costs.limit / len(spans)
    least = np.array([costs.use[:, span].min(axis=1) for span in spans]).reshape(len(spans), -1)
    chosen = [0] * len(spans)
    left, carry, needed = costs.limit.copy(), np.zeros_like(costs.limit), least.sum(axis=0)
    for i in order:
        needed = needed - least[i]
        use, given = costs.use[:, spans[i]], share + carry
        over = np.maximum((use - given[:, None]) / costs.scale[:, None], 0.0)
        starved = np.maximum((use - (left - needed)[:, None]) / costs.scale[:, None], 0.0)
        worst = np.round(np.maximum(over, starved).max(axis=0, initial=0.0), 12)
        chosen[i] = int(np.lexsort((weights[spans[i]], worst))[0])
        spent = use[:, chosen[i]]
        left, carry = left - spent, given - spent
    return _nearest(table, goal, chosen, how)


def _uniform(table: Table, goal: Goal, how: Search) -> tuple[int, ...]:
    """The best single choice for all layers that meets the bounds. One that at least half of the layers offer
    counts; where a layer of a mixed parent lacks it, the layer keeps its first choice."""
    names = table.names()
    offered = Counter(name for row in names for name in set(row))
    weights, starts = goal.weights(table), goal.program(table).starts
    best: tuple[float, tuple[int, ...]] | None = None
    common = [name for name, count in offered.items() if 2 * count >= len(names)]
    for name in common:
        chosen = tuple(row.index(name) if name in row else 0 for row in names)
        value = math.fsum(weights[starts[:-1] + np.array(chosen)])
        if _fits(table, goal, chosen) and (best is None or value < best[0]):
            best = value, chosen
    if best is None:
        what = f"none of {len(common)} does" if common else "no choice is offered by half of the layers"
        raise Infeasible(
            f"uniform: expected a choice that meets the bounds in every layer, got {what}; relax one"
        )
    return best[1]


def _noop_only(
    table: Table, kept: Sequence[Sequence[int]], whole: Table, goal: Goal, how: Search
) -> list[Solution]:
    """The optimum over the choices that `keeps_or_drops` leaves."""
    left = []
    for i, (row, indices) in enumerate(zip(table.layers, kept, strict=True)):
        first = whole.layers[i][0]
        left.append([j for j, k in enumerate(indices) if k == 0 or keeps_or_drops(row[j], first)])
        if not left[-1]:
            raise ValueError(
                f"noop_only: layer {i}: expected a choice that keeps or drops sub-blocks, got none of "
                f"{len(row)}; name them ATTENTION+FEED_FORWARD with - for nothing, or add a column noop"
            )
    if all(len(indices) == 1 for indices in left) and any(len(row) > 1 for row in table.layers):
        raise ValueError(
            "noop_only: expected choices without a sub-block, got none in any layer; name them "
            "ATTENTION+FEED_FORWARD with - for nothing, or add a column noop"
        )
    layers = tuple(tuple(row[j] for j in some) for row, some in zip(table.layers, left, strict=True))
    try:
        found = solve_goal(replace(table, layers=layers), goal, how)
    except Infeasible as error:
        raise Infeasible(f"noop_only: {error}") from error
    return [replace(s, chosen=tuple(left[i][j] for i, j in enumerate(s.chosen))) for s in found]


def _max_params(table: Table, goal: Goal, how: Search) -> list[Solution]:
    """The most of the column `params` within the bounds; of a single solution, the best with as many."""
    found = solve_goal(table, Goal("params", True, goal.bounds), how)
    if how.num_solutions > 1:
        return [goal.solution(table, solution.chosen, solution.gap) for solution in found]
    as_many = Bound("params", "min", table.total("params", found[0].chosen))
    try:
        best = solve_goal(table, replace(goal, bounds=(*goal.bounds, as_many)), how)[0]
    except OutOfTime:  # to meet that number again can be hard, and all that is gained is a better tie
        best = found[0]
    return [goal.solution(table, best.chosen, found[0].gap)]


def _random_solutions(table: Table, goal: Goal, how: Search) -> list[Solution]:
    rng = np.random.default_rng(how.seed)
    found: list[Solution] = []
    for _ in range(DRAWS * how.num_solutions):
        chosen = _random(table, goal, how, rng)
        if all(_differences(chosen, s.chosen) >= how.diversity for s in found):
            found.append(goal.solution(table, chosen))
        if len(found) == how.num_solutions:
            break
    return sorted(found, key=lambda s: -s.objective if goal.greatest else s.objective)


def _random(table: Table, goal: Goal, how: Search, rng: np.random.Generator) -> tuple[int, ...]:
    """A choice drawn evenly for every layer; then swaps drawn evenly from those that lower what is passed of
    the bounds, until none is; then from those that raise the use of the tightest maximum and pass none,
    until 1% of it is left or no swap is of use."""
    costs = _Costs.of(table, goal)
    sizes = np.diff(costs.starts)
    chosen = np.array([rng.integers(n) for n in sizes])
    layer = np.repeat(np.arange(len(sizes)), sizes)

    def swapped() -> np.ndarray:
        """[K, choices]: the sums after each possible swap."""
        now = costs.use[:, costs.starts[:-1] + chosen]
        return now.sum(axis=1, keepdims=True) - now[:, layer] + costs.use

    def swap(useful: np.ndarray) -> bool:
        if not useful.any():
            return False
        place = rng.choice(np.flatnonzero(useful))
        chosen[layer[place]] = place - costs.starts[layer[place]]
        return True

    def sums() -> np.ndarray:
        return costs.use[:, costs.starts[:-1] + chosen].sum(axis=1)

    def left(use: np.ndarray) -> np.ndarray:
        room = (costs.limit[:, None] - use) / costs.scale[:, None]
        return room[costs.is_max].min(axis=0)

    while (over := costs.excess(sums())) > 0 and swap(costs.excess(swapped()) < over * (1 - 1e-9)):
        pass
    if costs.is_max.any() and costs.excess(sums()) == 0:
        while (room := left(sums()[:, None])[0]) > FULL:
            after = swapped()
            if not swap((costs.excess(after) == 0) & (left(after) < room - 1e-9)):
                break
    return _nearest(table, goal, chosen.tolist(), how)


def _nearest(table: Table, goal: Goal, chosen: Sequence[int], how: Search) -> tuple[int, ...]:
    """`chosen` where it meets the bounds; else what does and differs in the fewest layers, with the best
    objective among those up to a thousandth of a layer."""
    if _fits(table, goal, chosen):
        return tuple(chosen)
    program, weights = goal.program(table), goal.weights(table)
    spread = float(np.ptp(weights)) * len(table.layers) or 1.0
    distance = 1e-3 * (weights - weights.min()) / spread
    distance[program.places(chosen)] -= 1.0
    answer = program.minimise(distance, how.max_seconds)
    if answer is None:
        raise Infeasible(infeasible(table, goal, how.max_seconds))
    return answer.chosen


def _fits(table: Table, goal: Goal, chosen: Sequence[int]) -> bool:
    linear = map(table.linear, goal.bounds)
    return all(bound.holds(table.total(bound.name, chosen)) for bound in linear)


def _differences(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
