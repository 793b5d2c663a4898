"""The model against itself: cache, packing, layouts, runs, and the same numbers on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.model import layout, llama
from nemojax.model.attention import make_context
from nemojax.model.cache import Window, fork, init_cache
from nemojax.model.layout import split_layers
from nemojax.model.llama import Compute
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh
from nemojax.train import lm_loss
from tests.environment import OPTIMISED


def full(kv=2, width=64):
    return BlockSpec(Attention(kv), SwiGLU(width))


MIXED = ArchSpec(
    vocab_size=64,
    dim=32,
    num_heads=4,
    head_dim=8,
    context=64,
    blocks=(
        BlockSpec(NoOp(), SwiGLU(64)),
        full(),
        full(),
        BlockSpec(NoOp(), NoOp()),
        full(),
        BlockSpec(Linear(), SwiGLU(32)),
        BlockSpec(Attention(1, window=5), Linear()),
        BlockSpec(Attention(4), NoOp()),
    ),
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: llama.init_params(MIXED, key))(jax.random.key(0))


def logits(params, tokens, arch=MIXED, **extra):
    return jax.jit(lambda p, b: llama.apply(p, arch, b)[0])(params, {"tokens": tokens} | extra)


def tokens_of(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, MIXED.vocab_size)


def test_parameters_are_counted_without_allocating(params):
    assert MIXED.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))
    abstract = jax.tree.map(lambda s: s.shape, llama.abstract_params(MIXED))
    assert abstract == jax.tree.map(lambda p: p.shape, params)


def test_runs_skip_empty_layers_and_layouts_round_trip(params):
    assert [run.layers for run in MIXED.runs()] == [(0,), (1, 2, 4), (5,), (6,), (7,)]
    canonical = layout.unstack(params, MIXED)
    assert set(canonical["layers"]) == {"0", "1", "2", "4", "5", "6", "7"}
    back = layout.stack(canonical, MIXED)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), back, params))
    assert set(layout.layer_params(params, MIXED, 0)) == {"ffn"}
    assert layout.layer_params(params, MIXED, 3) == {}


def test_every_split_of_the_layers_composes_to_the_whole(params):
    tokens = tokens_of(2, 8)
    ctx = make_context(MIXED, jnp.broadcast_to(jnp.arange(8), (2, 8)))
    h = llama.embed(params, tokens)
    whole, taps, _ = llama.apply_blocks(params, MIXED, h, ctx, taps=(0, 2, 3, 6))
    for cut in range(MIXED.num_layers + 1):
        first, _, _ = llama.apply_blocks(params, MIXED, h, ctx, stop=cut)
        second, _, _ = llama.apply_blocks(params, MIXED, first, ctx, start=cut)
        np.testing.assert_allclose(second, whole, atol=1e-5)
        if cut - 1 in taps:
            np.testing.assert_allclose(first, taps[cut - 1], atol=1e-5)
    np.testing.assert_array_equal(taps[3], taps[2])  # an empty layer passes the stream on


def test_packed_documents_do_not_see_each_other(params):
    a, b = tokens_of(1, 5, seed=2), tokens_of(1, 7, seed=3)
    row = jnp.concatenate([a, b, jnp.zeros((1, 4), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [0] * 4])
    positions = jnp.asarray([[*range(5), *range(7), *range(4)]])
    packed = logits(params, row, segments=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :5], logits(params, a), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:12], logits(params, b), atol=1e-5)


def test_sliding_window_limits_what_a_query_sees():
    arch = MIXED.replace(blocks=(BlockSpec(Attention(2, window=3), NoOp()),))
    params = llama.init_params(arch, jax.random.key(0))
    tokens = tokens_of(1, 8)
    changed = tokens.at[0, 4].set((tokens[0, 4] + 1) % 64)
    difference = jnp.abs(logits(params, tokens, arch) - logits(params, changed, arch)).max(-1)[0]
    assert (difference[:4] == 0).all() and (difference[7:] == 0).all()
    assert (difference[4:7] > 0).all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("prefill", [1, 9, 12])
def test_cache_gives_the_logits_of_the_whole_sequence(params, prefill, split):
    rows, length = 3, 14
    tokens = tokens_of(rows, length)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))

    weights = split_layers(params) if split else params

    @jax.jit
    def forward(part, where, cache):
        ctx = make_context(MIXED, where)
        h, _, cache = llama.apply_blocks(
            weights, MIXED, llama.embed(weights, part), ctx, window=Window(cache, 16)
        )
        return llama.head(weights, MIXED, h), cache

    cache = init_cache(MIXED, rows, 16, split=split)
    layers = [len(run) if split else run["k"].shape[0] for run in cache.values()]
    assert len(layers) == 3 and sum(layers) == len(MIXED.attention_layers)
    got, cache = forward(tokens[:, :prefill], positions[:, :prefill], cache)
    outputs = [got]
    for t in range(prefill, length):
        got, cache = forward(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        outputs.append(got)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), logits(params, tokens), atol=2e-5)


def test_params_split_by_layer_are_the_same_model(params):
    tokens = tokens_of(2, 12)
    split = split_layers(params)
    assert split_layers(split)["runs"]["000"][0] is split["runs"]["000"][0]
    got, taps = jax.jit(lambda p: llama.apply(p, MIXED, {"tokens": tokens}, taps=(0, 3)))(split)
    want, wanted = jax.jit(lambda p: llama.apply(p, MIXED, {"tokens": tokens}, taps=(0, 3)))(params)
    np.testing.assert_allclose(got, want, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), taps, wanted)


@pytest.mark.parametrize("dtype, atol", [("bfloat16", 0.004), ("int8", 0.015), ("float8_e4m3fn", 0.05)])
def test_a_cache_of_fewer_bits_is_near(params, dtype, atol):
    """Probabilities of the next token; scales follow each head, so that a large one spoils no other."""
    tokens, rows = tokens_of(4, 14), 4
    positions = jnp.broadcast_to(jnp.arange(14), (rows, 14))
    window = Window(init_cache(MIXED, rows, 16, dtype), 16)
    h, _, cache = llama.apply_blocks(
        params, MIXED, llama.embed(params, tokens), make_context(MIXED, positions), window=window
    )
    assert cache is not None
    assert all(run["k"].dtype == dtype for run in cache.values())
    assert all(("k_scale" in run) == (dtype != "bfloat16") for run in cache.values())
    got = jax.nn.softmax(llama.head(params, MIXED, h))
    np.testing.assert_allclose(got, jax.nn.softmax(logits(params, tokens)), atol=atol)


def test_forked_slots_hold_the_same(params):
    """Slot 0 read a prompt; slot 2 gets its first 8 positions, slot 1 stays as it was."""
    tokens = tokens_of(1, 12)
    for split in (False, True):
        weights = split_layers(params) if split else params
        start = init_cache(MIXED, 3, 16, "int8", split)
        ctx = make_context(MIXED, jnp.arange(12)[None])
        h = llama.embed(weights, tokens)
        _, _, cache = llama.apply_blocks(weights, MIXED, h, ctx, window=Window(start, 16, jnp.array([0])))
        assert cache is not None
        forked = fork(cache, jnp.array([0, 0]), jnp.array([2, 2**30]), 8)
        for leaf, old in zip(jax.tree.leaves(forked), jax.tree.leaves(cache), strict=True):
            leaf, old = (
                np.asarray(x, np.float32) if split else np.asarray(x[0], np.float32) for x in (leaf, old)
            )
            assert (leaf[2, :, :8] == old[0, :, :8]).all() and leaf[2, :, :8].any()
            assert not leaf[2, :, 8:].any() and (leaf[:2] == old[:2]).all()


@pytest.mark.parametrize("compute", [Compute(remat="full"), Compute(remat="dots"), Compute(unroll=3)])
def test_remat_and_unrolling_change_nothing_but_rounding(params, compute):
    batch = packed_batch(2, 16)

    def value(c):
        loss_fn = lm_loss(MIXED, c)
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(p, None, batch, jax.random.key(0))[0]))(params)

    plain, other = value(Compute()), value(compute)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, other)


def test_bf16_stays_near_f32(params):
    tokens = tokens_of(2, 16)
    low = llama.apply(params, MIXED, {"tokens": tokens}, compute=Compute(dtype="bfloat16"))[0]
    assert low.dtype == jnp.float32
    assert jnp.abs(low - logits(params, tokens)).mean() < 0.05


def packed_batch(rows, length, seed=5):
    rng = np.random.default_rng(seed)
    segments = np.repeat([[1] * (length // 2) + [2] * (length - length // 2)], rows, 0)
    positions = np.concatenate([np.arange(length // 2), np.arange(length - length // 2)])
    return {
        "tokens": rng.integers(0, 64, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, 64, (rows, length)).astype(np.int32),
        "weights": (rng.random((rows, length)) < 0.7).astype(np.float32),
        "segments": segments.astype(np.int32),
        "positions": np.repeat(positions[None], rows, 0).astype(np.int32),
    }


@pytest.fixture(scope="module")
def on_one_device(params):
    return value_on(params, make_mesh(MeshConfig(), jax.devices()[:1]))


def value_on(params, mesh):
    batch = packed_batch(8, 16)
    loss_fn = lm_loss(MIXED)
    with use_mesh(mesh):
        placed = jax.device_put(params, llama.param_shardings(MIXED, mesh))

        def mean(p, b):
            total, weight, _ = loss_fn(p, None, b, jax.random.key(0))
            return total / weight

        step = jax.jit(jax.value_and_grad(mean), compiler_options=OPTIMISED)
        loss, grads = step(placed, place_batch(batch, mesh))
    return float(loss), jax.device_get(grads)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 4), (1, 8, 1, 1), (8, 1, 1, 1), (2, 2, 1, 2)], ids=str)
def test_loss_and_gradients_do_not_depend_on_the_mesh(params, on_one_device, sizes):
    # MIXED has 1, 2 and 4 KV heads: fewer than the tensor axis are replicated
    loss, grads = on_one_device
    other_loss, other_grads = value_on(params, make_mesh(MeshConfig(*sizes)))
    assert abs(loss - other_loss) <= 1e-6
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), 1e-3)


def test_a_mesh_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match="multiply to 8 devices, got data=1, fsdp=3, context=1, tensor=1"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ValueError, match="heads = 4 does not divide over tensor = 8"):
        llama.param_shardings(MIXED, make_mesh(MeshConfig(tensor=8)))
