"""Products of activations with weights: where precision and gradients of a matmul are chosen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def matmul(subscripts: str, x: jax.Array, w: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` of activations `x` and a weight `w`, accumulated in `out_dtype`.

    The weight's gradient contracts `x` with the incoming gradient, in this order. JAX's own rule turns
    them round, and XLA on a CPU then writes every incoming gradient a second time, transposed: a fifth of
    a training step (tests/benchmarks/train_step.py).
    """
    return _matmul(x, w, subscripts, jnp.dtype(out_dtype or x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, w: jax.Array, subscripts: str, out_dtype: Any) -> jax.Array:
    return _contract(subscripts, x, w, out_dtype)


def _forward(x: jax.Array, w: jax.Array, subscripts: str, out_dtype: Any):
    return _matmul(x, w, subscripts, out_dtype), (x, w)


def _backward(subscripts: str, out_dtype: Any, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, w = saved
    inputs, out = subscripts.split("->")
    x_dims, w_dims = inputs.split(",")
    dx = _contract(f"{out},{w_dims}->{x_dims}", g, w, out_dtype)
    dw = _contract(f"{x_dims},{out}->{w_dims}", x, g, out_dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_forward, _backward)


def _contract(subscripts: str, a: jax.Array, b: jax.Array, out_dtype: Any) -> jax.Array:
    """An einsum without batch dimensions whose operands stay in the order given (`jnp.einsum` may swap)."""
    inputs, out = subscripts.split("->")
    a_dims, b_dims = inputs.split(",")
    summed = [d for d in a_dims if d not in out]
    contracted = ([a_dims.index(d) for d in summed], [b_dims.index(d) for d in summed])
    y = jax.lax.dot_general(a, b, (contracted, ([], [])), preferred_element_type=out_dtype)
    y_dims = [d for d in a_dims + b_dims if d in out]
    return y.transpose([y_dims.index(d) for d in out])
