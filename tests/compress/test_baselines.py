"""The baselines: what each one is, always within the bounds, never better than the optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nemojax.compress.baselines import METHODS, find, keeps_or_drops
from nemojax.compress.pareto import plot_sweep, sweep, sweep_text
from nemojax.compress.search import Infeasible, Search, total
from nemojax.compress.table import Bound, Table
from nemojax.plots import standalone

ATTN = {"kv4": 4.0, "kv1": 2.5, "-": 0.0}
FFN = {"ffn64": 6.0, "ffn32": 3.0, "-": 0.0}


def table(seed: int = 0, layers: int = 6) -> Table:
    """Attention times feed-forward; what costs less scores worse, more or less."""
    rng = np.random.default_rng(seed)

    def choice(a: str, f: str, weight: float) -> dict:
        params = ATTN[a] + FFN[f]
        score = 0.0 if params == 10 else weight * (10 - params) * rng.uniform(0.5, 1.5)
        ms = 0.0 if params == 0 else params * rng.uniform(0.8, 1.2)
        return {"name": f"{a}+{f}", "score": float(score), "params": params, "ms": float(ms)}

    rows = [
        tuple(choice(a, f, weight) for a, f in itertools.product(ATTN, FFN))
        for weight in rng.uniform(0.2, 3.0, layers)
    ]
    return Table(tuple(rows), {"params": 7.0, "ms": 2.0})


BOUNDS = (
    ({"params": 7.0 + 36.0}, {}),
    ({"params": 7.0 + 45.0, "ms": 2.0 + 40.0}, {}),
    ({"ms": 2.0 + 36.0}, {"params": 7.0 + 30.0}),
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_feasible_and_never_better_than_the_optimum(method, seed):
    some = table(seed)
    for maximum, minimum in BOUNDS:
        best = find(some, maximum=maximum, minimum=minimum)[0].objective
        try:
            [found] = find(some, method, maximum=maximum, minimum=minimum, seed=seed)
        except Infeasible:
            assert method == "uniform" and minimum  # one choice everywhere need not exist
            continue
        assert found.objective >= best - 1e-9
        assert found.objective == pytest.approx(total(some, "score", found.chosen))
        assert all(found.totals[n] <= b * (1 + 1e-9) for n, b in maximum.items())
        assert all(found.totals[n] >= b * (1 - 1e-9) for n, b in minimum.items())
        assert (found.gap == 0.0) if method in ("mip", "noop_only", "max_params") else found.gap is None


def test_greedy_is_the_papers():
    """By hand: 2 layers, 10 to spend. Layer 1 is the easier: of its 5 it spends 2, and 3 roll on."""
    rows = [{"full": (0.0, 9.0), "half": (3.0, 8.0), "-": (9.0, 0.0)}]
    rows += [{"full": (0.0, 9.0), "half": (1.0, 2.0), "-": (2.0, 0.0)}]
    layers = [tuple({"name": n, "score": s, "p": p} for n, (s, p) in row.items()) for row in rows]
    some = Table(tuple(layers), {})
    assert find(some, "greedy", maximum={"p": 10.0})[0].chosen == (1, 1)
    assert find(some, "greedy", maximum={"p": 9.0})[0].chosen == (2, 1)  # 4.5 + 2.5 < 8
    assert find(some, maximum={"p": 9.0})[0].chosen == (0, 2)


def test_greedy_where_a_layer_cannot_pay_its_part():
    """Layer 0 costs 8 of 10 at least; its part would be 5. The other can pay 5, but must leave those 8."""
    some = Table(
        (
            ({"name": "a", "score": 5.0, "p": 9.0}, {"name": "b", "score": 9.0, "p": 8.0}),
            ({"name": "a", "score": 0.0, "p": 5.0}, {"name": "b", "score": 1.0, "p": 1.0}),
        ),
        {},
    )
    assert find(some, "greedy", maximum={"p": 10.0})[0].chosen == (0, 1)
    with pytest.raises(Infeasible, match="p max 8 .least possible: 9"):
        find(some, "greedy", maximum={"p": 8.0})


@pytest.mark.parametrize("seed", range(5))
def test_random_ends_at_the_budget(seed):
    some = table(layers=20)
    for share in (0.3, 0.7, 0.95):
        most = 7.0 + share * 200
        [found] = find(some, "random", maximum={"params": most}, seed=seed)
        assert 0.98 * (most - 7.0) <= found.totals["params"] - 7.0 <= share * 200
        assert find(some, "random", maximum={"params": most}, seed=seed)[0] == found
    chosen = {find(some, "random", maximum={"params": 107.0}, seed=s)[0].chosen for s in range(4)}
    assert len(chosen) == 4


def test_random_draws_differ():
    found = find(table(layers=12), "random", maximum={"params": 67.0}, num_solutions=4, diversity=5)
    assert len(found) == 4 and [s.objective for s in found] == sorted(s.objective for s in found)
    for a, b in itertools.combinations(found, 2):
        assert sum(x != y for x, y in zip(a.chosen, b.chosen, strict=True)) >= 5


def test_uniform_is_the_best_single_choice():
    some = table()
    [found] = find(some, "uniform", maximum={"params": 43.0})
    fitting = [j for j in range(9) if total(some, "params", [j] * 6) <= 43.0]
    assert found.chosen in [(j,) * 6 for j in fitting]
    assert found.objective == pytest.approx(min(total(some, "score", [j] * 6) for j in fitting))
    with pytest.raises(Infeasible, match="uniform: expected a choice that meets the bounds in every layer"):
        find(some, "uniform", maximum={"params": 44.0}, minimum={"params": 43.5})


def test_uniform_in_a_mixed_parent():
    """Layer 1 has no attention left to narrow: it keeps what it has."""
    rows = [
        ({"name": "kv2+f", "score": 0.0, "p": 4.0}, {"name": "kv1+f", "score": 1.0, "p": 2.0}),
        ({"name": "-+f", "score": 0.0, "p": 1.0},),
        ({"name": "kv2+f", "score": 0.0, "p": 4.0}, {"name": "kv1+f", "score": 1.0, "p": 2.0}),
    ]
    assert find(Table(tuple(rows), {}), "uniform", maximum={"p": 6.0})[0].names(Table(tuple(rows), {})) == [
        "kv1+f", "-+f", "kv1+f"
    ]  # fmt: skip


def test_noop_only_keeps_or_drops():
    some = table()
    [found] = find(some, "noop_only", maximum={"params": 43.0})
    names = found.names(some)
    assert set(names) <= {"kv4+ffn64", "-+ffn64", "kv4+-", "-+-"} and len(set(names)) > 1
    wanted = [0, 2, 6, 8]
    fits = [c for c in itertools.product(wanted, repeat=6) if total(some, "params", c) <= 43.0]
    assert found.objective == pytest.approx(min(total(some, "score", c) for c in fits))


@pytest.mark.parametrize(
    "name, first, kept",
    [
        ("kv4+ffn64", "kv4+ffn64", True),
        ("-+ffn64", "kv4+ffn64", True),
        ("noop+No_Op", "kv4+ffn64", True),
        ("kv1+ffn64", "kv4+ffn64", False),
        ("kv4+ffn32", "kv4+ffn64", False),
        ("-+-", "-+ffn64", True),
        ("none", "full", True),
        ("half", "full", False),
    ],
)
def test_no_ops_by_name(name, first, kept):
    assert keeps_or_drops({"name": name}, {"name": first}) == kept


def test_no_ops_by_column():
    rows = tuple(
        (
            {"name": "a", "score": 0.0, "p": 2.0, "noop": False},
            {"name": "b", "score": 0.1, "p": 1.0, "noop": False},
            {"name": "c", "score": 1.0, "p": 0.0, "noop": True},
        )
        for _ in range(3)
    )
    assert sorted(find(Table(rows, {}), "noop_only", maximum={"p": 3.0})[0].chosen) == [0, 2, 2]
    foreign = tuple(tuple({k: v for k, v in c.items() if k != "noop"} for c in row) for row in rows)
    with pytest.raises(
        ValueError, match="noop_only: expected choices without a sub-block, got none.*column noop"
    ):
        find(Table(foreign, {}), "noop_only", maximum={"p": 3.0})
    with pytest.raises(Infeasible, match="noop_only: budget: .*p min 7 .most possible: 6"):
        find(Table(rows, {}), "noop_only", minimum={"p": 7.0})


def test_max_params():
    some = table()
    small = Table(some.layers[:4], some.fixed)
    [found] = find(small, "max_params", maximum={"ms": 22.0})
    fits = [c for c in itertools.product(range(9), repeat=4) if total(small, "ms", c) <= 22.0]
    most = max(total(small, "params", c) for c in fits)
    assert total(small, "params", found.chosen) == most
    equal = [total(small, "score", c) for c in fits if total(small, "params", c) == most]
    assert found.objective == pytest.approx(min(equal)) and set(found.totals) == {"ms"}
    with pytest.raises(ValueError, match="column 'params': expected a finite number, got nothing"):
        find(Table((({"name": "a", "score": 1.0},),), {}), "max_params")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "uniform"])
def test_every_method_keeps_to_the_rules(method):
    some, rules = table(), ("2:-+*", "2:*+-")
    [found] = find(some, method, maximum={"params": 50.0}, fix=("0,5:kv4+ffn64",), exclude=rules)
    names = found.names(some)
    assert names[0] == names[5] == "kv4+ffn64" and "-" not in names[2]


def test_uniform_keeps_to_the_rules():
    some = table()
    [free] = find(some, "uniform", maximum={"params": 50.0})
    [found] = find(some, "uniform", maximum={"params": 50.0}, exclude=(f"all:{free.names(some)[0]}",))
    assert found.objective > free.objective and len(set(found.names(some))) == 1


def test_bad_methods():
    with pytest.raises(ValueError, match="method: expected one of mip, greedy, .*got 'best'"):
        find(table(), "best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_solutions: expected 1 with greedy, got 2"):
        find(table(), "greedy", num_solutions=2)


def test_sweep():
    some = table()
    values, others = [8.0, 30.0, 43.0, 67.0, 5.0], [Bound("ms", "max", 50.0)]
    series = {m: sweep(some, "params", values, Search(m), others) for m in ("mip", "greedy")}
    for points in series.values():
        assert [p.bound for p in points] == values
        assert points[-1].solution is None and "params max 5 (least possible" in points[-1].why
        scores = [p.solution.objective for p in points if p.solution]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    for one, other in zip(series["mip"][:4], series["greedy"], strict=False):
        assert one.solution and other.solution and one.solution.objective <= other.solution.objective + 1e-9
        assert one.solution.totals["params"] <= one.bound and one.solution.totals["ms"] <= 50.0
    text = sweep_text(some, "params", "score", series)
    assert (
        text.count("impossible") == 2 and len({len(line.split("  ")) > 1 for line in text.splitlines()}) == 1
    )
    svg = standalone(plot_sweep("params", "score", series))
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg" ') and "greedy" in svg and "params" in svg


def test_a_sweep_does_not_hide_bad_input():
    with pytest.raises(ValueError, match="column 'kl'"):
        sweep(table(), "params", [30.0], Search(minimize="kl"))


def test_a_sweep_of_rates():
    rows = tuple(
        ({"name": "a", "score": 0.0, "x_ms": 4.0}, {"name": "b", "score": 1.0, "x_ms": 1.0}) for _ in range(3)
    )
    some = Table(rows, {"x_ms": 2.0}, {"x_ms": 10.0})
    points = sweep(some, "x_tokens_per_s", [700.0, 1000.0, 1300.0, 2001.0], Search())
    assert [p.solution and p.solution.objective for p in points] == [0.0, 2.0, 3.0, None]
