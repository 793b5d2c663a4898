"""Peak matmul rates, so that a run can say how much of the machine it uses.

Published dense peaks in FLOP/s by device kind (vendors' data sheets); a CPU is measured.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# dense bf16, without sparsity
PEAK_BF16 = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices of this process together; None when the chip is not known.

    Virtual CPU devices share one machine, so a CPU counts once.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_cpu_peak()
    per_chip = PEAK_BF16.get(device.device_kind)
    return per_chip * len(jax.devices()) if per_chip else None


@functools.cache
def measured_cpu_peak(size: int = 1024) -> float:
    """FLOP/s of the best of five f32 [size, size] matmuls on this machine."""
    matmul = jax.jit(jnp.dot)
    x = jnp.ones((size, size), jnp.float32)
    matmul(x, x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
