"""Layers by pattern, and rules such as `4-27:kv4+*` that name choices of such layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

_RANGE = re.compile(r"(\d*)\s*(-?)\s*(\d*)")


def layers_in(pattern: str, num_layers: int) -> tuple[int, ...]:
    """Indices that a pattern names, ascending: `all`, `none`, or a list of `7`, `4-27`, `10-` and `-2`.

    Both ends of a range belong to it, an open end is the first or the last layer: `-2` is 0, 1 and 2.
    ValueError for anything else, and for a layer that there is not.
    """
    text = pattern.strip().lower()
    if text in ("all", "none"):
        return tuple(range(num_layers)) if text == "all" else ()
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match or not (match[1] or match[3]):
            raise ValueError(
                f"layers {pattern!r}: expected all, none, or a list such as 0,4-27,30-, got {part.strip()!r}"
            )
        first = int(match[1] or 0)
        last = first if not match[2] else int(match[3] or num_layers - 1)
        if first > last or last >= num_layers:
            raise ValueError(
                f"layers {pattern!r}: expected ascending layers of 0-{num_layers - 1}, got {part.strip()!r}"
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def split_rule(rule: str, num_layers: int) -> tuple[tuple[int, ...], str]:
    """(layers, glob) of `LAYERS:GLOB`."""
    layers, colon, glob = rule.partition(":")
    if not colon or not glob:
        raise ValueError(
            f"rule {rule!r}: expected LAYERS:GLOB such as 0-3:kv8+*, got no {'glob' * bool(colon) or 'colon'}"
        )
    return layers_in(layers, num_layers), glob.strip()


def excluded(rules: Sequence[str], names: Sequence[Sequence[str]]) -> list[set[int]]:
    """For each layer the indices of its choices that a rule matches.

    ValueError for a rule that matches nothing anywhere, which is a slip of the pen.
    """
    out: list[set[int]] = [set() for _ in names]
    for rule in rules:
        layers, glob = split_rule(rule, len(names))
        hits = 0
        for layer in layers:
            found = {j for j, name in enumerate(names[layer]) if fnmatchcase(name, glob)}
            out[layer] |= found
            hits += len(found)
        if not hits:
            some = ", ".join(list(names[layers[0]])[:4]) if layers else "none: no layer is named"
            raise ValueError(
                f"rule {rule!r}: expected a glob of choice names, got no match; names are {some}"
            )
    return out
