"""Einsums of activations with a weight, as the matmuls of every number format write them.

Without batch dimensions: a dimension of the result is one of `x` or one of `w`, any other is summed over.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

SAVED = "product"  # what rematerialisation calls a product: inside a gradient of its own it sees no dot


def contract(subscripts: str, a: jax.Array, b: jax.Array, out_dtype: Any, precision: Any = None) -> jax.Array:
    """An einsum whose operands stay in the order given (`jnp.einsum` may swap), summed up in `out_dtype`."""
    inputs, out = subscripts.split("->")
    a_dims, b_dims = inputs.split(",")
    summed = [d for d in a_dims if d not in out]
    contracted = ([a_dims.index(d) for d in summed], [b_dims.index(d) for d in summed])
    precision = exact(a, b) if precision is None else precision
    y = jax.lax.dot_general(
        a, b, (contracted, ([], [])), precision=precision, preferred_element_type=out_dtype
    )
    y_dims = [d for d in a_dims + b_dims if d in out]
    return y.transpose([y_dims.index(d) for d in out])


def missing_rows(least: int, subscripts: str, x: jax.Array) -> int:
    """Rows that activations need more, for the result to have so many tokens."""
    inputs, out = subscripts.split("->")
    rows = x.shape[0]
    others = math.prod(n for d, n in zip(inputs, x.shape, strict=False) if d in out) // rows
    return max(0, -(-least // others) - rows)


def contract_filled(
    rows: int, subscripts: str, x: jax.Array, w: jax.Array, out_dtype: Any, precision: Any = None
) -> jax.Array:
    """`contract` with so many rows of zeros behind those of `x`, and without them in the result."""
    filled = jnp.pad(x, [(0, rows), *[(0, 0)] * (x.ndim - 1)]) if rows else x
    return contract(subscripts, filled, w, out_dtype, precision)[: x.shape[0]]


def exact(*operands: jax.Array) -> jax.lax.Precision | None:
    """Of a product, so that f32 means f32: by default GPUs would round operands to TF32 (10 bits) and TPUs to
    bf16 (7 bits). Other dtypes lose nothing by the default."""
    return jax.lax.Precision.HIGHEST if all(a.dtype == jnp.float32 for a in operands) else None


def gradient_forms(subscripts: str) -> tuple[str, str]:
    """The products of the backward pass: gradient with weight for `x`, `x` with gradient for the weight."""
    inputs, out = subscripts.split("->")
    x_dims, w_dims = inputs.split(",")
    return f"{out},{w_dims}->{x_dims}", f"{x_dims},{out}->{w_dims}"


def absmax_along(subscripts: str, a: jax.Array, operand: int) -> jax.Array:
    """Largest magnitude in f32 of each slice of `a` (operand 0 or 1) that is summed over, dimensions kept."""
    inputs, out = subscripts.split("->")
    dims = inputs.split(",")[operand]
    axes = [i for i, d in enumerate(dims) if d not in out]
    return jnp.max(jnp.abs(a), axis=axes, keepdims=True).astype(jnp.float32)


def scale_result(subscripts: str, y: jax.Array, scale: jax.Array, operand: int) -> jax.Array:
    """`y` times what `absmax_along` has the shape of: the operand's dimensions, those summed over being 1."""
    inputs, out = subscripts.split("->")
    dims = inputs.split(",")[operand]
    kept = [d for d in dims if d in out]
    scale = scale.reshape([scale.shape[dims.index(d)] for d in kept])
    scale = scale.transpose([kept.index(d) for d in out if d in kept])
    return y * jnp.expand_dims(scale, [i for i, d in enumerate(out) if d not in kept]).astype(y.dtype)
