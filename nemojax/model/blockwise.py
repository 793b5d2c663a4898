"""Causal attention in memory that grows with the length of a row, not with its square.

Blocks of queries meet blocks of keys one pair at a time, with a softmax that is carried along; what is kept
for the backward pass is the output and the log-sum-exp of each query, and scores are computed anew
(FlashAttention, arXiv:2205.14135, sections 3.1 and B.4). Pairs in which no query may see a key are left out
before the loop begins, so that the work follows what is visible: half of the square for one document, the
sum of the squares for packed ones, a band for a window. What a query sees is decided by segments and
positions alone: columns may stand in any order, and only the number of pairs depends on it.

Shape letters: B rows, T query length, S key length, N query heads, K KV heads, H head dim, I and J blocks of
a row's queries and keys, X = B x I and Y = B x J blocks in all, q queries of a block, s keys of a block,
Q = (N / K) x q queries that a block has for one KV head, P pairs of blocks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nemojax.backends.contract import exact
from nemojax.backends.rows import SAVED

MASKED = float(jnp.finfo(jnp.float32).min)
# where the running maximum begins: exp(MASKED - NOTHING) is 0, so a query that has seen no key yet adds none
NOTHING = MASKED / 2


class Tiles(NamedTuple):
    """Sizes that suit a machine, in positions."""

    block: int  # of a block, at most
    long: int  # of a row that is worth a loop over blocks


CPU = Tiles(block=128, long=512)  # blocks that stay in its cache
ACCELERATOR = Tiles(block=512, long=2048)  # blocks that keep it busy


class Places(NamedTuple):
    """Where columns stand: their document (0: padding, which neither sees nor is seen) and position in it."""

    segments: jax.Array
    positions: jax.Array


def attend_blockwise(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries_BT: Places,
    keys_BS: Places,
    *,
    window: int | None = None,
    block: int,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the keys of the same document at no later position; [B, T, N, H].

    `window`: positions that a query sees, itself included. `block`: positions of a block. The softmax is in
    f32; a query that sees nothing gets 0.
    """
    b, t, n, h = q_BTNH.shape
    heads = k_BSKH.shape[2]
    q_XqNH, at_Xq = _blocks(q_BTNH * (h**-0.5), block), _places(queries_BT, block)
    k_YsKH, v_YsKH, at_Ys = _blocks(k_BSKH, block), _blocks(v_BSKH, block), _places(keys_BS, block)
    x, size = q_XqNH.shape[:2]
    q_XKQH = q_XqNH.reshape(x, size, heads, n // heads, h).transpose(0, 2, 3, 1, 4).reshape(x, heads, -1, h)
    k_YKsH, v_YKsH = k_YsKH.swapaxes(1, 2), v_YsKH.swapaxes(1, 2)
    out_XKQH: Any = _attend(q_XKQH, k_YKsH, v_YKsH, at_Xq, at_Ys, b, window)
    out_XqNH = out_XKQH.reshape(x, heads, n // heads, size, h).transpose(0, 3, 1, 2, 4)
    return out_XqNH.reshape(b, -1, n, h)[:, :t]


def block_size(length: int, most: int) -> int:
    """Positions of the fewest equal blocks, none above `most`, that hold `length` positions."""
    count = max(1, -(-length // most))
    return -(-length // count)


def visible(queries_Xq: Places, keys_Ys: Places, rows: int, window: int | None) -> jax.Array:
    """Whether any query of a block may see a key of a block, [B, I, J]; never wrongly False.

    Decided by the blocks' first and last (segment, position), padding apart.
    """
    first_q, last_q = jax.tree.map(lambda x_X: x_X.reshape(rows, -1, 1), _ends(queries_Xq))
    first_k, last_k = jax.tree.map(lambda x_Y: x_Y.reshape(rows, 1, -1), _ends(keys_Ys))
    causal = (first_k.segments < last_q.segments) | (
        (first_k.segments == last_q.segments) & (first_k.positions <= last_q.positions)
    )
    seen = causal & (last_k.segments >= first_q.segments) & (last_q.segments > 0) & (last_k.segments > 0)
    if window is not None:
        near = first_q.positions - last_k.positions < window
        seen &= near | (last_k.segments > first_q.segments)  # else they share one document at most
    return seen


def _ends(at_Xq: Places) -> tuple[Places, Places]:
    """The least and the greatest (segment, position) of each block, [X] each; padding does not count."""
    segments_Xq, positions_Xq = at_Xq
    far = jnp.iinfo(jnp.int32).max
    first_X1 = jnp.min(jnp.where(segments_Xq > 0, segments_Xq, far), axis=1, keepdims=True)
    last_X1 = jnp.max(segments_Xq, axis=1, keepdims=True)
    return (
        Places(first_X1[:, 0], jnp.min(jnp.where(segments_Xq == first_X1, positions_Xq, far), axis=1)),
        Places(last_X1[:, 0], jnp.max(jnp.where(segments_Xq == last_X1, positions_Xq, -1), axis=1)),
    )


class _Pairs(NamedTuple):
    """The pairs of blocks to visit: the first `count` of all."""

    x_P: jax.Array
    y_P: jax.Array
    count: jax.Array


def _pairs(at_Xq: Places, at_Ys: Places, rows: int, window: int | None) -> _Pairs:
    seen_BIJ = visible(at_Xq, at_Ys, rows, window)
    _, i, j = seen_BIJ.shape
    b_P, i_P, j_P = jnp.nonzero(seen_BIJ, size=seen_BIJ.size, fill_value=0)
    return _Pairs(b_P * i + i_P, b_P * j + j_P, jnp.sum(seen_BIJ))


def _scores(q_KQH: jax.Array, k_KsH: jax.Array, q_at: Places, k_at: Places, window: int | None) -> jax.Array:
    """Scores of a pair of blocks in f32, [K, Q, s]."""
    back_qs = q_at.positions[:, None] - k_at.positions
    mask_qs = (q_at.segments[:, None] == k_at.segments) & (q_at.segments[:, None] > 0) & (back_qs >= 0)
    if window is not None:
        mask_qs &= back_qs < window
    scores_KQs = _dot(q_KQH, k_KsH, 2, 2)
    heads, _, size = scores_KQs.shape
    scores_KGqs = scores_KQs.reshape(heads, -1, *mask_qs.shape)
    return jnp.where(mask_qs, scores_KGqs, MASKED).reshape(heads, -1, size)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Product for each KV head (axis 0), summed over one axis of each, in f32."""
    dims = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=exact(a, b), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_XKQH: jax.Array,
    k_YKsH: jax.Array,
    v_YKsH: jax.Array,
    at_Xq: Places,
    at_Ys: Places,
    rows: int,
    window: int | None,
) -> jax.Array:
    return _forward(q_XKQH, k_YKsH, v_YKsH, at_Xq, at_Ys, rows, window)[0]


def _forward(
    q_XKQH: jax.Array,
    k_YKsH: jax.Array,
    v_YKsH: jax.Array,
    at_Xq: Places,
    at_Ys: Places,
    rows: int,
    window: int | None,
):
    pairs = _pairs(at_Xq, at_Ys, rows, window)

    def body(p: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, y = pairs.x_P[p], pairs.y_P[p]
        sum_KQH, top_KQ, total_KQ = (a[x] for a in carry)
        scores_KQs = _scores(q_XKQH[x], k_YKsH[y], _at(at_Xq, x), _at(at_Ys, y), window)
        new_KQ = jnp.maximum(top_KQ, jnp.max(scores_KQs, axis=-1))
        weights_KQs = jnp.exp(scores_KQs - new_KQ[..., None])
        shrink_KQ = jnp.exp(top_KQ - new_KQ)
        total_KQ = total_KQ * shrink_KQ + jnp.sum(weights_KQs, axis=-1)
        sum_KQH = sum_KQH * shrink_KQ[..., None] + _dot(weights_KQs.astype(v_YKsH.dtype), v_YKsH[y], 2, 1)
        return tuple(a.at[x].set(new) for a, new in zip(carry, (sum_KQH, new_KQ, total_KQ), strict=True))

    start = (
        jnp.zeros(q_XKQH.shape, jnp.float32),
        jnp.full(q_XKQH.shape[:-1], NOTHING, jnp.float32),
        jnp.zeros(q_XKQH.shape[:-1], jnp.float32),
    )
    sum_XKQH, top_XKQ, total_XKQ = jax.lax.fori_loop(0, pairs.count, body, start)
    out_XKQH = (sum_XKQH / jnp.where(total_XKQ > 0, total_XKQ, 1.0)[..., None]).astype(q_XKQH.dtype)
    # infinite where nothing is seen, which makes every weight of the backward pass 0
    lse_XKQ = jnp.where(total_XKQ > 0, top_XKQ + jnp.log(total_XKQ), jnp.inf)
    out_XKQH, lse_XKQ = checkpoint_name(out_XKQH, SAVED), checkpoint_name(lse_XKQ, SAVED)
    return out_XKQH, (q_XKQH, k_YKsH, v_YKsH, at_Xq, at_Ys, out_XKQH, lse_XKQ)


def _backward(rows: int, window: int | None, saved: tuple[Any, ...], d_XKQH: jax.Array):
    q_XKQH, k_YKsH, v_YKsH, at_Xq, at_Ys, out_XKQH, lse_XKQ = saved
    pairs = _pairs(at_Xq, at_Ys, rows, window)
    dot_XKQ = jnp.sum(d_XKQH.astype(jnp.float32) * out_XKQH.astype(jnp.float32), axis=-1)

    def body(p: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, y = pairs.x_P[p], pairs.y_P[p]
        dq, dk, dv = carry
        q_KQH, k_KsH, v_KsH, d_KQH = q_XKQH[x], k_YKsH[y], v_YKsH[y], d_XKQH[x]
        scores_KQs = _scores(q_KQH, k_KsH, _at(at_Xq, x), _at(at_Ys, y), window)
        weights_KQs = jnp.exp(scores_KQs - lse_XKQ[x][..., None])
        slope_KQs = weights_KQs * (_dot(d_KQH, v_KsH, 2, 2) - dot_XKQ[x][..., None])
        weights_KQs, slope_KQs = weights_KQs.astype(d_KQH.dtype), slope_KQs.astype(q_KQH.dtype)
        return (
            dq.at[x].add(_dot(slope_KQs, k_KsH, 2, 1)),
            dk.at[y].add(_dot(slope_KQs, q_KQH, 1, 1)),
            dv.at[y].add(_dot(weights_KQs, d_KQH, 1, 1)),
        )

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q_XKQH, k_YKsH, v_YKsH))
    dq, dk, dv = jax.lax.fori_loop(0, pairs.count, body, start)
    return dq.astype(q_XKQH.dtype), dk.astype(k_YKsH.dtype), dv.astype(v_YKsH.dtype), None, None


_attend.defvjp(_forward, _backward)


def _at(places: Places, block: jax.Array) -> Places:
    return Places(places.segments[block], places.positions[block])


def _places(at_BT: Places, block: int) -> Places:
    return Places(_blocks(at_BT.segments, block), _blocks(at_BT.positions, block))


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] as [B x I, block, ...]; the last block of a row is filled with zeros."""
    more = -x.shape[1] % block
    if more:
        x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(-1, block, *x.shape[2:])
