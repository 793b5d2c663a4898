"""Loads count what is there: weights, multiplications, cache; and training what the tokens cost."""

import pytest

from nemojax.arch import Attention, BlockSpec, Linear, NoOp, SwiGLU, block_params, load_arch
from nemojax.backends.roofline import Load, blocks_load, head_load, outer_load, sub_load, training_load
from nemojax.backends.speed import flops_per_token

ARCH = load_arch("llama_3_1_8b")


@pytest.mark.parametrize("sub", [Attention(8), Attention(2, 512), SwiGLU(1024), Linear(), NoOp()], ids=str)
def test_a_step_of_one_token_reads_the_weights_and_multiplies_by_each_once(sub):
    spec = BlockSpec(sub, NoOp()) if isinstance(sub, Attention | Linear | NoOp) else BlockSpec(NoOp(), sub)
    params = block_params(ARCH, spec)
    load = sub_load(ARCH, sub, batch=1, tokens=1)
    norm = 0 if isinstance(sub, NoOp) else ARCH.dim
    over_keys = 4 * ARCH.num_heads * ARCH.head_dim if isinstance(sub, Attention) else 0
    assert load.flops == 2 * (params - norm) + over_keys
    assert 2 * params <= load.bytes <= 2 * params + 40 * (ARCH.dim + 4096)


def test_a_cache_is_read_once_a_step():
    how = {"batch": 4, "tokens": 1}
    short, long = (sub_load(ARCH, Attention(8), cached=n, **how) for n in (1000, 3000))
    assert long.bytes - short.bytes == 4 * 2000 * 2 * 8 * 128 * 2
    windowed = sub_load(ARCH, Attention(8, 512), cached=3000, **how)
    assert windowed.bytes - sub_load(ARCH, Attention(8, 512), cached=512, **how).bytes == 0
    one_byte = sub_load(ARCH, Attention(8), cached=1000, cache_bytes=1, **how)
    assert short.bytes - one_byte.bytes == 4 * 1001 * 2 * 8 * 128


def test_training_costs_what_its_tokens_do():
    rows, length = 3, 2048
    load = training_load(ARCH, rows, length, remat=False)
    assert load.flops == pytest.approx(flops_per_token(ARCH, length) * rows * length, rel=1e-4)
    blocks = blocks_load(ARCH, batch=rows, tokens=length)
    again = training_load(ARCH, rows, length, remat=True)
    assert again.flops - load.flops == pytest.approx(blocks.flops)
    assert head_load(ARCH, 1).flops == outer_load(ARCH, batch=1, tokens=1).flops


def test_the_longer_of_two_decides():
    assert Load(100.0, 10.0).seconds(10.0, 10.0) == 10.0
    assert (Load(100.0, 10.0) * 2 + Load(0.0, 480.0)).seconds(10.0, 10.0) == 50.0
