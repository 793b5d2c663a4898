"""Kinds of variants, their library on disk, scores and assembly."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.checkpoints.artifact import save_params
from nemojax.compress import importance
from nemojax.compress import library as lib
from nemojax.compress.assemble import assemble, block_map, child_arch
from nemojax.compress.score import Scoring, score
from nemojax.compress.space import choices
from nemojax.compress.window import Parent
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


def test_built_kinds_are_not_built_again(setup, tmp_path):
    params, ranks, _, kinds, _ = setup
    first = dataclasses.replace(BLD, steps=0)
    few = [dataclasses.replace(kinds[2], layers=(0, 2)), kinds[3]]
    library = lib.build(params, ARCH, few, ranks, lambda: iter([]), first, tmp_path)
    assert library.layers("ffn-ffn24") == (0, 2) and library.names() == ("ffn-ffn24", "ffn-linear")
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    lib.build(params, ARCH, few, ranks, lambda: iter([]), first, tmp_path)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    lib.build(params, ARCH, kinds, ranks, lambda: iter([]), first, tmp_path)
    assert all(p.stat().st_mtime_ns == t for p, t in files.items() if "ffn-linear" in p.parts)
    assert all(library.has(kind) for kind in kinds)
    assert library.curve("ffn", Linear(), 0).shape == (0,)
    with pytest.raises(ValueError, match="bld.steps: expected 6 calibration batches, got 1; give more data"):
        lib.build(params, ARCH, kinds[:1], ranks, lambda: iter(batches(1)), BLD, tmp_path / "other")


def test_a_variant_is_read_without_the_rest(setup, tmp_path):
    """The data of the others may be gone, on disk each variant stands alone."""
    library = lib.Library(tmp_path)
    curve = np.arange(3, dtype=np.float32)
    for layer in range(3):
        weights: lib.Weights = {
            "ffn": {"norm": np.full(32, layer, np.float32), "linear": np.ones((32, 32), np.float32)}
        }
        library.save("ffn", Linear(), layer, weights, curve, {"recipe": {"steps": layer}})
    data = [p for p in (tmp_path / "ffn-linear" / "d").iterdir() if p.stat().st_size > 4096]
    assert len(data) == 3
    oldest = min(data, key=lambda p: p.stat().st_mtime_ns)
    oldest.write_bytes(b"")
    fresh = lib.Library(tmp_path)
    assert fresh.load("ffn", Linear(), 2)["norm"][0] == 2 and fresh.layers("ffn-linear") == (0, 1, 2)
    assert fresh.about("ffn", Linear(), 1)["recipe"] == {"steps": 1}
    np.testing.assert_array_equal(fresh.curve("ffn", Linear(), 1), curve)
    with pytest.raises(ValueError, match=r"ffn-linear: damaged .*delete the folder and run again"):
        fresh.load("ffn", Linear(), 0)


def test_a_library_of_another_parent_is_refused(setup):
    params, ranks, _, kinds, library = setup
    with pytest.raises(
        ValueError, match=r"library\.json: expected a library of this parent .*got one of ano"
    ):
        lib.build(parent(1), ARCH, kinds, ranks, lambda: iter(batches(1) * 6), BLD, library.dir)
    other = dataclasses.replace(BLD, optim=dataclasses.replace(BLD.optim, lr=1e-3))
    with pytest.raises(ValueError, match=r"attn-kv1: layer 0: .* optim.lr 0.001, got 0.003; delete the fold"):
        lib.build(params, ARCH, kinds, ranks, lambda: iter(batches(1) * 6), other, library.dir)
    with pytest.raises(ValueError, match="expected a variant made with data"):
        lib.build(params, ARCH, kinds, ranks, lambda: iter(batches(1, seed=3) * 6), BLD, library.dir)


def test_fingerprint_of_a_parent(tmp_path):
    """Of every bit, whatever the window and wherever the weights are."""
    params = parent()
    digest = Parent(params, ARCH).fingerprint()
    save_params(tmp_path, ARCH, params)
    host = jax.tree.map(np.array, params)
    assert {Parent(p, ARCH, w).fingerprint() for p, w in ((host, 0), (params, 2), (str(tmp_path), 1))} == {
        digest
    }
    host["runs"]["000"]["ffn"]["up"][2, 3, 4] += 1e-6
    assert Parent(host, ARCH).fingerprint() != digest
    tied = ARCH.replace(tie_embeddings=True)
    assert Parent({k: v for k, v in params.items() if k != "head"}, tied).fingerprint() != digest


def test_coupled_kinds(setup):
    options = setup[2]
    kinds = lib.kinds_of(options, ARCH, ("all:-+*", "1:kv1+linear"))
    names = [(k.name, k.layers) for k in kinds if k.part == "block"]
    assert names == [
        ("block-none+ffn48", (0, 1, 2)),
        ("block-none+ffn24", (0, 1, 2)),
        ("block-none+linear", (0, 1, 2)),
        ("block-kv1+linear", (1,)),
    ]
    assert kinds[: len(setup[3])] == setup[3] and kinds[-1].trained == ("attn", "ffn")
    with pytest.raises(
        ValueError, match=r"rule 'all:kv7\+\*': expected a glob of choice names, got no match"
    ):
        lib.kinds_of(options, ARCH, ("all:kv7+*",))


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
    with pytest.raises(ValueError, match="attn-kv1: layer 2: no such variant"):
        assemble(setup[0], ARCH, child, lib.Library(tmp_path))


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
