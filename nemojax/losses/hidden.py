"""Losses between hidden states. Shape letters: B batch, T length, D model."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cosine_distance(student_BTD: jax.Array, teacher_BTD: jax.Array, eps: float = 1e-6) -> jax.Array:
    """1 - cos(student, teacher) at every position, [B, T] f32 (a term of Puzzle, arXiv:2411.19146)."""
    s, t = student_BTD.astype(jnp.float32), teacher_BTD.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(s * s, -1) + eps) * jnp.sqrt(jnp.sum(t * t, -1) + eps)
    return 1.0 - jnp.sum(s * t, -1) / norms


def normalised_mse(student_BTD: jax.Array, teacher_BTD: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """MSE(teacher, student) / MSE(teacher, 0) over the weighted positions, a scalar (Puzzle, section 3)."""
    s, t = student_BTD.astype(jnp.float32), teacher_BTD.astype(jnp.float32)
    error = jnp.sum(jnp.sum((s - t) ** 2, -1) * weights_BT)
    return error / jnp.maximum(jnp.sum(jnp.sum(t * t, -1) * weights_BT), 1e-12)
