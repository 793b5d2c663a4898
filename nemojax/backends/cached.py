"""Attention of a few new tokens over a cache, on an NVIDIA GPU: one pass over what each row has of it.

A kernel for Pallas' Triton compiler, split along positions as Flash-Decoding is (Dao et al., 2023). It takes
the cache of a whole run with the layer's index, and the slot of every row, so that nothing is copied before
it is read; it reads no further than a row's tokens reach; and eight-bit caches are widened on the way.

Shape letters: n layers, S slots' capacity in tokens, B rows, K KV heads, Q queries of a KV head (tokens x
heads of its group, filled up), H head dim, P parts of a row, s positions read at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64  # positions read at once
LEAST = 256  # positions of a part
PROGRAMS = 528  # four on each multiprocessor of a Hopper GPU: those of idle rows end at once
MOST_QUERIES = 64  # of a KV head; with more, products are worth cuBLAS
_TILE = 16  # rows that a matrix unit multiplies at once, at least
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


def refusal(tokens: int, group: int, head_dim: int, dtype: Any, slots: Slots) -> str | None:
    """Why the kernel cannot serve such queries (`tokens` new ones of a row); None when it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not in {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128, 256):
        return f"its heads have 64, 128 or 256 channels, not {head_dim}"
    if tokens * group > MOST_QUERIES:
        return f"it takes {MOST_QUERIES} queries of a KV head, not {tokens * group}"
    if slots.k.shape[3] % BLOCK:
        return f"its caches have a multiple of {BLOCK} positions, not {slots.k.shape[3]}"
    if 2**31 < slots.k.size <= 2**32 // slots.k.dtype.itemsize:
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
    from jax.experimental import pallas as pl  # takes a second to load
    from jax.experimental.pallas import triton

    b, t, n, h = q_BTNH.shape
    num_kv = slots.k.shape[2]
    group = n // num_kv
    queries = max(_TILE, 1 << (t * group - 1).bit_length())
    q_BKQH = q_BTNH.reshape(b, t, num_kv, group, h).transpose(0, 2, 1, 3, 4).reshape(b, num_kv, -1, h)
    fill = queries - t * group
    q_BKQH = jnp.pad(q_BKQH, ((0, 0), (0, 0), (0, fill), (0, 0)))
    inside_BT = jnp.where(positions_BT < slots.k.shape[3], positions_BT, -1).astype(jnp.int32)
    at_BQ = jnp.pad(jnp.repeat(inside_BT, group, axis=1), ((0, 0), (0, fill)), constant_values=-1)

    parts = max(1, min(PROGRAMS // (b * num_kv), -(-keys // LEAST)))
    size = -(-keys // (parts * BLOCK)) * BLOCK
    parts = -(-keys // size)
    scales = () if slots.k_scale is None else (slots.k_scale, slots.v_scale)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    places = (None, None, None)
    kernel = pl.pallas_call(
        functools.partial(_kernel, size=size, keys=keys, window=window),
        grid=(b, num_kv, parts),
        in_specs=[
            pl.BlockSpec((None, None, queries, h), lambda i, k, p: (i, k, 0, 0)),
            pl.BlockSpec((None, queries), lambda i, k, p: (i, 0)),
            pl.BlockSpec((None,), lambda i, k, p: (i,)),
            pl.BlockSpec((None,), lambda i, k, p: (0,)),
            *[whole] * (2 + len(scales)),
        ],
        out_specs=[
            pl.BlockSpec((*places, queries, h), lambda i, k, p: (i, k, p, 0, 0)),
            *[pl.BlockSpec((*places, queries), lambda i, k, p: (i, k, p, 0))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((b, num_kv, parts, queries, h), jnp.float32),
            *[jax.ShapeDtypeStruct((b, num_kv, parts, queries), jnp.float32)] * 2,
        ],
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attend_slots",
    )
    layer_1 = slots.layer.reshape(1).astype(jnp.int32)
    sum_BKPQH, top_BKPQ, total_BKPQ = kernel(
        q_BKQH, at_BQ, slots.slot_B.astype(jnp.int32), layer_1, slots.k, slots.v, *scales
    )
    shrink_BKPQ = jnp.exp(top_BKPQ - jnp.max(top_BKPQ, axis=2, keepdims=True))
    total_BKQ = jnp.sum(total_BKPQ * shrink_BKPQ, axis=2)
    sum_BKQH = jnp.sum(sum_BKPQH * shrink_BKPQ[..., None], axis=2)
    out_BKQH = (sum_BKQH / jnp.maximum(total_BKQ, 1e-30)[..., None]).astype(q_BTNH.dtype)
    out_BKTGH = out_BKQH[:, :, : t * group].reshape(b, num_kv, t, group, h)
    return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _kernel(
    q_ref: Any, at_ref: Any, slot_ref: Any, layer_ref: Any, *refs: Any, size: int, keys: int, window: Any
):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *inputs, sum_ref, top_ref, total_ref = refs
    k_ref, v_ref, *scales = inputs
    head, part = pl.program_id(1), pl.program_id(2)
    layer, slot = layer_ref[...], slot_ref[...]
    q_QH, at_Q = q_ref[...], at_ref[...]
    scale = q_QH.shape[-1] ** -0.5 * math.log2(math.e)  # exponentials are powers of two there

    def rows(ref: Any, start: jax.Array) -> jax.Array:
        return ref.at[layer, slot, head, pl.ds(start, BLOCK)][...]

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sum_QH, top_Q, total_Q = carry
        start = i * BLOCK
        k_sH, v_sH = (rows(ref, start).astype(q_QH.dtype) for ref in (k_ref, v_ref))
        scores_Qs = triton.dot(q_QH, k_sH, trans_b=True) * scale
        if scales:
            scores_Qs *= rows(scales[0], start)[None, :]
        key_s = start + jnp.arange(BLOCK, dtype=jnp.int32)
        seen_Qs = key_s[None, :] <= at_Q[:, None]
        if window is not None:
            seen_Qs &= at_Q[:, None] - key_s[None, :] < window
        scores_Qs = jnp.where(seen_Qs, scores_Qs, NOTHING)
        new_Q = jnp.maximum(top_Q, jnp.max(scores_Qs, axis=1))
        # nothing is seen by a query whose top is still the least of all
        weights_Qs = jnp.where(seen_Qs, jnp.exp2(scores_Qs - new_Q[:, None]), 0.0)
        shrink_Q = jnp.exp2(top_Q - new_Q)
        total_Q = total_Q * shrink_Q + jnp.sum(weights_Qs, axis=1)
        if scales:
            weights_Qs *= rows(scales[1], start)[None, :]
        sum_QH = sum_QH * shrink_Q[:, None] + triton.dot(weights_Qs.astype(v_sH.dtype), v_sH)
        return sum_QH, new_Q, total_Q

    first = part * size
    last = jnp.minimum(jnp.minimum(first + size, keys), jnp.max(at_Q) + 1)
    if window is not None:
        earliest = jnp.min(jnp.where(at_Q < 0, keys, at_Q)) - window + 1
        first = jnp.maximum(first, earliest)
    queries = q_QH.shape[0]
    start = (
        jnp.zeros(q_QH.shape, jnp.float32),
        jnp.full((queries,), NOTHING, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
    )
    sum_QH, top_Q, total_Q = jax.lax.fori_loop(first // BLOCK, pl.cdiv(last, BLOCK), body, start)
    sum_ref[...], total_ref[...] = sum_QH, total_Q
    top_ref[...] = top_Q / math.log2(math.e)
