"""The distillation loss: nothing to learn from oneself, layers matched by global index, a frozen teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, BlockSpec, NoOp, SwiGLU, uniform
from nemojax.distill.losses import DistillWeights, distill_loss
from nemojax.model import llama

PARENT = uniform(vocab_size=32, dim=16, num_layers=3, num_heads=2, num_kv_heads=2, ffn_width=32, context=16)
CHILD = PARENT.replace(
    blocks=(PARENT.blocks[0], BlockSpec(NoOp(), NoOp()), BlockSpec(Attention(1), SwiGLU(16)))
)
KEY = jax.random.key(0)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (4, 9)).astype(np.int32)
    weights = (rng.random((4, 8)) < 0.5).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@pytest.fixture(scope="module")
def teacher():
    return llama.init_params(PARENT, jax.random.key(1))


@pytest.fixture(scope="module")
def student():
    return llama.init_params(CHILD, jax.random.key(2))


def test_a_model_has_nothing_to_learn_from_itself(teacher):
    loss, weight, metrics = distill_loss(PARENT, PARENT, DistillWeights())(teacher, teacher, batch(), KEY)
    assert weight == batch()["weights"].sum()
    assert abs(loss / weight) < 1e-5
    assert set(metrics) == {"kl", "cosine"}


def test_terms_equal_their_definitions(teacher, student):
    data = batch()
    weights = DistillWeights(kl=2.0, cosine=3.0, lm=0.5, temperature=2.0)
    loss, weight, metrics = distill_loss(CHILD, PARENT, weights)(student, teacher, data, KEY)
    s, s_taps = llama.apply(student, CHILD, data, taps=(0, 2))
    t, t_taps = llama.apply(teacher, PARENT, data, taps=(0, 2))
    w = data["weights"]
    p, q = jax.nn.log_softmax(t / 2), jax.nn.log_softmax(s / 2)
    kl = 4 * jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * w)
    # the child's last block stands beside the parent's third, not its second
    cosine = jnp.zeros(())
    for layer in (0, 2):
        a, b = s_taps[layer], t_taps[layer]
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        cosine += jnp.sum((1 - jnp.sum(a * b, -1) / norms) * w) / 2
    lm = -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(s), data["targets"][..., None], -1)[..., 0] * w)
    for name, value in (("kl", kl), ("cosine", cosine), ("lm", lm)):
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-4)
    np.testing.assert_allclose(loss, 2 * kl + 3 * cosine + 0.5 * lm, rtol=1e-4)
    assert weight == w.sum()


def test_chunks_change_nothing_but_rounding(teacher, student):
    def value(chunk):
        loss_fn = distill_loss(CHILD, PARENT, DistillWeights(lm=1.0), chunk=chunk)
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(p, teacher, batch(), KEY)[0]))(student)

    for a, b in zip(jax.tree.leaves(value(0)), jax.tree.leaves(value(2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_teacher(teacher, student):
    loss_fn = distill_loss(CHILD, PARENT, DistillWeights())
    grads = jax.grad(lambda t: loss_fn(student, t, batch(), KEY)[0])(teacher)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


def test_the_lm_loss_alone_needs_no_teacher(student):
    loss, _, metrics = distill_loss(CHILD, PARENT, DistillWeights(0.0, 0.0, 1.0))(student, None, batch(), KEY)
    assert set(metrics) == {"lm"} and jnp.isfinite(loss)


def test_teachers_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="vocab_size 32 as the student's, got 64"):
        distill_loss(CHILD, PARENT.replace(vocab_size=64), DistillWeights())
    with pytest.raises(ValueError, match="num_layers 3"):
        distill_loss(CHILD, PARENT.replace(blocks=PARENT.blocks[:2]), DistillWeights())
    with pytest.raises(ValueError, match="at least one above 0"):
        DistillWeights(0.0, 0.0, 0.0)
