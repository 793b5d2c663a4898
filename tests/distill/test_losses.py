"""The distillation loss: nothing to learn from oneself, layers matched by global index, frozen teachers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, uniform
from nemojax.config import from_dict
from nemojax.distill.losses import (
    DistillWeights,
    Ramp,
    Teacher,
    TokenTerms,
    distill_loss,
    teacher_top_k,
)
from nemojax.model import llama
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh

PARENT = uniform(vocab_size=32, dim=16, num_layers=3, num_heads=2, num_kv_heads=2, ffn_width=32, context=16)
CHILD = PARENT.replace(
    blocks=(PARENT.blocks[0], BlockSpec(NoOp(), NoOp()), BlockSpec(Attention(1), SwiGLU(16)))
)
OTHER = PARENT.replace(blocks=(BlockSpec(Linear(), SwiGLU(16)), *PARENT.blocks[1:]))
SHORT = PARENT.replace(blocks=(PARENT.blocks[0], BlockSpec(NoOp(), SwiGLU(32))))
WIDER = PARENT.replace(vocab_size=36)  # four added tokens
KEY = jax.random.key(0)


def batch(vocab: int = 32):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (4, 9)).astype(np.int32)
    weights = (rng.random((4, 8)) < 0.5).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


ARCHS = {"teacher": PARENT, "student": CHILD, "other": OTHER, "short": SHORT, "wider": WIDER}


def random_params(arch: ArchSpec, seed: int) -> Any:
    """Drawn on the host: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = {"norm", "scale"} & {str(key.key) for key in path[-1:]}
        return jnp.asarray(rng.normal(1.0 if scale else 0.0, 0.25, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, llama.abstract_params(arch))


@pytest.fixture(scope="module")
def models():
    return {name: random_params(arch, i) for i, (name, arch) in enumerate(ARCHS.items())}


@pytest.fixture(scope="module")
def teacher(models):
    return models["teacher"]


@pytest.fixture(scope="module")
def student(models):
    return models["student"]


@pytest.fixture(scope="module")
def other(models):
    return models["other"]


def run(loss_fn, params, frozen, data):
    return jax.jit(loss_fn)(params, frozen, data, KEY)


def apply(params, arch, data, taps=()) -> Any:
    """(logits, taps); a dict of both kinds of taps cannot leave a program, as their names have no order."""

    def fn(params, data):
        logits, tapped = llama.apply(params, arch, data, taps=taps)
        return logits, [tapped[tap] for tap in taps]

    logits, tapped = jax.jit(fn)(params, data)
    return logits, dict(zip(taps, tapped, strict=True))


def cos(a, b):
    return jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)


def test_a_model_has_nothing_to_learn_from_itself(teacher):
    loss, weight, metrics = run(distill_loss(PARENT, PARENT, DistillWeights()), teacher, teacher, batch())
    assert weight == batch()["weights"].sum()
    assert abs(loss / weight) < 1e-5
    assert set(metrics) == {"kl", "cosine", "teacher_entropy", "agreement"}
    assert metrics["agreement"][0] == weight


def test_terms_equal_their_definitions(teacher, student):
    data = batch()
    weights = DistillWeights(kl=2.0, cosine=3.0, lm=0.5, temperature=2.0, mse=0.7, attention=1.5)
    loss, weight, metrics = run(distill_loss(CHILD, PARENT, weights), student, teacher, data)
    taps = (0, 2, ("attn", 0), ("attn", 2))
    s, s_taps = apply(student, CHILD, data, taps=taps)
    t, t_taps = apply(teacher, PARENT, data, taps=taps)
    w = data["weights"]
    p, q = jax.nn.log_softmax(t / 2), jax.nn.log_softmax(s / 2)
    kl = 4 * jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * w)
    # the child's last block stands beside the parent's third, not its second
    cosine = sum(jnp.sum((1 - cos(s_taps[i], t_taps[i])) * w) / 2 for i in (0, 2))
    mse = sum(
        jnp.sum(jnp.sum((s_taps[i] - t_taps[i]) ** 2, -1) / jnp.sum(t_taps[i] ** 2, -1) * w) / 2
        for i in (0, 2)
    )
    attention = sum(jnp.sum((1 - cos(s_taps["attn", i], t_taps["attn", i])) * w) / 2 for i in (0, 2))
    lm = -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(s), data["targets"][..., None], -1)[..., 0] * w)
    values = {"kl": kl, "cosine": cosine, "lm": lm, "mse": mse, "attention": attention}
    for name, value in values.items():
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-4)
    np.testing.assert_allclose(loss, 2 * kl + 3 * cosine + 0.5 * lm + 0.7 * mse + 1.5 * attention, rtol=1e-4)
    assert weight == w.sum() == metrics["mse"][1]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_tap_of_attention_is_what_it_adds(other, remat):
    """The stream after a layer whose feed-forward is gone, less the stream before it."""
    arch = PARENT.replace(blocks=(OTHER.blocks[0], BlockSpec(Attention(2), NoOp())))
    params = {**other, "runs": dict(other["runs"])}
    params["runs"]["001"] = {"attn": jax.tree.map(lambda w: w[:1], other["runs"]["001"]["attn"])}
    compute = llama.Compute(remat=remat)
    tapped: tuple[llama.Tap, ...] = (0, 1, ("attn", 1))

    def fn(params):
        taps = llama.hidden(params, arch, batch(), taps=tapped, compute=compute)[1]
        return [taps[tap] for tap in tapped]

    before, after, added = jax.jit(fn)(params)
    np.testing.assert_allclose(added, after - before, atol=1e-5)


def test_mesh_and_chunks_change_nothing_but_rounding(teacher, student):
    data = batch() | {
        "segments": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
    }
    weights = DistillWeights(lm=1.0, reverse_kl=1.0, attention=1.0)

    def value(mesh, chunk):
        loss_fn = distill_loss(CHILD, PARENT, weights, chunk=chunk)
        with use_mesh(mesh):
            own = jax.device_put(student, llama.param_shardings(CHILD, mesh))
            theirs = jax.device_put(teacher, llama.param_shardings(PARENT, mesh))
            fn = jax.jit(jax.value_and_grad(lambda p, t, b: loss_fn(p, t, b, KEY)[0]))
            return jax.device_get(fn(own, theirs, place_batch(data, mesh)))

    one = value(make_mesh(MeshConfig(), jax.devices()[:1]), 0)
    many = value(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2)), 6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), 1e-3)


def test_no_gradient_reaches_the_teacher(teacher, student):
    loss_fn = distill_loss(CHILD, PARENT, DistillWeights())
    grads = jax.jit(jax.grad(lambda t: loss_fn(student, t, batch(), KEY)[0]))(teacher)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


def test_the_lm_loss_alone_needs_no_teacher(student):
    loss, _, metrics = run(distill_loss(CHILD, PARENT, DistillWeights(0.0, 0.0, 1.0)), student, None, batch())
    assert set(metrics) == {"lm"} and jnp.isfinite(loss)
    with pytest.raises(ValueError, match="the parameters of 1 teachers, got 0"):
        run(distill_loss(CHILD, PARENT, DistillWeights()), student, None, batch())


def test_several_teachers_are_mixed(teacher, other, student):
    data, weights = batch(), DistillWeights(kl=1.0, cosine=2.0)
    everyone = [Teacher(PARENT, 3.0), Teacher(OTHER, 1.0, llama.Compute(remat="full"))]
    loss, _, metrics = run(distill_loss(CHILD, everyone, weights), student, (teacher, other), data)
    (s, s_taps), (t, t_taps), (o, o_taps) = (
        apply(p, arch, data, taps=(0, 2)) for p, arch in ((student, CHILD), (teacher, PARENT), (other, OTHER))
    )
    p = 0.75 * jax.nn.softmax(t) + 0.25 * jax.nn.softmax(o)
    kl = jnp.sum(jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(s)), -1) * data["weights"])
    np.testing.assert_allclose(metrics["kl"][0], kl, rtol=1e-4)
    cosine = sum(
        share * jnp.sum((1 - cos(s_taps[i], taps[i])) * data["weights"]) / 2
        for share, taps in ((0.75, t_taps), (0.25, o_taps))
        for i in (0, 2)
    )
    np.testing.assert_allclose(metrics["cosine"][0], cosine, rtol=1e-4)
    np.testing.assert_allclose(loss, kl + 2 * cosine, rtol=1e-4)
    with pytest.raises(ValueError, match="the parameters of 2 teachers, got 1"):
        run(distill_loss(CHILD, everyone, weights), student, teacher, data)


def test_a_cache_is_as_good_as_the_teacher_it_is_of(teacher, other, student):
    everyone = [Teacher(PARENT, 0.6), Teacher(OTHER, 0.4)]
    weights = DistillWeights(cosine=0.0, reverse_kl=0.5, jsd=0.5, lm=0.1, temperature=2.0, top_k=4)
    tell = teacher_top_k(everyone, dataclasses.replace(weights, top_k=6), chunk=3)
    told = jax.jit(tell)((teacher, other), batch())
    assert told["teacher_ids"].shape == told["teacher_logps"].shape == (4, 8, 6)
    loss_fn = distill_loss(CHILD, everyone, weights, chunk=4)

    def value(frozen, data):
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(p, frozen, data, KEY)[0]))(student)

    online, offline = value((teacher, other), batch()), value(None, batch() | told)
    for a, b in zip(jax.tree.leaves(online), jax.tree.leaves(offline), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), 1e-3)
    # hidden terms beside a cache: one teacher runs for these alone
    mixed = DistillWeights(cosine=1.0, top_k=4)
    loss_fn = distill_loss(CHILD, PARENT, mixed)
    _, _, metrics = jax.eval_shape(loss_fn, student, teacher, batch() | told, KEY)
    assert {"kl", "cosine"} <= set(metrics)
    with pytest.raises(ValueError, match="top_k: expected 1 to 6"):
        run(distill_loss(CHILD, PARENT, DistillWeights(cosine=0.0)), student, None, batch() | told)


def test_a_shorter_student_says_which_layers_are_its_own(models, teacher):
    params = models["short"]
    weights = DistillWeights(kl=0.0, cosine=1.0, attention=1.0, layers="0:0,1:2")
    data = batch()
    loss, _, metrics = run(distill_loss(SHORT, PARENT, weights), params, teacher, data)
    _, s = apply(params, SHORT, data, taps=(0, 1, ("attn", 0)))
    _, t = apply(teacher, PARENT, data, taps=(0, 2, ("attn", 0)))
    cosine = sum(jnp.sum((1 - cos(s[i], t[j])) * data["weights"]) / 2 for i, j in ((0, 0), (1, 2)))
    # the second layer has no attention: the first one's is the mean
    attention = jnp.sum((1 - cos(s["attn", 0], t["attn", 0])) * data["weights"])
    np.testing.assert_allclose(metrics["cosine"][0], cosine, rtol=1e-4)
    np.testing.assert_allclose(metrics["attention"][0], attention, rtol=1e-4)
    # without hidden terms the number of layers is no matter
    distill_loss(SHORT, PARENT, DistillWeights(cosine=0.0))


def test_added_tokens_are_left_out(models, teacher):
    params, data = models["wider"], batch(36)
    weights = DistillWeights(cosine=0.0, lm=1.0, tokens=TokenTerms(shared=32))
    assert (data["tokens"] >= 32).any()
    loss_fn = distill_loss(WIDER, PARENT, weights)
    _, weight, metrics = run(loss_fn, params, teacher, data)
    known = data["tokens"] < 32
    assert weight == data["weights"].sum() and metrics["lm"][1] == weight
    assert metrics["kl"][1] == (data["weights"] * known).sum() < weight
    s, _ = apply(params, WIDER, data)
    t, _ = apply(teacher, PARENT, data | {"tokens": np.where(known, data["tokens"], 0)})
    p, q = jax.nn.log_softmax(t), jax.nn.log_softmax(s[..., :32])
    kl = jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1) * data["weights"] * known)
    np.testing.assert_allclose(metrics["kl"][0], kl, rtol=1e-4)


def test_weights_follow_their_ramps(teacher, student):
    ramps = (
        Ramp("kl", 0.0, last=10),
        Ramp("lm", 2.0, first=10, last=20, shape="cosine"),
    )
    weights = DistillWeights(kl=1.0, cosine=0.5, ramps=ramps)
    assert weights.terms == ("kl", "lm", "cosine")
    found = [{k: float(v) for k, v in weights.at(jnp.int32(step)).items()} for step in (0, 5, 10, 15, 30)]
    assert found == [
        pytest.approx({"kl": kl, "lm": lm, "cosine": 0.5})
        for kl, lm in ((1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.0, 1.0), (0.0, 2.0))
    ]
    loss_fn = distill_loss(CHILD, PARENT, weights)
    at = jax.jit(lambda b: loss_fn(student, teacher, b, KEY))
    for step, kl, lm in ((0, 1.0, 0.0), (15, 0.0, 1.0)):
        loss, _, terms = at(batch() | {"step": jnp.int32(step)})
        value = kl * terms["kl"][0] + lm * terms["lm"][0] + 0.5 * terms["cosine"][0]
        np.testing.assert_allclose(loss, value, rtol=1e-5)
    told = {"ramps": [{"term": "lm", "to": 1.0, "last": 5}], "tokens": {"beta": 0.1}, "jsd": 1.0}
    built = from_dict(DistillWeights, told)
    assert built.ramps[0].shape == "linear" and built.tokens.beta == 0.1


def test_teachers_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="vocab_size 32 as the student's, got 64; if only added"):
        distill_loss(CHILD, PARENT.replace(vocab_size=64), DistillWeights())
    with pytest.raises(ValueError, match="at most the 32 ids of the smallest vocabulary, got 40"):
        distill_loss(CHILD, WIDER, DistillWeights(tokens=TokenTerms(shared=40)))
    with pytest.raises(ValueError, match="dim 16 as the student's, got 32; or set cosine to 0"):
        distill_loss(CHILD, PARENT.replace(dim=32), DistillWeights())
    with pytest.raises(ValueError, match="num_layers 3"):
        distill_loss(CHILD, PARENT.replace(blocks=PARENT.blocks[:2]), DistillWeights())
    with pytest.raises(ValueError, match=r"top_k: expected less than the 32 ids compared, got 32"):
        distill_loss(CHILD, PARENT, DistillWeights(top_k=32))
    without = CHILD.replace(blocks=(BlockSpec(NoOp(), SwiGLU(16)),) * 3)
    with pytest.raises(ValueError, match=r"loss\.attention: expected layers to compare, got none"):
        distill_loss(without, PARENT, DistillWeights(attention=1.0))
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        distill_loss(CHILD, [], DistillWeights())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kl": 0.0, "cosine": 0.0}, "at least one above 0"),
        ({"kl": -1.0}, "expected weights >= 0"),
        ({"ramps": (Ramp("kl", -1.0, last=5),)}, "expected weights >= 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0"),
        ({"top_k": -1}, "top_k: expected 0 or more"),
        ({"ramps": (Ramp("kl", 1.0, last=5),) * 2}, "ramps: expected at most one of each"),
    ],
)
def test_weights_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DistillWeights(**values)


def test_parts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="first < last for kl, got 5 and 5"):
        Ramp("kl", 1.0, first=5, last=5)
    with pytest.raises(ValueError, match="beta: expected 0 to 1, got 2"):
        TokenTerms(beta=2)
    with pytest.raises(ValueError, match="shared: expected 0 or more ids, got -1"):
        TokenTerms(shared=-1)
    with pytest.raises(ValueError, match="expected a share above 0, got 0"):
        Teacher(PARENT, 0.0)
    with pytest.raises(ValueError, match=r"loss\.top_k: expected 1 or more"):
        teacher_top_k(PARENT, DistillWeights())
