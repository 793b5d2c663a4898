"""The search's input: every layer's choices as rows of numbers, and what lies outside the layers.

On disk `{"layers": [[{"name": ..., "kl": ..., "memory_mib": ..., ...}, ...], ...], "fixed": {"memory_mib":
...}}`, of this project's or of anybody's library; neither a model nor jax is needed to read it.

A column of milliseconds may say under `tokens` how many tokens are processed in that time. Then a bound on
`chat_tokens_per_s` is understood as one on the total of `chat_ms`, which is linear (Puzzle, arXiv 2411.19146,
App. B: the sum of runtimes is at most batch * sequence / throughput).
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from nemojax.buckets import place
from nemojax.compress.pattern import excluded, split_rule

Choice = Mapping[str, Any]
Side = Literal["max", "min"]
TIME, RATE = "_ms", "_tokens_per_s"
TOLERANCE = 1e-12  # relative; sums of decimal fractions are not exact


@dataclass(frozen=True)
class Bound:
    """The total of `name`, non-block costs included, is at most (`max`) or at least (`min`) `value`."""

    name: str
    side: Side
    value: float

    def holds(self, total: float) -> bool:
        excess = total - self.value if self.side == "max" else self.value - total
        return excess <= TOLERANCE * max(abs(total), abs(self.value))


def bounds_of(
    maximum: Mapping[str, float] | None = None, minimum: Mapping[str, float] | None = None
) -> tuple[Bound, ...]:
    """Bounds from {column: value}. ValueError for a value that is not a finite number."""
    sides: tuple[tuple[Side, Mapping[str, float]], ...] = (("max", maximum or {}), ("min", minimum or {}))
    bounds = tuple(Bound(name, side, value) for side, given in sides for name, value in given.items())
    for bound in bounds:
        if not _is_number(bound.value):
            raise ValueError(f"budget: {bound.name} {bound.side}: expected a number, got {bound.value!r}")
    return bounds


@dataclass(frozen=True)
class Table:
    """`layers[i][j]`: {"name": text, any number of numeric columns}; `fixed`: costs outside the layers;
    `tokens`: {column of ms: tokens processed in its total}; `provenance`: {column: how it came about}."""

    layers: tuple[tuple[Choice, ...], ...]
    fixed: Mapping[str, float]
    tokens: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> list[np.ndarray]:
        """One column by layer. ValueError naming the cell that is missing or not a finite number."""
        return [np.array([self._cell(c, name, i) for c in options]) for i, options in enumerate(self.layers)]

    def names(self) -> list[list[str]]:
        """Names of the choices by layer."""
        return [[str(choice["name"]) for choice in options] for options in self.layers]

    def columns(self) -> list[str]:
        """Names of every column that some choice has, and of the rates that follow from them."""
        found = dict.fromkeys(n for options in self.layers for c in options for n in c if n != "name")
        return [*found, *(name.removesuffix(TIME) + RATE for name in self.tokens)]

    def outside(self, name: str) -> float:
        """What a column amounts to outside the layers."""
        value = self.fixed.get(name, 0.0)
        if not _is_number(value):
            raise ValueError(f"table: fixed, column {name!r}: expected a finite number, got {value!r}")
        return float(value)

    def time_of(self, name: str) -> tuple[str, float] | None:
        """(column of ms, tokens) of a rate such as `chat_tokens_per_s`, else None."""
        column = name.removesuffix(RATE) + TIME
        return (column, self.tokens[column]) if name.endswith(RATE) and column in self.tokens else None

    def linear(self, bound: Bound) -> Bound:
        """The same bound on a column that adds up: at least a rate is at most a time."""
        timed = self.time_of(bound.name)
        if timed is None:
            return bound
        column, tokens = timed
        if bound.value <= 0:
            raise ValueError(f"budget: {bound.name}: expected a positive rate, got {bound.value:g}")
        return Bound(column, "min" if bound.side == "max" else "max", 1000.0 * tokens / bound.value)

    def total(self, name: str, chosen: Sequence[int]) -> float:
        """A column's sum over the chosen blocks plus what is fixed; of a rate, tokens per second."""
        timed = self.time_of(name)
        if timed is not None:
            ms = self.total(timed[0], chosen)
            return 1000.0 * timed[1] / ms if ms > 0 else math.inf
        cells = (
            self._cell(row[j], name, i) for i, (row, j) in enumerate(zip(self.layers, chosen, strict=True))
        )
        return math.fsum([self.outside(name), *cells])

    def restrict(
        self, fix: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> tuple[Table, tuple[tuple[int, ...], ...]]:
        """The choices that rules `LAYERS:GLOB` leave, and their indices here.

        A layer that `fix` names keeps only choices that match (several rules: all of them); `exclude` takes
        choices away. ValueError for a layer with nothing left.
        """
        names = self.names()
        gone = excluded(exclude, names)
        for rule in fix:
            layers, glob = split_rule(rule, len(names))
            for layer in layers:
                gone[layer] |= {j for j, name in enumerate(names[layer]) if not fnmatchcase(name, glob)}
        kept = tuple(
            tuple(j for j in range(len(row)) if j not in out) for row, out in zip(names, gone, strict=True)
        )
        for layer, left in enumerate(kept):
            if not left:
                rules = ", ".join([*(f"fix {r}" for r in fix), *(f"exclude {r}" for r in exclude)])
                raise ValueError(
                    f"search: layer {layer}: expected at least one choice, got none of its "
                    f"{len(names[layer])} ({', '.join(names[layer][:4])}, ...) after {rules}; relax a rule"
                )
        layers = tuple(tuple(row[j] for j in left) for row, left in zip(self.layers, kept, strict=True))
        return Table(layers, self.fixed, self.tokens, self.provenance), kept

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "layers": [[dict(c) for c in options] for options in self.layers],
            "fixed": dict(self.fixed),
        }
        more = {"tokens": dict(self.tokens), "provenance": dict(self.provenance)}
        return out | {name: value for name, value in more.items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        """ValueError for anything that is not a table; a column's cells are read when they are asked for."""
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), list | tuple):
            raise ValueError('table: expected {"layers": [[{"name": ..., ...}, ...], ...]}, got no layers')
        if not data["layers"]:
            raise ValueError("table: expected at least one layer, got none")
        for i, options in enumerate(data["layers"]):
            if not isinstance(options, list | tuple):
                raise ValueError(f"table: layer {i}: expected a list of choices, got {_short(options)}")
            if not options:
                raise ValueError(f"table: layer {i}: expected at least one choice, got none")
            for j, choice in enumerate(options):
                if not isinstance(choice, Mapping) or not isinstance(choice.get("name"), str):
                    raise ValueError(
                        f'table: layer {i}, choice {j}: expected {{"name": text, ...}}, got {_short(choice)}'
                    )
        sections = {name: data.get(name) or {} for name in ("fixed", "tokens", "provenance")}
        for name, section in sections.items():
            if not isinstance(section, Mapping):
                raise ValueError(f"table: {name}: expected {{column: value}}, got {_short(section)}")
        for name, value in sections["tokens"].items():
            if not _is_number(value) or value <= 0 or not name.endswith(TIME):
                raise ValueError(
                    f"table: tokens: expected a positive number for a column named ...{TIME}, "
                    f"got {name!r}: {_short(value)}"
                )
        layers = tuple(tuple(options) for options in data["layers"])
        return cls(layers, *(dict(section) for section in sections.values()))

    def _cell(self, choice: Choice, name: str, layer: int) -> float:
        value: Any = choice.get(name)
        if _is_number(value):
            return float(value)
        known = self.columns()
        hint = ""
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; columns are {', '.join(known)}"
        raise ValueError(
            f"table: layer {layer}, choice {choice.get('name', '?')!r}, column {name!r}: "
            f"expected a finite number, got {'nothing' if name not in choice else _short(value)}{hint}"
        )


def load_table(path: str | os.PathLike) -> Table:
    """Reads a table from JSON. ValueError, with the file's name, for a file that is not one."""
    try:
        return Table.from_json(json.loads(place(path).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such table") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a table in JSON, got something else ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
