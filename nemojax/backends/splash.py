"""Splash attention, the Pallas kernel for TPUs that JAX brings, over packed rows with grouped KV heads.

Blocks that causality or a window hides are left out; those that only documents hide are not. Memory grows
with the length of a row: nothing but the output and the log-sum-exp of each query is kept.

Shape letters: B rows, T length, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

from nemojax.backends.rows import SAVED, fill_rows

BLOCK = 512  # positions of a block at most: the scores of a pair, in f32, fit in any TPU's vector memory
LANES = 128  # a block is a multiple of these


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over what stands before in the same document, [B, T, N, H].

    Columns are in order. Padding (segment 0) sees padding. `interpret`: without a TPU, slowly.
    """
    length, heads = q_BTNH.shape[1:3]
    count = -(-length // block)
    block = -(-length // (count * LANES)) * LANES
    full = count * block
    q_BTNH, k_BTKH, v_BTKH, segments_BT = fill_rows((q_BTNH, k_BTKH, v_BTKH, segments_BT), full)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([_Band(full, window)] * heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    q_BNTH = (q_BTNH * q_BTNH.shape[-1] ** -0.5).swapaxes(1, 2)
    documents = splash.SegmentIds(segments_BT, segments_BT)
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), documents)
    return jnp.asarray(out_BNTH).swapaxes(1, 2)[:, :length]


class _Band(splash.LocalMask):
    """What a query sees in a row of `length`: itself and what is before it, `window` positions in all."""

    def __init__(self, length: int, window: int | None):
        super().__init__((length, length), (None if window is None else window - 1, 0), 0)

    def __getitem__(self, idx) -> np.ndarray:
        """Whether each query of a block sees each key: one element where that is the same for all.

        JAX asks about every pair of blocks before it compiles; to look at each of their elements takes
        seconds for 32K positions, and grows with the square.
        """
        queries, keys = idx
        farthest, nearest = queries.stop - 1 - keys.start, queries.start - (keys.stop - 1)
        back = self.window_size[0]
        whole = nearest >= 0 and (back is None or farthest <= back)
        if whole or farthest < 0 or (back is not None and nearest > back):
            return np.full((1, 1), whole)
        return super().__getitem__(idx)
