"""Several processes that answer together: each has all the weights on its own devices, and a share of what is
asked. What they find is put together in all of them. One process does as if this were not here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple
from typing import Any

import jax

from nemojax.arch import ArchSpec
from nemojax.generate.completions import Completion, generate
from nemojax.generate.programs import cast
from nemojax.generate.sampling import SamplingConfig
from nemojax.hosts import of_all
from nemojax.model.llama import Compute, Params, param_shardings, quantize, quantized_shardings
from nemojax.sharding import MeshConfig, make_mesh


def weights_here(
    params: Params, arch: ArchSpec, mesh: jax.sharding.Mesh | None, compute: Compute
) -> tuple[Params, jax.sharding.Mesh | None]:
    """(parameters as a whole on the devices of this process, the mesh over these).

    The tensor axis stays as it is, as far as a process has its devices, and fsdp takes what is left there.
    Each must have room for all weights as they are used: in the dtype of `compute`, block matrices in e4m3
    where it says fp8.
    """
    if mesh is None or not mesh.is_multi_process:
        return params, mesh
    tensor = math.gcd(mesh.shape["tensor"], jax.local_device_count())
    wide = make_mesh(MeshConfig(data=jax.process_count(), tensor=tensor))
    here = make_mesh(MeshConfig(tensor=tensor), jax.local_devices())
    copied = copied_to(params, arch, wide, compute)

    def of_this_process(weight: jax.Array, place: jax.sharding.NamedSharding) -> jax.Array:
        parts = [shard.data for shard in weight.addressable_shards]
        return jax.make_array_from_single_device_arrays(weight.shape, place, parts)

    return jax.tree.map(of_this_process, copied, _places(arch, here, compute)), here


def copied_to(params: Params, arch: ArchSpec, mesh: jax.sharding.Mesh, compute: Compute) -> Params:
    """Parameters as they are used, over `mesh`."""
    weights, tree = jax.tree.flatten(params)
    return _copy(arch, mesh, compute, tree, tuple(w.sharding for w in weights))(params)


@functools.lru_cache(maxsize=8)
def _copy(
    arch: ArchSpec, mesh: jax.sharding.Mesh, compute: Compute, tree: Any, places: tuple[Any, ...]
) -> Callable[[Params], Params]:
    """The program that copies weights which lie in these places: one for all rollouts of a run."""
    fp8, trained = compute.matmul == "fp8", jax.tree.unflatten(tree, places)
    before = quantized_shardings(trained) if fp8 else trained

    def as_used(tree: Params) -> Params:
        # narrow where they are, and then sent
        return jax.lax.with_sharding_constraint(cast(quantize(tree) if fp8 else tree, compute), before)

    return jax.jit(as_used, out_shardings=_places(arch, mesh, compute))


def _places(arch: ArchSpec, mesh: jax.sharding.Mesh, compute: Compute) -> Params:
    places = param_shardings(arch, mesh)
    return quantized_shardings(places) if compute.matmul == "fp8" else places


def generate_together(
    params: Params,
    arch: ArchSpec,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: SamplingConfig,
    eos_ids: Collection[int],
    *,
    group: int = 1,
    max_batch: int = 64,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
) -> list[Completion]:
    """`generate`, by all processes: a completion for each of the prompts, which all of them know. `group`
    prompts that follow each other go to one of them."""
    weights, here = weights_here(params, arch, mesh, compute)

    def answer(mine: Sequence[int]) -> list[tuple]:
        found = generate(
            weights, arch, prompts, key, sampling, eos_ids,
            max_batch=max_batch, compute=compute, mesh=here, only=mine,
        )  # fmt: skip
        return [astuple(completion) for completion in found]

    return [Completion(*found) for found in answered(len(prompts), group, answer)]


def share(number: int) -> int:
    """How many of so many requests a process answers at most."""
    return -(-number // jax.process_count())


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
