"""How fast a model reads and writes on the machine at hand, by stopwatch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.generate.completions import generate
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import Compute, Params


@dataclass(frozen=True)
class LatencyConfig:
    batch: int = field(16, "prompts at once; 0 measures nothing")
    prompt: int = field(32, "tokens a prompt")
    new_tokens: int = field(32, "tokens generated for each prompt")
    repeats: int = field(5, "timed repetitions, of which the median counts")


def measure(
    params: Params,
    arch: ArchSpec,
    cfg: LatencyConfig,
    *,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """{"prefill_ms": the whole batch up to its first tokens, "decode_tokens_per_second": after them}."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, arch.vocab_size, (cfg.batch, cfg.prompt)).tolist()

    def seconds(new_tokens: int) -> float:
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=new_tokens)
        start = time.perf_counter()
        generate(
            params,
            arch,
            prompts,
            jax.random.key(0),
            sampling,
            max_batch=cfg.batch,
            compute=compute,
            mesh=mesh,
            new_capacity=cfg.new_tokens,
        )
        return time.perf_counter() - start

    seconds(cfg.new_tokens)
    # alternating, so that a busy moment of the machine hits both
    pairs = [(seconds(1), seconds(cfg.new_tokens)) for _ in range(cfg.repeats)]
    prefill = statistics.median(first for first, _ in pairs)
    decode = statistics.median(max(whole - first, 1e-9) for first, whole in pairs)
    return {
        "prefill_ms": 1000 * prefill,
        "decode_tokens_per_second": cfg.batch * (cfg.new_tokens - 1) / decode,
    }
