"""Attention in pairs of blocks against plain attention: values, gradients, work and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, uniform
from nemojax.model import attention
from nemojax.model.attention import attend_packed, make_context, masked_attention
from nemojax.model.blockwise import Places, Tiles, attend_blockwise, block_size, visible

LENGTH, BLOCK, HEADS, KV_HEADS, DIM = 90, 16, 4, 2, 8  # the last block of a row is shorter than the others


def places(rows: list[list[int]], length: int = LENGTH) -> Places:
    """Rows of documents of these sizes; the rest is padding."""
    segments, positions = np.zeros((2, len(rows), length), np.int32)
    for row, sizes in enumerate(rows):
        start = 0
        for number, size in enumerate(sizes, 1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    return Places(jnp.asarray(segments), jnp.asarray(positions))


ROWS = places([[LENGTH], [33, 2, 1, 40]])


def inputs(dtype=jnp.float32, length=LENGTH):
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return tuple(
        jax.random.normal(jax.random.key(i), (2, length, n, DIM)).astype(dtype) for i, n in enumerate(heads)
    )


def plain(q, k, v, at: Places, window: int | None):
    back_BTS = at.positions[:, :, None] - at.positions[:, None]
    mask_BTS = (
        (at.segments[:, :, None] == at.segments[:, None]) & (at.segments[:, None] > 0) & (back_BTS >= 0)
    )
    mask_BTS &= back_BTS < (window or LENGTH)
    return masked_attention(q, k, v, mask_BTS) * (at.segments > 0)[..., None, None]


@functools.partial(jax.jit, static_argnames=("attend",))
def value_and_grads(attend, q, k, v, d):
    out, vjp = jax.vjp(attend, q, k, v)
    return (out, *vjp(d))


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("window", [None, 20])
def test_values_and_gradients_are_those_of_plain_attention(window):
    q, k, v, d = inputs()
    d = d * (ROWS.segments > 0)[..., None, None]
    want = value_and_grads(lambda q, k, v: plain(q, k, v, ROWS, window), q, k, v, d)
    ours = functools.partial(attend_blockwise, window=window, block=BLOCK)
    close(value_and_grads(lambda q, k, v: ours(q, k, v, ROWS, ROWS), q, k, v, d), want, 2e-6)

    # columns in any order, keys in another one than queries, are the same attention
    rng = np.random.default_rng(0)
    order, other = rng.permutation(LENGTH), rng.permutation(LENGTH)
    queries, keys = (Places(*(x[:, o] for x in ROWS)) for o in (order, other))
    got = value_and_grads(
        lambda q, k, v: ours(q, k, v, queries, keys), q[:, order], k[:, other], v[:, other], d[:, order]
    )
    back = [x[:, np.argsort(o)] for x, o in zip(got, (order, order, other, other), strict=True)]
    close(back, want, 2e-6)


def test_bf16_is_as_near_as_plain_bf16():
    exact = value_and_grads(lambda q, k, v: plain(q, k, v, ROWS, None), *inputs())
    q, k, v, d = inputs(jnp.bfloat16)
    got = value_and_grads(lambda q, k, v: attend_blockwise(q, k, v, ROWS, ROWS, block=BLOCK), q, k, v, d)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    close([np.asarray(x, np.float32) for x in got], exact, 0.03)


def test_long_rows_take_this_path_and_short_ones_agree_with_it(monkeypatch):
    arch = uniform(
        vocab_size=8,
        dim=32,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        ffn_width=8,
        context=LENGTH,
    )
    ctx = make_context(arch, ROWS.positions, ROWS.segments)
    q, k, v, _ = inputs()
    short = attend_packed(q, k, v, ctx, Attention(KV_HEADS))
    monkeypatch.setattr(attention, "tiles", lambda: Tiles(BLOCK, LENGTH))
    long = attend_packed(q, k, v, ctx, Attention(KV_HEADS))
    real = np.asarray(ROWS.segments > 0)
    np.testing.assert_allclose(long[real], short[real], atol=2e-6)
    assert not np.asarray(long)[~real].any()


def pairs(rows: list[list[int]], length: int, block: int, window: int | None = None) -> list[int]:
    at = Places(*(x.reshape(-1, block) for x in places(rows, length)))
    return visible(at, at, len(rows), window).sum((1, 2)).tolist()


def test_only_pairs_that_see_each_other_are_visited():
    assert pairs([[1024]], 1024, 32) == [32 * 33 // 2]
    assert pairs([[256] * 4, [512, 512], [100]], 1024, 32) == [4 * 36, 2 * 136, 4 * 5 // 2]
    assert pairs([[1] * 64], 64, 16) == [4]  # documents end with blocks
    assert pairs([[24, 24, 16]], 64, 16) == [6]
    assert pairs([[1024]], 1024, 32, window=32) == [32 + 31]
    assert pairs([[1024]], 1024, 32, window=34) == [32 + 31 + 30]
    assert pairs([[512, 512]], 1024, 32, window=1) == [32]
    assert pairs([[]], 64, 16) == [0]


def test_blocks_are_equal_and_few():
    assert [block_size(n, 512) for n in (1, 512, 513, 1024, 1500, 16384)] == [1, 512, 257, 512, 500, 512]


def largest(jaxpr) -> int:
    """Elements of the largest array of a program and of all programs in it."""
    sizes = [
        v.aval.size for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "size")
    ]
    inner = [
        largest(getattr(sub, "jaxpr", sub))
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for sub in (value if isinstance(value, tuple | list) else [value])
        if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns")
    ]
    return max([*sizes, *inner, 0])


def test_no_array_grows_with_the_square_of_the_length():
    def biggest(length):
        at = places([[length], [length]], length)
        made = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length=128))
        q, k, v, d = (jax.ShapeDtypeStruct((2, length, *x.shape[2:]), x.dtype) for x in made)
        attend = lambda q, k, v: attend_blockwise(q, k, v, at, at, block=32)  # noqa: E731
        return largest(jax.make_jaxpr(lambda *a: jax.vjp(attend, *a[:3])[1](a[3]))(q, k, v, d).jaxpr)

    assert biggest(4096) == 4 * biggest(1024) == 2 * 4096 * HEADS * DIM
