"""What several processes that answer together have, as far as one can tell (see tests/processes)."""

import jax
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.generate.programs import prepare
from nemojax.generate.shares import answered, copied_to
from nemojax.model.llama import Compute, init_params, param_shardings
from nemojax.sharding import MeshConfig, make_mesh

ARCH = uniform(vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=64, context=32)


@pytest.mark.parametrize("matmul", ["default", "fp8"])
def test_weights_arrive_as_they_are_used(matmul):
    """From a mesh of training onto one on which every second device has all of them."""
    compute = Compute("bfloat16", matmul=matmul)
    train, wide = make_mesh(MeshConfig(fsdp=4, tensor=2)), make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    init = jax.jit(lambda key: init_params(ARCH, key), out_shardings=param_shardings(ARCH, train))
    params = init(jax.random.key(0))
    copied = copied_to(params, ARCH, wide, compute)
    expected, _ = prepare(params, compute, train)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), copied, expected)
    assert all(leaf.sharding.mesh == wide for leaf in jax.tree.leaves(copied))
    gate = jax.tree.leaves(copied["runs"]["000"]["ffn"]["gate"])[0]
    assert gate.dtype == ("float8_e4m3fn" if matmul == "fp8" else "bfloat16")
    assert gate.addressable_shards[0].data.size * 2 == gate.size  # over tensor alone


def test_one_process_answers_all():
    assert answered(3, 1, lambda mine: [i * i for i in mine]) == [0, 1, 4]
