"""Distances of hidden states, and which layers stand beside each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, BlockSpec, NoOp, SwiGLU, uniform
from nemojax.losses.hidden import cosine_distance, matched_layers, relative_error

FULL, EMPTY = BlockSpec(Attention(2), SwiGLU(8)), BlockSpec(NoOp(), NoOp())
FOUR = uniform(vocab_size=8, dim=4, num_layers=4, num_heads=2, num_kv_heads=2, ffn_width=8, context=8)
HOLED = FOUR.replace(blocks=(FULL, EMPTY, FULL, EMPTY))
TWO = FOUR.replace(blocks=(FULL, FULL))


def test_distances():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 2, 3, 4))
    cosine = 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(cosine_distance(jnp.asarray(s), jnp.asarray(t)), cosine, atol=1e-5)
    error = ((s - t) ** 2).sum(-1) / (t**2).sum(-1)
    np.testing.assert_allclose(relative_error(jnp.asarray(s), jnp.asarray(t)), error, rtol=1e-4)


@pytest.mark.parametrize(
    "student, layers, pairs",
    [
        (FOUR, "", ((0, 0), (1, 1), (2, 2), (3, 3))),
        (HOLED, "", ((0, 0), (2, 2))),
        (TWO, "0-1:0-1", ((0, 0), (1, 1))),
        (TWO, "0:1, 1:3", ((0, 1), (1, 3))),
        (HOLED, "1-2:2-3", ((2, 3),)),
    ],
)
def test_layers_are_matched(student, layers, pairs):
    assert matched_layers(student, FOUR, layers) == pairs


@pytest.mark.parametrize(
    "layers, message",
    [
        ("", "expected a teacher with num_layers 2 as the student's, got 4; say which"),
        ("0", "expected student's:teacher's as 4:6 or 0-3:0-3, got '0'"),
        ("0-1:0-2", "as many layers on both sides"),
        ("1-0:1-0", "at least one layer|at most once"),
        ("0:0,0:1", "every layer of the student at most once"),
        ("0:4", "below the teacher's 4, got 4"),
        ("2:0", "below the student's 2, got 2"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        matched_layers(TWO, FOUR, layers)
