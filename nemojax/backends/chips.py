"""What is publicly known of accelerators, as data: peak rates, memory, links. A CPU is measured.

One JSON file a chip, among the package's data; every file names its sources. Rates are of dense products.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nemojax.config import configs_dir

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Chip:
    """Facts of one chip. JAX sees `devices_per_chip` devices in it, which share all of them.

    flops: FLOP/s by dtype ("bfloat16", "float8", "int8", "float32"). hbm_bytes: what programs can have.
    hbm_bandwidth, link_bandwidth (of each of `links` to its neighbours, one way), network_bandwidth (of its
    share of the host's adapters, one way): bytes/s. torus_dims: of the network that the links make; 0 where
    all chips of a host reach each other.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    kinds: tuple[str, ...]
    flops: Mapping[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    devices_per_chip: int = 1
    chips_per_host: int = 1
    links: int = 1
    link_bandwidth: float = 0.0
    network_bandwidth: float = 0.0
    torus_dims: int = 0
    clock_hz: float = 0.0  # of a TPU, in whose cycles its compiler counts
    target: Mapping[str, Any] | None = None  # what XLA wants to know of a GPU
    sources: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        """FLOP/s of products of this dtype. A chip without units for it computes in bf16."""
        return self.flops.get("float8" if dtype.startswith("float8") else dtype) or self.flops["bfloat16"]


def chip_names(platform: str = "") -> list[str]:
    """Of the chips that a file describes, or those of a platform."""
    names = sorted(file.stem for file in (configs_dir() / "chips").glob("*.json"))
    return [name for name in names if not platform or load_chip(name).platform == platform]


@functools.cache
def load_chip(name: str) -> Chip:
    """A chip by the name of its file, or "cpu" for the machine at hand. ValueError lists those there are."""
    if name == "cpu":
        return _this_cpu()
    path = configs_dir() / "chips" / f"{name}.json"
    if name not in chip_names():
        raise ValueError(f"chip: expected one of {', '.join((*chip_names(), 'cpu'))}, got {name!r}")
    values = json.loads(path.read_text())
    if values.pop("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}; use the nemojax it belongs to")
    lists = {key: tuple(values[key]) for key in ("kinds", "sources")}
    return Chip(**values | lists)


def chip_of(device: Any) -> Chip | None:
    """The chip that a JAX device is, or a part of; None for one that no file describes."""
    if device.platform == "cpu":
        return load_chip("cpu")
    return next((c for c in map(load_chip, chip_names()) if device.device_kind in c.kinds), None)


def peak_flops() -> float | None:
    """Peak bf16 FLOP/s of all devices together (f32 on a CPU); None when the chip is not known.

    Virtual CPU devices share one machine, so a CPU counts once.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_cpu_peak()
    chip = chip_of(device)
    return chip.peak("bfloat16") * len(jax.devices()) / chip.devices_per_chip if chip else None


def _this_cpu() -> Chip:
    peak = measured_cpu_peak()
    return Chip(
        "cpu",
        "cpu",
        ("cpu",),
        {"bfloat16": peak, "float32": peak},
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        measured_cpu_bandwidth(),
        sources=(
            "measured: the best of five products of 1024 x 1024, and of five sums over 256 MiB, in f32",
        ),
    )


@functools.cache
def measured_cpu_peak(size: int = 1024) -> float:
    """FLOP/s of the best of five f32 [size, size] matmuls on this machine."""
    matmul = jax.jit(jnp.dot)
    x = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / _best_of_five(lambda: matmul(x, x))


@functools.cache
def measured_cpu_bandwidth(size: int = 1 << 26) -> float:
    """Bytes/s of reading `size` f32 numbers that no cache holds, the best of five sums on this machine."""
    total = jax.jit(lambda x: x.reshape(64, -1).sum(1))  # in parts, so that all cores read
    x = jnp.ones(size, jnp.float32)
    return 4 * size / _best_of_five(lambda: total(x))


def _best_of_five(call: Any) -> float:
    call().block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call().block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best
