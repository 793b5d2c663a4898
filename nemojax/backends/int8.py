"""Matmuls of int8, twice the rate of bf16 on TPU v5e and v6e: forwards only, gradients straight through.

Symmetric: every token of the activations and every output channel of the weight is divided by its largest
magnitude / 127 and rounded; the sums are exact int32. Backwards both products are those of the operands
before they were rounded, in the dtype of the activations, as if rounding had slope one (Jacob et al., 2018,
arXiv:1712.05877, section 3): gradients, whose magnitudes spread over many powers of two, are what int8 serves
worst.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nemojax.backends.contract import absmax_along, contract, gradient_forms, scale_result

LARGEST = 127


def matmul(subscripts: str, x: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` in int8; the weight's gradient has the weight's dtype."""
    return _matmul(x, w, subscripts, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, w: jax.Array, subscripts: str, out_dtype: Any) -> jax.Array:
    x_int, x_scale = _quantize(subscripts, x, 0)
    w_int, w_scale = _quantize(subscripts, w, 1)
    y = contract(subscripts, x_int, w_int, jnp.int32).astype(jnp.float32)
    y = scale_result(subscripts, scale_result(subscripts, y, x_scale, 0), w_scale, 1)
    return y.astype(out_dtype)


def _forward(x: jax.Array, w: jax.Array, subscripts: str, out_dtype: Any):
    return _matmul(x, w, subscripts, out_dtype), (x, w)


def _backward(subscripts: str, out_dtype: Any, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, w = saved
    x_form, w_form = gradient_forms(subscripts)
    g = g.astype(x.dtype)
    return contract(x_form, g, w.astype(x.dtype), x.dtype), contract(w_form, x, g, w.dtype)


_matmul.defvjp(_forward, _backward)


def _quantize(subscripts: str, a: jax.Array, operand: int) -> tuple[jax.Array, jax.Array]:
    """(int8 array, the f32 step of each of its slices that are summed over)."""
    absmax = absmax_along(subscripts, a, operand)
    step = jnp.where(absmax > 0, absmax / LARGEST, 1)
    return jnp.round(a.astype(jnp.float32) / step).astype(jnp.int8), step
