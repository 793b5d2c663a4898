"""Matmuls of FP8: e4m3 for activations and weights, e5m2 for gradients (Micikevicius et al., 2022,
arXiv:2209.05433).

**Scales are powers of two.** Dividing and multiplying by one loses nothing, and an FP8 number is exact in
bf16 as in f32. So for an H100 a product is one FP8 call of cuBLASLt (to which sharded operands are gathered
as FP8), where there is no FP8 unit the same numbers are multiplied in bf16 or f32, and results agree up to
the order of sums. A scale that is no power of two would use the range better, by a factor of two at most,
which a floating-point format does not notice: only what is below 1/14,336 of the largest magnitude is rounded
more coarsely (DeepSeek-V3 restricts scales of activations likewise, arXiv:2412.19437, section 3.3.2).

**Training scales per tensor, by the tensor's own largest magnitude ("current").** The alternative, "delayed"
scales from a history of earlier steps, is a state beside the weights, which every stage would have to
initialise, save, restore and carry through the scan over layers, and which is wrong whenever a step leaves
its history, as the first one does. Current scales are a function of the operands alone: nothing can
overflow, and a run resumed is the run uninterrupted. They cost one more reading of each operand before it
is rounded, most often fused with what makes it, and over a mesh a maximum of one number for each operand.
A token's result then depends, by rounding, on what is in the batch beside it.

**Generation scales activations per token**, so that no sequence depends on its neighbours, and keeps weights
as `Quantized`: one byte a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nemojax.backends.contract import (
    absmax_along,
    contract,
    contract_filled,
    gradient_forms,
    missing_rows,
    scale_result,
)

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MIN_ROWS = 16  # that cuBLASLt's FP8 takes; XLA widens the weights for fewer, as in decoding few sequences
MAX_EXPONENT = 125  # of a scale, either way: it and its inverse are ordinary numbers of f32 and bf16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """`values` in FP8 that stand for values * scale. Of a weight: e4m3 with one f32 scale, or one for each
    entry of a leading axis of layers."""

    values: jax.Array
    scale: jax.Array

    def widen(self, dtype: Any) -> jax.Array:
        """What the values stand for, exactly; `scale` must broadcast against them from the left."""
        scale = jnp.expand_dims(self.scale, range(self.scale.ndim, self.values.ndim))
        return self.values.astype(dtype) * scale.astype(dtype)


class _Dtypes(NamedTuple):
    x: Any
    w: Any
    out: Any


def quantize(a: jax.Array, dtype: Any = E4M3) -> Quantized:
    """Rounded to the nearest, with one scale for the whole array. Not finite: NaN there, or infinity."""
    scale = _scale(jnp.max(jnp.abs(a)).astype(jnp.float32), dtype)
    return Quantized(_divide(a, scale).astype(dtype), scale)


def keep(w: jax.Array, summed: Sequence[int]) -> Quantized:
    """A weight for `matmul_quantized`, its dimensions that are summed over last.

    FP8 units read both operands along these; stored in another order, all weights would be turned round
    beside themselves in every program, at twice the memory.
    """
    kept = quantize(w)
    rest = [axis for axis in range(w.ndim) if axis not in summed]
    return Quantized(kept.values.transpose(*rest, *summed), kept.scale)


def matmul(subscripts: str, x: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` in FP8, forwards and backwards, with scales per tensor.

    The forward product is e4m3 with e4m3; both products of the backward pass take the incoming gradient in
    e5m2 and the operand that the forward pass has rounded. Products accumulate in f32 and come in
    `out_dtype`, the gradient of `x` in its dtype, that of `w` in its own, never rounded to the dtype of `x`.
    """
    return _matmul(x, w, subscripts, _Dtypes(x.dtype, w.dtype, jnp.dtype(out_dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, w: jax.Array, subscripts: str, dtypes: _Dtypes) -> jax.Array:
    return _forward(x, w, subscripts, dtypes)[0]


def _forward(x: jax.Array, w: jax.Array, subscripts: str, dtypes: _Dtypes):
    x8, w8 = quantize(x), quantize(w)
    return _product(subscripts, x8, w8, dtypes.x, dtypes.out), (x8, w8)


def _backward(subscripts: str, dtypes: _Dtypes, saved: tuple[Quantized, Quantized], g: jax.Array):
    (x8, w8), g8 = saved, quantize(g, E5M2)
    x_form, w_form = gradient_forms(subscripts)
    # as in Flax: no fast accumulation of cuBLASLt, which keeps some 14 bits of a sum, for gradients
    exactly = jax.lax.Precision.HIGHEST
    dx = _product(x_form, g8, w8, dtypes.x, dtypes.x, exactly)
    return dx, _product(w_form, x8, g8, dtypes.x, dtypes.w, exactly)


_matmul.defvjp(_forward, _backward)


def matmul_quantized(subscripts: str, x: jax.Array, w: Quantized, out_dtype: Any) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` of a weight as `keep` has it, and activations rounded to e4m3 per token.

    Forwards only.
    """
    inputs, out = subscripts.split("->")
    x_dims, w_dims = inputs.split(",")
    stored = "".join(sorted(w_dims, key=lambda d: d not in out))  # what is summed over last
    scale = _scale(absmax_along(subscripts, x, 0), E4M3)
    rounded = Quantized(_divide(x, scale).astype(E4M3), jnp.float32(1))
    y = _product(f"{x_dims},{stored}->{out}", rounded, w, x.dtype, out_dtype)
    return scale_result(subscripts, y, scale, 0)


def _product(
    subscripts: str, a: Quantized, b: Quantized, dtype: Any, out_dtype: Any, precision: Any = None
) -> jax.Array:
    """An einsum of two arrays with a scale each, summed up in `out_dtype`; without FP8 units, in `dtype`.

    XLA would rewrite operands that are widened before the product to an FP8 call too, but not where it first
    merges products that share an operand, as those of q, k and v. So for CUDA the product itself is in FP8,
    and where tokens are too few for such a call there are more, of zeros.
    """

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        if subscripts[0] not in out:  # no tokens in the result: the gradient of a weight
            return contract(subscripts, a, b, out_dtype, precision)
        more = missing_rows(MIN_ROWS, subscripts, a)
        return contract_filled(more, subscripts, a, b, out_dtype, precision)

    def wide(a: jax.Array, b: jax.Array) -> jax.Array:
        return contract(subscripts, a.astype(dtype), b.astype(dtype), out_dtype)

    out = subscripts.split("->")[1]
    y = jax.lax.platform_dependent(a.values, b.values, cuda=narrow, default=wide)
    return y * a.scale.astype(y.dtype) * b.scale.astype(y.dtype)


def _scale(absmax: jax.Array, dtype: Any) -> jax.Array:
    """The least power of two by which what is at most `absmax` must be divided to fit; 1 for nothing."""
    mantissa, exponent = jnp.frexp(absmax / float(jnp.finfo(dtype).max))
    exponent -= mantissa == 0.5
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT))


def _divide(a: jax.Array, scale: jax.Array) -> jax.Array:
    return a * (1 / scale).astype(a.dtype)
