"""Scaled dot-product attention with grouped KV heads, over a packed batch or over a cache.

Shape letters: B batch, T query length, S key length, N query heads, K KV heads, G = N / K queries a
group, H head dim, P = H / 2, n layers of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention
from nemojax.model import rope

QUERY_BLOCKS = 4
SPLIT_LENGTH = 128  # below, a block is too small to be worth a program of its own


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What attention needs to know of a batch, made once and shared by all layers."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    cos_BTP: jax.Array
    sin_BTP: jax.Array


def make_context(arch: ArchSpec, positions_BT: jax.Array, segments_BT: jax.Array | None = None) -> Context:
    """Context of a batch: positions restart with each document; segments tell documents apart (0 pads)."""
    cos_BTP, sin_BTP = rope.tables(arch.rope, arch.head_dim, positions_BT)
    segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
    return Context(positions_BT, segments_BT, cos_BTP, sin_BTP)


def attend_packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ctx: Context, spec: Attention
) -> jax.Array:
    """Causal attention inside each document of a packed row; returns [B, T, N, H].

    Long rows go through in blocks of queries, each with only the keys that it may see: of 4 blocks the
    scores take 5/8 of the work and at most a quarter of the memory at once.
    """
    length = q_BTNH.shape[1]
    size = -(-length // QUERY_BLOCKS) if length >= SPLIT_LENGTH else length
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if spec.window is None else max(0, start - spec.window + 1)
        # index order equals position order inside a document, and costs no comparison per batch row
        back_TS = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        mask_TS = back_TS >= 0
        if spec.window is not None:
            mask_TS &= back_TS < spec.window
        same_BTS = ctx.segments_BT[:, start:stop, None] == ctx.segments_BT[:, None, first:stop]
        keys = slice(first, stop)
        blocks.append(
            masked_attention(q_BTNH[:, start:stop], k_BTKH[:, keys], v_BTKH[:, keys], mask_TS & same_BTS)
        )
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def attend_cached(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, ctx: Context, spec: Attention
) -> jax.Array:
    """Attention of new tokens over a cache whose key index is its position; returns [B, T, N, H]."""
    keys_S = jnp.arange(k_BKSH.shape[2])
    query_BT1 = ctx.positions_BT[:, :, None]
    mask_BTS = keys_S[None, None, :] <= query_BT1
    if spec.window is not None:
        mask_BTS &= query_BT1 - keys_S[None, None, :] < spec.window
    return masked_attention(q_BTNH, k_BKSH, v_BKSH, mask_BTS, "BKSH")


def masked_attention(
    q_BTNH: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array, layout: str = "BSKH"
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with the softmax in f32; a masked score is -inf in effect. [B, T, N, H]

    `layout`: the dimensions of `k` and `v` in order.
    """
    b, t, n, h = q_BTNH.shape
    k_heads = k.shape[layout.index("K")]
    q_BTKGH = (q_BTNH * (h**-0.5)).reshape(b, t, k_heads, n // k_heads, h)
    scores_BKGTS = jnp.einsum(f"BTKGH,{layout}->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v.dtype)
    return jnp.einsum(f"BKGTS,{layout}->BTKGH", weights_BKGTS, v).reshape(b, t, n, h)
