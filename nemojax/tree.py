"""Nested dicts of arrays: paths, and a comparison that names every difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def paths(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a/b": leaf} for a nested dict, in sorted key order."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            flat |= paths(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def from_paths(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a {"a/b": leaf} mapping."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def check_same(expected: Mapping[str, Any], got: Mapping[str, Any], where: str) -> None:
    """Raises ValueError naming up to five leaves that are missing, unexpected or of another shape.

    Leaves are anything with a `shape`; dtypes may differ.
    """
    want, have = paths(expected), paths(got)
    problems = [f"{p}: expected shape {tuple(want[p].shape)}, got none" for p in want if p not in have]
    problems += [f"{p}: not expected, shape {tuple(have[p].shape)}" for p in have if p not in want]
    problems += [
        f"{p}: expected shape {tuple(want[p].shape)}, got {tuple(have[p].shape)}"
        for p in want
        if p in have and tuple(want[p].shape) != tuple(have[p].shape)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where}: " + "; ".join(problems[:5]) + more)
