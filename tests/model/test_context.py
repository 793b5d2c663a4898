"""Rows that several devices share: the same numbers as on one device, equal work, and less memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, uniform
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model import llama
from nemojax.model.attention import make_context
from nemojax.model.blockwise import Places, visible
from nemojax.model.cache import Window, init_cache
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.sharding import (
    MeshConfig,
    column_order,
    make_mesh,
    mesh_of,
    place_batch,
    use_mesh,
    ways_of,
    whole_rows,
)
from nemojax.train import FitConfig, fit, init_state, lm_loss, make_step

VOCAB = 64
MIXED = ArchSpec(
    vocab_size=VOCAB,
    dim=32,
    num_heads=4,
    head_dim=8,
    context=64,
    blocks=(
        BlockSpec(Attention(2), SwiGLU(64)),
        BlockSpec(Attention(2), SwiGLU(64)),
        BlockSpec(Linear(), SwiGLU(32)),
        BlockSpec(Attention(1, window=5), Linear()),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Attention(4, window=30), NoOp()),
    ),
)


def make_batch(rows: int, length: int, sizes: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in documents of these sizes, padding behind them."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    stops = np.cumsum(sizes)
    for number, (size, stop) in enumerate(zip(sizes, stops, strict=True), 1):
        segments[:, stop - size : stop] = number
        positions[:, stop - size : stop] = np.arange(size)
    return {
        "tokens": rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        "weights": ((rng.random((rows, length)) < 0.7) & (segments > 0)).astype(np.float32),
        "segments": segments,
        "positions": positions,
    }


def mesh_over(**sizes: int) -> jax.sharding.Mesh:
    sizes = {"fsdp": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def init(arch: ArchSpec):
    return jax.jit(lambda key: llama.init_params(arch, key))(jax.random.key(0))


def loss_and_gradients(arch, params, batch, mesh=None, placed=True):
    loss_fn = lm_loss(arch)

    def mean(p, b):
        total, weight, _ = loss_fn(p, None, b, jax.random.key(0))
        return total / weight

    with use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, llama.param_shardings(arch, mesh))
        loss, grads = jax.jit(jax.value_and_grad(mean))(params, place_batch(batch, mesh) if placed else batch)
    return float(loss), jax.device_get(grads)


def check_equal(got, want):
    assert abs(got[0] - want[0]) <= 1e-6 * abs(want[0])
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3)


@pytest.fixture(scope="module")
def params():
    return init(MIXED)


@pytest.fixture(scope="module")
def mixed_batch():
    return make_batch(2, 64, [20, 3, 30])


@pytest.fixture(scope="module")
def on_one_device(params, mixed_batch):
    return loss_and_gradients(MIXED, params, mixed_batch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"context": 8},
        {"context": 2, "tensor": 4},  # 1 and 2 KV heads are held by all
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(params, mixed_batch, on_one_device, sizes):
    check_equal(loss_and_gradients(MIXED, params, mixed_batch, mesh_over(**sizes)), on_one_device)


def test_a_batch_in_its_own_order_gives_the_same(params, mixed_batch, on_one_device):
    mesh = mesh_over(context=4, tensor=2)
    check_equal(loss_and_gradients(MIXED, params, mixed_batch, mesh, placed=False), on_one_device)


def test_heads_that_do_not_divide_find_their_keys():
    """Three query heads a KV head, two heads a device: some devices have heads of two KV heads."""
    arch = uniform(
        vocab_size=VOCAB, dim=48, num_layers=1, num_heads=6, num_kv_heads=2, ffn_width=24, context=32
    ).replace(head_dim=8)
    arch = arch.replace(blocks=(BlockSpec(Attention(2), NoOp()),))
    batch = make_batch(1, 32, [32])
    params = init(arch)
    want = loss_and_gradients(arch, params, batch)
    mesh = mesh_over(context=2, tensor=3)
    # the vocabulary and the channels do not divide over three devices, so the parameters are held by all
    with use_mesh(mesh):
        loss_fn = lm_loss(arch)
        value = jax.jit(
            jax.value_and_grad(lambda p, b: loss_fn(p, None, b, jax.random.key(0))[0] / b["weights"].sum())
        )
        loss, grads = value(params, place_batch(batch, mesh))
    check_equal((float(loss), jax.device_get(grads)), want)


@pytest.mark.parametrize("sizes", [[16384], [5000, 300, 1, 7000, 3000]], ids=["whole", "packed"])
def test_16k_tokens_equal_one_device(sizes):
    arch = uniform(
        vocab_size=VOCAB, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=64, context=16384
    )
    batch, params = make_batch(1, 16384, sizes), init(arch)
    check_equal(
        loss_and_gradients(arch, params, batch, mesh_over(context=8)), loss_and_gradients(arch, params, batch)
    )


# --- where columns go


def test_columns_of_a_row():
    assert column_order(8, 1).tolist() == list(range(8))
    assert column_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert sorted(column_order(48, 8).tolist()) == list(range(48))
    batch = {"tokens": np.arange(16).reshape(2, 8), "other": np.arange(6).reshape(2, 3), "row": np.arange(2)}
    placed = place_batch(batch, mesh_over(fsdp=2, context=2))
    assert placed["tokens"].tolist() == batch["tokens"][:, column_order(8, 2)].tolist()
    assert placed["positions"].tolist() == [column_order(8, 2).tolist()] * 2
    assert placed["other"].tolist() == batch["other"].tolist() and placed["row"].tolist() == [0, 1]
    assert placed["tokens"].sharding.shard_shape((2, 8)) == (1, 4)
    assert placed["other"].sharding.shard_shape((2, 3)) == (1, 3)


def test_a_length_that_does_not_divide_is_refused():
    mesh = mesh_over(context=4)
    with pytest.raises(ValueError, match="divides into 8 chunks, two for each of the 4 devices .*, got 60"):
        place_batch(make_batch(1, 60, [60]), mesh)


def test_what_is_split_over_the_mesh_in_scope(params):
    assert ways_of("length") == ways_of("batch") == 1
    with use_mesh(mesh_over(fsdp=2, context=4)):
        assert (ways_of("length"), ways_of("batch"), ways_of("heads")) == (4, 2, 1)
    assert mesh_of(params) is None


@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 700])
def test_devices_have_equal_work(ways, window):
    length, block = 16384, 128
    positions = np.arange(length, dtype=np.int32)[column_order(length, ways)]
    at = Places(jnp.ones((length // block, block), jnp.int32), jnp.asarray(positions.reshape(-1, block)))
    seen_IJ = visible(at, at, 1, window)[0]
    work = seen_IJ.reshape(ways, -1).sum(1)
    # a window of 6 blocks and a part is cut off at the start of the row, where one device has less to see
    assert work.max() <= 1.03 * work.min() + (0 if window is None else 1 + 2 + 3 + 4 + 5 + 6)
    assert work.sum() <= (0.51 if window is None else 0.06) * (length // block) ** 2


# --- whole stages


class Given:
    """The same few batches again and again."""

    def __init__(self, batches):
        self.batches, self.step = batches, 0

    def __next__(self):
        self.step += 1
        return self.batches[self.step % len(self.batches)]

    def state(self):
        return {"step": self.step}

    def restore(self, state):
        self.step = state["step"]


def trained(params, batches, mesh, workdir):
    if mesh is not None:
        params = jax.device_put(params, llama.param_shardings(MIXED, mesh))
    return fit(
        jax.tree.map(jnp.copy, params),
        lm_loss(MIXED, Compute(remat="full"), chunk=16),
        Given(batches),
        arch=MIXED,
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        cfg=FitConfig(steps=4, accumulate=2, log_every=1),
        workdir=workdir,
        mesh=mesh,
    )


def test_training_and_measuring_equal_one_device(params, tmp_path):
    batches = [make_batch(4, 64, sizes, seed) for seed, sizes in enumerate(([64], [40, 20], [7, 50, 3]))]
    one = trained(params, batches, None, tmp_path / "one")
    eight = trained(params, batches, mesh_over(fsdp=2, context=2, tensor=2), tmp_path / "eight")
    # AdamW makes as much of a gradient that is all rounding as of any other: as a whole, weights move alike
    for a, b, start in zip(*map(jax.tree.leaves, (one, eight, params)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a - start)
    heldout = {"whole": batches[:1], "packed": [make_batch(3, 64, [30, 33], 7), *batches[1:]]}
    want = heldout_loss(one, MIXED, heldout)
    assert list(want) == ["whole", "packed", "loss"]
    got = heldout_loss(eight, MIXED, heldout, chunk=32)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=2e-5)


def temporaries(arch, length, mesh) -> int:
    """Bytes that each device needs besides the state and the batch in a training step."""
    tx = make_optimizer(OptimConfig(), 100)
    params = init(arch)
    with use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, llama.param_shardings(arch, mesh))
        state = init_state(params, tx, jax.random.key(0))
        batch = place_batch(make_batch(1, length, [length]), mesh)
        step = make_step(lm_loss(arch, Compute(remat="full"), chunk=length // 8), tx)
        compiled = jax.jit(step, donate_argnums=0).lower(state, None, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_falls_with_the_devices_that_share_a_row():
    length = 32768
    arch = uniform(
        vocab_size=VOCAB, dim=64, num_layers=2, num_heads=4, num_kv_heads=1, ffn_width=128, context=length
    )
    one, eight = (temporaries(arch, length, mesh) for mesh in (None, mesh_over(context=8)))
    assert eight < one / 4
    assert one < 4 * length * length / 8  # not even an eighth of one T x T array of f32


def test_a_cache_on_such_a_mesh_gives_the_same_logits(params, mixed_batch):
    """Generation does not split rows; the devices of a context axis share the prompt or repeat the work."""
    tokens, positions = mixed_batch["tokens"][:, :9], np.tile(np.arange(9), (2, 1))

    @jax.jit
    def forward(weights, part, where, cache):
        ctx = make_context(MIXED, where)
        h = llama.embed(weights, part)
        h, _, cache = llama.apply_blocks(weights, MIXED, h, ctx, window=Window(cache, 16))
        return llama.head(weights, MIXED, h), cache

    mesh = mesh_over(fsdp=2, context=2, tensor=2)
    with use_mesh(mesh):
        placed = jax.device_put(params, llama.param_shardings(MIXED, mesh))
        first, cache = forward(placed, tokens[:, :8], positions[:, :8], init_cache(MIXED, 2, 16))
        last, _ = forward(placed, tokens[:, 8:], positions[:, 8:], cache)
    want = jax.jit(lambda p: llama.apply(p, MIXED, {"tokens": tokens})[0])(params)
    np.testing.assert_allclose(np.concatenate([first, last], axis=1), want, atol=2e-5)


def test_stages_that_read_columns_back_refuse_a_context_axis():
    assert whole_rows(MeshConfig(tensor=2), "rl") == MeshConfig(tensor=2)
    with pytest.raises(
        ValueError, match="mesh: expected context=1 for rl, .* got 2; give the devices to fsdp"
    ):
        whole_rows(MeshConfig(context=2), "rl")
