"""Mesh axes, the rules that map logical axes onto them, and shardings for whole trees.

Axes: `slice` and `data` replicate parameters, `fsdp` shards them (all three split the batch), `context`
splits the positions of a row, `tensor` splits heads, feed-forward channels and the vocabulary, and between
sub-blocks the positions too (sequence parallelism, arXiv:2205.05198): what is kept for the backward pass is
whole nowhere, and an all-reduce becomes a scatter and a gather of the same bytes. "pjit sharding" is
`jax.jit(in_shardings=, out_shardings=)` under `jax.set_mesh` with Auto axes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from nemojax.config import field

AXES = ("slice", "data", "fsdp", "context", "tensor")  # from the farthest devices to the nearest
BATCH_AXES = ("slice", "data", "fsdp")
Rows = Literal["whole", "shared", "none"]
HOST_MEMORY = "pinned_host"  # of a device's host, from where it is copied without the host's help

# logical axis -> mesh axis; an axis that is absent here is never split
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "length": "context",
    "stream": ("context", "tensor"),  # positions of the residual stream between sub-blocks
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# fewer KV heads than the tensor axis has devices: every device keeps all of them
REPLICATED_WHEN_UNEVEN = frozenset({"kv_heads"})


@dataclass(frozen=True)
class MeshConfig:
    data: int = field(1, "devices along the data axis (parameters replicated)")
    fsdp: int = field(-1, "devices along the fsdp axis (parameters sharded); -1 takes what is left")
    context: int = field(1, "devices along the context axis (positions of a row split)")
    tensor: int = field(1, "devices along the tensor axis (heads, channels and vocabulary split)")
    slice: int = field(
        1,
        "groups of near devices, each with all parameters; 1: an fsdp axis shards over TPU slices and nodes",
    )


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None, *, rows: Rows = "whole"
) -> Mesh:
    """The mesh over `devices` (default: all), those of a TPU slice, and in it of a process, side by side.

    So the inner axes stay where communication is fast, and an axis that goes beyond a slice crosses to the
    others as few times as it can. rows: whether a process reads whole ones alone, or several may read the
    same ones (`shared`, see `readers`); `none` are read where a program is only compiled.
    ValueError when the axes do not multiply to the number of devices, or go across what they must not.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_neighbourhood)
    sizes = {name: getattr(config, name) for name in AXES}
    if (free := [name for name in AXES if sizes[name] == -1])[1:]:
        raise ValueError(f"mesh: expected at most one axis of -1, got {_shown(sizes)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and known and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        odd = [name for name, size in sizes.items() if size != -1 and (size < 1 or len(devices) % size)]
        nearest = nearest_mesh(config, {}, len(devices))
        raise ValueError(
            f"mesh: expected axes that multiply to {len(devices)} devices, got {_shown(sizes)}"
            + (f", of which {' and '.join(odd)} cannot divide them" if odd else "")
            + f"; the nearest mesh that does is {_shown(vars(nearest))}"
        )
    grid = np.asarray(devices).reshape([*sizes.values()])
    _check_slices(sizes["slice"], devices)
    _check_rows(grid, sizes, rows)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_rows(grid: np.ndarray, sizes: Mapping[str, int], rows: Rows) -> None:
    """ValueError where the devices that share rows are not of as many processes as may read them."""
    groups = [{d.process_index for d in g} for g in grid.reshape(-1, sizes["context"] * sizes["tensor"])]
    if rows == "none" or all(len(group) == 1 for group in groups):
        return
    here = f"tensor={sizes['tensor']}, context={sizes['context']}"
    if rows == "whole":
        raise ValueError(
            f"mesh: expected a context x tensor axis within the devices of one process, got {here} over "
            f"{jax.process_count()} processes of {jax.local_device_count()}; choose smaller ones"
        )
    if sum(map(len, groups)) != len(set().union(*groups)):
        raise ValueError(
            f"mesh: expected a context x tensor axis that is a part or a multiple of the "
            f"{jax.local_device_count()} devices of a process, got {here}; choose another"
        )


def readers(mesh: Mesh | None) -> tuple[int, int]:
    """(which share of the rows this process reads, how many shares there are).

    Processes whose devices share rows, by a context x tensor axis that goes beyond them, read the same ones.
    """
    shared = mesh.shape["context"] * mesh.shape["tensor"] if mesh is not None else 1
    together = max(1, shared // jax.local_device_count())
    return jax.process_index() // together, jax.process_count() // together


def _neighbourhood(device: Any) -> tuple[int, int]:
    return getattr(device, "slice_index", None) or 0, device.process_index


def _check_slices(count: int, devices: Sequence[Any]) -> None:
    """ValueError for a slice axis whose groups lie across the slices that the devices (in order) come in."""
    there = len({_neighbourhood(device)[0] for device in devices})
    if count > 1 and count % there and there % count:
        raise ValueError(
            f"mesh: expected a slice axis that fits the {there} slices of the devices, got slice={count}; "
            f"choose {there}, or 1 to shard parameters over all of them"
        )


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={sizes[name]}" for name in AXES if name != "slice" or sizes[name] != 1)


def nearest_mesh(config: MeshConfig, sizes: Mapping[str, Iterable[int]], devices: int) -> MeshConfig:
    """The mesh of `devices` devices nearest to `config` over which dimensions of these sizes can be split.

    sizes: of every logical axis (see RULES), as `logical_sizes` gives them; KV heads count for nothing. The
    tensor axis stays as near as can be to what was asked, by ratio, then the context and the slice axis,
    then data; fsdp takes what they leave, as far as it divides the embedding width, and data the rest.
    """
    divisors = {axis: _common_divisor(axis, sizes) for axis in AXES}

    def meshes(axes: Sequence[str], left: int) -> Iterator[dict[str, int]]:
        if not axes:
            yield from [{}] if left == 1 else []
            return
        for size in range(1, left + 1):
            if left % size == 0 and divisors[axes[0]] % size == 0:
                yield from ({axes[0]: size, **rest} for rest in meshes(axes[1:], left // size))

    def distance(mesh: Mapping[str, int]) -> list[float]:
        order = ("tensor", "context", "slice", "data", "fsdp")
        asked = [getattr(config, axis) for axis in order]
        return [
            abs(math.log(mesh[axis] / wanted)) if wanted > 0 else 0.0
            for axis, wanted in zip(order, asked, strict=True)
        ]

    return MeshConfig(**min(meshes(AXES, devices), key=distance))


def _common_divisor(axis: str, sizes: Mapping[str, Iterable[int]]) -> int:
    """What a mesh axis must divide; 0, which everything does, where it splits none of the dimensions."""
    split = [name for name in sizes if name not in REPLICATED_WHEN_UNEVEN and axis in _names(RULES.get(name))]
    return math.gcd(*(size for name in split for size in sizes[name]))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh on which parameters lie; None for one device, or none yet."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def whole_rows(config: MeshConfig, stage: str) -> MeshConfig:
    """The mesh of a stage that reads arrays back column by column; ValueError for one that splits rows."""
    if config.context != 1:
        raise ValueError(
            f"mesh: expected context=1 for {stage}, whose rows stay whole, got {config.context}; give the "
            "devices to fsdp or tensor"
        )
    return config


def partition_spec(
    logical: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    where: str,
    sizes: Mapping[str, Iterable[int]] | None = None,
) -> PartitionSpec:
    """Mesh axes for one array. ValueError when a split dimension does not divide, with the nearest mesh that
    divides it and all of `sizes` (see `nearest_mesh`)."""
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical, shape, strict=True):
        target = RULES.get(name) if name else None
        ways = _ways(target, mesh)
        if ways == 1:
            entries.append(None)
        elif size % ways == 0:
            entries.append(target)
        elif name in REPLICATED_WHEN_UNEVEN:
            entries.append(None)
        else:
            asked = MeshConfig(**{axis: mesh.shape[axis] for axis in AXES})
            all_sizes = sizes or {n: [s] for n, s in zip(logical, shape, strict=True) if n}
            raise ValueError(
                f"{where}: {name} = {size} does not divide over {target} = {ways}; the nearest mesh that "
                f"works is {_shown(vars(nearest_mesh(asked, all_sizes, mesh.size)))}"
            )
    return PartitionSpec(*entries)


def shardings_of(logical: Mapping[str, Any], abstract: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """NamedShardings for a tree of arrays from the equally shaped tree of logical axes."""
    sizes = logical_sizes(logical, abstract)

    def one(path: Any, axes: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, where, sizes))

    return jax.tree_util.tree_map_with_path(one, logical, abstract, is_leaf=lambda x: isinstance(x, tuple))


def logical_sizes(logical: Mapping[str, Any], abstract: Mapping[str, Any]) -> dict[str, set[int]]:
    """{logical axis: the sizes that it has anywhere in a tree of arrays}."""
    sizes: dict[str, set[int]] = {}

    def add(axes: tuple[str | None, ...], leaf: Any) -> None:
        for name, size in zip(axes, leaf.shape, strict=True):
            if name:
                sizes.setdefault(name, set()).add(size)

    jax.tree.map(add, logical, abstract, is_leaf=lambda x: isinstance(x, tuple))
    return sizes


def shardings_like(tree: Any, params: Any, *, over_data: bool = False, on_host: bool = False) -> Any:
    """A sharding for every leaf of a tree that repeats parameters, such as an optimiser state.

    A leaf goes where the parameter does whose path ends its own and whose shape it has, any other leaf to
    all devices. None where the parameters are on no mesh, and `on_host` is not asked for. over_data: such a
    leaf is split over the data axis besides (ZeRO-1, arXiv:1910.02054, section 5.1). Then hold the gradients
    to the shardings of their parameters, or the partitioner takes that split back into the activations.
    on_host: such a leaf lies in the memory of its devices' host.
    """
    placed = {
        path: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(leaf.sharding, NamedSharding) or on_host
    }
    if not placed:
        return None
    other = next(iter(placed.values())).sharding
    if isinstance(other, NamedSharding):
        other = NamedSharding(other.mesh, PartitionSpec())

    def one(path: tuple, leaf: Any) -> Sharding:
        ends = (placed.get(path[i:]) for i in range(len(path)))
        found = next((p.sharding for p in ends if p is not None and p.shape == leaf.shape), None)
        if found is None:
            return other
        if over_data and isinstance(found, NamedSharding):
            found = _over_data(found, leaf.shape)
        return found.with_memory_kind(HOST_MEMORY) if on_host else found

    return jax.tree_util.tree_map_with_path(one, tree)


def on_devices(shardings: Any) -> Any:
    """The same places in the devices' own memory, of arrays that lie on hosts."""
    return jax.tree.map(
        lambda s: s.with_memory_kind("device") if s.memory_kind == HOST_MEMORY else s, shardings
    )


def _over_data(place: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Also over the data axis, along a dimension that divides: best where fsdp splits it, so that gradients
    are scattered over both at once; never over the layers of a stack, which are walked one by one."""
    mesh, ways = place.mesh, place.mesh.shape.get("data", 1)
    entries = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    parts = [size // _ways(entry, mesh) for size, entry in zip(shape, entries, strict=True)]
    stacked = len(parts) > 1 and entries[0] is None
    dims = [d for d in range(int(stacked), len(parts)) if parts[d] % ways == 0]
    if ways == 1 or not dims:
        return place
    best = max(dims, key=lambda d: ("fsdp" in _names(entries[d]), parts[d]))
    entries[best] = (*_names(entries[best]), "data")
    return NamedSharding(mesh, PartitionSpec(*entries))


def ways_of(logical: str) -> int:
    """Over how many devices of the mesh in scope a logical axis is split; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(RULES.get(logical), mesh)


def platform() -> str:
    """Of the machine that a program is for ("cpu", "gpu", "tpu"): the mesh in scope's, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def spec_of(shape: Sequence[int], *logical: str | None) -> PartitionSpec:
    """Mesh axes of an activation under the mesh in scope; a dimension that does not divide is not split, or
    over as many of its axes, from the first, as it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    entries = []
    for name, size in zip(logical, shape, strict=True):
        axes = _names(RULES.get(name)) if name else ()
        while size % _ways(axes, mesh):
            axes = axes[:-1]
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """A sharding constraint on an activation under the mesh in scope; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, *logical))


@jax.custom_vjp
def gradient_split(x_BTD: jax.Array) -> jax.Array:
    """The same activations, whose gradient lies as the stream does between sub-blocks: a product that sums it
    over devices then leaves each its part, where it would give all of it to each."""
    return x_BTD


gradient_split.defvjp(lambda x: (x, None), lambda _, g: (constrain(g, "batch", "stream", None),))


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, *, shared: bool = False
) -> dict[str, jax.Array]:
    """This process's share of the rows onto devices: rows split over data and fsdp, positions over context.

    Over several devices of a context axis the columns of every array are put in `column_order`, and
    `positions` are added where there are none: with them and the segments, attention knows its way.
    shared: every process holds all the rows, any number of them, and gives its devices theirs.
    ValueError for rows or positions that do not divide.
    """
    if mesh is None or mesh.size == 1:
        return {k: jax.numpy.asarray(v) for k, v in batch.items()}
    rows, ways = len(next(iter(batch.values()))), _ways(BATCH_AXES, mesh)
    over: tuple[str, ...] | None = BATCH_AXES
    number = rows if shared else rows * readers(mesh)[1]
    if shared and rows % ways:
        over = None
    elif number % ways:
        raise ValueError(f"batch: expected rows that divide over data x fsdp = {ways} devices, got {rows}")
    length, batch = _in_column_order(batch, mesh)
    placed = {}
    for name, value in batch.items():
        along = (RULES["length"],) if value.ndim > 1 and value.shape[1] == length else ()
        place = NamedSharding(mesh, PartitionSpec(over, *along))
        shape = (number, *value.shape[1:])
        parts = place.addressable_devices_indices_map(shape).values()
        first = 0 if shared else min(part[0].indices(number)[0] for part in parts if part is not None)
        read = functools.partial(_rows_of, value, first, number)
        placed[name] = jax.make_array_from_callback(shape, place, read)
    return placed


def _rows_of(value: np.ndarray, first: int, number: int, part: tuple[slice, ...] | None) -> np.ndarray:
    """A part of `number` rows, of which this process has those from `first` on."""
    assert part is not None  # which JAX's type allows for, of places without devices here
    start, stop, _ = part[0].indices(number)
    return value[(slice(start - first, stop - first), *part[1:])]


def column_order(length: int, ways: int) -> np.ndarray:
    """Which column of a row stands where when `ways` devices share it, [length].

    Device i of n has chunks i and 2n - 1 - i of 2n, equal work for each in causal attention (Llama 3,
    arXiv:2407.21783, section 3.3.2). ValueError for a length that does not divide into them.
    """
    if ways > 1 and length % (2 * ways):
        raise ValueError(
            f"batch: expected rows of a length that divides into {2 * ways} chunks, two for each of the "
            f"{ways} devices of the context axis, got {length}; choose another length or mesh"
        )
    if ways == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


def _in_column_order(
    batch: Mapping[str, np.ndarray], mesh: Mesh
) -> tuple[int | None, Mapping[str, np.ndarray]]:
    """(length of the rows if a context axis splits them, the batch with its columns in order)."""
    ways = _ways(RULES["length"], mesh)
    known = next((batch[name] for name in ("positions", "tokens") if name in batch), None)
    if ways == 1 or known is None:
        return None, batch
    rows, length = known.shape
    order = column_order(length, ways)
    if "positions" not in batch:
        batch = {**batch, "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1))}
    return length, {
        name: value[:, order] if value.ndim > 1 and value.shape[1] == length else value
        for name, value in batch.items()
    }


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """`jax.set_mesh` when there is a mesh of several devices."""
    if mesh is None or mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def _ways(target: str | tuple[str, ...] | None, mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(target))


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()
