"""Divergences of chunks against sums written out in f64, their gradients, and the same on every mesh."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.losses.divergence import Comparison, Head, TopK, top_k_of, vocab_loss
from nemojax.sharding import MeshConfig, make_mesh, use_mesh

B, T, D, V = 4, 12, 8, 24
WEIGHTS = {"kl": 1.0, "reverse_kl": 0.7, "jsd": 1.3, "lm": 0.5}


def make_head(seed: int, dim: int = D, vocab: int = V) -> Head:
    k_x, k_w = jax.random.split(jax.random.key(seed))
    return Head(jax.random.normal(k_x, (B, T, dim)), 0.7 * jax.random.normal(k_w, (vocab, dim)))


STUDENT, TEACHER, OTHER = make_head(0), make_head(1, 12), make_head(2, 6)
RNG = np.random.default_rng(0)
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
POSITIONS = jnp.asarray((RNG.random((B, T)) < 0.7) * RNG.uniform(0.5, 2.0, (B, T)), jnp.float32)

CASES = {
    "plain": ({}, [TEACHER], (1.0,)),
    "warm": ({"temperature": 2.0, "beta": 0.1}, [TEACHER], (1.0,)),
    "beta 0": ({"beta": 0.0}, [TEACHER], (1.0,)),
    "beta 1": ({"beta": 1.0}, [TEACHER], (1.0,)),
    "top 3": ({"top_k": 3, "temperature": 0.5}, [TEACHER], (1.0,)),
    "mixed": ({"beta": 0.9}, [TEACHER, OTHER], (0.25, 0.75)),
    "mixed, top 5": ({"top_k": 5}, [TEACHER, OTHER], (0.25, 0.75)),
    "shared": ({"shared": 19, "top_k": 4}, [make_head(3, vocab=21), make_head(4, vocab=32)], (0.4, 0.6)),
    "by entropy": ({"weighting": "entropy"}, [TEACHER], (1.0,)),
    "by confidence": ({"weighting": "confidence", "top_k": 3}, [TEACHER], (1.0,)),
}


def expected(xp: Any, student, teachers, shares, how, positions) -> Any:
    """(loss, sums) from logits that all exist at once; `xp` is numpy in f64 or jax.numpy."""

    def probabilities(head, n):
        logits = (xp.asarray(head[0]) @ xp.asarray(head[1]).T)[..., :n] / how.temperature
        logits = logits - xp.max(logits, axis=-1, keepdims=True)
        return xp.exp(logits) / xp.sum(xp.exp(logits), axis=-1, keepdims=True)

    n = how.shared or V
    p: Any = sum(s * probabilities(t, n) for s, t in zip(shares, teachers, strict=True))
    q = probabilities(student, n)
    agreement = xp.argmax(p, axis=-1) == xp.argmax(q, axis=-1)
    confidence = xp.max(p, axis=-1)
    if how.top_k:
        best = xp.argsort(-p, axis=-1)[..., : how.top_k]
        p, q = (xp.take_along_axis(a, best, axis=-1) for a in (p, q))
        p, q = (xp.concatenate([a, 1 - xp.sum(a, axis=-1, keepdims=True)], axis=-1) for a in (p, q))
    m = how.beta * p + (1 - how.beta) * q

    def kl(a, b):
        return xp.sum(a * xp.log(a / b), axis=-1)

    jsd = how.beta * kl(p, m) + (1 - how.beta) * kl(q, m)
    jsd = {0.0: kl(p, q), 1.0: kl(q, p)}.get(how.beta, jsd)
    values = {"kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": jsd}
    values = {name: value * how.temperature**2 for name, value in values.items()}
    logits = xp.asarray(student[0]) @ xp.asarray(student[1]).T
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    logps = logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))
    values["lm"] = -xp.take_along_axis(logps, xp.asarray(TARGETS)[..., None], axis=-1)[..., 0]
    values["teacher_entropy"] = entropy = -xp.sum(p * xp.log(p), axis=-1)
    scale = {"uniform": 1.0, "entropy": entropy / math.log(p.shape[-1]), "confidence": confidence}
    terms = {name: v * (1 if name == "lm" else scale[how.weighting]) for name, v in values.items()}
    loss = sum(w * xp.sum(terms[name] * positions) for name, w in WEIGHTS.items())
    values["agreement"] = agreement
    return loss, {name: xp.sum(value * positions) for name, value in values.items()}


def f64(heads):
    return [tuple(np.asarray(a, np.float64) for a in head) for head in heads]


def chunked(student, teachers, shares, how, chunk):
    return vocab_loss(
        student, teachers, WEIGHTS, POSITIONS, targets_BT=TARGETS, how=how, shares=shares, chunk=chunk
    )


def value_and_gradient(teachers, shares, how, chunk):
    fn = jax.value_and_grad(lambda s: chunked(s, teachers, shares, how, chunk), has_aux=True)
    return jax.jit(fn)


def check_gradient(got, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_definitions(name):
    options, teachers, shares = CASES[name]
    how = Comparison(**options)
    positions = np.asarray(POSITIONS, np.float64)
    student, *others = f64([STUDENT, *teachers])
    wanted, sums = expected(np, student, others, shares, how, positions)
    # 5 does not divide 12: three chunks of 4
    (loss, got), gradient = value_and_gradient(teachers, shares, how, 5)(STUDENT)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert set(got) == set(sums)
    for term, value in sums.items():
        assert float(got[term]) == pytest.approx(value, rel=1e-5), term

    with jax.enable_x64(True):
        inputs = [Head(*(jnp.asarray(a) for a in head)) for head in f64([STUDENT, *teachers])]

        def straightforward(student):
            return expected(jnp, student, inputs[1:], shares, how, positions)[0]

        exact = jax.device_get(jax.jit(jax.grad(straightforward))(inputs[0]))
    check_gradient(gradient, exact)


def test_no_term_is_counted_that_has_no_weight_and_none_in_vain():
    loss, sums = vocab_loss(STUDENT, [], {"lm": 2.0}, POSITIONS, targets_BT=TARGETS)
    assert set(sums) == {"lm"} and float(loss) == pytest.approx(2 * float(sums["lm"]))
    half = POSITIONS * (np.arange(T) < 6)
    _, both = vocab_loss(
        STUDENT, [TEACHER], {"lm": 0.0, "kl": 1.0}, POSITIONS, targets_BT=TARGETS, compared_BT=half
    )
    _, of_half = vocab_loss(STUDENT, [TEACHER], {"kl": 1.0}, half)
    assert float(both["lm"]) == pytest.approx(float(sums["lm"]))
    assert float(both["kl"]) == pytest.approx(float(of_half["kl"]))


@pytest.mark.parametrize("limit", ["kl", "reverse_kl"])
def test_the_jsd_tends_to_either_kl(limit):
    beta = 1e-3 if limit == "kl" else 1 - 1e-3
    student, teacher = (Head(head.x_BTD, 0.3 * head.w_VD) for head in (STUDENT, TEACHER))
    terms = {"jsd": 1.0, limit: 0.0}
    _, sums = vocab_loss(student, [teacher], terms, POSITIONS, how=Comparison(beta=beta))
    assert float(sums["jsd"]) / min(beta, 1 - beta) == pytest.approx(float(sums[limit]), rel=0.02)


def test_the_cache_of_a_teacher_is_as_good_as_the_teacher():
    how, teachers, shares = Comparison(top_k=5, temperature=2.0), [TEACHER, OTHER], (0.25, 0.75)
    kept = jax.jit(lambda t: top_k_of(t, how=Comparison(top_k=7, temperature=2.0), shares=shares, chunk=5))(
        teachers
    )
    logits = [np.asarray(t.x_BTD @ t.w_VD.T, np.float64) / 2 for t in teachers]
    p: Any = sum(
        s * np.exp(z) / np.exp(z).sum(-1, keepdims=True) for s, z in zip(shares, logits, strict=True)
    )
    order = np.argsort(-p, axis=-1)[..., :7]
    np.testing.assert_array_equal(kept.ids_BTK, order)
    np.testing.assert_allclose(kept.logps_BTK, np.log(np.take_along_axis(p, order, -1)), atol=1e-5)
    online = value_and_gradient(teachers, shares, how, 4)(STUDENT)
    # the first 5 of 7 that are cached; here the tail is large enough to follow from the others too
    for cached in (kept, kept._replace(tail_BT=None)):
        offline = value_and_gradient(cached, shares, how, 4)(STUDENT)
        for a, b in zip(jax.tree.leaves(online[0]), jax.tree.leaves(offline[0]), strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-5)
        check_gradient(offline[1], online[1])
    rough = kept._replace(logps_BTK=kept.logps_BTK.astype(jnp.bfloat16))
    (loss, _), _ = value_and_gradient(rough, shares, how, 4)(STUDENT)
    assert float(loss) == pytest.approx(float(online[0][0]), rel=0.01)
    # a distribution still: its divergence from itself is nothing
    itself = Head(jnp.asarray(np.log(spread_out(rough)), jnp.float32), jnp.eye(V))
    _, sums = vocab_loss(itself, rough, {"kl": 1.0}, POSITIONS, how=Comparison(top_k=7))
    assert abs(float(sums["kl"])) < 1e-4


def spread_out(kept: TopK) -> Any:
    """Probabilities [B, T, V] of kept outcomes, normalised; the tail in equal parts for all others."""
    p = np.full(
        (B, T, V), np.exp(np.asarray(kept.tail(), np.float64))[..., None] / (V - kept.ids_BTK.shape[-1])
    )
    np.put_along_axis(p, np.asarray(kept.ids_BTK), np.exp(np.asarray(kept.logps_BTK, np.float64)), -1)
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 1, 1, 4), (1, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["plain", "shared"])
def test_a_mesh_changes_nothing(name, sizes):
    options, teachers, shares = CASES[name]
    how = Comparison(**options)
    one = value_and_gradient(teachers, shares, how, 6)(STUDENT)
    mesh = make_mesh(MeshConfig(*sizes))
    with use_mesh(mesh):  # 4 rows over 8 devices of fsdp: none is split, and all have the whole
        put = jax.device_put(STUDENT.w_VD, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
        many = value_and_gradient(teachers, shares, how, 6)(Head(STUDENT.x_BTD, put))
    many = jax.device_get(many)
    for a, b in zip(jax.tree.leaves(many[0]), jax.tree.leaves(one[0]), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-5)
    check_gradient(many[1], one[1])


def test_the_matrix_crosses_devices_before_the_chunks_and_its_gradient_after_them():
    student, teacher = make_head(0, 40), make_head(1, 40)
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    with use_mesh(mesh):

        def placed(*spec) -> Any:
            return jax.NamedSharding(mesh, jax.P(*spec))

        head: Any = Head(placed(("data", "fsdp"), "context"), placed("tensor", "fsdp"))
        fn = jax.grad(lambda s, t: vocab_loss(s, [t], {"kl": 1.0}, POSITIONS, chunk=4)[0])
        text = jax.jit(fn, in_shardings=(head, head), out_shardings=head).lower(student, teacher).compile()
    found = re.findall(r"^(ENTRY )?%?[\w.\-]+ .*?\{\n(.*?)^\}", text.as_text() or "", re.M | re.S)
    moved = {"before or after": set(), "in chunks": set()}
    for entry, body in found:
        for shape, name in re.findall(
            r"= \(?f32\[([\d,]*)\].* (all-gather|all-reduce|reduce-scatter)\(", body
        ):
            moved["before or after" if entry else "in chunks"].add((name, shape))
    # a device's matrix is [12, 20], [12, 40] once gathered; its chunk has 2 rows and 2 positions
    assert ("all-gather", "12,40") in moved["before or after"]
    assert any(shape in ("12,40", "12,20") for name, shape in moved["before or after"] if "reduce" in name)
    assert moved["in chunks"] and not {shape for _, shape in moved["in chunks"]} & {"12,40", "12,20"}


def test_a_mesh_selects_the_same_outcomes():
    how = Comparison(top_k=9)  # more than the 6 ids of a device
    one = top_k_of([TEACHER], how=how)
    with use_mesh(make_mesh(MeshConfig(1, 2, 1, 4))):
        many = jax.jit(lambda t: top_k_of(t, how=how, chunk=5))([TEACHER])
    np.testing.assert_array_equal(many.ids_BTK, one.ids_BTK)
    np.testing.assert_allclose(many.logps_BTK, one.logps_BTK, atol=1e-5)


def test_gradients_scale_with_what_follows_and_end_at_the_teacher():
    def after(student, teacher):
        return 3 * vocab_loss(student, [teacher], {"kl": 1.0}, POSITIONS, chunk=6)[0]

    once = jax.grad(lambda s: vocab_loss(s, [TEACHER], {"kl": 1.0}, POSITIONS)[0])(STUDENT)
    thrice, of_teacher = jax.grad(after, argnums=(0, 1))(STUDENT, TEACHER)
    check_gradient(thrice, jax.tree.map(lambda g: 3 * g, once))
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(of_teacher))


def test_in_bfloat16_gradients_come_near_those_in_f32():
    def low(tree):
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)

    how, student, teacher = Comparison(), low(STUDENT), low(TEACHER)
    _, near = value_and_gradient([teacher], (1.0,), how, 3)(student)
    assert near.w_VD.dtype == near.x_BTD.dtype == jnp.bfloat16
    up = jax.tree.map(lambda a: a.astype(jnp.float32), (student, teacher))
    _, exact = value_and_gradient([up[1]], (1.0,), how, 3)(up[0])
    check_gradient(jax.tree.map(lambda a: a.astype(jnp.float32), near), exact, 0.01)


@pytest.mark.parametrize(
    "teacher, how, message",
    [
        ([make_head(5, vocab=20)], {}, "expected a teacher of 24 tokens as the student's, got 20"),
        ([make_head(5, vocab=20)], {"shared": 22}, "at most the 20 of the smaller vocabulary, got 22"),
        ([TEACHER], {"top_k": 24}, "top_k: expected less than the 24 ids compared, got 24"),
        ([TEACHER], {"top_k": 9, "shared": 9}, "top_k: expected less than the 9 ids compared, got 9"),
        (TopK(jnp.zeros((B, T, 3), jnp.int32), jnp.zeros((B, T, 3))), {}, "expected 1 to 3.* got 0"),
        (TopK(jnp.zeros((B, T, 3), jnp.int32), jnp.zeros((B, T, 3))), {"top_k": 4}, "1 to 3.* got 4"),
    ],
)
def test_what_cannot_be_compared_is_refused(teacher, how, message):
    with pytest.raises(ValueError, match=message):
        vocab_loss(STUDENT, teacher, {"kl": 1.0}, POSITIONS, how=Comparison(**how))
