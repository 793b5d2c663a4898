"""Rotary position embedding, half-split layout (the two halves of a head are the pairs), with the
frequency-dependent scaling of Llama 3.1.

Shape letters: B batch, T length, N heads, H head dim, P = H / 2 pairs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair, [P] f32."""
    freq_P = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
    freq_P = freq_P.astype(np.float32)
    if (scaling := rope.scaling) is None:
        return freq_P
    wavelength_P = 2 * math.pi / freq_P
    longest = scaling.original_context / scaling.low_freq_factor
    shortest = scaling.original_context / scaling.high_freq_factor
    ramp_P = (scaling.original_context / wavelength_P - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended_P = (1 - ramp_P) * freq_P / scaling.factor + ramp_P * freq_P
    scaled_P = np.where(wavelength_P > longest, freq_P / scaling.factor, blended_P)
    return np.where(wavelength_P < shortest, freq_P, scaled_P).astype(np.float32)


def tables(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for the positions, each [B, T, P] f32."""
    # f32: bf16 rounds position 257 to 256
    angles_BTP = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles_BTP), jnp.sin(angles_BTP)


def rotate(x_BTNH: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> jax.Array:
    """Turns every pair of every head by its angle; computed in f32, dtype kept."""
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTP[:, :, None, :], sin_BTP[:, :, None, :]
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
