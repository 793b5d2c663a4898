"""The one interface to importance: planted uselessness, meshes, streaming, files and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from nemojax.compress import importance
from nemojax.compress.importance import Importance, ImportanceConfig
from nemojax.compress.subblock import layers_of
from nemojax.model.block import apply_block, rms_norm
from nemojax.model.llama import Compute, batch_context, embed, param_shardings
from nemojax.sharding import MeshConfig, make_mesh, use_mesh
from tests.compress.mixed import MIXED, change, mixed_parent
from tests.compress.tiny import batches

ALL = ("ffn", "kv", "embed", "depth")
DATA = batches(2, seed=5)
METHODS = {
    "magnitude": ImportanceConfig("magnitude", batches=2, parts=ALL, depth="magnitude"),
    "activation": ImportanceConfig("activation", batches=2, parts=ALL, depth="influence"),
    "iterative": ImportanceConfig(
        "iterative", batches=2, parts=("ffn", "depth"), depth="perplexity", removals=3
    ),
    "taylor": ImportanceConfig("taylor", batches=2, parts=ALL, depth="taylor"),
    "taylor2": ImportanceConfig(
        "taylor", batches=2, parts=ALL, depth="taylor", order=2, taylor_sum="outputs"
    ),
}


def planted():
    """A parent with a channel, a group, an embedding channel and a layer that do nothing."""

    def edit(tree):
        for weights in (tree["embed"]["weight"], tree["head"]["weight"]):
            weights[:, 2] = 0.0
        tree["norm"]["scale"][2] = 0.0
        for block in tree["layers"].values():
            for sub in block.values():
                for name, w in sub.items():
                    if name in ("o", "down", "linear"):
                        w[..., 2] = 0.0
                    if name not in ("o", "down"):
                        w[2] = 0.0
        for layer in ("0", "3"):
            attn, ffn = tree["layers"][layer]["attn"], tree["layers"][layer]["ffn"]
            size = attn["q"].shape[1] // attn["k"].shape[1]
            for w, index in ((attn["q"], slice(size, 2 * size)), (attn["k"], 1), (attn["v"], 1)):
                w[:, index] = 0.0
            attn["o"][size : 2 * size] = 0.0
            ffn["gate"][:, 5] = ffn["up"][:, 5] = ffn["down"][5] = 0.0
        for sub in tree["layers"]["1"].values():
            for w in sub.values():
                w[...] = 0.0

    return change(mixed_parent(), MIXED, edit)


@pytest.mark.parametrize("method", METHODS)
def test_what_does_nothing_comes_last(method):
    got = importance.measure(planted(), MIXED, DATA, METHODS[method])
    for layer in (0, 3):
        assert np.argmin(got.ffn[layer]) == 5 and np.sum(got.ffn[layer] == got.ffn[layer].min()) == 1
        if got.kv:
            assert np.argmin(got.kv[layer]) == 1
    if got.embed is not None:
        assert np.argmin(got.embed) == 2 and got.embed[2] < np.delete(got.embed, 2).min() / 10
    if method != "iterative":  # the loss may well fall without a layer of noise
        assert min(got.depth, key=lambda i: got.depth[i]) == 1
    assert got.depth[1] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_mesh_gives_the_scores_of_one_device(method):
    """Parameters sharded as training has them, batches split over data and fsdp."""
    params = mixed_parent()
    want = importance.measure(params, MIXED, DATA, METHODS[method])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, param_shardings(MIXED, mesh))
    assert not placed["embed"]["weight"].sharding.is_fully_replicated
    with use_mesh(mesh):  # in scope already, as in a stage, or not: the same
        got = importance.measure(placed, MIXED, DATA, METHODS[method])
    for part in ("ffn", "kv", "depth"):
        ours, theirs = getattr(got, part), getattr(want, part)
        assert ours.keys() == theirs.keys()
        for layer in theirs:
            np.testing.assert_allclose(ours[layer], theirs[layer], rtol=2e-3, atol=2e-6)
    if want.embed is not None and got.embed is not None:
        np.testing.assert_allclose(got.embed, want.embed, rtol=2e-3)


def test_embedding_channels_are_minitrons():
    params = mixed_parent()
    rows = {}
    for batch in DATA:
        h, ctx = embed(params, batch["tokens"]), batch_context(MIXED, batch)
        real = batch["segments"] > 0
        for layer, p in layers_of(params, MIXED):
            seen = {}
            after = apply_block(MIXED, MIXED.blocks[layer], p, h, ctx, capture=seen)
            for part, x in (("attn", h), ("ffn", seen["between_BTD"])):
                if part in p:
                    normed = np.abs(rms_norm(x, p[part]["norm"], MIXED.norm_eps))
                    means = [normed[b][real[b]].mean(0) for b in range(4)]
                    rows.setdefault((layer, part), []).extend(means)
            h = after
    want = sum(np.sqrt(np.square(means).sum(0)) for means in rows.values())
    got = importance.measure(params, MIXED, DATA, ImportanceConfig(batches=2, parts=("embed",)))
    assert got.embed is not None
    np.testing.assert_allclose(got.embed, want, rtol=1e-3)
    assert got.ffn == {} and got.kv == {} and got.depth == {} and len(rows) == 8


def test_batches_are_read_one_at_a_time_and_no_more_than_asked():
    alive = []

    class Watched(dict):
        def __init__(self, batch):
            super().__init__(batch)
            alive.append(1)

        def __del__(self):
            alive.pop()

    def endless():
        while True:
            assert len(alive) <= 2
            yield Watched(DATA[0])

    stream = endless()
    importance.measure(mixed_parent(), MIXED, stream, ImportanceConfig(batches=6))
    once = importance.measure(mixed_parent(), MIXED, stream, ImportanceConfig(batches=1))
    with_method_alone = importance.measure(mixed_parent(), MIXED, DATA[:1], "activation")
    assert np.array_equal(once.ffn[0], with_method_alone.ffn[0])


def test_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    channels = rng.random(6)
    ranks = Importance({0: rng.random(5), 3: rng.random(4)}, {3: rng.random(2)}, channels, {0: 0.5, 12: -1.0})
    path = tmp_path / "importance.npz"
    importance.save(ranks, path)
    again = importance.load(path)
    assert np.array_equal(again.ffn[3], ranks.ffn[3]) and np.array_equal(again.kv[3], ranks.kv[3])
    assert (
        again.embed is not None
        and again.embed.tolist() == channels.tolist()
        and again.depth == ranks.depth
        and set(again.ffn) == {0, 3}
    )
    assert [p.name for p in tmp_path.iterdir()] == ["importance.npz"]
    before: dict[str, Any] = {"ffn/0": ranks.ffn[0], "kv/0": ranks.kv[3]}
    np.savez(path, **before)  # as versions before wrote it
    old = importance.load(path)
    assert np.array_equal(old.ffn[0], ranks.ffn[0]) and old.embed is None and old.depth == {}
    np.savez(path, version=np.asarray(99))
    with pytest.raises(ValueError, match=r"importance\.npz: expected version 2 or lower, got 99; "):
        importance.load(path)
    np.savez(path, ones=np.ones(3))
    with pytest.raises(ValueError, match=r"importance\.npz: expected scores, got an array 'ones'"):
        importance.load(path)


def test_short_or_empty_data():
    params, cfg = mixed_parent(), ImportanceConfig(batches=3)
    with pytest.raises(ValueError, match=r"importance\.batches: expected 3 calibration batches, got 2; "):
        importance.measure(params, MIXED, iter(DATA), cfg)
    with pytest.raises(ValueError, match="at least one calibration batch with tokens, got none"):
        importance.measure(params, MIXED, iter([]), cfg)
    padding = {**DATA[0], "segments": np.zeros_like(DATA[0]["segments"])}
    with pytest.raises(ValueError, match="tokens in calibration batch 2, got padding alone"):
        importance.measure(params, MIXED, [DATA[0], padding, DATA[1]], cfg)


def test_scores_that_are_not_finite_are_named():
    params = jax.tree.map(np.array, mixed_parent())
    params["runs"]["001"]["attn"]["o"][0, 0, 0, 0] = np.inf  # layer 3, group 0
    with pytest.raises(ValueError, match=r"^importance: layer 3: kv: expected finite scores, got 1 of 2 "):
        importance.measure(params, MIXED, [], ImportanceConfig("magnitude", parts=("kv", "ffn")))
    with pytest.raises(ValueError, match="layer 3: ffn: expected finite scores, .*bfloat16"):
        cfg = ImportanceConfig("activation", batches=1, parts=("ffn",))
        importance.measure(params, MIXED, DATA, cfg, Compute(dtype="bfloat16"))


def test_configurations_that_make_no_sense():
    for name in ("batches", "removals", "depth_span"):
        with pytest.raises(ValueError, match=rf"^importance\.{name}: expected at least 1, got 0$"):
            dataclasses.replace(ImportanceConfig(), **{name: 0})
    with pytest.raises(
        ValueError, match=r"importance\.parts: expected some of ffn, kv, embed, depth, got none"
    ):
        ImportanceConfig(parts=())
