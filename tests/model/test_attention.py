"""Rows that go through in blocks of queries, against plain attention over the whole row, and a cache that is
read in blocks of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, uniform
from nemojax.generate.programs import FAR
from nemojax.model import attention
from nemojax.model.attention import SPLIT_LENGTH, attend_packed, attend_read, make_context
from nemojax.model.blockwise import Tiles

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


@pytest.mark.parametrize("length, window", [(64, None), (72, None), (72, 5)])
def test_a_cache_read_in_blocks_is_a_cache_read_at_once(monkeypatch, length, window):
    """Prompts at different places, a token that stands nowhere, keys that no number of blocks fills."""
    arch = uniform(
        vocab_size=8, dim=16, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=8, context=length
    )
    shapes = ((3, 4, 4, 4), (3, 2, length, 4), (3, 2, length, 4))
    q_BTNH, k_BKSH, v_BKSH = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    # a block beyond what any query sees is not read
    v_BKSH = v_BKSH.at[:, :, 48:].set(jnp.nan) if length == 64 else v_BKSH
    first_B1 = jnp.array([[0], [13], [39]])
    positions_BT = (first_B1 + jnp.arange(4)).at[1, 3].set(FAR)
    ctx, spec = make_context(arch, positions_BT), Attention(2, window)
    expected = attend_read(q_BTNH, k_BKSH, jnp.nan_to_num(v_BKSH), ctx, spec)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "SPLIT_LENGTH", 4)
    monkeypatch.setattr(attention, "tiles", lambda: Tiles(block=16, long=32))
    found = attend_read(q_BTNH, k_BKSH, v_BKSH, ctx, spec)
    here = np.asarray(positions_BT) < length
    np.testing.assert_allclose(found[here], np.asarray(expected)[here], rtol=1e-5, atol=1e-6)
