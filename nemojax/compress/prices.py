"""Times of sub-blocks on chips that are not at hand: by a roofline over their facts, or by their compilers.

`roofline:h100` takes any chip with a file of facts; `compiled:v5e` a TPU, whose compiler estimates the cycles
of each program it makes (nothing runs). Both are of one device: what a mesh would send is not in them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention, describe
from nemojax.backends.chips import load_chip
from nemojax.backends.roofline import Load, outer_load, scores_load, sub_load
from nemojax.backends.topology import Topology, compile_for, open_topology
from nemojax.compress.cost import Prices, Step
from nemojax.compress.stopwatch import Call, outer_call, stopwatch, sub_call
from nemojax.compress.subblock import Part, Sub
from nemojax.sharding import MeshConfig, make_mesh

SMALLEST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "7x": "2x2x1"}

KERNEL = "tpu_custom_call"  # how a program calls what is written by hand


def prices_of(source: str, dtype: str, repeats: int) -> Prices:
    """By "measured", "roofline:CHIP" or "compiled:CHIP", as `CostConfig.prices` allows them."""
    kind, _, chip = source.partition(":")
    match kind:
        case "roofline":
            return roofline_prices(chip, dtype)
        case "compiled":
            return compiled_prices(chip, dtype)
    return stopwatch(dtype, repeats)


def roofline_prices(chip_name: str, dtype: str) -> Prices:
    """The time that the chip needs at least, at its published rates, all numbers being of `dtype`."""
    chip, size = load_chip(chip_name), jnp.dtype(dtype).itemsize
    width: dict[str, Any] = {"weight_bytes": size, "act_bytes": size}

    def sub_ms(arch: ArchSpec, part: Part, sub: Sub, step: Step) -> float:
        load = sub_load(
            arch, sub, batch=step.batch, tokens=step.tokens, cached=step.cached, cache_bytes=size, **width
        )
        return 1e3 * load.seconds(chip.peak(dtype), chip.hbm_bandwidth)

    def outer_ms(arch: ArchSpec, step: Step) -> float:
        load = outer_load(arch, batch=step.batch, tokens=step.tokens, **width)
        return 1e3 * load.seconds(chip.peak(dtype), chip.hbm_bandwidth)

    facts = f"{chip.peak(dtype) / 1e12:.4g} TFLOP/s, {chip.hbm_bandwidth / 1e9:.4g} GB/s"
    return Prices(sub_ms, outer_ms, f"roofline of {chip_name} ({facts}), {dtype}, halves added")


def compiled_prices(chip_name: str, dtype: str) -> Prices:
    """What a TPU's compiler expects of each program: see `Compiled.expected_seconds`. To an attention kernel,
    for which it gives no cycles, the roofline's time."""
    topology, size = open_topology(f"{chip_name}:{SMALLEST[chip_name]}"), jnp.dtype(dtype).itemsize

    def sub_ms(arch: ArchSpec, part: Part, sub: Sub, step: Step) -> float:
        kernel = Load()
        if isinstance(sub, Attention):
            shape: dict[str, Any] = {"batch": step.batch, "tokens": step.tokens, "cached": step.cached}
            kernel = scores_load(arch, sub, **shape, act_bytes=size)
        by_hand = kernel.seconds(topology.peak(dtype), topology.hbm_bandwidth)
        return _estimate(topology, sub_call(arch, part, sub, step, dtype), f"{part} {describe(sub)}", by_hand)

    def outer_ms(arch: ArchSpec, step: Step) -> float:
        return _estimate(topology, outer_call(arch, step, dtype), "embedding and head")

    source = f"estimated by the compiler for {chip_name}, attention kernels by its roofline"
    return Prices(sub_ms, outer_ms, f"{source}, {dtype}, halves added")


def _estimate(topology: Topology, call: Call, what: str, by_hand: float = 0.0) -> float:
    """In milliseconds; `by_hand`: seconds of the kernel that the program may call."""
    mesh = make_mesh(MeshConfig(), topology.devices[:1], rows="none")
    place = jax.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(call.make)
    )
    compiled = compile_for(topology, call.program, mesh=mesh, **arguments, **call.static)
    name = topology.chip.name
    if compiled.refused:
        raise ValueError(f"cost.prices: {what}: no room on {name} ({compiled.refused[:120]})")
    seconds = compiled.expected_seconds(topology)
    assert seconds is not None, "a TPU's compiler counts the cycles of every fusion"
    return 1e3 * (seconds + by_hand * (KERNEL in (compiled.kernels or {})))
