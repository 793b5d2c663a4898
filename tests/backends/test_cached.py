"""The kernel of attention over a cache in place, interpreted, against attention over what is read of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, uniform
from nemojax.backends import cached
from nemojax.model import attention
from nemojax.model.attention import attend_cached, attend_read, make_context
from nemojax.model.cache import View, Window, init_cache, write
from nemojax.sharding import MeshConfig, make_mesh, use_mesh

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


def filled(dtype, positions_BT, rows_B, slots, capacity=CAPACITY):
    """A cache whose slots hold numbers everywhere, and new ones in its second layer."""
    [cache] = init_cache(ARCH, slots, capacity, jnp.dtype(dtype)).values()
    places = jnp.tile(jnp.arange(capacity), (slots, 1))
    for layer in range(3):
        new = {name: random(10 * layer + i, slots, capacity, 2, HEAD_DIM) for i, name in enumerate("kv")}
        cache = write(cache, new, jnp.arange(slots), places, jnp.int32(layer))
    new = {name: random(50 + i, *positions_BT.shape, 2, HEAD_DIM) for i, name in enumerate("kv")}
    return write(cache, new, rows_B, positions_BT, jnp.int32(1))


@pytest.mark.parametrize(
    "dtype, window, tokens, keys",
    [
        ("bfloat16", None, 1, CAPACITY),
        ("bfloat16", 100, 5, 256),
        ("int8", None, 5, CAPACITY),
        ("bfloat16", None, 40, CAPACITY),  # more queries than a tile has
        ("float8_e4m3fn", 100, 1, 208),  # of a cache of 400, in blocks of 16
    ],
)
def test_it_is_attention_over_what_is_read(dtype, window, tokens, keys):
    slots, rows_B = 6, jnp.array([4, 0, 3, 5])
    last_B1 = jnp.array([0, 64, keys - tokens, 130])[:, None]
    positions_BT = (last_B1 + jnp.arange(tokens)).at[3].set(FAR)  # an idle row
    cache = filled(dtype, positions_BT, rows_B, slots, CAPACITY if keys % 64 == 0 else 400)
    view = View({"run": cache}["run"], Window({}, keys, rows_B), jnp.int32(1))
    q_BTNH = random(99, 4, tokens, 8, HEAD_DIM)
    ctx, spec = make_context(ARCH, positions_BT), Attention(2, window)
    expected = attend_read(q_BTNH, *view.read(4, jnp.bfloat16), ctx, spec)
    places = view.slots(4)
    assert cached.refusal(HEAD_DIM, jnp.bfloat16, places) is None
    got = jax.jit(
        lambda q: cached.attend_slots(q, positions_BT, places, keys=keys, window=window, interpret=True)
    )(q_BTNH)
    # bf16 has 8 bits; both round what they read, the weights and the result to it
    np.testing.assert_allclose(np.float32(got[:3]), np.float32(expected[:3]), atol=0.03, rtol=0.03)
    assert not np.any(np.float32(got[3]))


@pytest.mark.parametrize(
    "config, rows_B, in_place",
    [
        (MeshConfig(fsdp=1, tensor=2), [3, 1, 0, 2], True),
        (MeshConfig(fsdp=4, tensor=2), None, True),
        (MeshConfig(fsdp=2), [3, 1, 0, 2], False),  # a device has not the slots of its rows
        (MeshConfig(fsdp=1, tensor=4), None, False),  # nor its heads' KV heads alone
    ],
)
def test_devices_read_slots_and_heads_of_their_own(monkeypatch, config, rows_B, in_place):
    called: list[int] = []

    def interpreted(*args, **kwargs):
        called.append(1)
        return attend_slots(*args, **kwargs, interpret=True)

    attend_slots = cached.attend_slots
    monkeypatch.setattr(cached, "attend_slots", interpreted)
    rows_B = None if rows_B is None else jnp.array(rows_B)
    positions_BT = jnp.array([[3], [200], [100], [254]]) + jnp.arange(2)
    with use_mesh(make_mesh(config, jax.devices()[: config.fsdp * config.tensor])):
        slots_B = jnp.arange(4) if rows_B is None else rows_B
        view = View(filled("bfloat16", positions_BT, slots_B, 4), Window({}, 256, rows_B), jnp.int32(1))
        q_BTNH, ctx, spec = random(99, 4, 2, 8, HEAD_DIM), make_context(ARCH, positions_BT), Attention(2)
        expected = jax.jit(lambda q: attend_cached(q, view, ctx, spec))(q_BTNH)
        assert not called
        monkeypatch.setattr(attention, "platform", lambda: "gpu")
        got = jax.jit(lambda q: attend_cached(q, view, ctx, spec))(q_BTNH)
    assert bool(called) == in_place
    np.testing.assert_allclose(np.float32(got), np.float32(expected), atol=0.03, rtol=0.03)


def test_what_it_cannot_serve():
    [cache] = init_cache(ARCH, 2, CAPACITY, jnp.bfloat16).values()
    slots = View(cache, Window({}, CAPACITY), jnp.int32(0)).slots(2)
    assert "bfloat16, not in float32" in str(cached.refusal(64, jnp.float32, slots))
    assert "not 48" in str(cached.refusal(48, jnp.bfloat16, slots))
    odd = slots._replace(k=slots.k[:, :, :, :500])
    assert "multiple of 16 positions, not 500" in str(cached.refusal(64, jnp.bfloat16, odd))
