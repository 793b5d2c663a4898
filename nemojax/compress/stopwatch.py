"""Times of sub-blocks on the machine at hand: compiled, warmed, the median of several."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention
from nemojax.compress.cost import Prices, Step
from nemojax.compress.subblock import Part, Sub, part_spec, run_part
from nemojax.model.attention import make_context
from nemojax.model.block import apply_block, init_block
from nemojax.model.cache import Cache, View, Window, init_cache, write
from nemojax.model.llama import Compute, embed, head


def stopwatch(dtype: str = "float32", repeats: int = 7) -> Prices:
    """Prices measured here, with weights, activations and cache of `dtype`."""
    device = jax.devices()[0]
    source = (
        f"measured on {device.device_kind} ({platform.machine()}, {platform.node()}), {dtype}, "
        f"median of {repeats}, halves added"
    )
    return Prices(
        lambda arch, part, sub, step: _median_ms_of(sub_call(arch, part, sub, step, dtype), repeats),
        lambda arch, step: _median_ms_of(outer_call(arch, step, dtype), repeats),
        source,
    )


class Call(NamedTuple):
    """A program, what makes its arguments, and its static ones: to be run here, or compiled for elsewhere."""

    program: Any
    make: Callable[[], dict[str, Any]]
    static: dict[str, Any]


def sub_call(arch: ArchSpec, part: Part, sub: Sub, step: Step, dtype: str) -> Call:
    """One sub-block, not a no-op, over the new tokens of a step."""
    static = {"arch": arch, "part": part, "sub": sub}
    cached = bool(step.cached) and isinstance(sub, Attention)

    def make() -> dict[str, Any]:
        p = init_block(arch, part_spec(part, sub), jax.random.key(0), jnp.dtype(dtype))[part]
        positions_BT = step.cached + _positions(step.batch, step.tokens)
        h_BTD = jax.random.normal(jax.random.key(1), (*positions_BT.shape, arch.dim), dtype)
        out = {"p": p, "h_BTD": h_BTD, "positions_BT": positions_BT}
        if not cached:
            return out | {"segments_BT": jnp.ones_like(positions_BT)}
        one = arch.replace(blocks=(part_spec(part, sub),))
        length = step.cached + step.tokens
        return out | {"cache": init_cache(one, step.batch, length, jnp.dtype(dtype), split=True)}

    return Call(_cached if cached else run_part, make, static)


def outer_call(arch: ArchSpec, step: Step, dtype: str) -> Call:
    """The embedding of all tokens, and final norm and head at each sequence's last."""

    def make() -> dict[str, Any]:
        weight_VD = jax.random.normal(jax.random.key(0), (arch.vocab_size, arch.dim), dtype)
        params: dict[str, Any] = {
            "embed": {"weight": weight_VD},
            "norm": {"scale": jnp.ones(arch.dim, dtype)},
        }
        if not arch.tie_embeddings:
            params["head"] = {"weight": weight_VD + 0}
        return {"params": params, "tokens_BT": _positions(step.batch, step.tokens) % arch.vocab_size}

    # the same program for every child
    return Call(_outer, make, {"arch": arch.replace(blocks=()), "dtype": dtype})


def _median_ms_of(call: Call, repeats: int) -> float:
    arguments = call.make()
    return _median_ms(lambda: call.program(**arguments, **call.static), repeats)


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _outer(params: dict, tokens_BT: jax.Array, arch: ArchSpec, dtype: Any) -> tuple[jax.Array, jax.Array]:
    h_BTD = embed(params, tokens_BT, Compute(dtype=dtype))
    return h_BTD, head(params, arch, h_BTD[:, -1:])


@partial(jax.jit, static_argnames=("arch", "part", "sub"))
def _cached(
    arch: ArchSpec, part: Part, sub: Sub, p: dict, h_BTD: jax.Array, cache: Cache, positions_BT: jax.Array
) -> jax.Array:
    """Attention of new tokens over all that the cache holds."""
    ctx = make_context(arch, positions_BT)
    [[layer]] = cache.values()
    rows, length = h_BTD.shape[0], layer["k"].shape[2]

    def update(k_BTKH: jax.Array, v_BTKH: jax.Array) -> View:
        new = write(layer, {"k": k_BTKH, "v": v_BTKH}, jnp.arange(rows), positions_BT)
        return View(new, Window(cache, length))

    return apply_block(arch, part_spec(part, sub), {part: p}, h_BTD, ctx, update=update)


def _positions(rows: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))


def _median_ms(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(2):
        jax.block_until_ready(call())
    times = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
