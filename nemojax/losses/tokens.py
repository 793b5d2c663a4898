"""Losses over the vocabulary, computed from hidden states.

Each function takes final-normed hidden states and an output matrix and can work through the sequence in
chunks, recomputed in the backward pass, so that [B, T, V] logits need not exist at once.

Shape letters: B batch, T length, C chunk, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nemojax.backends.matmul import matmul
from nemojax.sharding import ways_of


def logits_of(x_BTD: jax.Array, w_VD: jax.Array) -> jax.Array:
    """Output projection in the dtype of x, accumulated and returned in f32."""
    return matmul("BTD,VD->BTV", x_BTD, w_VD.astype(x_BTD.dtype), jnp.float32)


def over_chunks(fn: Callable[..., Any], chunk: int, *arrays: jax.Array) -> Any:
    """Applies fn to slices of at most `chunk` positions (axis 1) and joins its [B, C] outputs; 0 is all at
    once. Where positions are split over devices, each has an equal part of every slice."""
    length = arrays[0].shape[1]
    if chunk <= 0 or chunk >= length:
        return fn(*arrays)
    split, join = pieces(length, chunk, ways_of("length"))
    body = jax.checkpoint(lambda _, xs: (None, fn(*xs)), prevent_cse=False)
    _, outputs = jax.lax.scan(body, None, tuple(split(a) for a in arrays))
    return jax.tree.map(join, outputs)


def pieces(
    length: int, chunk: int, ways: int = 1
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """(split, join): [B, length, ...] into n slices [n, B, C, ...] of at most `chunk` positions, and back.

    The slices are equally long, the last filled up with zeros; 0 makes one. A slice takes as many positions,
    one at least, of each of `ways` equal parts of the row.
    """
    ways = ways if length % ways == 0 else 1
    part = length // ways
    count = -(-part // max(1, chunk // ways)) if chunk > 0 else 1
    size = -(-part // count)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], ways, part, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - part), *((0, 0),) * (x.ndim - 3)))
        x = jnp.moveaxis(x.reshape(x.shape[0], ways, count, size, *x.shape[3:]), 2, 0)
        return x.reshape(count, x.shape[1], ways * size, *x.shape[4:])

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(count, x.shape[1], ways, size, *x.shape[3:]), 0, 2)
        return x.reshape(x.shape[0], ways, count * size, *x.shape[4:])[:, :, :part].reshape(
            x.shape[0], length, *x.shape[4:]
        )

    return split, join


def token_logps(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, *, temperature: float = 1.0, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the target, log-normaliser) at every position, each [B, T] f32."""

    def one(x_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = logits_of(x_BCD, w_VD) / temperature
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        return _pick(logits_BCV, targets_BC) - lse_BC, lse_BC

    return over_chunks(one, chunk, x_BTD, targets_BT)


def kl_divergence(
    student_BTD: jax.Array,
    student_w_VD: jax.Array,
    teacher_BTE: jax.Array,
    teacher_w_VE: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int = 0,
) -> jax.Array:
    """Forward KL(teacher || student) in nats, [B, T] f32, times temperature squared (Hinton et al., 2015)."""

    def one(s_BCD: jax.Array, t_BCE: jax.Array) -> jax.Array:
        s_BCV = jax.nn.log_softmax(logits_of(s_BCD, student_w_VD) / temperature)
        t_BCV = jax.nn.log_softmax(logits_of(t_BCE, teacher_w_VE) / temperature)
        return jnp.sum(jnp.exp(t_BCV) * (t_BCV - s_BCV), axis=-1) * temperature**2

    return over_chunks(one, chunk, student_BTD, teacher_BTE)


def _pick(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # a compare-and-sum instead of a gather: its gradient is a mask, not a scatter, and it splits over V
    hit_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)
