"""FFN Fusion: which feed-forwards lean on which, what is fused, and that it is the same sum."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax import plots
from nemojax.arch import BlockSpec, Linear, NoOp, SwiGLU
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.compress import fuse as stage
from nemojax.compress.fuse import Config, Fusion, choose, dependency, ffn_runs, fuse, partition, run
from nemojax.compress.subblock import apply_part
from nemojax.config import from_dict, to_dict
from nemojax.data.mixture import TextData
from nemojax.data.sources import Source, load_texts
from nemojax.data.tokenizer import train_tokenizer
from nemojax.evaluate.latency import LatencyConfig
from nemojax.model.attention import make_context
from nemojax.model.layout import layer_params
from nemojax.model.llama import apply, init_params
from tests.compress.programs import compiled
from tests.compress.tiny import ARCH, batches

FULL, EMPTY = ARCH.blocks[0], BlockSpec(NoOp(), NoOp())


def ffn(width: int) -> BlockSpec:
    return BlockSpec(NoOp(), SwiGLU(width))


# 0, 7 attention; a run of 1 2 (3 empty) 4 5, broken by a linear layer, then 8 9
BLOCKS = (FULL, ffn(48), ffn(24), EMPTY, ffn(48), ffn(16), BlockSpec(NoOp(), Linear()), FULL, ffn(8), ffn(8))
DEEP = ARCH.replace(blocks=BLOCKS)


def parent(arch=DEEP, dtype=jnp.float32) -> dict:
    """Random weights whose norm scales differ, so that folding them shows."""
    params = init_params(arch, jax.random.key(0), dtype)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    for block in params["runs"].values():
        for sub in block.values():
            noise = jax.random.normal(next(keys), sub["norm"].shape)
            sub["norm"] = (1 + 0.3 * noise).astype(dtype)
    return params


def test_runs_see_through_empty_layers_and_end_at_others():
    assert ffn_runs(DEEP) == [(1, 2, 4, 5), (8, 9)]
    assert ffn_runs(ARCH) == []


@pytest.mark.parametrize("group", [(1, 2), (1, 2, 4, 5)])
def test_fused_is_the_sum_of_the_blocks_on_the_same_input(group):
    params = parent()
    arch, fused = fuse(params, DEEP, [group])
    h_BTD = jax.random.normal(jax.random.key(2), (2, 8, 32)) * 3
    ctx = make_context(DEEP, jnp.tile(jnp.arange(8), (2, 1)))
    want = h_BTD
    for layer in group:
        sub = DEEP.blocks[layer].ffn
        want += apply_part(DEEP, "ffn", sub, layer_params(params, DEEP, layer)["ffn"], h_BTD, ctx) - h_BTD
    wide = arch.blocks[group[-1]].ffn
    assert wide == SwiGLU(sum(DEEP.blocks[i].ffn.width for i in group))  # pyright: ignore[reportAttributeAccessIssue]
    got = apply_part(arch, "ffn", wide, layer_params(fused, arch, group[-1])["ffn"], h_BTD, ctx)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    lasting, shared = fuse(params, DEEP, [group], "last")
    other = apply_part(lasting, "ffn", wide, layer_params(shared, arch, group[-1])["ffn"], h_BTD, ctx)
    assert float(jnp.abs(other - want).max()) > 1e-2  # the scales differ, so the last one's is another sum


def test_layers_keep_their_numbers_and_all_else_its_bits():
    params = parent(dtype=jnp.bfloat16)
    arch, fused = fuse(params, DEEP, [(2, 4), (8, 9)])
    assert arch.num_layers == DEEP.num_layers
    assert {i for i, (a, b) in enumerate(zip(arch.blocks, BLOCKS, strict=True)) if a != b} == {2, 4, 8, 9}
    assert (
        arch.blocks[2] == arch.blocks[8] == EMPTY and arch.blocks[4] == ffn(72) and arch.blocks[9] == ffn(16)
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(fused))
    for layer in (0, 1, 5, 6, 7):
        old, new = layer_params(params, DEEP, layer), layer_params(fused, arch, layer)
        assert jax.tree.all(jax.tree.map(np.array_equal, old, new))
    assert np.array_equal(fused["embed"]["weight"], params["embed"]["weight"])


def test_where_blocks_read_the_same_the_model_says_the_same():
    """Blocks that add nothing leave the next one's input alone: then fusing loses nothing."""
    params, batch = parent(), batches(1)[0]
    for layer in (1, 2):
        number = next(n for n, r in enumerate(DEEP.runs()) if layer in r.layers)
        params["runs"][f"{number:03d}"]["ffn"]["down"] *= 0
    arch, fused = fuse(params, DEEP, [(1, 2, 4)])
    np.testing.assert_allclose(apply(fused, arch, batch)[0], apply(params, DEEP, batch)[0], atol=1e-4)


def by_hand(params, batch, left_out: int, layer: int) -> float:
    """The distance as it is defined: the model up to `layer`, with and without a block."""
    ctx = make_context(DEEP, jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"]))

    def adds(skip: int | None):
        h = jnp.asarray(params["embed"]["weight"])[batch["tokens"]]
        for i in range(layer + 1):
            before = h
            if i != skip:
                for part in ("attn", "ffn"):
                    p = layer_params(params, DEEP, i).get(part, {})
                    h = apply_part(DEEP, part, getattr(DEEP.blocks[i], part), p, h, ctx)
        return np.asarray(h - before, np.float64)

    a, b = adds(None), adds(left_out)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float((1 - cosine)[batch["segments"] > 0].sum())


def test_dependency_is_the_definition():
    params, data = parent(), batches(2)
    layers, matrix = dependency(params, DEEP, ffn_runs(DEEP), data)
    assert layers == (1, 2, 4, 5, 8, 9) and matrix.shape == (6, 6)
    first = np.arange(6) < 4
    inside = np.triu(first[:, None] == first, 1)
    assert np.array_equal(np.isfinite(matrix), inside)
    tokens = sum((b["segments"] > 0).sum() for b in data)
    with jax.disable_jit():
        for i, j in ((1, 2), (1, 5), (4, 5), (8, 9)):
            want = sum(by_hand(params, b, i, j) for b in data) / tokens
            assert matrix[layers.index(i), layers.index(j)] == pytest.approx(want, abs=1e-5)
        everything = [tuple(i for i, b in enumerate(BLOCKS) if not b.is_empty)]
        want = sum(by_hand(params, b, 0, 7) for b in data) / tokens
    layers, whole = dependency(params, DEEP, everything, data)
    assert whole[0, layers.index(7)] == pytest.approx(want, abs=1e-5)
    assert np.isfinite(whole).sum() == 9 * 8 / 2
    assert whole[1, 2] == pytest.approx(matrix[0, 1], abs=1e-6)


def test_programs_of_the_dependency_do_not_grow_with_layers():
    counts = {}
    for layers in (4, 9):
        arch = ARCH.replace(vocab_size=61 + layers, blocks=(FULL, *[ffn(40)] * layers))
        params = init_params(arch, jax.random.key(0))
        counts[layers] = compiled(lambda a=arch, p=params: dependency(p, a, ffn_runs(a), batches(1)))
    assert 0 < counts[4] == counts[9]


def test_partition_bounds_width_and_dependency():
    def cut(within, max_width=0, limit=0.5):
        return partition(range(5), lambda _: 10, within, max_width, limit)

    assert cut(lambda i, j: 0.1) == [(0, 1, 2, 3, 4)]
    assert cut(lambda i, j: 0.9) == []
    assert sorted(map(len, cut(lambda i, j: 0.1, max_width=30))) == [2, 3]
    assert cut(lambda i, j: 0.1, max_width=10) == []
    # 1 and 2 must be apart; of the cuts that do so in two pieces there is one
    assert cut(lambda i, j: 0.9 if (i, j) == (1, 2) else 0.1) == [(0, 1), (2, 3, 4)]
    # two pieces either way: the less dependent ones
    assert cut(lambda i, j: 0.4 if (i, j) == (2, 3) else 0.1, max_width=30) == [(0, 1, 2), (3, 4)]


def test_choices():
    layers = (1, 2, 4, 5, 8, 9)
    low = np.full((6, 6), 0.1)
    assert choose(DEEP, layers, low, Fusion()) == [(1, 2, 4)]
    assert choose(DEEP, layers, low, Fusion(skip_last=0)) == [(1, 2, 4, 5), (8, 9)]
    assert choose(DEEP, layers, low, Fusion(skip_last=0, max_width=80)) == [(1, 2), (4, 5), (8, 9)]
    assert choose(DEEP, layers, low, Fusion(max_dependency=0.05)) == []
    named = Fusion(runs=((8, 9), (2, 5)), max_dependency=0.0)
    assert choose(DEEP, layers, low + 1, named) == [(2, 4, 5), (8, 9)]


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        (
            {"runs": ((4, 6),)},
            r"fusion.runs: layer 6: expected a feed-forward without attention, got - linear",
        ),
        (
            {"runs": ((0, 2),)},
            r"layer 0: expected a feed-forward without attention, got kv2 ffn48; name a run",
        ),
        ({"runs": ((2, 3),)}, r"expected two feed-forwards in layers 2 to 3, got 1"),
        ({"runs": ((5, 99),)}, r"expected first < last of the 10 layers, got 5 and 99"),
        ({"runs": ((1, 4), (4, 5))}, r"expected runs apart, got layer 4 twice"),
        ({"runs": ((1, 2),), "max_width": 50}, r"fusion.max_width: expected room for two layers .* got 50"),
    ],
)
def test_runs_that_cannot_be_fused(fusion, message):
    with pytest.raises(ValueError, match=message):
        choose(DEEP, (), np.zeros((0, 0)), Fusion(**fusion))


def test_bad_numbers():
    with pytest.raises(ValueError, match="expected skip_last, max_width and max_dependency of at least 0"):
        Fusion(skip_last=-1)
    with pytest.raises(ValueError, match="expected calibration batches with tokens, got none"):
        dependency(parent(), DEEP, ffn_runs(DEEP), [])
    broken = parent()
    broken["runs"]["001"]["ffn"]["down"] *= jnp.nan
    with pytest.raises(ValueError, match="expected finite activations"):
        dependency(broken, DEEP, ffn_runs(DEEP), batches(1))


def test_a_mesh_of_eight_devices_equals_one():
    from nemojax.model.llama import param_shardings
    from nemojax.sharding import MeshConfig, make_mesh

    arch = DEEP.replace(vocab_size=64)
    params, mesh = parent(arch), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, one = dependency(params, arch, ffn_runs(arch), batches(1))
    placed = jax.device_put(params, param_shardings(arch, mesh))
    _, eight = dependency(placed, arch, ffn_runs(arch), batches(1), mesh=mesh)
    np.testing.assert_allclose(eight, one, atol=1e-5)


# --- the stage


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("fuse")
    texts, rng = root / "texts.jsonl", np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "and", "or", "not", "then"]
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) + "\n" for _ in range(40)))
    source = Source(name="words", kind="jsonl", path=str(texts), heldout_share=0.2)
    tokenizer = train_tokenizer(load_texts(source), 320, root / "tokenizer")
    arch = DEEP.replace(vocab_size=tokenizer.vocab_size)
    save_params(root / "model", arch, parent(arch), tokenizer_dir=root / "tokenizer")
    return Config(
        model=str(root / "model"),
        data=TextData(sources=(source,), length=32, batch_size=8),
        batches=1,
        fusion=Fusion(max_dependency=2.0),
        latency=LatencyConfig(batch=8, prompt=4, new_tokens=3, repeats=1),
    )


def test_the_stage_fuses_and_measures_before_and_after(cfg, tmp_path):
    result = run(cfg, tmp_path)
    assert result["runs"] == [[1, 2, 4, 5], [8, 9]]
    assert result["fused"] == [[1, 2, 4]] and result["widths"] == [120]
    assert (result["before"]["blocks"], result["after"]["blocks"]) == (9, 7)
    for when in ("before", "after"):
        assert 0 < result[when]["heldout"]["loss"] < 20
        assert result[when]["latency"]["decode_tokens_per_second"] > 0
    arch, params = load_params(tmp_path)
    want, weights = fuse(load_params(cfg.model)[1], load_params(cfg.model)[0], [(1, 2, 4)])
    assert arch == want and jax.tree.all(jax.tree.map(np.array_equal, params, weights))
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    stored = json.loads((tmp_path / "dependency.json").read_text())
    assert stored["layers"] == [1, 2, 4, 5, 8, 9] and stored["dependency"][1][0] is None
    assert ET.fromstring((tmp_path / "dependency.svg").read_text()).tag == "svg"
    assert from_dict(Config, to_dict(cfg)) == cfg and run(cfg, tmp_path) == result


def test_a_stage_that_was_stopped_does_not_measure_again(cfg, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    cfg = dataclasses.replace(cfg, latency=LatencyConfig(batch=0))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_params", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cfg, tmp_path)
    monkeypatch.setattr(stage, "dependency", stop)
    result = run(cfg, tmp_path)
    assert result["fused"] == [[1, 2, 4]] and "latency" not in result["after"]


def test_a_model_without_runs_stays_as_it_is(cfg, tmp_path, caplog):
    arch, params = load_params(cfg.model)
    plain = arch.replace(blocks=(FULL, FULL, ffn(8)))
    save_params(
        tmp_path / "m", plain, init_params(plain, jax.random.key(0)), tokenizer_dir=f"{cfg.model}/tokenizer"
    )
    cfg = dataclasses.replace(cfg, model=str(tmp_path / "m"), latency=LatencyConfig(batch=0))
    result = run(cfg, tmp_path / "out")
    assert result["fused"] == [] and result["before"] == result["after"]
    assert load_params(tmp_path / "out")[0] == plain and "nothing to fuse" in caplog.text
    named = dataclasses.replace(cfg, fusion=Fusion(runs=((0, 2),)))
    with pytest.raises(ValueError, match="layer 0: expected a feed-forward without attention"):
        run(named, tmp_path / "named")


# --- the picture


def test_heat_map():
    matrix = [[np.nan, 0.5, 1.0], [np.nan, np.nan, 0.25], [np.nan] * 3]
    names = ["1", "$2$", "5"]
    svg = plots.heat_map(matrix, names, title="a <b>", xlabel="layer", ylabel="left out", scale="distance")
    root = ET.fromstring(svg)
    text = [t.text for t in root.iter("text")]
    assert {"1", "$2$", "5", "layer", "left out", "distance"} <= set(text)
    assert plots._INK not in svg and "http" not in svg and "<image" not in svg
    opacity = [p.get("style", "") for p in root.iter("path")]
    assert sum("fill: #0072b2" in style for style in opacity) >= 3
    many = plots.heat_map(
        np.zeros((80, 80)).tolist(), [str(i) for i in range(80)], title="t", xlabel="x", ylabel="y"
    )
    assert len([t for t in ET.fromstring(many).iter("text") if (t.text or "").isdigit()]) < 80
    assert ET.fromstring(plots.heat_map([], [], title="t", xlabel="x", ylabel="y")).tag == "svg"
