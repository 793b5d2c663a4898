"""Losses in chunks: any length of a chunk, and the same part of every device's positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.losses.tokens import over_chunks, pieces, token_logps
from nemojax.sharding import MeshConfig, make_mesh, use_mesh


@pytest.mark.parametrize("length, chunk, ways", [(12, 5, 1), (12, 4, 1), (12, 1, 4), (24, 7, 4), (7, 100, 1)])
def test_pieces_come_together_again(length, chunk, ways):
    split, join = pieces(length, chunk, ways)
    x = np.arange(2 * length * 3).reshape(2, length, 3)
    parts = split(jnp.asarray(x))
    assert parts.shape[2] <= max(chunk, ways) and parts.shape[2] % ways == 0
    np.testing.assert_array_equal(join(parts), x)
    # of every part of the row as many positions in each piece
    first = np.asarray(parts[0, 0, :, 0]).reshape(ways, -1) // 3 // (length // ways)
    assert (first == np.arange(ways)[:, None]).all()


def test_a_chunk_that_does_not_divide_gives_the_same_gradients():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 10, 4), (9, 4)]))
    targets = jnp.arange(20).reshape(2, 10) % 9

    def loss(x, w, chunk):
        logps, lse = token_logps(x, w, targets, chunk=chunk)
        return jnp.sum(logps * jnp.arange(10) + lse**2)

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    for a, b in zip(gradient(x, w, 3), gradient(x, w, 0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_chunk_moves_no_positions_between_the_devices_of_a_row():
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    with use_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "context"))
        x = jax.device_put(jnp.arange(2.0 * 16 * 3).reshape(2, 16, 3), place)
        fn = jax.jit(lambda x: over_chunks(lambda c: jnp.tanh(c).sum(-1), 8, x), out_shardings=place)
        compiled = fn.lower(x).compile()
        np.testing.assert_allclose(fn(x), np.tanh(x).sum(-1), rtol=1e-6)
    text = compiled.as_text() or ""
    for moved in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert moved not in text
