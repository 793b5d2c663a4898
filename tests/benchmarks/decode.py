"""A decoding step of the 5.2M-parameter Llama against what the machine could do, and what bf16 drifts.

    python tests/benchmarks/decode.py

For batches of 1, 8 and 32 at the middle of 16 + 64 positions: the bytes that a step has to move (weights
once, keys and values of every row) over the step's time, as a share of the bandwidth measured beside it,
and the same for floating-point operations. Then the largest and the mean difference, in nats, between the
log-probabilities of the sampler and of a training forward pass, in f32 and in bf16.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.backends.chips import measured_cpu_bandwidth, measured_cpu_peak
from nemojax.data.examples import Example
from nemojax.data.packing import row_per_example
from nemojax.generate import programs
from nemojax.generate.completions import generate
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.cache import init_cache
from nemojax.model.llama import Compute, init_params
from nemojax.rl.loss import policy_logps
from tests.benchmarks import model

PROMPT, NEW, REPEATS = 16, 64, 9


def step_seconds(rows: int) -> float:
    arch = model.our_arch(PROMPT + NEW)
    params, split = programs.prepare(init_params(arch, jax.random.key(0)), Compute(), None)
    state = programs.State(init_cache(arch, rows, arch.context, jnp.dtype("float32"), split), None)
    packed = programs.pack([(5, PROMPT, NEW, SamplingConfig(), (0, i), ()) for i in range(rows)], 2)
    how, walls = programs.How(arch, Compute()), []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        state, out = programs.decode(
            params, state, packed, np.int32(NEW - 1), np.int32(0), how=how, keys=arch.context
        )
        jax.block_until_ready(out)
        walls.append(time.perf_counter() - start)
    return statistics.median(walls[1:]) / (NEW - 1)


def drift(dtype: str) -> tuple[float, float]:
    """(largest, mean) |log-probability of the sampler - of the trainer| of 32 x 64 tokens."""
    arch = model.our_arch(PROMPT + NEW)
    params = init_params(arch, jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, arch.vocab_size, (32, PROMPT)).tolist()
    compute = Compute(dtype=dtype)  # pyright: ignore[reportArgumentType]
    sampling = SamplingConfig(max_new_tokens=NEW)
    done = generate(params, arch, prompts, jax.random.key(1), sampling, compute=compute)
    weights = np.array([0.0] * PROMPT + [1.0] * NEW)
    examples = [Example(np.array(p + c.tokens), weights) for p, c in zip(prompts, done, strict=True)]
    batch = row_per_example(examples, arch.context, 0)
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    logps = jax.jit(lambda p: policy_logps(p, arch, arrays, compute=compute))(params)
    got = np.asarray(logps)[:, PROMPT - 1 : PROMPT - 1 + NEW]
    apart = np.abs(got - np.array([c.logprobs for c in done]))
    return float(apart.max()), float(apart.mean())


def main() -> None:
    arch = model.our_arch(PROMPT + NEW)
    weights = 4 * (arch.num_block_params() + arch.vocab_size * arch.dim)
    peak, moved = measured_cpu_peak(), measured_cpu_bandwidth()
    print(f"measured: {moved / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s")
    for rows in (1, 8, 32):
        seconds = step_seconds(rows)
        cache = 4 * rows * arch.kv_elements_per_token() * (PROMPT + NEW // 2)
        flops = 2 * rows * weights / 4
        print(
            f"batch {rows}: {1e3 * seconds:.2f} ms a step, {rows / seconds:,.0f} tokens/s, "
            f"{(weights + cache) / 1e6:.1f} MB, {(weights + cache) / seconds / moved:.0%} of the bandwidth, "
            f"{flops / seconds / peak:.0%} of the matmul peak"
        )
    for dtype in ("float32", "bfloat16"):
        largest, mean = drift(dtype)
        print(f"{dtype}: sampler and trainer differ by {largest:.2g} nats at most, {mean:.2g} on average")


if __name__ == "__main__":
    main()
