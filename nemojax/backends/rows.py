"""The rows of a call of attention: what a kernel needs to know of them, and what kernels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SAVED = "attended"  # the name, for policies of rematerialisation, of what the backward pass needs


class Rows(NamedTuple):
    """`length`: positions. `packed`: rows of several documents, or with padding; else one fills each row.
    `split`: several devices share a row, whose columns then stand in an order that only positions tell."""

    length: int
    head_dim: int
    dtype: Any
    packed: bool = True
    split: bool = False


def fill_rows(arrays: Sequence[jax.Array], length: int) -> list[jax.Array]:
    """[B, T, ...] each, with zeros up to `length` positions: padding (segment 0) behind what is there."""
    more = length - arrays[0].shape[1]
    return [jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x for x in arrays]
