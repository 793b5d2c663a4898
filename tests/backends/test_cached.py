"""The kernel of attention over a cache in place, interpreted, against attention over what is read of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, uniform
from nemojax.backends import cached
from nemojax.model.attention import attend_read, make_context
from nemojax.model.cache import View, Window, init_cache, write

HEAD_DIM, CAPACITY, FAR = 64, 512, 2**30
ARCH = uniform(
    vocab_size=32,
    dim=256,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=HEAD_DIM,
    ffn_width=64,
    context=CAPACITY,
)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)


def filled(dtype, positions_BT, rows_B, slots):
    """A cache whose slots hold numbers everywhere, and new ones in its second layer."""
    [cache] = init_cache(ARCH, slots, CAPACITY, jnp.dtype(dtype)).values()
    places = jnp.tile(jnp.arange(CAPACITY), (slots, 1))
    for layer in range(3):
        new = {name: random(10 * layer + i, slots, CAPACITY, 2, HEAD_DIM) for i, name in enumerate("kv")}
        cache = write(cache, new, jnp.arange(slots), places, jnp.int32(layer))
    new = {name: random(50 + i, *positions_BT.shape, 2, HEAD_DIM) for i, name in enumerate("kv")}
    return write(cache, new, rows_B, positions_BT, jnp.int32(1))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("tokens, keys", [(1, CAPACITY), (5, 256)])
def test_it_is_attention_over_what_is_read(dtype, window, tokens, keys):
    slots, rows_B = 6, jnp.array([4, 0, 3, 5])
    last_B1 = jnp.array([0, 64, keys - tokens, 130])[:, None]
    positions_BT = (last_B1 + jnp.arange(tokens)).at[3].set(FAR)  # an idle row
    cache = filled(dtype, positions_BT, rows_B, slots)
    view = View({"run": cache}["run"], Window({}, keys, rows_B), jnp.int32(1))
    q_BTNH = random(99, 4, tokens, 8, HEAD_DIM)
    ctx, spec = make_context(ARCH, positions_BT), Attention(2, window)
    expected = attend_read(q_BTNH, *view.read(4, jnp.bfloat16), ctx, spec)
    places = view.slots(4)
    assert cached.refusal(tokens, 4, HEAD_DIM, jnp.bfloat16, places) is None
    got = jax.jit(
        lambda q: cached.attend_slots(q, positions_BT, places, keys=keys, window=window, interpret=True)
    )(q_BTNH)
    # bf16 has 8 bits; both round what they read, the weights and the result to it
    np.testing.assert_allclose(np.float32(got[:3]), np.float32(expected[:3]), atol=0.03, rtol=0.03)
    assert not np.any(np.float32(got[3]))


def test_what_it_cannot_serve():
    [cache] = init_cache(ARCH, 2, CAPACITY, jnp.bfloat16).values()
    slots = View(cache, Window({}, CAPACITY), jnp.int32(0)).slots(2)
    assert "bfloat16, not in float32" in cached.refusal(1, 4, 64, jnp.float32, slots)
    assert "not 48" in cached.refusal(1, 4, 48, jnp.bfloat16, slots)
    assert "64 queries of a KV head, not 68" in cached.refusal(17, 4, 64, jnp.bfloat16, slots)
    odd = slots._replace(k=slots.k[:, :, :, :500])
    assert "multiple of 64 positions, not 500" in cached.refusal(1, 4, 64, jnp.bfloat16, odd)
