"""Attention of new tokens over a cache, on an NVIDIA GPU, without scores or copies of the cache in memory.

A kernel for Pallas' Triton compiler, along positions in parts where rows are few, as Flash-Decoding has it
(Dao et al., 2023). It takes the cache of a whole run with the layer's index, and the slot of every row, so
that nothing is copied before it is read; it reads no further than a row's tokens reach; and eight-bit caches
are widened on the way.

Shape letters: n layers, S slots' capacity in tokens, B rows, K KV heads, Q queries of a KV head (tokens x
heads of its group, filled up), q those of a tile, H head dim, P parts of a row, s positions read at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64  # positions read at once, at most
LEAST = 256  # positions of a part
PROGRAMS = 264  # that keep a Hopper GPU's multiprocessors busy, two on each
TILE = 128  # queries that read a position together, at most
_UNIT = 16  # rows that a matrix unit multiplies at once
NOTHING = -1e30


class Slots(NamedTuple):
    """Keys and values [n, slots, K, S, H] of a run, and for eight-bit ones a scale for each position and head
    [n, slots, K, S] f32; `layer` of it, and the slot of each row [B]."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    layer: jax.Array
    slot_B: jax.Array


def refusal(head_dim: int, dtype: Any, slots: Slots, size: int | None = None) -> str | None:
    """Why the kernel cannot serve queries of such heads; None when it can.

    size: numbers among the keys that one device has; all of them unless said.
    """
    size = slots.k.size if size is None else size
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not in {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128, 256):
        return f"its heads have 64, 128 or 256 channels, not {head_dim}"
    if slots.k.shape[3] % _UNIT:
        return f"its caches have a multiple of {_UNIT} positions, not {slots.k.shape[3]}"
    if 2**31 < size <= 2**32 // slots.k.dtype.itemsize:
        return "Pallas counts so many bytes in 32 bits"
    return None


def attend_slots(
    q_BTNH: jax.Array,
    positions_BT: jax.Array,
    slots: Slots,
    *,
    keys: int,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of new tokens at `positions_BT` over the first `keys` positions of their slots.

    A token beyond all positions (an idle row's) sees nothing, and gets zeros; [B, T, N, H].
    """
    b, t, n, h = q_BTNH.shape
    num_kv = slots.k.shape[2]
    group = n // num_kv
    tile = min(TILE, max(_UNIT, 1 << (t * group - 1).bit_length()))
    queries = -(-t * group // tile) * tile
    q_BKQH = q_BTNH.reshape(b, t, num_kv, group, h).transpose(0, 2, 1, 3, 4).reshape(b, num_kv, -1, h)
    fill = queries - t * group
    q_BKQH = jnp.pad(q_BKQH, ((0, 0), (0, 0), (0, fill), (0, 0)))
    inside_BT = jnp.where(positions_BT < slots.k.shape[3], positions_BT, -1).astype(jnp.int32)
    at_BQ = jnp.pad(jnp.repeat(inside_BT, group, axis=1), ((0, 0), (0, fill)), constant_values=-1)

    sum_BKPQH, top_BKPQ, total_BKPQ = _parts(q_BKQH, at_BQ, slots, tile, keys, window, interpret)
    shrink_BKPQ = jnp.exp(top_BKPQ - jnp.max(top_BKPQ, axis=2, keepdims=True))
    total_BKQ = jnp.sum(total_BKPQ * shrink_BKPQ, axis=2)
    sum_BKQH = jnp.sum(sum_BKPQH * shrink_BKPQ[..., None], axis=2)
    out_BKQH = (sum_BKQH / jnp.maximum(total_BKQ, 1e-30)[..., None]).astype(q_BTNH.dtype)
    out_BKTGH = out_BKQH[:, :, : t * group].reshape(b, num_kv, t, group, h)
    return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _parts(
    q_BKQH: jax.Array,
    at_BQ: jax.Array,
    slots: Slots,
    tile: int,
    keys: int,
    window: int | None,
    interpret: bool,
) -> Any:
    """Of every part of the positions: weighted sum of values [B, K, P, Q, H], largest score and sum of
    weights [B, K, P, Q]; f32."""
    from jax.experimental import pallas as pl  # takes a second to load
    from jax.experimental.pallas import triton

    b, num_kv, queries, h = q_BKQH.shape
    parts = max(1, min(PROGRAMS // (b * num_kv * (queries // tile)), -(-keys // LEAST)))
    block = math.gcd(slots.k.shape[3], BLOCK)  # so that none reaches beyond the cache
    size = -(-keys // (parts * block)) * block
    parts = -(-keys // size)
    scales = () if slots.k_scale is None else (slots.k_scale, slots.v_scale)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    places = (None, None, None)
    kernel = pl.pallas_call(
        functools.partial(_kernel, block=block, size=size, keys=keys, window=window),
        grid=(b, num_kv, parts, queries // tile),
        in_specs=[
            pl.BlockSpec((None, None, tile, h), lambda i, k, p, t: (i, k, t, 0)),
            pl.BlockSpec((None, tile), lambda i, k, p, t: (i, t)),
            pl.BlockSpec((None,), lambda i, k, p, t: (i,)),
            pl.BlockSpec((None,), lambda i, k, p, t: (0,)),
            *[whole] * (2 + len(scales)),
        ],
        out_specs=[
            pl.BlockSpec((*places, tile, h), lambda i, k, p, t: (i, k, p, t, 0)),
            *[pl.BlockSpec((*places, tile), lambda i, k, p, t: (i, k, p, t))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((b, num_kv, parts, queries, h), jnp.float32),
            *[jax.ShapeDtypeStruct((b, num_kv, parts, queries), jnp.float32)] * 2,
        ],
        compiler_params=None if interpret else triton.CompilerParams(**_resources(tile, h)),
        interpret=interpret,
        name="attend_slots",
    )
    layer_1, slot_B = (x.astype(jnp.int32) for x in (slots.layer.reshape(1), slots.slot_B))
    return kernel(q_BKQH, at_BQ, slot_B, layer_1, slots.k, slots.v, *scales)


def _resources(tile: int, head_dim: int) -> dict[str, int]:
    """Groups of 32 threads, and blocks of keys on their way at once: what a multiprocessor has room for."""
    warps, blocks = (8, 3) if tile == TILE else (4, 4)
    return {"num_warps": warps, "num_stages": blocks if head_dim <= 128 else blocks - 1}


def _kernel(
    q_ref: Any,
    at_ref: Any,
    slot_ref: Any,
    layer_ref: Any,
    *refs: Any,
    block: int,
    size: int,
    keys: int,
    window: Any,
):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *inputs, sum_ref, top_ref, total_ref = refs
    k_ref, v_ref, *scales = inputs
    head, part = pl.program_id(1), pl.program_id(2)
    layer, slot = layer_ref[...], slot_ref[...]
    q_qH, at_q = q_ref[...], at_ref[...]
    scale = q_qH.shape[-1] ** -0.5 * math.log2(math.e)  # exponentials are powers of two there

    def rows(ref: Any, start: jax.Array) -> jax.Array:
        return ref.at[layer, slot, head, pl.ds(start, block)][...]

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sum_qH, top_q, total_q = carry
        start = i * block
        k_sH, v_sH = (rows(ref, start).astype(q_qH.dtype) for ref in (k_ref, v_ref))
        scores_qs = triton.dot(q_qH, k_sH, trans_b=True) * scale
        if scales:
            scores_qs *= rows(scales[0], start)[None, :]
        key_s = start + jnp.arange(block, dtype=jnp.int32)
        seen_qs = key_s[None, :] <= at_q[:, None]
        if window is not None:
            seen_qs &= at_q[:, None] - key_s[None, :] < window
        scores_qs = jnp.where(seen_qs, scores_qs, NOTHING)
        new_q = jnp.maximum(top_q, jnp.max(scores_qs, axis=1))
        # nothing is seen by a query whose top is still the least of all
        weights_qs = jnp.where(seen_qs, jnp.exp2(scores_qs - new_q[:, None]), 0.0)
        shrink_q = jnp.exp2(top_q - new_q)
        total_q = total_q * shrink_q + jnp.sum(weights_qs, axis=1)
        if scales:
            weights_qs *= rows(scales[1], start)[None, :]
        sum_qH = sum_qH * shrink_q[:, None] + triton.dot(weights_qs.astype(v_sH.dtype), v_sH)
        return sum_qH, new_q, total_q

    first = part * size
    last = jnp.minimum(jnp.minimum(first + size, keys), jnp.max(at_q) + 1)
    if window is not None:
        earliest = jnp.min(jnp.where(at_q < 0, keys, at_q)) - window + 1
        first = jnp.maximum(first, earliest)
    queries = q_qH.shape[0]
    start = (
        jnp.zeros(q_qH.shape, jnp.float32),
        jnp.full((queries,), NOTHING, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
    )
    sum_qH, top_q, total_q = jax.lax.fori_loop(first // block, pl.cdiv(last, block), body, start)
    sum_ref[...], total_ref[...] = sum_qH, total_q
    top_ref[...] = top_q / math.log2(math.e)
