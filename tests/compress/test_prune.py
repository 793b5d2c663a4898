"""Uniform pruning: what is exact is exact, nothing pruned is the parent, and the stage end to end."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from nemojax.arch import Attention, SwiGLU, uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.compress import cuts, importance
from nemojax.compress.importance import Importance, ImportanceConfig
from nemojax.compress.prune import Config, Targets, importance_config, prune, run
from nemojax.config import from_dict, to_dict
from nemojax.data.mixture import TextData
from nemojax.data.sources import Source, load_texts
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model.layout import unstack
from nemojax.model.llama import apply, init_params
from nemojax.tree import check_same, paths
from tests.compress.mixed import MIXED, TIED, change, mixed_parent
from tests.compress.tiny import batches

BATCH = batches(1, seed=2)[0]
logits = jax.jit(lambda p, arch, batch: apply(p, arch, batch)[0], static_argnums=1)


def random_ranks(seed: int = 0) -> Importance:
    rng = np.random.default_rng(seed)
    blocks = dict(enumerate(MIXED.blocks))
    return Importance(
        {i: rng.random(b.ffn.width) for i, b in blocks.items() if isinstance(b.ffn, SwiGLU)},
        {i: rng.random(b.attn.num_kv_heads) for i, b in blocks.items() if isinstance(b.attn, Attention)},
        rng.random(MIXED.dim),
        {i: float(rng.random()) for i, b in blocks.items() if not b.is_empty},
    )


def same_outputs(child, params, arch, atol=2e-5):
    np.testing.assert_allclose(logits(child[1], child[0], BATCH), logits(params, arch, BATCH), atol=atol)


def well_formed(child):
    """The parameters have the shapes of the architecture."""
    check_same(jax.eval_shape(functools.partial(init_params, child[0]), jax.random.key(0)), child[1], "child")


@pytest.mark.parametrize("arch", [MIXED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "targets",
    [
        Targets(),
        Targets(dim=16, ffn_width=24, kv_heads=4, layers=5),
        Targets(params_ratio=1.0, norms="rescale"),
    ],
    ids=["unset", "full", "ratio"],
)
def test_nothing_pruned_is_the_parent_bitwise(arch, targets):
    params = mixed_parent(arch)
    child, weights = prune(params, arch, random_ranks(), targets)
    assert child == arch
    mine, theirs = paths(weights), paths(params)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[p], theirs[p]) for p in mine)


def test_fewer_channels_are_the_parent_with_the_others_masked():
    ranks = random_ranks()
    child = cuts.prune_ffn(mixed_parent(), MIXED, ranks, 10)
    well_formed(child)
    assert [b.ffn.width for b in child[0].blocks if isinstance(b.ffn, SwiGLU)] == [10, 10, 10]

    def mask(tree):
        for layer, scores in ranks.ffn.items():
            tree["layers"][str(layer)]["ffn"]["down"][np.argsort(scores)[:-10]] = 0.0

    same_outputs(child, change(mixed_parent(), MIXED, mask), MIXED)
    ratio = prune(mixed_parent(), MIXED, ranks, Targets(ffn_ratio=0.5, multiple=4))
    assert [b.ffn.width for b in ratio[0].blocks if isinstance(b.ffn, SwiGLU)] == [12, 12, 8]
    only_wide = cuts.prune_ffn(mixed_parent(), MIXED, ranks, 20)
    assert [b.ffn.width for b in only_wide[0].blocks if isinstance(b.ffn, SwiGLU)] == [20, 20, 16]


@pytest.mark.parametrize("groups", ["remove", "zero"])
def test_fewer_groups_are_the_parent_with_the_others_silent(groups):
    ranks = random_ranks(1)
    child = cuts.prune_kv(mixed_parent(), MIXED, ranks, 2, groups)
    well_formed(child)
    kept = {0: 2, 1: 2, 3: 1} if groups == "remove" else {0: 2, 1: 2, 3: 2}
    assert all(child[0].blocks[i].attn == Attention(count) for i, count in kept.items())
    assert child[0].num_heads == (2 if groups == "remove" else 4) and child[0].head_dim == MIXED.head_dim

    def silence(tree):
        for layer, count in kept.items():
            scores, attn = ranks.kv[layer], tree["layers"][str(layer)]["attn"]
            size = len(attn["o"]) // len(scores)
            for group in np.argsort(scores)[: len(scores) - count]:
                attn["o"][group * size : (group + 1) * size] = 0.0

    same_outputs(child, change(mixed_parent(), MIXED, silence), MIXED)


@pytest.mark.parametrize("arch", [MIXED, TIED], ids=["untied", "tied"])
def test_a_narrower_stream_is_the_parent_with_silent_channels_once_norms_are_rescaled(arch):
    ranks = random_ranks(2)
    child = cuts.prune_embed(mixed_parent(arch), arch, ranks, 11, "rescale")
    well_formed(child)
    gone = np.argsort(np.asarray(ranks.embed))[: arch.dim - 11]

    def silence(tree):
        tree["embed"]["weight"][:, gone] = 0.0
        for block in tree["layers"].values():
            for sub in block.values():
                for name in {"o", "down", "linear"} & sub.keys():
                    sub[name][..., gone] = 0.0

    masked = change(mixed_parent(arch), arch, silence)
    same_outputs(child, masked, arch, atol=1e-4)
    plain = cuts.prune_embed(mixed_parent(arch), arch, ranks, 11)
    stay = np.setdiff1d(np.arange(arch.dim), gone)
    tree, parent = unstack(plain[1], plain[0]), unstack(mixed_parent(arch), arch)
    assert np.array_equal(tree["norm"]["scale"], parent["norm"]["scale"][stay])
    assert np.array_equal(
        tree["layers"]["5"]["ffn"]["linear"], parent["layers"]["5"]["ffn"]["linear"][stay][:, stay]
    )
    assert not np.allclose(logits(plain[1], plain[0], BATCH), logits(masked, arch, BATCH), atol=1e-2)
    assert ("head" in child[1]) == (not arch.tie_embeddings)


def test_removed_layers_leave_empty_ones_or_nothing():
    ranks = Importance({}, {}, None, {0: 3.0, 1: 1.0, 3: 4.0, 4: 1.5, 5: 5.0})
    empty = prune(mixed_parent(), MIXED, ranks, Targets(layers=3))
    gone = prune(mixed_parent(), MIXED, ranks, Targets(layers=3, leave="remove"))
    assert [b.is_empty for b in empty[0].blocks] == [False, True, True, False, True, False]
    assert [b.is_empty for b in gone[0].blocks] == [False, True, False, False]
    well_formed(empty)
    well_formed(gone)
    assert np.array_equal(logits(empty[1], empty[0], BATCH), logits(gone[1], gone[0], BATCH))

    def silence(tree):
        for sub in (*tree["layers"]["1"].values(), *tree["layers"]["4"].values()):
            for name in {"o", "down", "linear"} & sub.keys():
                sub[name][...] = 0.0

    same_outputs(empty, change(mixed_parent(), MIXED, silence), MIXED)


def test_which_layers_go():
    one_by_one = Importance({}, {}, None, {0: 3.0, 1: 1.0, 3: 4.0, 4: 1.5, 5: 5.0})
    assert cuts.layers_to_remove(MIXED, one_by_one, 3) == (1, 4)
    assert cuts.layers_to_remove(MIXED, one_by_one, 3, contiguous=True) == (0, 1)
    pieces = Importance({}, {}, None, {0: 9.0, 1: 8.0, 3: 2.0, 4: 7.0})  # of two neighbours together
    assert cuts.layers_to_remove(MIXED, pieces, 3, contiguous=True) == (3, 4)
    assert cuts.layers_to_remove(MIXED, pieces, 5, contiguous=True) == ()


def test_everything_at_once():
    targets = Targets(dim=12, ffn_width=9, kv_heads=2, layers=3, leave="remove")
    child = prune(mixed_parent(), MIXED, random_ranks(), targets)
    well_formed(child)
    assert (child[0].dim, child[0].num_heads, sum(not b.is_empty for b in child[0].blocks)) == (12, 2, 3)
    assert np.isfinite(logits(child[1], child[0], BATCH)).all()


def test_a_share_of_the_parameters():
    ranks = random_ranks()
    child, _ = cuts.prune_to_ratio(mixed_parent(), MIXED, ranks, 0.9)
    widths = {b.ffn.width for b in child.blocks if isinstance(b.ffn, SwiGLU)}
    most = 0.9 * MIXED.num_params()
    assert len(widths) == 1 and child.num_params() <= most
    wider = cuts.prune_ffn(mixed_parent(), MIXED, ranks, max(widths) + 1)[0]
    assert wider.num_params() > most
    even = cuts.width_for(MIXED, most, multiple=4)
    assert even % 4 == 0 and 0 <= max(widths) - even < 4
    both, _ = prune(mixed_parent(), MIXED, ranks, Targets(params_ratio=0.8, layers=4, multiple=1))
    assert both.num_params() <= 0.8 * MIXED.num_params()
    with pytest.raises(
        ValueError, match=r"^targets\.params_ratio: expected at least \d+ parameters .*got 58"
    ):
        cuts.width_for(MIXED, 58.0)


@pytest.mark.parametrize(
    "targets, message",
    [
        (dict(dim=17), r"targets\.dim: expected 0 \(as the parent\) to the parent's 16, got 17"),
        (dict(ffn_width=25), r"targets\.ffn_width: .* the parent's 24, got 25"),
        (dict(layers=6), r"targets\.layers: .* the parent's 5, got 6"),
        (dict(dim=-1), r"targets\.dim: .*got -1"),
        (dict(kv_heads=5), r"targets\.kv_heads: .* the parent's 4, got 5"),
        (dict(kv_heads=3), r"layer 3: expected a whole number of KV heads in every layer, got 3/4 of 2"),
        (dict(kv_heads=3, groups="zero"), r"layer 0: expected a divisor of its 4 KV heads, got 3"),
        (dict(ffn_width=8, ffn_ratio=0.5), r"targets: expected one of ffn_width and ffn_ratio, got 2"),
        (dict(params_ratio=1.5), r"targets\.params_ratio: expected 0 to 1, got 1\.5"),
        (dict(multiple=0), r"targets\.multiple: expected at least 1"),
    ],
)
def test_impossible_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        prune(mixed_parent(), MIXED, random_ranks(), Targets(**targets))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    root = tmp_path_factory.mktemp("prune")
    texts = root / "texts.jsonl"
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "and", "or", "not", "then"]
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) + "\n" for _ in range(60)))
    source = Source(name="words", kind="jsonl", path=str(texts), heldout_share=0.2)
    tokenizer = train_tokenizer(load_texts(source), 320, root / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=24,
        context=32,
        head_dim=4,
    )
    save_params(root / "parent", arch, init_params(arch, jax.random.key(0)), tokenizer_dir=root / "tokenizer")
    return Config(
        parent=str(root / "parent"),
        data=TextData(sources=(source,), length=32, batch_size=8, heldout_batches=1),
        importance=ImportanceConfig(batches=2),
        targets=Targets(dim=10, ffn_width=16, kv_heads=1, layers=2, contiguous=True),
    )


def test_the_stage_makes_an_artifact(cfg, tmp_path, monkeypatch):
    """On all devices; the child, whose width does not divide over them, is then evaluated on one."""
    result = run(cfg, tmp_path / "child")
    arch, params = load_params(tmp_path / "child")
    assert (arch.dim, arch.num_heads, arch.num_params()) == (10, 2, result["num_params"])
    assert result["child"]["ffn_widths"] == [16, 16] and result["child"]["kv_heads"] == [1, 1]
    losses = result["heldout"]
    assert losses["parent"]["loss"] != losses["child"]["loss"] and np.isfinite(losses["child"]["loss"])
    ranks = importance.load(tmp_path / "child" / "importance.npz")
    parent = load_params(cfg.parent)
    again = prune(parent[1], parent[0], ranks, cfg.targets)
    assert again[0] == arch
    assert all(np.array_equal(w, paths(params)[p]) for p, w in paths(again[1]).items())
    assert from_dict(Config, to_dict(cfg)) == cfg
    # a stage that was killed behind the measuring does not measure again
    monkeypatch.setattr(importance, "measure", None)
    (tmp_path / "child" / "DONE").unlink()
    assert run(cfg, tmp_path / "child") == result


def test_the_stage_measures_only_what_is_cut(cfg):
    arch = load_params(cfg.parent)[0]
    assert importance_config(cfg, arch).parts == ("ffn", "kv", "embed", "depth")
    deep = dataclasses.replace(cfg, targets=Targets(layers=1, contiguous=True))
    assert importance_config(deep, arch).parts == ("depth",) and importance_config(deep, arch).depth_span == 2
    by_taylor = dataclasses.replace(deep, importance=ImportanceConfig("taylor", depth="taylor"))
    assert importance_config(by_taylor, arch).depth_span == 1


def test_the_stage_refuses_before_it_measures(cfg, tmp_path):
    wide = dataclasses.replace(cfg, targets=Targets(dim=20))
    with pytest.raises(ValueError, match=r"targets\.dim: .*parent's 16, got 20"):
        run(wide, tmp_path / "wide")
    assert not (tmp_path / "wide" / "importance.npz").exists()
