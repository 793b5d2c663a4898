"""What the text of a compiled program tells: its collectives by mesh axis, the kernels that it calls, and
the time that its compiler expects.

A collective inside a loop counts as often as the loop turns; a compiler that cuts one into a chain of
asynchronous parts leaves it one channel, which counts once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4}  # of dtypes whose name does not end in their number of bits

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_END = re.compile(r"^\}(, execution_thread=.*)?$")  # an attribute of several lines also ends in a brace
_SCATTERS = "all-reduce-scatter"  # so libtpu calls a fusion of an all-reduce with a device's slice of it
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{(\{[^=]*?\})\}")
_MESH = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[^=]*?\})\}")


@dataclass(frozen=True)
class Collective:
    """Equal ones together. `axes`: of the mesh, () where the program does not say; `count`: how often
    in a run of the program; `bytes`: what one device sends in all of them, by the usual ring."""

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of an optimised program over a mesh {axis: size}, by kind and axes, largest first."""
    computations = _computations(text)
    times = _times(computations)
    seen: dict[tuple, float] = defaultdict(float)
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            if times[name] and (found := _COLLECTIVE.search(line)):
                channel = re.search(r"channel_id=(\d+)", line)
                key = (int(channel[1]),) if channel else (name, number)
                groups, kind = _groups(line), found[2]
                moved = _moved(kind, found[1], bool(found[3]), groups)
                if kind == "all-reduce" and name.startswith(_SCATTERS):
                    kind, moved = "reduce-scatter", moved / 2
                what = (*key, kind, _axes(groups, mesh), moved)
                seen[what] = max(seen[what], times[name])
    total: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (*_, kind, axes, moved), count in seen.items():
        total[kind, axes][0] += count
        total[kind, axes][1] += count * moved
    return sorted(
        (Collective(kind, axes, *sums) for (kind, axes), sums in total.items()), key=lambda c: -c.bytes
    )


def kernels(text: str) -> dict[str, int]:
    """{target: how many places} of the program's calls of libraries and of kernels written by hand."""
    names = re.findall(r'custom_call_target="([^"]+)"', text)
    return {name: names.count(name) for name in sorted(set(names))}


def estimated_cycles(text: str) -> tuple[float, tuple[tuple[int, float], ...]]:
    """What a TPU's compiler expects a program to take in cycles, and of its loops (turns, cycles of a turn),
    the longest in all first.

    Kernels written by hand have no estimate, and copies that run beside the rest none of their own.
    """
    computations = _computations(text)
    times = _times(computations)
    own = {
        name: sum(float(n) for line in lines for n in _CYCLES.findall(line))
        for name, lines in computations.items()
    }
    total = math.fsum(times[name] * cycles for name, cycles in own.items())
    turns = defaultdict(int)
    for name, cycles in own.items():
        if times[name] > 1 and cycles:
            turns[int(times[name]), cycles] += 1
    loops = [(number * count, cycles) for (number, cycles), count in turns.items()]
    return total, tuple(sorted(loops, key=lambda loop: -loop[0] * loop[1]))


def _computations(text: str) -> dict[str, list[str]]:
    """{computation: its instructions}; the entry is called "ENTRY"."""
    found: dict[str, list[str]] = {}
    inside: list[str] | None = None
    for line in text.splitlines():
        if inside is None:
            if head := _COMPUTATION.match(line):
                inside = found.setdefault("ENTRY" if line.startswith("ENTRY") else head[1], [])
        elif _END.match(line):
            inside = None
        else:
            inside.append(line)
    return found


def _times(computations: Mapping[str, list[str]]) -> dict[str, float]:
    """How often each computation runs in a run of the program. A loop without a known end counts once."""
    calls: dict[str, list[tuple[str, float]]] = {name: [] for name in computations}
    for name, lines in computations.items():
        for line in lines:
            trips = 1.0
            if loop := _WHILE.search(line):
                trips = _trip_count(line, computations.get(loop[1], []))
            for called in _called(line):
                if called in computations:
                    calls[name].append((called, trips))
    times = dict.fromkeys(computations, 0.0)
    order: list[str] = []
    _visit("ENTRY", calls, set(), order)
    times["ENTRY"] = 1.0
    for name in reversed(order):
        for called, trips in calls[name]:
            times[called] += times[name] * trips
    return times


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _visit(name: str, calls: Mapping[str, list], seen: set[str], order: list[str]) -> None:
    """Callees before callers."""
    seen.add(name)
    for called, _ in calls.get(name, []):
        if called not in seen:
            _visit(called, calls, seen, order)
    order.append(name)


def _trip_count(line: str, condition: list[str]) -> float:
    if known := _TRIPS.search(line):
        return float(known[1])
    limits = [int(n) for text in condition for n in _CONSTANT.findall(text)]
    return float(max(limits, default=1))


def _groups(line: str) -> np.ndarray:
    """Devices that take part together, [groups, size]; of a permutation, its pairs."""
    if iota := _IOTA.search(line):
        shape, over, turned = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        ids = np.arange(math.prod(over)).reshape(over)
        return (ids.transpose(turned) if turned else ids).reshape(-1, shape[-1])
    if named := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[4])
        ids = np.arange(math.prod(sizes.values()))
        if named[2]:
            over, turned = ([int(n) for n in part.split(",")] for part in named.group(2, 3))
            ids = ids.reshape(over).transpose(turned)
        ids = ids.reshape(tuple(sizes.values()))
        rest = [i for i, name in enumerate(sizes) if name not in chosen]
        last = [i for i, name in enumerate(sizes) if name in chosen]
        return ids.transpose(rest + last).reshape(-1, math.prod(sizes[n] for n in chosen))
    listed = _LISTS.search(line) or _PAIRS.search(line)
    if listed is None:
        return np.zeros((0, 1), int)
    rows = [[int(n) for n in row.split(",") if n] for row in re.findall(r"\{([\d,]*)\}", listed[1])]
    return np.array(rows) if len({len(row) for row in rows}) == 1 else np.zeros((0, 1), int)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The fewest axes of the mesh along which the groups lie; () for groups that are not known."""
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    wanted = [set(group) for group in groups.tolist()]
    for count in range(1, len(names) + 1):
        for some in itertools.combinations(names, count):
            last = [i for i, name in enumerate(mesh) if name in some]
            rest = [i for i in range(len(mesh)) if i not in last]
            size = math.prod(mesh[name] for name in some)
            group_of = np.empty(ids.size, int)
            for number, group in enumerate(ids.transpose(rest + last).reshape(-1, size)):
                group_of[group] = number
            if wanted and all(len(set(group_of[list(group)])) == 1 for group in wanted):
                return some
    return ()


def _moved(kind: str, result: str, start: bool, groups: np.ndarray) -> float:
    """Bytes that one device sends."""
    ways = max(groups.shape[1], 1) if groups.size else 2
    size = sum(_size(dtype, dims) for dtype, dims in _ARRAY.findall(result))
    # what starts one gives (operands, results, contexts of a few bytes)
    if start and kind == "all-gather":
        size *= ways / (ways + 1)
    elif start and kind == "reduce-scatter":
        size /= ways + 1
    elif start and kind == "collective-permute":
        size /= 2
    match kind:
        case "all-gather" | "all-to-all":
            return size * (ways - 1) / ways
        case "reduce-scatter":
            return size * (ways - 1)
        case "all-reduce":
            return 2 * size * (ways - 1) / ways
    return size


def _size(dtype: str, dims: str) -> float:
    """Bytes of an array such as bf16[4,256]."""
    bits = BITS.get(dtype) or (8 if dtype.startswith("f8") else int(re.findall(r"\d+", dtype)[0]))
    return math.prod(int(n) for n in dims.split(",") if n) * bits / 8
