"""The GRPO loss against numbers worked by hand, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.losses.policy import PolicyLossConfig, clipped_objective, k3, policy_terms
from nemojax.model.llama import init_params
from nemojax.rl.loss import grpo_loss, policy_logps
from nemojax.sharding import MeshConfig, make_mesh, use_mesh

ARCH = uniform(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32, context=32)


def objective(ratio, advantage, **cfg):
    loss, _, _ = clipped_objective(
        jnp.log(jnp.array(ratio)), jnp.array(0.0), jnp.array(advantage), PolicyLossConfig(**cfg)
    )
    return float(loss)


@pytest.mark.parametrize(
    "ratio, advantage, cfg, loss",
    [
        (1.1, 1.0, {}, -1.1),
        (1.5, 1.0, {}, -1.2),
        (1.5, 1.0, {"ratio_clip_max": 0.28}, -1.28),
        (0.5, 1.0, {}, -0.5),
        (0.5, -1.0, {}, 0.8),
        (9.0, -1.0, {}, 9.0),
        (9.0, -1.0, {"ratio_clip_c": 3.0}, 3.0),
        (9.0, 1.0, {"ratio_clip_c": 3.0}, -1.2),
    ],
)
def test_clipping(ratio, advantage, cfg, loss):
    assert objective(ratio, advantage, **cfg) == pytest.approx(loss, rel=1e-5)


def test_k3_is_an_unbiased_kl():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    estimate = float(jnp.sum(p * k3(jnp.log(q / p))))
    assert estimate == pytest.approx(float(np.sum(p * np.log(p / q))), rel=1e-5)


@pytest.fixture(scope="module")
def case():
    params = init_params(ARCH, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (3, 8)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.zeros((3, 8), np.float32)}
    batch["weights"][:2, 3:7] = 1
    logps = policy_logps(params, ARCH, batch)
    batch |= {"advantages": np.zeros((3, 8), np.float32), "sampler_logps": np.asarray(logps)}
    batch["advantages"][0], batch["advantages"][1] = 1.0, -0.5
    return params, batch


@functools.cache
def gradient(cfg):
    loss_fn = grpo_loss(ARCH, cfg)

    def total(params, batch):
        loss, weight, metrics = loss_fn(params, None, batch, jax.random.key(0))
        return loss, (weight, metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(case, cfg=PolicyLossConfig(), **changes):
    params, batch = case
    return gradient(cfg)(params, batch | changes)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_on_policy_gradient_is_reinforce(case):
    params, batch = case
    (loss, (weight, metrics)), grads = run(case)
    assert float(weight) == 8 and float(loss) == pytest.approx(-(4 * 1.0 - 4 * 0.5), rel=1e-5)

    def reinforce(p):
        return -jnp.sum(policy_logps(p, ARCH, batch) * batch["advantages"] * batch["weights"])

    np.testing.assert_allclose(flat(grads), flat(jax.jit(jax.grad(reinforce))(params)), rtol=1e-4, atol=1e-4)
    assert float(metrics["token_mult_prob_error"][0]) == pytest.approx(8.0, rel=1e-6)
    assert float(metrics["js_divergence_error"][0]) == pytest.approx(0.0, abs=1e-5)


def test_a_gradient_step_favours_the_good_answer(case):
    params, batch = case
    _, grads = run(case)
    after = policy_logps(jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), ARCH, batch)
    moved = ((np.asarray(after) - batch["sampler_logps"]) * batch["weights"]).sum(1)
    assert moved[0] > moved[1] and moved[0] - 0.5 * moved[1] > 0


def test_masked_positions_change_nothing(case):
    _, batch = case
    wild = np.where(batch["weights"] > 0, batch["sampler_logps"], -1e30).astype(np.float32)
    (a, _), ga = run(case)
    (b, _), gb = run(case, sampler_logps=wild, old_logps=wild)
    assert float(a) == pytest.approx(float(b)) and np.isfinite(flat(gb)).all()
    np.testing.assert_allclose(flat(ga), flat(gb), atol=1e-6)


def test_truncated_importance_sampling(case):
    _, batch = case
    drifted = batch["sampler_logps"] - np.log(4.0).astype(np.float32)
    (loss, (_, metrics)), _ = run(case, sampler_logps=drifted)
    assert float(loss) == pytest.approx(2.0 * -2.0, rel=1e-4)
    assert float(metrics["is_oob_ratio"][0]) == 8


def test_kl_to_the_reference_pulls_back(case):
    _, batch = case
    cfg = PolicyLossConfig(reference_policy_kl_penalty=0.5)
    (_, (_, metrics)), _ = run(case, cfg, ref_logps=batch["sampler_logps"])
    assert float(metrics["kl_penalty"][0]) == pytest.approx(0.0, abs=1e-5)
    (_, (_, metrics)), _ = run(case, cfg, ref_logps=batch["sampler_logps"] - 1.0)
    assert float(metrics["kl_penalty"][0]) == pytest.approx(8 * (np.exp(-1) - 1 + 1), rel=1e-4)


@pytest.mark.parametrize("sizes", [None, (1, 2, 2, 2), (2, 1, 1, 4)], ids=str)
def test_one_pass_of_chunks_is_the_objective_on_log_probabilities(case, sizes):
    """At a temperature, off-policy, with a reference, in chunks that do not divide the rows, on meshes."""
    params, batch = case
    rng, cfg = np.random.default_rng(1), PolicyLossConfig(reference_policy_kl_penalty=0.3)
    batch = {name: np.concatenate([value, value[:1]]) for name, value in batch.items()}
    for name in ("sampler_logps", "old_logps", "ref_logps"):
        batch[name] = batch["sampler_logps"] + rng.normal(0, 0.2, (4, 8)).astype(np.float32)
    rows = {name: jnp.asarray(value) for name, value in batch.items()}

    def straightforward(p):
        loss, metrics = policy_terms(policy_logps(p, ARCH, rows, temperature=0.7), rows, cfg)
        return jnp.sum(loss * rows["weights"]), {k: jnp.sum(v * rows["weights"]) for k, v in metrics.items()}

    def one_pass(p):
        fn = grpo_loss(ARCH, cfg, temperature=0.7, chunk=3)
        loss, _, metrics = fn(p, None, rows, jax.random.key(0))
        return loss, {name: total for name, (total, _) in metrics.items()}

    (loss, metrics), grads = jax.jit(jax.value_and_grad(straightforward, has_aux=True))(params)
    with use_mesh(make_mesh(MeshConfig(*sizes)) if sizes else None):
        (found, sums), found_grads = jax.jit(jax.value_and_grad(one_pass, has_aux=True))(params)
    assert float(found) == pytest.approx(float(loss), rel=1e-5) and abs(float(loss)) > 0.1
    assert sums.keys() == metrics.keys()
    for name, total in metrics.items():
        assert float(sums[name]) == pytest.approx(float(total), rel=1e-4, abs=1e-5), name
    np.testing.assert_allclose(flat(found_grads), flat(grads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [{"ratio_clip_min": 0.0}, {"ratio_clip_c": 1.1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PolicyLossConfig(**bad)
