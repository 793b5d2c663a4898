"""The search against brute force, and what it says when nothing fits."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemojax.compress.baselines import find, find_within
from nemojax.compress.milp import OutOfTime, Program
from nemojax.compress.search import Budget, Infeasible, Search, changes, solve, total
from nemojax.compress.table import Bound, Table, load_table


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


def timed(seed: int = 0) -> Table:
    """Two scenarios of different blocks' liking, with non-block times."""
    rng = np.random.default_rng(seed)
    names = ("kv2+ffn8", "kv1+ffn8", "-+ffn8", "kv2+-")
    layers = tuple(
        tuple(
            {"name": n, "score": float(s) * (n != names[0]), "chat_ms": float(a), "long_ms": float(b)}
            for n, s, a, b in zip(names, *rng.uniform(1, 10, (3, 4)), strict=True)
        )
        for _ in range(4)
    )
    return Table(layers, {"chat_ms": 3.0, "long_ms": 1.0}, {"chat_ms": 500.0, "long_ms": 2000.0})


def feasible(table: Table, maximum: dict, minimum: dict | None = None):
    for chosen in itertools.product(*(range(len(c)) for c in table.layers)):
        fits = all(total(table, n, chosen) <= b * (1 + 1e-12) for n, b in maximum.items())
        if fits and all(total(table, n, chosen) >= b * (1 - 1e-12) for n, b in (minimum or {}).items()):
            yield chosen


def brute(table: Table, maximum: dict, minimum: dict | None = None, column: str = "score") -> float:
    return min((total(table, column, c) for c in feasible(table, maximum, minimum)), default=np.inf)


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
            with pytest.raises(Infeasible, match="relax one"):
                solve(some, maximum=maximum, minimum=minimum)
            continue
        solution = solve(some, maximum=maximum, minimum=minimum)[0]
        assert solution.objective == pytest.approx(expected, rel=1e-9) and solution.gap == 0.0
        assert all(solution.totals[n] <= b for n, b in maximum.items())


cells = st.integers(0, 12).map(float)  # whole numbers: many ties, and bounds that are met exactly


@st.composite
def programs(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    layers = tuple(
        tuple({"name": f"c{j}", "score": draw(cells), "a": draw(cells), "b": draw(cells)} for j in range(n))
        for n in sizes
    )
    fixed = {"a": draw(cells)}
    names = draw(st.lists(st.sampled_from([("a", 0), ("b", 0), ("a", 1), ("b", 1)]), max_size=3, unique=True))
    bounds = [{n: float(draw(st.integers(0, 40))) for n, s in names if s == side} for side in (0, 1)]
    return Table(layers, fixed), *bounds


@settings(max_examples=60, deadline=None)
@given(programs())
def test_any_small_table_against_brute_force(program):
    some, maximum, minimum = program
    expected = brute(some, maximum, minimum)
    try:
        solution = solve(some, maximum=maximum, minimum=minimum)[0]
    except Infeasible:
        assert np.isinf(expected)
        return
    assert solution.objective == pytest.approx(expected, abs=1e-9)
    assert solution.objective == total(some, "score", solution.chosen)
    assert all(total(some, n, solution.chosen) <= b for n, b in maximum.items())
    assert all(total(some, n, solution.chosen) >= b for n, b in minimum.items())


@settings(max_examples=25, deadline=None)
@given(programs(), st.integers(1, 3))
def test_diverse_solutions_are_the_best_ones_left(program, diversity):
    some, maximum, minimum = program
    if diversity > len(some.layers) or np.isinf(brute(some, maximum, minimum)):
        return
    found = solve(some, maximum=maximum, minimum=minimum, num_solutions=3, diversity=diversity)

    def apart(a, b):
        return sum(x != y for x, y in zip(a, b, strict=True)) >= diversity

    taken: list[tuple[int, ...]] = []
    for n in range(3):
        left = [c for c in feasible(some, maximum, minimum) if all(apart(c, t) for t in taken)]
        if not left:
            assert len(found) == n
            break
        best = min(total(some, "score", c) for c in left)
        assert found[n].objective == pytest.approx(best, abs=1e-9)
        assert found[n].chosen in left
        taken.append(found[n].chosen)


@pytest.mark.parametrize("seed", range(6))
def test_runs_are_the_longest_within_the_share(seed):
    some = table(layers=5, choices=3, seed=seed)
    maximum, share = {"params": 5.0 + 27.0, "ms": 32.0}, 0.2
    best = brute(some, maximum)
    near = [c for c in feasible(some, maximum) if total(some, "score", c) <= best * (1 + share)]
    found = solve(some, maximum=maximum, prefer_runs=share)[0]
    assert changes(some, found.chosen) == min(changes(some, c) for c in near)
    assert found.chosen in near and found.gap is not None
    assert found.gap * found.objective == pytest.approx(found.objective - best, abs=1e-9)
    assert solve(some, maximum=maximum, prefer_runs=1e-9)[0].objective == pytest.approx(best)


def test_runs_shorten_something():
    """Else the test above might compare what is equal anyhow."""
    pairs = [
        [solve(table(5, 3, seed), maximum={"params": 32.0, "ms": 32.0}, prefer_runs=p)[0] for p in (0.0, 0.2)]
        for seed in range(6)
    ]
    some = table(5, 3)
    assert any(changes(some, runs.chosen) < changes(some, best.chosen) for best, runs in pairs)


def test_bound_met_exactly():
    some = Table(
        tuple(
            ({"name": "a", "score": 0.0, "p": 3.0}, {"name": "b", "score": 1.0, "p": 1.0}) for _ in range(3)
        ),
        {},
    )
    assert solve(some, maximum={"p": 5.0})[0].chosen.count(0) == 1
    assert solve(some, maximum={"p": 4.999})[0].chosen.count(0) == 0
    assert solve(some, maximum={"p": 5.0 - 1e-8})[0].chosen.count(0) == 0  # below what a solver tolerates


def test_tenths_fill_a_budget():
    """0.1 + 0.2 is more than 0.3 in binary, and still within it."""
    some = Table(
        (
            ({"name": "a", "score": 0.0, "p": 0.1},),
            ({"name": "a", "score": 0.0, "p": 0.2}, {"name": "b", "score": 1.0, "p": 0.1}),
        ),
        {},
    )
    assert solve(some, maximum={"p": 0.3})[0].chosen == (0, 0)


def test_several_solutions_differ():
    found = solve(table(), maximum={"params": 30.0}, num_solutions=3, diversity=2)
    assert len(found) == 3
    assert [s.objective for s in found] == sorted(s.objective for s in found)
    for a, b in itertools.combinations(found, 2):
        assert sum(x != y for x, y in zip(a.chosen, b.chosen, strict=True)) >= 2
    with pytest.raises(ValueError, match="diversity: expected from 1 to the 4 layers, got 5"):
        solve(table(), num_solutions=2, diversity=5)


def test_any_column_least_or_greatest():
    some = table()
    bound = {"score": 20.0}
    assert solve(some, minimize="params", maximum=bound)[0].objective == pytest.approx(
        brute(some, bound, column="params")
    )
    most = max(total(some, "ms", c) for c in feasible(some, bound))
    found = solve(some, maximize="ms", maximum=bound, num_solutions=2)
    assert found[0].objective == pytest.approx(most) and found[1].objective <= found[0].objective


@pytest.mark.parametrize("seed", range(3))
def test_scenarios_together(seed):
    """Tokens per second in two scenarios at once are two bounds on sums of ms, non-block time included."""
    some = timed(seed)
    chat, long = (1.1 * total(some, name, (1, 2, 3, 2)) for name in ("chat_ms", "long_ms"))
    rates = {"chat_tokens_per_s": 500e3 / chat, "long_tokens_per_s": 2000e3 / long}
    found = solve(some, minimum=rates)[0]
    assert found.objective == pytest.approx(brute(some, {"chat_ms": chat, "long_ms": long}))
    for name, column in (("chat_tokens_per_s", "chat_ms"), ("long_tokens_per_s", "long_ms")):
        ms = some.fixed[column] + sum(
            row[j][column] for row, j in zip(some.layers, found.chosen, strict=True)
        )
        assert found.totals[name] == pytest.approx(1000 * some.tokens[column] / ms)
        assert found.totals[name] >= rates[name] * (1 - 1e-9)
    fastest = solve(some, maximize="chat_tokens_per_s")[0]
    assert fastest.objective == pytest.approx(500e3 / brute(some, {}, column="chat_ms"))
    with pytest.raises(
        Infeasible, match=f"chat_tokens_per_s min 1000000 .most possible: {fastest.objective:.10g}"
    ):
        solve(some, minimum={"chat_tokens_per_s": 1e6})
    with pytest.raises(ValueError, match="chat_tokens_per_s: expected a positive rate, got 0"):
        solve(some, minimum={"chat_tokens_per_s": 0.0})


def test_budgets_of_a_stage():
    some = timed()
    parent = [0] * 4
    bounds = Budget({"chat_ms": 0.5, "long_tokens_per_s": 1.25}, {"chat_ms": 1e9}, {}).bounds(some)
    blocks = total(some, "chat_ms", parent) - 3.0
    assert bounds == (
        Bound("chat_ms", "max", blocks * 0.5 + 3.0),
        Bound("long_tokens_per_s", "min", 1.25 * total(some, "long_tokens_per_s", parent)),
    )
    found = find_within(some, Budget({"long_tokens_per_s": 1.25}), Search())[0]
    assert total(some, "long_ms", found.chosen) <= total(some, "long_ms", parent) / 1.25 * (1 + 1e-9)


def test_rules_by_layer():
    some = timed()
    free = find(some, maximum={"chat_ms": 32.0})[0]
    fixed = find(some, maximum={"chat_ms": 32.0}, fix=("0:kv2+*", "2-:-+*"), exclude=("1:kv1*",))[0]
    names = fixed.names(some)
    assert names[0].startswith("kv2+") and names[2:] == ["-+ffn8"] * 2 and names[1] != "kv1+ffn8"
    allowed = [
        c for c in feasible(some, {"chat_ms": 32.0}) if c[0] in (0, 3) and c[2] == c[3] == 2 and c[1] != 1
    ]
    assert fixed.objective == pytest.approx(min(total(some, "score", c) for c in allowed))
    assert free.objective <= fixed.objective
    with pytest.raises(
        ValueError, match=r"layer 1: .*got none of its 4 .*after fix 1:kv2., exclude all:kv2.; relax a rule"
    ):
        find(some, fix=("1:kv2*",), exclude=("all:kv2*",))
    with pytest.raises(ValueError, match="rule '0-1:kv9.': expected a glob of choice names, got no match"):
        find(some, exclude=("0-1:kv9*",))
    for rule in ("kv2", ":kv2", "0:"):
        with pytest.raises(ValueError, match=f"rule '{rule}': expected|layers '':"):
            find(some, fix=(rule,))


def test_infeasible_names_each_bound():
    some = table()
    least = 5.0 + sum(min(c["params"] for c in options) for options in some.layers)
    with pytest.raises(Infeasible, match=re.escape(f"params max 6 (least possible: {least:.10g})")):
        solve(some, maximum={"params": 6.0})
    with pytest.raises(
        Infeasible, match="params max 6 .*with the others held.*ms max 30 .*the others alone are impossible"
    ):
        solve(some, maximum={"params": 6.0, "ms": 30.0})
    held = brute(some, {"ms": 12.0}, column="params")
    ms = brute(some, {"params": held - 0.1}, column="ms")
    with pytest.raises(Infeasible) as raised:
        solve(some, maximum={"params": held - 0.1, "ms": 12.0})
    assert f"(least possible with the others held: {held:.10g})" in str(raised.value)
    assert f"(least possible with the others held: {ms:.10g})" in str(raised.value)
    most = max(total(some, "score", c) for c in feasible(some, {"ms": 20.0}))
    with pytest.raises(
        Infeasible, match=re.escape(f"score min 99 (most possible with the others held: {most:.10g})")
    ):
        solve(some, maximum={"ms": 20.0}, minimum={"score": 99.0})


def test_no_time():
    rng = np.random.default_rng(0)
    big = Program([40] * 60)
    with pytest.raises(OutOfTime, match="no solution within 1e-09 s; raise the time limit"):
        big.minimise(rng.uniform(size=2400), 1e-9)


@pytest.mark.parametrize("value", [None, "fast", float("nan"), float("inf"), True, [1.0], 10**400])
def test_bad_cell_is_named(value):
    some = Table((({"name": "a", "score": 1.0}, {"name": "b", "score": value}),), {})
    with pytest.raises(
        ValueError, match="layer 0, choice 'b', column 'score': expected a finite number, got"
    ):
        solve(some)
    with pytest.raises(ValueError, match="layer 0, choice 'b', column 'score'"):
        solve(
            Table((({"name": "b", "kl": 1.0, "score": value},),), {}), minimize="kl", maximum={"score": 2.0}
        )
    with pytest.raises(ValueError, match="fixed, column 'score': expected a finite number"):
        solve(Table((({"name": "a", "score": 1.0},),), {"score": value}), maximum={"score": 2.0})


def test_unknown_columns_are_named():
    with pytest.raises(
        ValueError, match="column 'parms': expected a finite number, got nothing; did you mean 'params'"
    ):
        solve(table(), maximum={"parms": 1.0})
    with pytest.raises(ValueError, match="column 'kl'.*got nothing; columns are score, params, ms$"):
        solve(table(), minimize="kl")
    with pytest.raises(ValueError, match="budget: ms max: expected a number, got nan"):
        solve(table(), maximum={"ms": float("nan")})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_seconds": 0.0}, "max_seconds: expected a positive"),
        ({"num_solutions": 0}, "num_solutions: expected at least 1"),
        ({"prefer_runs": 1.0}, "prefer_runs: expected a share"),
        ({"prefer_runs": -0.1}, "prefer_runs: expected a share"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        solve(table(), **options)


def test_json_round_trip():
    for some in (table(), timed()):
        assert Table.from_json(some.to_json()) == some


@pytest.mark.parametrize(
    "data, message",
    [
        ({"layers": [[{"name": "a"}], []]}, "layer 1: expected at least one choice, got none"),
        ({"layers": []}, "expected at least one layer, got none"),
        ({"rows": []}, ".*got no layers"),
        ([], ".*got no layers"),
        ({"layers": [{"name": "a"}]}, "layer 0: expected a list of choices, got {'name': 'a'}"),
        ({"layers": [[{"name": "a"}, {"kl": 1}]]}, "layer 0, choice 1: expected .*got {'kl': 1}"),
        ({"layers": [[3]]}, "layer 0, choice 0: expected .*got 3"),
        ({"layers": [[{"name": "a"}]], "fixed": 3}, "fixed: expected .*got 3"),
        ({"layers": [[{"name": "a"}]], "tokens": {"ms": 3}}, "tokens: expected a positive number"),
        ({"layers": [[{"name": "a"}]], "tokens": {"x_ms": 0}}, "tokens: expected a positive number"),
    ],
)
def test_what_is_not_a_table(data, message, tmp_path):
    import json

    (tmp_path / "table.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"table.json: table: {message}"):
        load_table(tmp_path / "table.json")


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(ValueError, match="none.json: no such table"):
        load_table(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json: expected a table in JSON"):
        load_table(tmp_path / "bad.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes.json: "):
        load_table(tmp_path / "bytes.json")
