"""What a block costs: parameters, memory for weights and KV cache, and time. One dict a block.

Memory follows NVIDIA Model Optimizer's model: (all parameters + KV elements of a full cache) * bytes each.
Times are of half a block at a time and add up; where they come from is a `Prices`, by default a stopwatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention, BlockSpec, NoOp, block_params
from nemojax.backends.chips import chip_names
from nemojax.compress.subblock import PARTS, Part, Sub, sub_of
from nemojax.config import field, required

MIB = 2**20
Timing = Literal["prefill", "decode"]
TAKEN = ("prefill", "decode", "kv", "memory")  # columns that are not a scenario's


@dataclass(frozen=True)
class Scenario:
    """Requests as a server sees them, for a column NAME_ms and the rate NAME_tokens_per_s."""

    name: str = required("what its columns are called by")
    batch: int = field(8, "sequences answered together")
    input: int = field(128, "tokens of each prompt")
    output: int = field(128, "tokens generated for each")
    counted: Literal["all", "output"] = field("all", "tokens of a rate: all, as in Puzzle, or output alone")

    def __post_init__(self):
        if not self.name.isidentifier() or self.name in TAKEN:
            raise ValueError(f"name: expected a word other than {', '.join(TAKEN)}, got {self.name!r}")
        for name in ("batch", "input", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Of the whole batch, as far as they are counted."""
        return self.batch * (self.output + (self.input if self.counted == "all" else 0))


@dataclass(frozen=True)
class CostConfig:
    """The situation that costs are counted and measured in. `timing_dtype` is that of every time's source."""

    batch: int = field(8, "sequences in the KV cache")
    context: int = field(1024, "tokens of each sequence in the KV cache")
    dtype: Literal["float32", "bfloat16"] = field("bfloat16", "dtype of weights and KV cache")
    timings: tuple[Timing, ...] = field(("prefill",), "what to measure on this machine: prefill, decode")
    timing_batch: int = field(4, "sequences in a measurement")
    timing_length: int = field(128, "tokens in a prefill, and in the cache of a decode step")
    timing_dtype: Literal["float32", "bfloat16"] = field("float32", "dtype of what is measured")
    repeats: int = field(7, "measurements; the median counts")
    prices: str = field(
        "measured", "where times come from: measured (here), roofline:CHIP, or compiled:CHIP (a TPU)"
    )
    scenarios: tuple[Scenario, ...] = field((), "requests to measure as well, each with columns of its own")

    def __post_init__(self):
        kind, _, chip = self.prices.partition(":")
        known = {"measured": [""], "roofline": [*chip_names(), "cpu"], "compiled": chip_names("tpu")}
        if chip not in known.get(kind, []):
            raise ValueError(
                f"prices: expected measured, roofline:CHIP of {', '.join(known['roofline'])}, or "
                f"compiled:CHIP of {', '.join(known['compiled'])}, got {self.prices!r}"
            )
        names = [scenario.name for scenario in self.scenarios]
        if len(set(names)) < len(names):
            raise ValueError(f"scenarios: expected different names, got {', '.join(names)}")
        for name in ("batch", "context", "timing_batch", "timing_length", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def without_times(self) -> CostConfig:
        """The costs that follow from the architecture alone, at once."""
        return replace(self, timings=(), scenarios=())


@dataclass(frozen=True)
class Step:
    """One pass through the model: `tokens` new ones of each of `batch` sequences, behind `cached` ones."""

    batch: int
    tokens: int
    cached: int = 0


@dataclass(frozen=True)
class Prices:
    """Where times come from, in milliseconds: of one sub-block in a step, and of what is outside the blocks
    (embedding, final norm, and the head at each sequence's last token). `source` is the provenance."""

    sub_ms: Callable[[ArchSpec, Part, Sub, Step], float]
    outer_ms: Callable[[ArchSpec, Step], float]
    source: str


def block_costs(
    arch: ArchSpec,
    choices: Sequence[Sequence[BlockSpec]],
    config: CostConfig = CostConfig(),
    prices: Prices | None = None,
) -> dict[BlockSpec, dict[str, float]]:
    """{block: {"params", "memory_mib", "kv_mib", and as configured "prefill_ms", "decode_ms", and of each
    scenario NAME_ms and NAME_memory_mib}}. `prices`: None takes the configuration's source."""
    blocks = list(dict.fromkeys(option for options in choices for option in options))
    costs = {block: counted(arch, block, config) for block in blocks}
    seen: dict[tuple[Part, Sub, Step], float] = {}
    for column, passes in times(config).items():
        prices = prices or _prices(config)
        for block in blocks:
            ms = 0.0
            for part in PARTS:
                sub = sub_of(block, part)
                for step, count in passes:
                    if (part, sub, step) not in seen:
                        seen[part, sub, step] = (
                            0.0 if isinstance(sub, NoOp) else prices.sub_ms(arch, part, sub, step)
                        )
                    ms += count * seen[part, sub, step]
            costs[block][column] = ms
    return costs


def times(config: CostConfig) -> dict[str, list[tuple[Step, float]]]:
    """{column of ms: (step, how often)}. A scenario is a prefill, which yields the first token, and a decode
    step for each other one, over a cache of the mean length: what attention costs is linear in it."""
    batch, length = config.timing_batch, config.timing_length
    known = {"prefill": Step(batch, length), "decode": Step(batch, 1, length - 1)}
    out = {f"{timing}_ms": [(known[timing], 1.0)] for timing in config.timings}
    for s in config.scenarios:
        passes = [(Step(s.batch, s.input), 1.0)]
        if s.output > 1:
            passes.append((Step(s.batch, 1, s.input + s.output // 2 - 1), s.output - 1.0))
        out[f"{s.name}_ms"] = passes
    return out


def tokens_of(config: CostConfig) -> dict[str, float]:
    """{column of ms: tokens processed in it}, for a table: rates such as NAME_tokens_per_s follow from it."""
    batch, length = config.timing_batch, config.timing_length
    known = {"prefill": batch * length, "decode": batch}
    tokens = {f"{timing}_ms": known[timing] for timing in config.timings}
    return {
        name: float(n) for name, n in (tokens | {f"{s.name}_ms": s.tokens for s in config.scenarios}).items()
    }


def counted(arch: ArchSpec, block: BlockSpec, config: CostConfig) -> dict[str, float]:
    """Parameters, and MiB of weights and full KV cache."""
    params = block_params(arch, block)
    size = jnp.dtype(config.dtype).itemsize / MIB

    def kv(batch: int, context: int) -> int:
        if not isinstance(block.attn, Attention):
            return 0
        tokens = min(context, block.attn.window or context)
        return 2 * block.attn.num_kv_heads * arch.head_dim * tokens * batch

    elements = kv(config.batch, config.context)
    out = {"params": float(params), "kv_mib": elements * size, "memory_mib": (params + elements) * size}
    for s in config.scenarios:
        out[f"{s.name}_memory_mib"] = (params + kv(s.batch, s.input + s.output)) * size
    return out


def fixed_costs(
    arch: ArchSpec, config: CostConfig = CostConfig(), prices: Prices | None = None
) -> dict[str, float]:
    """What is outside the blocks, embedding, final norm and head: the same columns, a cache apart."""
    params = arch.num_params() - arch.num_block_params()
    mib = params * jnp.dtype(config.dtype).itemsize / MIB
    out = {"params": float(params), "memory_mib": mib}
    out |= {f"{s.name}_memory_mib": mib for s in config.scenarios}
    seen: dict[Step, float] = {}
    for column, passes in times(config).items():
        prices = prices or _prices(config)
        for step, _ in passes:
            if step not in seen:
                seen[step] = prices.outer_ms(arch, step)
        out[column] = sum(count * seen[step] for step, count in passes)
    return out


def provenance(config: CostConfig, prices: Prices | None = None) -> dict[str, str]:
    """How each cost came about, for the table that carries them."""
    cache = f"batch {config.batch}, context {config.context}, {config.dtype}"
    out = {
        "params": "counted",
        "kv_mib": f"counted at {cache}",
        "memory_mib": f"counted at {cache}, weights and KV",
    }
    for s in config.scenarios:
        out[f"{s.name}_memory_mib"] = (
            f"counted at batch {s.batch}, context {s.input + s.output}, {config.dtype}, weights and KV"
        )
    if config.timings or config.scenarios:
        source = (prices or _prices(config)).source
        shape = f"batch {config.timing_batch}, {config.timing_length} tokens"
        out |= {f"{timing}_ms": f"{source}, {shape}" for timing in config.timings}
        for s in config.scenarios:
            out[f"{s.name}_ms"] = (
                f"{source}, batch {s.batch}, {s.input} tokens in, {s.output} out: a prefill and "
                f"{s.output - 1} decode steps over the mean cache"
            )
    return out


def _prices(config: CostConfig) -> Prices:
    from nemojax.compress.prices import prices_of

    return prices_of(config.prices, config.timing_dtype, config.repeats)
