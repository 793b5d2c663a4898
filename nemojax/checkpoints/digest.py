"""Digests of weights: the same on any mesh and in any file, another for any bit that differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.checkpoints import store

MIXERS = (2654435761, 2246822519)  # odd, so that a product with one of them loses no bit


def weights_digest(arch: ArchSpec, params: Mapping[str, Any]) -> str:
    """A digest of an architecture and of every bit of its weights in the memory layout."""
    sums = {path: bit_sums(leaf[None])[0] for path, leaf in store.flat_paths(params).items()}
    return digest_of_sums(arch, sums)


def digest_of_sums(arch: ArchSpec, sums: Mapping[str, list[int]]) -> str:
    """The digest of an architecture and of `bit_sums` by path."""
    text = json.dumps([arch.to_json(), sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def bit_sums(stacked: jax.Array) -> list[list[int]]:
    """Two sums over the bits of each entry of a stack [L, ...]; equal for equal bits, on any mesh."""
    return store.to_host(_mixed(stacked)).tolist()


@jax.jit
def _mixed(stacked: jax.Array) -> jax.Array:
    """[L, 2] u32: each element's bits times an odd number that depends on its place, added modulo 2**32.

    Whole numbers are added to the same sum in any order, so a mesh changes nothing.
    """
    bits = jax.lax.bitcast_convert_type(stacked, jnp.dtype(f"uint{8 * stacked.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(stacked.shape, jnp.uint32)
    for axis in range(1, stacked.ndim):
        place = place * stacked.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, stacked.shape, axis)
    inner = tuple(range(1, stacked.ndim))
    mixed = [jnp.sum(bits * (2 * place * np.uint32(mixer) + 1), inner, dtype=jnp.uint32) for mixer in MIXERS]
    return jnp.stack(mixed, axis=1)
