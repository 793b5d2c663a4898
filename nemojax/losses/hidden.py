"""Losses between hidden states, and which layers they compare. Shape letters: B batch, T length, D model."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec


def cosine_distance(student_BTD: jax.Array, teacher_BTD: jax.Array, eps: float = 1e-6) -> jax.Array:
    """1 - cos(student, teacher) at every position, [B, T] f32 (a term of Puzzle, arXiv:2411.19146)."""
    s, t = student_BTD.astype(jnp.float32), teacher_BTD.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(s * s, -1) + eps) * jnp.sqrt(jnp.sum(t * t, -1) + eps)
    return 1.0 - jnp.sum(s * t, -1) / norms


def relative_error(student_BTD: jax.Array, teacher_BTD: jax.Array, eps: float = 1e-6) -> jax.Array:
    """|student - teacher|^2 / |teacher|^2 at every position, [B, T] f32: an MSE that every position's own
    size normalises, so that sums over any split of the positions add up."""
    s, t = student_BTD.astype(jnp.float32), teacher_BTD.astype(jnp.float32)
    return jnp.sum((s - t) ** 2, -1) / (jnp.sum(t * t, -1) + eps)


def normalised_mse(student_BTD: jax.Array, teacher_BTD: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """MSE(teacher, student) / MSE(teacher, 0) over the weighted positions, a scalar (Puzzle, section 3)."""
    s, t = student_BTD.astype(jnp.float32), teacher_BTD.astype(jnp.float32)
    error = jnp.sum(jnp.sum((s - t) ** 2, -1) * weights_BT)
    return error / jnp.maximum(jnp.sum(jnp.sum(t * t, -1) * weights_BT), 1e-12)


def matched_layers(student: ArchSpec, teacher: ArchSpec, layers: str = "") -> tuple[tuple[int, int], ...]:
    """(student's layer, teacher's layer) of all that are compared, by global index; the student's empty
    layers are left out.

    By default a layer stands beside the teacher's of the same index. A student with fewer layers says which
    ones are its own: "0-3:0-3,4:6" is student's layers to teacher's, ranges with both ends.
    """
    if not layers and student.num_layers != teacher.num_layers:
        raise ValueError(
            f"layers: expected a teacher with num_layers {student.num_layers} as the student's, got "
            f"{teacher.num_layers}; say which belong together, as 0-3:0-3,4:6 (student's:teacher's)"
        )
    own: list[int] = []
    theirs: list[int] = []
    everything = f"0-{student.num_layers - 1}:0-{student.num_layers - 1}"
    for part in (layers or everything).split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?\s*", part)
        if not found:
            raise ValueError(f"layers: expected student's:teacher's as 4:6 or 0-3:0-3, got {part!r}")
        first, last, their_first, their_last = found.groups()
        own += range(int(first), int(last or first) + 1)
        theirs += range(int(their_first), int(their_last or their_first) + 1)
        if len(own) != len(theirs):
            raise ValueError(f"layers: expected as many layers on both sides of the colon, got {part!r}")
    if not own or len(set(own)) < len(own):
        raise ValueError(f"layers: expected every layer of the student at most once, got {layers!r}")
    for whose, named, arch in (("student", own, student), ("teacher", theirs, teacher)):
        if max(named) >= arch.num_layers:
            raise ValueError(
                f"layers: expected layers below the {whose}'s {arch.num_layers}, got {max(named)}"
            )
    return tuple((i, j) for i, j in zip(own, theirs, strict=True) if not student.blocks[i].is_empty)
