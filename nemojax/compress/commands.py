"""`nemojax search`: the search over a table of anybody's library, without a model."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemojax.buckets import place, write_text
from nemojax.commands import Parser

if TYPE_CHECKING:
    from nemojax.compress.pareto import Point
    from nemojax.compress.search import Search, Solution
    from nemojax.compress.table import Bound, Side, Table

DESCRIPTION = """\
The choices of least sum, one for each layer, within bounds on any columns of a table.

TABLE.json is {"layers": [[{"name": TEXT, "kl": 0.1, "memory_mib": 210, ...}, ...], ...],
"fixed": {"memory_mib": 1000}}: for each layer its choices, and what is outside the layers. With
"tokens": {"chat_ms": 81920}, a bound on chat_tokens_per_s is one on the total of chat_ms. A stage's
table.json is such a table, with the column score."""

EPILOG = """\
LAYERS is all, or a list such as 0,4-27,30-; GLOB matches names of choices. noop_only takes names such as
kv8+ffn14336, whose halves are - where nothing is, the first choice being the parent's, or a column noop;
max_params takes a column params.

  nemojax search table.json --minimize=kl --max=memory_mib:80000 --max=runtime_ms:51200
  nemojax search table.json --minimize=kl --sweep=memory_mib:60000,70000,80000 --method=mip,greedy
      --plot=front.svg"""


def search_command(argv: Sequence[str]) -> int:
    """nemojax search TABLE.json --minimize=COLUMN --max=COLUMN:VALUE ... [options]."""
    parser = _parser()
    args = parser.parse_args(argv)
    methods = _check(args, parser)
    from nemojax.compress.table import load_table

    table = load_table(args.table)
    bounds, hows = _bounds(args, parser), [_how(args, method, parser) for method in methods]
    start = time.perf_counter()
    if args.sweep:
        return _sweep(args, table, bounds, hows, parser)
    from nemojax.compress.baselines import find_within

    found = find_within(table, bounds, hows[0])
    seconds = time.perf_counter() - start
    if args.json:
        side = "maximize" if hows[0].maximize else "minimize"
        head = {"method": hows[0].method, side: getattr(hows[0], side), "seconds": seconds}
        print(_dumps(head | {"solutions": [_as_json(table, solution) for solution in found]}))
    else:
        print(_as_text(table, bounds, hows[0], found, seconds))
    return 0


def _sweep(
    args: argparse.Namespace, table: Table, bounds: Sequence[Bound], hows: Sequence[Search], parser: Parser
) -> int:
    from nemojax.compress.pareto import plot_sweep, sweep, sweep_text
    from nemojax.plots import standalone

    name, values = _sweep_bounds(args.sweep, parser)
    if any(bound.name == name for bound in bounds):
        parser.error(f"--sweep: {name} has a bound by --max or --min as well; give one of them")
    side = "maximize" if hows[0].maximize else "minimize"
    objective = getattr(hows[0], side)
    series = {how.method: sweep(table, name, values, how, bounds) for how in hows}
    if args.plot:
        write_text(place(args.plot), standalone(plot_sweep(name, objective, series)))
    if args.json:
        points = {method: [_point(table, p) for p in some] for method, some in series.items()}
        print(_dumps({side: objective, "sweep": name, "points": points}))
    else:
        print(sweep_text(table, name, objective, series))
    if not any(point.solution for some in series.values() for point in some):
        raise ValueError(f"--sweep: {next(iter(series.values()))[-1].why}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="nemojax search",
        usage="nemojax search TABLE.json --minimize=COLUMN --max=COLUMN:VALUE ... [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="TABLE.json", help="the choices of every layer")
    parser.add_argument("--minimize", metavar="COLUMN", help="whose sum is least (default: score)")
    parser.add_argument("--maximize", metavar="COLUMN", help="whose sum is greatest, in place of --minimize")
    for side, word in (("max", "most"), ("min", "least")):
        parser.add_argument(
            f"--{side}", metavar="COLUMN:VALUE", action="append", default=[],
            help=f"{word} of a column's total, `fixed` included; may be given several times",
        )  # fmt: skip
    parser.add_argument(
        "--method", default="mip",
        help="mip (default) or greedy, random, uniform, noop_only, max_params; several with --sweep",
    )  # fmt: skip
    parser.add_argument("--num_solutions", type=int, default=1, help="solutions, best first (default: 1)")
    parser.add_argument(
        "--diversity",
        type=int,
        default=1,
        help="layers in which any two solutions differ at least (default: 1)",
    )
    parser.add_argument(
        "--prefer_runs", type=float, default=0.0, metavar="SHARE",
        help="give up this share of the optimum at most for fewer changes between neighbours, as 0.001",
    )  # fmt: skip
    for name, verb in (("fix", "only a choice that matches"), ("exclude", "no choice that matches")):
        parser.add_argument(
            f"--{name}", metavar="LAYERS:GLOB", action="append", default=[], help=f"these layers take {verb}"
        )
    parser.add_argument("--sweep", metavar="COLUMN:V,V,...", help="one search for each bound on a column")
    parser.add_argument("--plot", metavar="FILE.svg", help="with --sweep: where the picture goes")
    parser.add_argument("--seed", type=int, default=0, help="of the random method (default: 0)")
    parser.add_argument("--max_seconds", type=float, default=60.0, help="limit of a solution (default: 60)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _check(args: argparse.Namespace, parser: Parser) -> list[str]:
    """The methods; what does not go together is refused."""
    if args.minimize is not None and args.maximize is not None:
        parser.error("--minimize and --maximize: give one of them")
    if args.plot and not args.sweep:
        parser.error("--plot goes with --sweep")
    if args.sweep and args.num_solutions > 1:
        parser.error("--num_solutions does not go with --sweep")
    methods = args.method.split(",")
    if len(methods) > 1 and not args.sweep:
        parser.error("--method: several go with --sweep only")
    from nemojax.compress.baselines import METHODS

    for method in methods:
        if method not in METHODS:
            parser.error(f"--method: expected one of {', '.join(METHODS)}, got {method!r}")
    return methods


def _how(args: argparse.Namespace, method: Any, parser: Parser) -> Search:
    from nemojax.compress.search import Search

    try:
        return Search(
            method=method,
            minimize=args.minimize or "score",
            maximize=args.maximize,
            max_seconds=args.max_seconds,
            num_solutions=args.num_solutions,
            diversity=args.diversity,
            prefer_runs=args.prefer_runs,
            fix=tuple(args.fix),
            exclude=tuple(args.exclude),
            seed=args.seed,
        )
    except ValueError as error:
        parser.error(f"--{error}")


def _bounds(args: argparse.Namespace, parser: Parser) -> tuple[Bound, ...]:
    from nemojax.compress.table import Bound

    bounds = []
    sides: tuple[tuple[Side, list[str]], ...] = (("max", args.max), ("min", args.min))
    for side, given in sides:
        for item in given:
            name, colon, text = item.rpartition(":")
            if not colon or not name:
                parser.error(f"--{side}={item}: expected COLUMN:VALUE")
            bounds.append(Bound(name, side, _number(text, f"--{side}={item}", parser)))
    return tuple(dict.fromkeys(bounds))


def _sweep_bounds(item: str, parser: Parser) -> tuple[str, list[float]]:
    name, colon, text = item.rpartition(":")
    if not colon or not name or not text:
        parser.error(f"--sweep={item}: expected COLUMN:VALUE,VALUE,...")
    return name, [_number(value, f"--sweep={item}", parser) for value in text.split(",")]


def _number(text: str, where: str, parser: Parser) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        parser.error(f"{where}: expected a finite number, got {text!r}")
    return value


def _as_json(table: Table, solution: Solution) -> dict[str, Any]:
    """A solution as a stage writes it, and the names alone."""
    rows = zip(table.layers, solution.chosen, strict=True)
    return {
        "objective": solution.objective,
        "totals": dict(solution.totals),
        "gap": solution.gap,
        "choices": solution.names(table),
        "layers": [{"layer": i, "index": j, **row[j]} for i, (row, j) in enumerate(rows)],
    }


def _point(table: Table, point: Point) -> dict[str, Any]:
    if point.solution is None:
        return {"bound": point.bound, "solution": None, "why": point.why}
    return {"bound": point.bound, "solution": _as_json(table, point.solution)}


def _as_text(
    table: Table, bounds: Sequence[Bound], how: Search, found: Sequence[Solution], seconds: float
) -> str:
    from nemojax.compress.pareto import aligned
    from nemojax.compress.search import changes

    objective, lines = how.maximize or how.minimize, []
    for n, solution in enumerate(found, 1):
        proof = {None: how.method, 0.0: "optimal"}.get(solution.gap, f"gap {100 * (solution.gap or 0):.3g}%")
        rows = [(objective, f"{solution.objective:.10g}", proof)]
        for bound in bounds:
            limit = f"at {'most' if bound.side == 'max' else 'least'} {bound.value:.10g}"
            rows.append((bound.name, f"{solution.totals[bound.name]:.10g}", limit))
        rows.append(("changes", str(changes(table, solution.chosen)), "between neighbouring layers"))
        lines += [f"solution {n} of {len(found)}", aligned(rows), ""]
        cells = [("layer", "choice", objective)]
        column = None if table.time_of(objective) else table.column(objective)
        for i, (name, j) in enumerate(zip(solution.names(table), solution.chosen, strict=True)):
            cells.append((str(i), name, "" if column is None else f"{column[i][j]:.6g}"))
        lines += [aligned(cells), ""]
    used = [*dict.fromkeys([objective, *(table.linear(bound).name for bound in bounds)])]
    lines += [f"{name}: {table.provenance[name]}" for name in used if name in table.provenance]
    if len(found) < how.num_solutions:
        lines.append(
            f"{how.num_solutions} solutions were asked for; no more differ in {how.diversity} layers"
        )
    lines.append(f"{len(table.layers)} layers, {sum(map(len, table.layers))} choices, {seconds:.2f} s")
    return "\n".join(lines)


def _dumps(value: Any) -> str:
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN, as in a column that nothing asks for, nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
