"""What a block costs: parameters, memory for weights and KV cache, and measured time. One dict a block.

Memory follows NVIDIA Model Optimizer's model: (all parameters + KV elements of a full cache) * bytes each.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention, BlockSpec, NoOp, block_params
from nemojax.compress.subblock import PARTS, Part, Sub, apply_part, part_spec, run_part, sub_of
from nemojax.config import field
from nemojax.model.attention import make_context
from nemojax.model.block import apply_block, init_block
from nemojax.model.cache import Cache, Window, init_cache, read, write

MIB = 2**20
Timing = Literal["prefill", "decode"]


@dataclass(frozen=True)
class CostConfig:
    """The situation that costs are counted and measured in."""

    batch: int = field(8, "sequences in the KV cache")
    context: int = field(1024, "tokens of each sequence in the KV cache")
    dtype: Literal["float32", "bfloat16"] = field("bfloat16", "dtype of weights and KV cache")
    timings: tuple[Timing, ...] = field(("prefill",), "what to measure on this machine: prefill, decode")
    timing_batch: int = field(4, "sequences in a measurement")
    timing_length: int = field(128, "tokens in a prefill, and in the cache of a decode step")
    repeats: int = field(7, "measurements; the median counts")


def block_costs(
    arch: ArchSpec, choices: Sequence[Sequence[BlockSpec]], config: CostConfig = CostConfig()
) -> dict[BlockSpec, dict[str, float]]:
    """{block: {"params", "memory_mib", "kv_mib", "prefill_ms", "decode_ms"}}; times only as configured."""
    blocks = list(dict.fromkeys(option for options in choices for option in options))
    costs = {block: counted(arch, block, config) for block in blocks}
    for timing in config.timings:
        halves: dict[tuple[Part, Sub], float] = {}
        for block in blocks:
            for part in PARTS:
                sub = sub_of(block, part)
                if (part, sub) not in halves:
                    halves[part, sub] = measured_ms(arch, part, sub, timing, config)
            costs[block][f"{timing}_ms"] = sum(halves[part, sub_of(block, part)] for part in PARTS)
    return costs


def counted(arch: ArchSpec, block: BlockSpec, config: CostConfig) -> dict[str, float]:
    """Parameters, and MiB of weights and full KV cache."""
    params = block_params(arch, block)
    kv = 0
    if isinstance(block.attn, Attention):
        tokens = min(config.context, block.attn.window or config.context)
        kv = 2 * block.attn.num_kv_heads * arch.head_dim * tokens * config.batch
    size = jnp.dtype(config.dtype).itemsize / MIB
    return {"params": float(params), "kv_mib": kv * size, "memory_mib": (params + kv) * size}


def fixed_costs(arch: ArchSpec, config: CostConfig = CostConfig()) -> dict[str, float]:
    """What is outside the blocks: embedding, final norm and head. Their time is not counted."""
    params = arch.num_params() - arch.num_block_params()
    return {"params": float(params), "memory_mib": params * jnp.dtype(config.dtype).itemsize / MIB}


def provenance(config: CostConfig) -> dict[str, str]:
    """How each cost came about, for the table that carries them."""
    cache = f"batch {config.batch}, context {config.context}, {config.dtype}"
    out = {
        "params": "counted",
        "kv_mib": f"counted at {cache}",
        "memory_mib": f"counted at {cache}, weights and KV",
    }
    device = jax.devices()[0]
    for timing in config.timings:
        out[f"{timing}_ms"] = (
            f"measured on {device.device_kind} ({platform.machine()}, {platform.node()}), float32, batch "
            f"{config.timing_batch}, {config.timing_length} tokens, median of {config.repeats}, halves added"
        )
    return out


def measured_ms(arch: ArchSpec, part: Part, sub: Sub, timing: Timing, config: CostConfig) -> float:
    """Median milliseconds of one sub-block on this machine, compiled and warmed; 0 for a no-op."""
    if isinstance(sub, NoOp):
        return 0.0
    p = init_block(arch, part_spec(part, sub), jax.random.key(0))[part]
    batch, length = config.timing_batch, config.timing_length
    segments_BT = jnp.ones((batch, length), jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments_BT.shape)
    h_BTD = jax.random.normal(jax.random.key(1), (batch, length, arch.dim))
    if timing == "prefill":
        return _median_ms(
            lambda: run_part(arch, part, sub, p, h_BTD, positions_BT, segments_BT), config.repeats
        )
    one = arch.replace(blocks=(part_spec(part, sub),))
    cache = init_cache(one, batch, length, split=True)
    last_B1 = positions_BT[:, -1:]
    return _median_ms(lambda: _decode_part(arch, part, sub, p, h_BTD[:, :1], cache, last_B1), config.repeats)


@partial(jax.jit, static_argnames=("arch", "part", "sub"))
def _decode_part(
    arch: ArchSpec, part: Part, sub: Sub, p: dict, h_B1D: jax.Array, cache: Cache, positions_B1: jax.Array
) -> jax.Array:
    ctx = make_context(arch, positions_B1)
    if not isinstance(sub, Attention):
        return apply_part(arch, part, sub, p, h_B1D, ctx)
    [[layer]] = cache.values()
    rows, length = h_B1D.shape[0], layer["k"].shape[2]

    def update(k_B1KH: jax.Array, v_B1KH: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = write(layer, {"k": k_B1KH, "v": v_B1KH}, jnp.arange(rows), positions_B1)
        return read(new, Window(cache, length), rows, h_B1D.dtype)

    return apply_block(arch, part_spec(part, sub), {part: p}, h_B1D, ctx, update=update)


def _median_ms(call: Callable[[], jax.Array], repeats: int) -> float:
    for _ in range(2):
        jax.block_until_ready(call())
    times = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
