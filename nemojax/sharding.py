"""Mesh axes, the rules that map a weight's logical axes onto them, and shardings for whole trees.

Axes: `data` replicates parameters, `fsdp` shards them (both split the batch), `tensor` splits heads,
feed-forward channels and the vocabulary. "pjit sharding" is `jax.jit(in_shardings=, out_shardings=)`
under `jax.set_mesh` with Auto axes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemojax.config import field

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# logical axis -> mesh axis; an axis that is absent here is never split
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": BATCH_AXES,
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
    tensor: int = field(1, "devices along the tensor axis (heads, channels and vocabulary split)")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all). ValueError when the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh: expected at most one axis of -1, got {dict(zip(AXES, sizes, strict=True))}")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and known and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: expected axes that multiply to {len(devices)} devices, got "
            f"{', '.join(f'{n}={s}' for n, s in zip(AXES, sizes, strict=True))}"
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(
    logical: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, where: str
) -> PartitionSpec:
    """Mesh axes for one array. ValueError when a split dimension does not divide."""
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
            raise ValueError(
                f"{where}: {name} = {size} does not divide over {target} = {ways}; choose another mesh"
            )
    return PartitionSpec(*entries)


def shardings_of(logical: Mapping[str, Any], abstract: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """NamedShardings for a tree of arrays from the equally shaped tree of logical axes."""

    def one(path: Any, axes: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, where))

    return jax.tree_util.tree_map_with_path(one, logical, abstract, is_leaf=lambda x: isinstance(x, tuple))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """A sharding constraint on an activation under the mesh in scope; nothing without a mesh.

    A dimension that does not divide is left to the partitioner.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries = []
    for name, size in zip(logical, x.shape, strict=True):
        target = RULES.get(name) if name else None
        entries.append(target if target and size % _ways(target, mesh) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    """This process's rows onto the devices: the batch dimension split over data and fsdp."""
    if mesh is None or mesh.size == 1:
        return {k: jax.numpy.asarray(v) for k, v in batch.items()}
    placed = {}
    rows, ways = len(next(iter(batch.values()))), _ways(BATCH_AXES, mesh)
    if rows * jax.process_count() % ways:
        raise ValueError(f"batch: expected rows that divide over data x fsdp = {ways} devices, got {rows}")
    for name, value in batch.items():
        spec = PartitionSpec(BATCH_AXES, *(None,) * (value.ndim - 1))
        placed[name] = jax.make_array_from_process_local_data(NamedSharding(mesh, spec), value)
    return placed


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """`jax.set_mesh` when there is a mesh of several devices."""
    if mesh is None or mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def _ways(target: str | tuple[str, ...] | None, mesh: Any) -> int:
    names = (target,) if isinstance(target, str) else target or ()
    return math.prod(mesh.shape[n] for n in names)
