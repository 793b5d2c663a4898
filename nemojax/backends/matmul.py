"""Products of activations with weights: where precision and gradients of a matmul are chosen."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nemojax.backends import fp8, int8
from nemojax.backends.contract import SAVED, contract, contract_filled, gradient_forms, missing_rows

# Tokens of a product on a GPU or TPU, at least. With fewer it would be no matmul but a sum of products: on
# GPUs rounded one by one, both operands being written down anew, the weights of the head in f32; on TPUs on
# their vector units, which take longer over it than the weights take to arrive.
MIN_ROWS = 8

Kind = Literal["default", "fp8", "int8"]


def matmul(
    subscripts: str,
    x: jax.Array,
    w: jax.Array | fp8.Quantized,
    out_dtype: Any = None,
    kind: Kind = "default",
) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` of activations `x` and a weight `w`, accumulated in `out_dtype`.

    default: in the dtype of `x`. fp8, int8: with both operands rounded to eight bits (`fp8.matmul`,
    `int8.matmul`). A weight that is kept in FP8 goes through `fp8.matmul_quantized` whatever the kind. The
    gradient of a weight has the weight's dtype.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if isinstance(w, fp8.Quantized):
        return fp8.matmul_quantized(subscripts, x, w, out_dtype)
    match kind:
        case "fp8":
            y = fp8.matmul(subscripts, x, w, out_dtype)
        case "int8":
            y = int8.matmul(subscripts, x, w, out_dtype)
        case _:
            y = _matmul(x, w.astype(x.dtype), subscripts, out_dtype)
    return checkpoint_name(y, SAVED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, w: jax.Array, subscripts: str, out_dtype: Any) -> jax.Array:
    """The weight's gradient contracts `x` with the incoming gradient, in this order. JAX's own rule turns
    them round, and XLA on a CPU then writes every incoming gradient a second time, transposed: a fifth of
    a training step (tests/benchmarks/train_step.py).
    """
    plain = functools.partial(contract, subscripts, out_dtype=out_dtype)
    if more := missing_rows(MIN_ROWS, subscripts, x):
        filled = functools.partial(contract_filled, more, subscripts, out_dtype=out_dtype)
        return jax.lax.platform_dependent(x, w, cuda=filled, tpu=filled, default=plain)
    return plain(x, w)


def _forward(x: jax.Array, w: jax.Array, subscripts: str, out_dtype: Any):
    return _matmul(x, w, subscripts, out_dtype), (x, w)


def _backward(subscripts: str, out_dtype: Any, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, w = saved
    g = g.astype(x.dtype)  # logits are f32: a GPU would take all three operands for f32, at half the speed
    x_form, w_form = gradient_forms(subscripts)
    dx = contract(x_form, g, w, out_dtype)
    dw = contract(w_form, x, g, out_dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_forward, _backward)
