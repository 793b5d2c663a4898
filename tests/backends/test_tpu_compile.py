"""A training step and a decoding step compiled for TPUs on this CPU, by libtpu alone.

What the compiler says about memory and communication is what a pod would see; nothing runs. The test needs
`pip install libtpu` in the version that belongs to jax (the extra `tpu` brings it).
"""

import importlib.util
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.backends import tpu
from nemojax.generate import programs
from nemojax.generate.sampling import SamplingConfig
from nemojax.model import llama
from nemojax.model.cache import init_cache
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.sharding import BATCH_AXES, MeshConfig, make_mesh, use_mesh
from nemojax.train import TrainState, lm_loss, make_step

LIBTPU = os.environ.get("NEMOJAX_LIBTPU")  # a directory of its own, as `launch/test.sh --all` makes it
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (LIBTPU or importlib.util.find_spec("libtpu")),
        reason="libtpu is not installed (200 MB; the extra `tpu`)",
    ),
]
FULL = BlockSpec(Attention(4), SwiGLU(1024))
ARCH = ArchSpec(
    vocab_size=1024,
    dim=512,
    num_heads=8,
    head_dim=128,
    context=1024,
    blocks=(
        *(FULL,) * 4,
        BlockSpec(Attention(2), SwiGLU(512)),
        BlockSpec(NoOp(), SwiGLU(512)),
        BlockSpec(Linear(), NoOp()),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Attention(1), Linear()),  # one KV head on two devices: replicated
    ),
)
ROWS, LENGTH, CAPACITY = 8, 256, 1024


@pytest.fixture(scope="module")
def chips():
    """Four v5e chips."""
    with pytest.MonkeyPatch.context() as patch:
        if LIBTPU:
            patch.setenv("TPU_LIBRARY_PATH", f"{LIBTPU}/libtpu/libtpu.so")
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        yield topology.devices


@pytest.fixture(scope="module")
def mesh(chips):
    return make_mesh(MeshConfig(fsdp=2, tensor=2), chips)


def abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def over(tree: Any, mesh: jax.sharding.Mesh, *spec: Any) -> Any:
    """The tree's shapes, each array with the same partition."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))),
        tree,
    )


def bytes_of(tree: Any, *, on_a_device: bool) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if on_a_device else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check_memory(compiled: Any, *arguments: Any) -> None:
    """What a device holds is its shards. Tiles round vectors and scalars up, by a thousandth in all."""
    memory = compiled.memory_analysis()
    mine = bytes_of(arguments, on_a_device=True)
    assert mine <= memory.argument_size_in_bytes <= 1.001 * mine
    assert mine < 0.3 * bytes_of(arguments, on_a_device=False)
    assert memory.temp_size_in_bytes > 0


def collectives(compiled: Any) -> set[str]:
    return set(
        re.findall(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", compiled.as_text())
    )


def train_state(
    mesh: jax.sharding.Mesh, tx: optax.GradientTransformation, arch: ArchSpec = ARCH
) -> TrainState:
    """Abstract, with moments that are split as their parameters."""
    params = abstract(llama.abstract_params(arch), llama.param_shardings(arch, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree.map_params(
        tx,
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere),
    )
    count, key = over((jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0)), mesh)
    return TrainState(count, params, moments, None, key, count)


def abstract_batch(mesh: jax.sharding.Mesh, rows: int, length: int, *spec: Any) -> dict[str, Any]:
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {name: ids for name in ("tokens", "targets", "segments", "positions")}
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    return over(batch, mesh, *spec)


def test_a_training_step(mesh):
    tx = make_optimizer(OptimConfig(), 100)
    state, batch = train_state(mesh, tx), abstract_batch(mesh, ROWS, LENGTH, BATCH_AXES, None)
    compute = llama.Compute(dtype="bfloat16", remat="full")
    step = make_step(lm_loss(ARCH, compute, chunk=128), tx)
    with use_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(state, None, batch).compile()
    check_memory(compiled, state, batch)
    # the state is updated in place, in the shardings that it came in
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of(state, on_a_device=True)
    assert {"all-gather", "all-reduce"} <= collectives(compiled)
    (new_state, _) = compiled.output_shardings
    for old, new in zip(jax.tree.leaves(state.params), jax.tree.leaves(new_state.params), strict=True):
        assert new.is_equivalent_to(old.sharding, old.ndim)


def test_chips_that_share_a_row_share_its_memory(chips):
    """32,768 tokens: queries stay, keys and values are gathered, and nothing is as large as T x T."""
    arch = ARCH.replace(context=32768, blocks=(BlockSpec(Attention(2), SwiGLU(1024)),) * 2)
    length, tx, compute = 32768, make_optimizer(OptimConfig(), 100), llama.Compute("bfloat16", remat="full")
    step = make_step(lm_loss(arch, compute, chunk=2048), tx)
    needed = {}
    for ways in (2, 4):
        mesh = make_mesh(MeshConfig(fsdp=1, context=ways), chips[:ways])
        arguments = train_state(mesh, tx, arch), None, abstract_batch(mesh, 1, length, BATCH_AXES, "context")
        with use_mesh(mesh):
            compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        memory: Any = compiled.memory_analysis()
        needed[ways] = memory.temp_size_in_bytes
        assert {"all-gather", "reduce-scatter"} <= collectives(compiled)
    assert needed[4] < 0.65 * needed[2] < length * length


def long_step(mesh: jax.sharding.Mesh) -> Any:
    """A training step over rows of 2,048 tokens, compiled with the options of `backends/tpu.py`."""
    arch = ARCH.replace(context=2048, blocks=(BlockSpec(Attention(2), SwiGLU(1024)),) * 2)
    tx, compute = make_optimizer(OptimConfig(), 100), llama.Compute("bfloat16", remat="dots")
    arguments = train_state(mesh, tx, arch), None, abstract_batch(mesh, 2, 2048, BATCH_AXES, None)
    step = make_step(lm_loss(arch, compute, chunk=256), tx)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
    return lowered.compile(compiler_options=dict(tpu.COMPILER_OPTIONS))


def kernels_of(compiled: Any) -> list[str]:
    calls = [line for line in compiled.as_text().splitlines() if '"tpu_custom_call"' in line]
    return sorted(name[0] for line in calls if (name := re.findall(r"splash_mha_(\w+?)_segmented", line)))


def test_long_rows_take_splash_attention(chips):
    """Forward once, which rematerialisation keeps, and backward; in less memory than a layer's scores."""
    splash = long_step(make_mesh(MeshConfig(), chips[:1]))
    assert kernels_of(splash) == ["dkv", "dq", "fwd"]
    memory: Any = splash.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * ARCH.num_heads * 2048**2 * 4


def test_splash_attention_where_rows_and_heads_are_split(mesh):
    assert kernels_of(long_step(mesh)) == ["dkv", "dq", "fwd"]


def test_a_decoding_step(mesh):
    params = abstract(llama.abstract_params(ARCH, jnp.bfloat16), llama.param_shardings(ARCH, mesh))
    cache = {}
    for name, run in jax.eval_shape(lambda: init_cache(ARCH, ROWS, CAPACITY, jnp.dtype("bfloat16"))).items():
        heads = run["k"].shape[2]
        cache[name] = over(run, mesh, None, BATCH_AXES, "tensor" if heads % 2 == 0 else None, None, None)
    rows = programs.pack([(5, 16, 8, SamplingConfig(), (0, i), ()) for i in range(ROWS)], 2)
    how = programs.How(ARCH, llama.Compute(dtype="bfloat16"), steps=8)
    state = programs.State(cache, None)
    steps = (np.int32(8), np.int32(0))
    with use_mesh(mesh):
        lowered = programs.decode.lower(params, state, rows, *steps, how=how, keys=CAPACITY)
        compiled = lowered.compile()
    check_memory(compiled, params, cache)
    # partial sums of the heads and channels that lie on two devices
    assert "all-reduce" in collectives(compiled)
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of(cache, on_a_device=True)
