"""The KV cache: one slot for each layer that has attention, stacked by run like the parameters.

Prompts are right-padded and a key's index is its position, so that a row's cache needs no offset.
Shape letters: n layers of a run, B batch, S capacity in tokens, K KV heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention

Cache = dict[str, dict[str, jax.Array]]


def init_cache(arch: ArchSpec, batch_size: int, capacity: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """Zeros: {run: {"k": [n, B, S, K, H], "v": ...}} for runs that have attention."""
    cache: Cache = {}
    for i, run in enumerate(arch.runs()):
        match run.spec.attn:
            case Attention(num_kv_heads=k):
                shape = (len(run.layers), batch_size, capacity, k, arch.head_dim)
                cache[f"{i:03d}"] = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
    return cache
