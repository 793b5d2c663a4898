"""Rows long enough to go through in blocks of queries, against plain attention over the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, uniform
from nemojax.model.attention import SPLIT_LENGTH, attend_packed, make_context

LENGTH = SPLIT_LENGTH + 10  # the last block is shorter than the others


@pytest.mark.parametrize("window", [None, 3, 70])
def test_blocks_of_queries_equal_the_whole_row(window):
    arch = uniform(
        vocab_size=8, dim=16, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=8, context=LENGTH
    )
    q_BTNH, k_BTKH, v_BTKH = (
        jax.random.normal(jax.random.key(i), (2, LENGTH, heads, arch.head_dim))
        for i, heads in enumerate((4, 2, 2))
    )
    # the second row: two documents, the border inside a block, and padding
    segments = np.ones((2, LENGTH), np.int32)
    segments[1, 50:], segments[1, 130:] = 2, 0
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    ctx = make_context(arch, positions_BT, jnp.asarray(segments))
    out_BTNH = attend_packed(q_BTNH, k_BTKH, v_BTKH, ctx, Attention(2, window))

    back_TS = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    mask_BTS = (back_TS >= 0) & (segments[:, :, None] == segments[:, None, :])
    mask_BTS &= back_TS < (window or LENGTH)
    scores_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, np.repeat(k_BTKH, 2, 2)) / np.sqrt(arch.head_dim)
    scores_BNTS = np.where(mask_BTS[:, None], scores_BNTS, -np.inf)
    weights_BNTS = np.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
    weights_BNTS /= weights_BNTS.sum(-1, keepdims=True)
    expected = np.einsum("BNTS,BSNH->BTNH", weights_BNTS, np.repeat(v_BTKH, 2, 2))
    np.testing.assert_allclose(out_BTNH, expected, rtol=1e-4, atol=1e-5)
