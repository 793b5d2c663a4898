"""A tiny random parent, its calibration data and its library, shared by the tests of this folder."""

from __future__ import annotations

import jax
import numpy as np

from nemojax.arch import uniform
from nemojax.compress.space import Space
from nemojax.model.llama import init_params

ARCH = uniform(
    vocab_size=61, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_width=48, context=64, head_dim=8
)
SPACE = Space(kv_heads=(1,), attn_linear=True, ffn_ratios=(0.5,), ffn_linear=True, multiple=8)


def parent(seed: int = 0) -> dict:
    return init_params(ARCH, jax.random.key(seed))


def batches(count: int, seed: int = 0, rows: int = 4, length: int = 16) -> list[dict]:
    """Random tokens; the second half of each row is another document, its last token padding."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        tokens = rng.integers(0, ARCH.vocab_size, (rows, length + 1)).astype(np.int32)
        half = length // 2
        segments = np.repeat(np.array([[1] * half + [2] * (length - half)], np.int32), rows, axis=0)
        segments[:, -1] = 0
        positions = np.tile(np.arange(length, dtype=np.int32) % half, (rows, 1))
        weights = (segments > 0).astype(np.float32)
        out.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "segments": segments,
                "positions": positions,
                "weights": weights,
            }
        )
    return out
