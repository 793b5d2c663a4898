"""The search against brute force, and what it says when nothing fits."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from nemojax.compress.search import Table, solve, total


def table(layers: int = 4, choices: int = 4, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    return Table(
        tuple(
            tuple(
                {"name": f"c{j}", "score": float(s), "params": float(p), "ms": float(t)}
                for j, (s, p, t) in enumerate(rng.uniform(1, 10, (choices, 3)))
            )
            for _ in range(layers)
        ),
        {"params": 5.0},
    )


def brute(table: Table, maximum: dict, minimum: dict | None = None) -> float:
    best = np.inf
    for chosen in itertools.product(*(range(len(c)) for c in table.layers)):
        fits = all(total(table, n, chosen) <= b for n, b in maximum.items())
        fits &= all(total(table, n, chosen) >= b for n, b in (minimum or {}).items())
        if fits:
            best = min(best, total(table, "score", chosen))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_optimal(seed):
    some = table(seed=seed)
    for maximum, minimum in (
        ({"params": 24.0}, {}),
        ({"params": 26.0, "ms": 22.0}, {}),
        ({"ms": 30.0}, {"params": 20.0}),
    ):
        expected = brute(some, maximum, minimum)
        if np.isinf(expected):
            with pytest.raises(ValueError, match="relax one"):
                solve(some, maximum=maximum, minimum=minimum)
            continue
        solution = solve(some, maximum=maximum, minimum=minimum)[0]
        assert solution.objective == pytest.approx(expected, rel=1e-9)
        assert all(solution.totals[n] <= b for n, b in maximum.items())


def test_bound_met_exactly():
    some = Table(
        tuple(
            ({"name": "a", "score": 0.0, "p": 3.0}, {"name": "b", "score": 1.0, "p": 1.0}) for _ in range(3)
        ),
        {},
    )
    assert solve(some, maximum={"p": 5.0})[0].chosen.count(0) == 1
    assert solve(some, maximum={"p": 4.999})[0].chosen.count(0) == 0


def test_several_solutions_differ():
    found = solve(table(), maximum={"params": 30.0}, num_solutions=3, diversity=2)
    assert len(found) == 3
    assert [s.objective for s in found] == sorted(s.objective for s in found)
    for a, b in itertools.combinations(found, 2):
        assert sum(x != y for x, y in zip(a.chosen, b.chosen, strict=True)) >= 2


def test_infeasible_names_each_bound():
    some = table()
    least = 5.0 + sum(min(c["params"] for c in options) for options in some.layers)
    with pytest.raises(ValueError, match=re.escape(f"params max 6 (least possible: {least:.10g})")):
        solve(some, maximum={"params": 6.0})
    with pytest.raises(
        ValueError, match="params max 6 .*with the others held.*ms max 30 .*the others alone are impossible"
    ):
        solve(some, maximum={"params": 6.0, "ms": 30.0})


@pytest.mark.parametrize("value", [None, "fast", float("nan"), True])
def test_bad_cell_is_named(value):
    some = Table((({"name": "a", "score": 1.0}, {"name": "b", "score": value}),), {})
    with pytest.raises(ValueError, match="layer 0, choice 'b', column 'score'"):
        solve(some)


def test_json_round_trip():
    some = table()
    assert Table.from_json(some.to_json()) == some
    with pytest.raises(ValueError, match="layer 1: expected at least one choice"):
        Table.from_json({"layers": [[{"name": "a"}], []]})
