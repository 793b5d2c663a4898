"""Blockwise distillation in a stack, scores, costs and assembly."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, BlockSpec, Linear, NoOp, SwiGLU, uniform
from nemojax.compress import cost, importance
from nemojax.compress import library as lib
from nemojax.compress.assemble import assemble, block_map, child_arch
from nemojax.compress.score import Scoring, score
from nemojax.compress.space import choices
from nemojax.losses.tokens import kl_divergence, token_logps
from nemojax.model.llama import apply, final_norm, head_weight, hidden
from nemojax.optim import OptimConfig
from nemojax.tree import paths
from tests.compress.tiny import ARCH, SPACE, batches, parent

BLD = lib.Bld(steps=6, optim=OptimConfig(lr=3e-3, weight_decay=0.0))
FULL = ARCH.blocks[0]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    params = parent()
    ranks = importance.measure(params, ARCH, batches(2))
    options = choices(SPACE, ARCH)
    kinds = lib.kinds_of(options, ARCH)
    library = lib.build(
        params, ARCH, kinds, ranks, lambda: iter(batches(1) * 6), BLD, tmp_path_factory.mktemp("library")
    )
    return params, ranks, options, kinds, library


def test_kinds(setup):
    kinds = setup[3]
    assert [k.name for k in kinds] == ["attn-kv1", "attn-linear", "ffn-ffn24", "ffn-linear"]
    assert all(k.layers == (0, 1, 2) for k in kinds)


def test_distillation_lowers_the_loss(setup):
    _, _, _, kinds, library = setup
    for kind in kinds:
        for layer in kind.layers:
            curve = library.curve(kind.part, kind.child, layer)
            assert curve.shape == (6,) and curve[-1] < curve[0]


def test_a_variant_in_the_stack_equals_it_alone(setup):
    params, ranks, _, kinds, library = setup
    for kind in kinds:
        alone = dataclasses.replace(kind, layers=(1,))
        first = lib.init_kind(params, ARCH, alone, ranks, "mean")
        (trained,), (curve,) = lib.train(params, ARCH, [alone], [first], iter(batches(1) * 6), BLD)
        stored = library.load(kind.part, kind.child, 1)
        for name, weight in trained.items():
            np.testing.assert_allclose(weight[0], stored[name], atol=1e-5)
        np.testing.assert_allclose(curve[:, 0], library.curve(kind.part, kind.child, 1), rtol=1e-4)


def test_a_variant_that_is_not_finite_stays_alone(setup):
    params, ranks, _, kinds, library = setup
    kind = kinds[2]
    first = lib.init_kind(params, ARCH, kind, ranks, "mean")
    first["down"][2] = np.inf
    (trained,), (curve,) = lib.train(params, ARCH, [kind], [first], iter(batches(1) * 6), BLD)
    assert not np.isfinite(curve[:, 2]).any() and np.isinf(trained["down"][2]).all()
    np.testing.assert_allclose(trained["down"][0], library.load("ffn", kind.child, 0)["down"], atol=1e-5)


def test_built_kinds_are_not_built_again(setup, tmp_path):
    params, ranks, _, kinds, _ = setup
    pairs = dataclasses.replace(BLD, steps=0, together=2)
    library = lib.build(params, ARCH, kinds[2:], ranks, lambda: iter([]), pairs, tmp_path)
    before = library.path("ffn", Linear(), 0).stat().st_mtime_ns
    lib.build(params, ARCH, kinds, ranks, lambda: iter([]), pairs, tmp_path)
    assert library.path("ffn", Linear(), 0).stat().st_mtime_ns == before
    assert library.has(kinds[0])
    with pytest.raises(ValueError, match="expected 6 calibration batches, got 1"):
        lib.build(params, ARCH, kinds[:1], ranks, lambda: iter(batches(1)), BLD, tmp_path / "other")


def test_a_group_that_was_half_saved_is_trained_again_to_the_same_bits(setup, tmp_path):
    """As after a kill in the middle of a save: some files of the group are there, others are not."""
    params, ranks, _, kinds, library = setup
    for path in library.dir.rglob("*.npz"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    shutil.rmtree(tmp_path / "ffn-ffn24")
    (tmp_path / "attn-linear" / "001.npz").rename(tmp_path / "attn-linear" / "001.partial")
    again = lib.build(params, ARCH, kinds, ranks, lambda: iter(batches(1) * 6), BLD, tmp_path)
    for kind in kinds:
        for layer in kind.layers:
            for name, weight in library.load(kind.part, kind.child, layer).items():
                assert np.array_equal(weight, again.load(kind.part, kind.child, layer)[name])


@pytest.mark.parametrize("metric", ["kl", "lm_loss"])
def test_scores_equal_whole_model_replacement(setup, metric):
    params, _, options, _, library = setup
    picked = [
        (FULL, BlockSpec(Attention(1), SwiGLU(24)), BlockSpec(NoOp(), Linear()), BlockSpec(NoOp(), NoOp()))
    ] * 3
    data = batches(2, seed=5)
    got = score(params, ARCH, picked, library, data, Scoring(metric=metric))
    for layer, row in enumerate(picked):
        assert got[layer][0] == 0.0
        for choice, value in zip(row[1:], got[layer][1:], strict=True):
            blocks = (*ARCH.blocks[:layer], choice, *ARCH.blocks[layer + 1 :])
            assert value == pytest.approx(
                whole_model(params, child_arch(ARCH, blocks), library, data, metric), abs=1e-5
            )


def test_scoring_resumes_by_layer(setup):
    params, _, _, _, library = setup
    picked, data, seen = [(FULL, BlockSpec(NoOp(), FULL.ffn))] * 3, batches(1), []
    full = score(params, ARCH, picked, library, data, on_layer=lambda i, s: seen.append(i))
    done = {0: full[0], 1: [0.0, 7.0]}
    again = score(params, ARCH, picked, library, data, done=done, on_layer=lambda i, s: seen.append(i))
    assert seen == [0, 1, 2, 2] and again[1] == [0.0, 7.0] and again[2] == full[2]


def test_a_heterogeneous_child_is_scored_as_a_parent(setup):
    params, _, _, _, library = setup
    blocks = (FULL, BlockSpec(NoOp(), NoOp()), BlockSpec(Attention(1), FULL.ffn))
    child = child_arch(ARCH, blocks)
    weights = assemble(params, ARCH, child, library)
    options = tuple((b, BlockSpec(NoOp(), b.ffn)) if not b.is_empty else (b,) for b in blocks)
    data = batches(1)
    got = score(weights, child, options, library, data)
    assert got[1] == [0.0]
    for layer in (0, 2):
        other = child_arch(child, tuple(o[-1] if i == layer else o[0] for i, o in enumerate(options)))
        want = kl_of(weights, child, assemble(weights, child, other, library), other, data)
        assert got[layer][1] == pytest.approx(want, abs=1e-5)


def test_unchanged_child_is_the_parent_bitwise(setup):
    params, _, _, _, library = setup
    same = assemble(params, ARCH, ARCH, library)
    for path, leaf in paths(params).items():
        assert np.array_equal(leaf, paths(same)[path])
    batch = batches(1)[0]
    assert np.array_equal(apply(params, ARCH, batch)[0], apply(same, ARCH, batch)[0])
    child = child_arch(ARCH, (FULL, BlockSpec(NoOp(), FULL.ffn), FULL))
    mixed = assemble(params, ARCH, child, library)
    assert np.array_equal(mixed["runs"]["002"]["attn"]["q"][0], params["runs"]["000"]["attn"]["q"][2])
    assert np.array_equal(mixed["runs"]["001"]["ffn"]["up"][0], params["runs"]["000"]["ffn"]["up"][1])
    assert "was kv2 ffn48" in block_map(ARCH, child).splitlines()[2]


def test_a_missing_variant_is_named(setup, tmp_path):
    child = child_arch(ARCH, (FULL, FULL, BlockSpec(Attention(1), FULL.ffn)))
    with pytest.raises(ValueError, match="attn-kv1/002.npz: no such variant"):
        assemble(setup[0], ARCH, child, lib.Library(tmp_path))


def test_memory_equals_model_optimizers():
    llama = uniform(
        vocab_size=128256,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        ffn_width=14336,
        context=8192,
    )
    config = cost.CostConfig(batch=96, context=8192)
    block = cost.counted(llama, llama.blocks[0], config)
    assert cost.fixed_costs(llama, config)["memory_mib"] + 32 * block["memory_mib"] == pytest.approx(
        113620.5, abs=0.1
    )


def test_costs_by_block():
    options = [(FULL, BlockSpec(NoOp(), SwiGLU(24)), BlockSpec(NoOp(), NoOp()))]
    config = cost.CostConfig(timings=("prefill", "decode"), timing_batch=2, timing_length=8, repeats=2)
    costs = cost.block_costs(ARCH, options, config)
    full, half, empty = (costs[option] for option in options[0])
    assert full["params"] == ARCH.num_block_params() / 3 and half["kv_mib"] == 0 and full["kv_mib"] > 0
    assert min(full["prefill_ms"], half["prefill_ms"], full["decode_ms"]) > 0
    assert set(empty.values()) == {0.0}
    assert cost.provenance(config).keys() == full.keys()


@functools.partial(jax.jit, static_argnames="arch")
def final(params, arch, batch):
    return final_norm(params, arch, hidden(params, arch, batch)[0])


def whole_model(params, child, library, data, metric) -> float:
    weights = assemble(params, ARCH, child, library)
    if metric == "kl":
        return kl_of(params, ARCH, weights, child, data)
    return loss_of(weights, child, data) - loss_of(params, ARCH, data)


def kl_of(params, arch, weights, child, data) -> float:
    total = 0.0
    for batch in data:
        teacher = final(params, arch, batch)
        student = final(weights, child, batch)
        kl = kl_divergence(student, head_weight(weights), teacher, head_weight(params))
        total += float(jnp.sum(kl * batch["weights"]))
    return total / sum(b["weights"].sum() for b in data)


def loss_of(params, arch, data) -> float:
    total = 0.0
    for batch in data:
        x = final(params, arch, batch)
        total -= float(jnp.sum(token_logps(x, head_weight(params), batch["targets"])[0] * batch["weights"]))
    return total / sum(b["weights"].sum() for b in data)
