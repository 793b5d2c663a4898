"""The `compare` stage: what several stages came to, side by side, mean and spread over seeds.

It trains and measures nothing: each way is a list of work directories that are done, one a seed, and each
number a dotted name in their `result.json`. A claim compares two ways by one number, seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemojax.config import field, required
from nemojax.stage import RESULT, read_done, read_result, run_stage, write_text
from nemojax.study.claims import head, spread


@dataclass(frozen=True)
class Claim:
    better: str = required("way that should be better")
    worse: str = required("way that it is compared with")
    number: str = required("by which number")
    higher: bool = field(False, "whether more is better")


@dataclass(frozen=True)
class Config:
    ways: dict[str, tuple[str, ...]] = field({}, "work directories of each way, one a seed, in one order")
    numbers: dict[str, str] = field({}, "dotted names in result.json, by the title of their column")
    claims: tuple[Claim, ...] = field((), "which way should be better")

    def __post_init__(self):
        if not self.ways or not self.numbers:
            raise ValueError(
                "ways, numbers: expected at least one of each; name work directories and columns"
            )
        for claim in self.claims:
            if unknown := {claim.better, claim.worse} - set(self.ways):
                raise ValueError(f"claims: expected ways among {', '.join(self.ways)}, got {min(unknown)!r}")
            if claim.number not in self.numbers:
                titles = ", ".join(self.numbers)
                raise ValueError(f"claims: expected a number among {titles}, got {claim.number!r}")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Returns {"ways": {way: {title: [a value a seed]}}, "claims": [...]}; `table.md` shows them."""
    inputs = [path for paths in cfg.ways.values() for path in paths]
    return run_stage("compare", cfg, workdir, inputs, lambda path: _compare(cfg, path))


def _compare(cfg: Config, workdir: Path) -> dict[str, Any]:
    ways = {
        way: {title: [number_at(path, name) for path in paths] for title, name in cfg.numbers.items()}
        for way, paths in cfg.ways.items()
    }
    result = {"ways": ways, "claims": [_claim(ways, claim) for claim in cfg.claims]}
    write_text(workdir / "table.md", table(result))
    return result


def number_at(workdir: str | Path, name: str) -> float:
    """The number under a dotted name of a finished stage; ValueError if it is not done or has none."""
    if not read_done(workdir):
        raise ValueError(f"{workdir}: expected a stage that is done, got one that is not; run it first")
    value: Any = read_result(workdir)
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{workdir}: {RESULT}: expected a number at {name!r}, got {value!r}")
    return float(value)


def _claim(ways: Mapping[str, Mapping[str, Sequence[float]]], claim: Claim) -> dict[str, Any]:
    a, b = ways[claim.better][claim.number], ways[claim.worse][claim.number]
    if len(a) != len(b):
        raise ValueError(
            f"claims: expected as many seeds of {claim.better} as of {claim.worse}, got {len(a)} and {len(b)}"
        )
    gains = [(x - y) if claim.higher else (y - x) for x, y in zip(a, b, strict=True)]
    return {
        "claim": f"{claim.better} beats {claim.worse}",
        "number": claim.number,
        "gain": statistics.fmean(gains),
        "low": min(gains),
        "high": max(gains),
        "holds": f"{sum(gain >= 0 for gain in gains)}/{len(gains)}",
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown of what `run` returns: mean ± standard deviation over seeds, and the claims."""
    ways, claims = result["ways"], result["claims"]
    titles = list(next(iter(ways.values())))
    out = head("way", *titles)
    for way, numbers in ways.items():
        cells = [spread(numbers[title], "{:.3f}") for title in titles]
        out.append(f"| {way} | {' | '.join(cells)} |")
    if claims:
        out += ["", "How much better, mean [least, most] over seeds:", ""]
        out += head("claim", "number", "gain", "seeds")
        for c in claims:
            gain = f"{c['gain']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
            out.append(f"| {c['claim']} | {c['number']} | {gain} | {c['holds']} |")
    return "\n".join(out) + "\n"
