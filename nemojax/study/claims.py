"""From the rows of a study to its claims and its tables: no model, only numbers.

A claim compares two ways at one budget by one measure, seed by seed. It holds where every seed says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
BETTER = {"kl": -1, "loss": -1, "accuracy": 1}

# what is claimed, group, the better way, the worse way
SEARCHED = (
    ("MIP beats greedy", "mip", "greedy"),
    ("MIP beats random", "mip", "random"),
    ("MIP beats one choice for all layers", "mip", "uniform"),
    ("a mixed space beats no-ops alone", "mip", "noop_only"),
    ("scores beat most parameters", "mip", "max_params"),
    ("blocks distilled beat first weights", "mip", "mip first weights"),
    ("KL scores are no worse than LM-loss scores", "mip", "mip lm_loss"),
)


def values(rows: Sequence[Row], group: str, name: str, measure: str, ratio: float | None) -> dict[int, float]:
    """{seed: value}, the mean over the draws of a seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["group"] == group and row["name"] == name and row.get("ratio") == ratio:
            found.setdefault(row["seed"], []).append(row[measure])
    return {seed: statistics.fmean(numbers) for seed, numbers in found.items()}


def claims(rows: Sequence[Row], healed_at: float) -> list[dict[str, Any]]:
    """One dict a claim, budget and measure: `gain` (mean over seeds, positive where the claim is right),
    `low` and `high` over seeds, `holds` ("3/3")."""
    ratios = sorted({row["ratio"] for row in rows if row["group"] == "search"}, reverse=True)
    out = []
    for text, better, worse in SEARCHED:
        for ratio in ratios:
            out += [_claim(rows, text, "search", better, worse, m, ratio) for m in ("kl", "accuracy")]
        out += [_claim(rows, f"{text}, healed", "healed", better, worse, m, healed_at) for m in BETTER]
    for method in sorted({row["name"] for row in rows if row["group"] == "importance"} - {"random"}):
        text = f"{method} importance beats random channels"
        out.append(_claim(rows, text, "importance", method, "random", "kl", None))
    fused = "fused is no worse than unfused, both healed on"
    pair = ("fused, healed on", "unfused, healed on")
    out += [_claim(rows, fused, "fusion", *pair, m, None) for m in BETTER]
    return [claim for claim in out if claim]


def _claim(
    rows: Sequence[Row], text: str, group: str, better: str, worse: str, measure: str, ratio: float | None
) -> dict[str, Any]:
    a, b = (values(rows, group, name, measure, ratio) for name in (better, worse))
    gains = [BETTER[measure] * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
    if not gains:
        return {}
    return {
        "claim": text,
        "ratio": ratio,
        "measure": measure,
        "gain": statistics.fmean(gains),
        "low": min(gains),
        "high": max(gains),
        "holds": f"{sum(gain >= 0 for gain in gains)}/{len(gains)}",
    }


def tables(rows: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the measurements, mean ± standard deviation over seeds, and the claims."""
    parent = next(row for row in rows if row["group"] == "parent")
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    out = [
        f"Parent: loss {parent['loss']:.3f} nats a token, {parent['accuracy']:.1%} of the problems, "
        f"{parent['params']:,.0f} block parameters. {len(seeds)} seeds; mean ± standard deviation over them."
    ]
    ratios = sorted({row["ratio"] for row in rows if row["group"] == "search"}, reverse=True)
    if ratios:
        titles = [f"{ratio:.0%}: KL | problems" for ratio in ratios]
        out += [
            "",
            "Children before distillation, by budget:",
            "",
            *head("way", *" | ".join(titles).split(" | ")),
        ]
        out += [_line(rows, "search", name, ratios) for name in _names(rows, "search")]
    for group, title in (
        ("healed", "Children of one budget after the same short distillation:"),
        ("importance", "Importance methods at one width, untrained:"),
        ("fusion", "Feed-forwards fused:"),
    ):
        if names := _names(rows, group):
            [ratio] = {row.get("ratio") for row in rows if row["group"] == group}
            out += ["", title, "", *head("way", "KL", "problems")]
            out += [_line(rows, group, name, [ratio]) for name in names]
    out += ["", "Claims (gain: how much better, mean [least, most] over seeds):", ""]
    out += head("claim", "budget", "measure", "gain", "seeds")
    for c in found:
        budget = f"{c['ratio']:.0%}" if c["ratio"] is not None else ""
        gain = f"{c['gain']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}]"
        out.append(f"| {c['claim']} | {budget} | {c['measure']} | {gain} | {c['holds']} |")
    return "\n".join(out) + "\n"


def _names(rows: Sequence[Row], group: str) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows if row["group"] == group))


def head(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]


def _line(rows: Sequence[Row], group: str, name: str, ratios: Sequence[float | None]) -> str:
    cells = [name]
    for ratio in ratios:
        kl, accuracy = (values(rows, group, name, m, ratio).values() for m in ("kl", "accuracy"))
        cells += [spread(list(kl), "{:.3f}"), spread([100 * a for a in accuracy], "{:.1f}") + "%"]
    return "| " + " | ".join(cells) + " |"


def spread(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "–"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{form.format(statistics.fmean(numbers))} ± {form.format(deviation)}"
