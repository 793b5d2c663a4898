"""Products with weights agree with einsum, forwards and backwards, in every form that the model uses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.backends.matmul import MIN_ROWS, matmul
from nemojax.model.llama import Compute, init_params
from nemojax.train import lm_loss

ARCH = uniform(vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=32, context=1024)

SIZES = dict(B=2, T=3, D=8, N=2, K=2, H=4, F=6, E=8, V=10)
FORMS = ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,DE->BTE", "BTD,VD->BTV"]


def operands(form: str, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    dims = form.replace("->", ",").split(",")
    return [jnp.asarray(rng.normal(size=[SIZES[d] for d in part]), dtype) for part in dims]


@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients_are_those_of_einsum(form):
    x, w, g = operands(form)

    def through(product):
        value, back = jax.vjp(lambda x, w: product(form, x, w), x, w)
        return value, *back(g)

    for got, expected in zip(through(matmul), through(jnp.einsum), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bf16_operands_accumulate_in_the_dtype_asked_for():
    x, w, g = operands("BTD,VD->BTV", jnp.bfloat16)
    value, back = jax.vjp(lambda x, w: matmul("BTD,VD->BTV", x, w, jnp.float32), x, w)
    exact = np.einsum("BTD,VD->BTV", np.asarray(x, np.float32), np.asarray(w, np.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)
    dx, dw = back(g.astype(jnp.float32))
    assert dx.dtype == dw.dtype == jnp.bfloat16


def test_it_batches_over_stacked_weights():
    x, w, _ = operands("BTD,DF->BTF")
    stacked = jnp.stack([w, 2 * w])
    out = jax.vmap(lambda w: matmul("BTD,DF->BTF", x, w))(stacked)
    np.testing.assert_allclose(out[1], 2 * out[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length, chunk", [(8, 0), (1024, 256)])
def test_f32_means_f32_on_every_machine(dtype, length, chunk):
    """Also in backward passes that are written out: of matmuls, of attention over long rows, of the loss."""
    compute = Compute(dtype=dtype)
    loss = lm_loss(ARCH, compute, chunk=chunk)
    ids = jnp.ones((1, length), jnp.int32)
    batch = {"tokens": ids, "targets": ids, "segments": ids, "weights": ids.astype(jnp.float32)}
    params = init_params(ARCH, jax.random.key(0))
    both = jax.grad(lambda p: loss(p, None, batch, jax.random.key(0))[0])
    text = jax.jit(both).lower(params).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20
    if dtype == "float32":
        assert not [line for line in products if "HIGHEST" not in line]
    else:
        assert not [line for line in products if "HIGHEST" in line and "bf16>" in line]


@pytest.mark.parametrize("machine, rows", [("tpu", MIN_ROWS), ("cuda", MIN_ROWS), ("cpu", 1)])
def test_one_token_is_multiplied_among_as_many_as_the_machine_takes(machine, rows):
    x, w = jnp.ones((1, 1, 16), jnp.bfloat16), jnp.ones((16, 32), jnp.bfloat16)
    traced = jax.jit(lambda x, w: matmul("BTD,DF->BTF", x, w)).trace(x, w)
    text = traced.lower(lowering_platforms=(machine,)).as_text()
    assert re.findall(r"dot_general.*: \((tensor<\S+),", text) == [f"tensor<{rows}x1x16xbf16>"]
