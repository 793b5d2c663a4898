"""The KV cache: one place for each layer that has attention, in the layout of the parameters.

Slots hold sequences; a key's index is its position, so that a slot needs no offset. Heads come before
positions: attention then reads each head's keys in one piece. Where the parameters are stacked by run the
cache is too, where they are split by layer (`layout.split_layers`) it is a tuple of layers.

Shape letters: n layers of a run, B slots or rows of a batch, T new tokens, S capacity or keys read, in
tokens, K KV heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention
from nemojax.backends.cached import Slots
from nemojax.model.layout import run_name
from nemojax.sharding import constrain

CacheDtype = Literal["float32", "bfloat16", "float8_e4m3fn", "int8"]
Layer = dict[str, jax.Array]  # {"k", "v"} and, where the dtype needs them, {"k_scale", "v_scale"}
Cache = dict[str, Any]  # {run: Layer of [n, ...]} or {run: (Layer, ...)}
LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number that the dtype holds


class Window(NamedTuple):
    """What a forward pass sees of a cache: positions below `keys` of the slots `rows_B` (None: row b of the
    batch is slot b)."""

    cache: Cache
    keys: int
    rows_B: jax.Array | None = None


@functools.partial(jax.jit, static_argnames=("arch", "slots", "capacity", "dtype", "split"))
def init_cache(
    arch: ArchSpec, slots: int, capacity: int, dtype: Any = jnp.float32, split: bool = False
) -> Cache:
    """Zeros: k and v of [n, B, K, S, H] for each run that has attention (a tuple of layers if `split`).

    Eight-bit dtypes keep a scale for each position and head, [n, B, K, S] f32.
    """
    cache: Cache = {}
    for i, run in enumerate(arch.runs()):
        match run.spec.attn:
            case Attention(num_kv_heads=k):
                shape, layers = (slots, k, capacity, arch.head_dim), len(run.layers)
                if split:
                    cache[run_name(i)] = tuple(_empty_layer(shape, dtype, False) for _ in run.layers)
                else:
                    cache[run_name(i)] = _empty_layer((layers, *shape), dtype, True)
    return cache


def _empty_layer(shape: tuple[int, ...], dtype: Any, stacked: bool) -> Layer:
    layer = {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
    if jnp.dtype(dtype).name in LIMITS:
        layer |= {f"{name}_scale": jnp.zeros(shape[:-1], jnp.float32) for name in ("k", "v")}
    return {name: _constrain(value, stacked) for name, value in layer.items()}


def write(
    layer: Layer,
    new: dict[str, jax.Array],
    rows_B: jax.Array,
    positions_BT: jax.Array,
    index: jax.Array | None = None,
) -> Layer:
    """The layer with new keys and values `{"k", "v"}` [B, T, K, H] at their positions of the slots `rows_B`.

    `index`: which layer of a stacked run. A position that no array has is dropped.
    """
    heads_K = jnp.arange(new["k"].shape[2])
    at = (rows_B[:, None, None], heads_K, positions_BT[:, :, None])
    at = at if index is None else (index, *at)
    out = dict(layer)
    for name, value_BTKH in new.items():
        if f"{name}_scale" in layer:
            value_BTKH, scale_BTK = _quantise(value_BTKH, layer[name].dtype)
            out[f"{name}_scale"] = layer[f"{name}_scale"].at[at].set(scale_BTK, mode="drop")
        out[name] = layer[name].at[at].set(value_BTKH.astype(layer[name].dtype), mode="drop")
    return {name: _constrain(value, index is not None) for name, value in out.items()}


class View(NamedTuple):
    """What attention sees of a layer: `layer` with the new keys and values, through a window; `index`: which
    one it is of a stacked run."""

    layer: Layer
    window: Window
    index: jax.Array | None = None

    def read(self, num_rows: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """(keys, values) [B, K, S, H] that a batch of `num_rows` rows sees."""

        def part(name: str) -> jax.Array:
            x, window = self.layer[name], self.window
            if self.index is not None:
                x = jax.lax.dynamic_index_in_dim(x, self.index, keepdims=False)
            if window.rows_B is None:
                return x[:num_rows, :, : window.keys]
            return x[:, :, : window.keys][window.rows_B]

        def value(name: str) -> jax.Array:
            x = part(name).astype(dtype)
            return x * part(f"{name}_scale")[..., None].astype(dtype) if f"{name}_scale" in self.layer else x

        return value("k"), value("v")

    def slots(self, num_rows: int) -> Slots:
        """All of it in place, for a kernel that picks what it reads."""
        stacked = {name: x if self.index is not None else x[None] for name, x in self.layer.items()}
        index = jnp.zeros((), jnp.int32) if self.index is None else self.index
        rows_B = jnp.arange(num_rows) if self.window.rows_B is None else self.window.rows_B
        names = ("k", "v", "k_scale", "v_scale")
        return Slots(*(stacked.get(name) for name in names), layer=index, slot_B=rows_B)  # pyright: ignore


def fork(cache: Cache, from_M: jax.Array, to_M: jax.Array, keys: int) -> Cache:
    """The first `keys` positions of the slots `from_M` copied into `to_M` (beyond all slots: none)."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        stacked = x.ndim == (4 if path[-1].key.endswith("_scale") else 5)
        if stacked:
            return x.at[:, to_M, :, :keys].set(x[:, from_M, :, :keys], mode="drop")
        return x.at[to_M, :, :keys].set(x[from_M, :, :keys], mode="drop")

    return jax.tree_util.tree_map_with_path(one, cache)


def _quantise(value_BTKH: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(numbers, scale of each position and head); the largest number of a head becomes the dtype's limit."""
    limit = LIMITS[jnp.dtype(dtype).name]
    wide = value_BTKH.astype(jnp.float32)
    scale_BTK = jnp.max(jnp.abs(wide), axis=-1) / limit
    scaled = wide / jnp.where(scale_BTK > 0, scale_BTK, 1.0)[..., None]
    return jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled, scale_BTK


def _constrain(x: jax.Array, stacked: bool) -> jax.Array:
    """Slots lie over the batch axes of a mesh, heads over its tensor axis."""
    names = ("batch", "kv_heads", *[None] * (x.ndim - 2 - stacked))
    return constrain(x, *[None] * stacked, *names)
