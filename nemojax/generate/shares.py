"""Several processes that answer together: each has all the weights on its own devices, and a share of what is
asked. What they find is put together in all of them. One process does as if this were not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from nemojax.arch import ArchSpec
from nemojax.hosts import of_all
from nemojax.model.llama import Compute, Params, param_shardings
from nemojax.sharding import MeshConfig, make_mesh, use_mesh


def weights_here(
    params: Params, arch: ArchSpec, mesh: jax.sharding.Mesh | None, compute: Compute
) -> tuple[Params, jax.sharding.Mesh | None]:
    """(parameters as a whole on the devices of this process, the mesh over these).

    The tensor axis stays as it is, and fsdp takes what is left within each process, which must have room
    for all weights in the dtype of `compute` (in FP8, before they are rounded: as they are trained).
    """
    if mesh is None or jax.process_count() == 1:
        return params, mesh
    tensor = mesh.shape["tensor"]
    wide = make_mesh(MeshConfig(data=jax.process_count(), tensor=tensor))
    here = make_mesh(MeshConfig(tensor=tensor), jax.local_devices())

    def as_used(tree: Params) -> Params:
        return tree if compute.matmul == "fp8" else jax.tree.map(lambda w: w.astype(compute.dtype), tree)

    with use_mesh(wide):
        copied = jax.jit(as_used, out_shardings=param_shardings(arch, wide))(params)

    def of_this_process(weight: jax.Array, place: jax.sharding.NamedSharding) -> jax.Array:
        parts = [shard.data for shard in weight.addressable_shards]
        return jax.make_array_from_single_device_arrays(weight.shape, place, parts)

    return jax.tree.map(of_this_process, copied, param_shardings(arch, here)), here


def answered(number: int, group: int, answer: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
    """The answers to `number` requests in order, of which each process gives those of its own groups.

    answer: what stands for these requests, as JSON can say it where there are several processes; `group`
    requests that follow each other go to one of them.
    """
    count = jax.process_count()
    if count == 1:
        return list(answer(range(number)))
    shares = [[i for i in range(number) if i // group % count == process] for process in range(count)]
    out: list[Any] = [None] * number
    for share, found in zip(shares, of_all(list(answer(shares[jax.process_index()]))), strict=True):
        for i, value in zip(share, found, strict=True):
            out[i] = value
    return out
