"""Children: bitwise the parent where nothing changed, in Hugging Face formats and back, and parents again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.checkpoints.hf import export_hf, import_hf
from nemojax.compress import importance
from nemojax.compress import library as lib
from nemojax.compress.assemble import assemble, block_map, child_arch
from nemojax.compress.cost import CostConfig, block_costs
from nemojax.compress.fuse import fuse
from nemojax.compress.score import score
from nemojax.compress.search import solve
from nemojax.compress.space import Space, choices
from nemojax.compress.table import Table
from nemojax.model.llama import apply, init_params
from tests.checkpoints.toy_models import read_config, write_tokenizer
from tests.compress.made import Made
from tests.compress.tiny import batches

PARENT = uniform(
    vocab_size=64, dim=32, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=768, context=64, head_dim=8
)
FULL = PARENT.blocks[0]
KV, NARROW = BlockSpec(Attention(1), FULL.ffn), BlockSpec(FULL.attn, SwiGLU(256))
FFN, EMPTY = BlockSpec(NoOp(), FULL.ffn), BlockSpec(NoOp(), NoOp())
# every kind of outcome that a search may have
CHILDREN = {
    "kv heads": (KV, FULL, BlockSpec(Attention(2), FULL.ffn), FULL),
    "widths": (FULL, NARROW, BlockSpec(FULL.attn, SwiGLU(512)), FULL),
    "linear attention": (FULL, BlockSpec(Linear(), FULL.ffn), FULL, BlockSpec(Linear(), SwiGLU(512))),
    "linear feed-forward": (FULL, BlockSpec(FULL.attn, Linear()), FULL, BlockSpec(Linear(), Linear())),
    "no attention": (FFN, FULL, BlockSpec(NoOp(), SwiGLU(256)), FULL),
    "no feed-forward": (FULL, BlockSpec(FULL.attn, NoOp()), BlockSpec(Linear(), NoOp()), FULL),
    "empty layers": (EMPTY, FULL, EMPTY, FULL),
    "all at once": (KV, EMPTY, BlockSpec(Linear(), SwiGLU(512)), BlockSpec(NoOp(), Linear())),
}
PLAIN = {
    "unchanged": (FULL,) * 4,
    "uniformly less": (BlockSpec(Attention(2), SwiGLU(512)),) * 4,
}


def parent_of(arch: ArchSpec = PARENT, dtype=jnp.float32) -> dict:
    return init_params(arch, jax.random.key(0), dtype)


def round_trip(tmp_path, arch: ArchSpec, params: dict, format: str) -> dict:
    """Out and in again: the same architecture, weights and logits bitwise; the exported config."""
    save_params(tmp_path / "a", arch, params)
    write_tokenizer(tmp_path / "a" / "tokenizer", arch.vocab_size)
    done = export_hf(tmp_path / "a", tmp_path / "out", format)  # pyright: ignore[reportArgumentType]
    assert import_hf(tmp_path / "out", tmp_path / "b") == arch
    again, weights = load_params(tmp_path / "b")
    assert jax.tree.structure(weights) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, weights, params))
    tokens = {"tokens": jax.random.randint(jax.random.key(0), (2, 12), 0, arch.vocab_size)}
    with jax.disable_jit():
        assert np.array_equal(apply(weights, again, tokens)[0], apply(params, arch, tokens)[0])
    return {**read_config(tmp_path / "out"), "format": done.format}


@pytest.mark.parametrize("format", ["decilm", "anymodel"])
@pytest.mark.parametrize("name", CHILDREN)
def test_children_go_out_and_come_back(name, format, tmp_path):
    child = child_arch(PARENT, CHILDREN[name])
    config = round_trip(tmp_path, child, assemble(parent_of(), PARENT, child, Made(PARENT)), format)
    assert config["format"] == format and len(config["block_configs"]) == 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_equal_layers_are_a_plain_llama(name, tied, tmp_path):
    arch = PARENT.replace(tie_embeddings=tied)
    child = child_arch(arch, PLAIN[name])
    config = round_trip(tmp_path, child, assemble(parent_of(arch), arch, child, Made(arch)), "auto")
    assert config["format"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    ffn = child.blocks[0].ffn
    assert isinstance(ffn, SwiGLU) and config["intermediate_size"] == ffn.width


@pytest.mark.parametrize("format", ["auto", "anymodel"])
def test_a_fused_layer_goes_out_as_a_wide_one(format, tmp_path):
    arch = PARENT.replace(tie_embeddings=True, blocks=(FULL, FFN, BlockSpec(NoOp(), SwiGLU(256)), FULL))
    fused, params = fuse(parent_of(arch, jnp.bfloat16), arch, [(1, 2)])
    config = round_trip(tmp_path, fused, params, format)
    assert config["format"] == ("decilm" if format == "auto" else "anymodel")
    if format == "auto":
        assert config["block_configs"][2]["ffn"]["ffn_mult"] == 48.0  # 1024 channels of 32 dimensions
        assert config["block_configs"][1]["ffn"]["no_op"] and config["block_configs"][1]["attention"]["no_op"]


@pytest.mark.parametrize(
    ("arch", "format", "message"),
    [
        (
            PARENT.replace(blocks=(FULL, BlockSpec(FULL.attn, SwiGLU(384)))),
            "decilm",
            r"layer 1: ffn width: expected a multiple of 256, got 384; the nearest are 256, 512, or use "
            r"--format=anymodel",
        ),
        (
            PARENT.replace(head_dim=16),
            "decilm",
            r"head_dim: expected dim / num_heads = 8, got 16; .* use --format=anymodel",
        ),
        (
            PARENT.replace(blocks=(FULL, BlockSpec(Attention(4, window=8), FULL.ffn))),
            "anymodel",
            r"layer 1: window: expected none, got 8; use --format=decilm",
        ),
        *(
            (PARENT.replace(blocks=CHILDREN[name]), "llama", rf"llama: layer {layer} is {what}")
            for name, layer, what in (
                ("kv heads", 1, "kv4 ffn768, expected kv1 ffn768 as in layer 0"),
                ("widths", 1, "kv4 ffn256, expected kv4 ffn768 as in layer 0"),
                ("linear attention", 1, "linear ffn768, expected attention and SwiGLU"),
                ("no feed-forward", 1, "kv4 -, expected attention and SwiGLU"),
                ("empty layers", 0, "- -, expected attention and SwiGLU; use --format=decilm"),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 9 else "",
)
def test_what_a_format_cannot_say_is_named(arch, format, message, tmp_path):
    save_params(tmp_path / "a", arch, jax.tree.map(np.zeros_like, parent_of(arch)))
    write_tokenizer(tmp_path / "a" / "tokenizer", arch.vocab_size)
    with pytest.raises(ValueError, match=message):
        export_hf(tmp_path / "a", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_where_nothing_changed_the_child_is_the_parent_bitwise():
    params, library = parent_of(dtype=jnp.bfloat16), Made(PARENT)
    same = assemble(params, PARENT, PARENT, library)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, params))
    data = {"tokens": jnp.arange(12)[None]}
    forward = jax.jit(lambda p: apply(p, PARENT, data)[0])
    assert np.array_equal(forward(same), forward(params))
    child = child_arch(PARENT, (FULL, NARROW, BlockSpec(NoOp(), FULL.ffn), FULL))
    mixed = assemble(params, PARENT, child, library)
    own = params["runs"]["000"]
    for run, layer, parts in (("000", 0, ("attn", "ffn")), ("001", 1, ("attn",)), ("002", 2, ("ffn",))):
        for part in parts:
            for name, weight in mixed["runs"][run][part].items():
                assert np.array_equal(weight[0], own[part][name][layer]), (run, part, name)
    assert mixed["runs"]["001"]["ffn"]["gate"].shape == (1, 32, 256)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(mixed))


def test_a_block_that_was_trained_whole_is_taken_whole():
    whole = BlockSpec(Attention(4), SwiGLU(256))
    library = Made(PARENT, coupled=(whole,))
    child = child_arch(PARENT, (FULL, whole, FULL, BlockSpec(Attention(1), SwiGLU(256))))
    got = assemble(parent_of(), PARENT, child, library)["runs"]
    want = library.load_block(FULL, whole, 1)
    for part, weights in want.items():
        assert all(np.array_equal(got["001"][part][n][0], w) for n, w in weights.items()), part
    alone = library.load("ffn", SwiGLU(256), 3)
    assert np.array_equal(got["003"]["ffn"]["up"][0], alone["up"])
    assert not np.array_equal(got["001"]["attn"]["q"][0], parent_of()["runs"]["000"]["attn"]["q"][1])


def test_a_child_is_a_parent_again(tmp_path):
    """Iterative Puzzle: compressed, and its child compressed once more, with everything on the way."""
    arch = PARENT.replace(blocks=(BlockSpec(Attention(4), SwiGLU(32)),) * 3)
    params, data, sizes = parent_of(arch), batches(3), [arch.num_block_params()]
    data = [{**batch, "tokens": batch["tokens"] % 64, "targets": batch["targets"] % 64} for batch in data]
    space = Space(kv_heads=(2, 1), ffn_ratios=(0.5,), multiple=8, ffn_linear=True)
    archs = [arch]
    for round in (1, 2):
        options = choices(space, arch)
        ranks = importance.measure(params, arch, data[:1])
        kinds = lib.kinds_of(options, arch)
        bld = lib.Bld(steps=1)
        library = lib.build(params, arch, kinds, ranks, lambda: iter(data), bld, tmp_path / str(round))
        scores = score(params, arch, options, library, data[1:])
        costs = block_costs(arch, options, CostConfig(timings=()))
        rows = tuple(
            tuple(
                {"name": str(j), "score": s, **costs[o]}
                for j, (o, s) in enumerate(zip(row, values, strict=True))
            )
            for row, values in zip(options, scores, strict=True)
        )
        budget = 0.6 * sum(costs[block]["params"] for block in arch.blocks)
        [best] = solve(Table(rows, {}), maximum={"params": budget})
        child = child_arch(arch, tuple(row[j] for row, j in zip(options, best.chosen, strict=True)))
        params, arch = assemble(params, arch, child, library), child
        archs.append(arch)
        sizes.append(arch.num_block_params())
        assert sizes[-1] <= 0.6 * sizes[-2] and best.objective > 0
    assert len(set(archs[1].blocks)) > 1, "the second parent was meant to be of several kinds"
    assert np.isfinite(apply(params, arch, data[0])[0]).all()
    assert block_map(archs[1], arch).count("was") == sum(
        a != b for a, b in zip(archs[1].blocks, arch.blocks, strict=True)
    )
