"""A step of distillation beside the sum of a teacher's forward pass and a student's training step.

    python tests/benchmarks/distill.py [--rounds=7] [--steps=3] [--vocab=1024]

The parent is the Llama of 5.2M parameters of the other benchmarks; its child lacks the attention of two
layers and has half the feed-forward in three. Everything is compiled and warmed up, then teacher (a forward
pass up to the log-probability of the targets), student (a step of next-token training), and distillation by
KL, by KL and cosine, and by KL out of a cache of the top 32 tokens take turns. f32, AdamW, batch 32 x 128.
Printed are medians over rounds, and of the ratios to teacher + student of the same round (to the student
alone for the cache), in wall and CPU seconds.

With --rounds=7 --steps=2, on two shared cores: 0.92 of teacher + student by KL, 0.96 by KL and cosine (wall;
0.92 and 0.92 in CPU seconds), and 0.84 of the student's own step out of a cache.
With --rounds=5 --steps=1 --vocab=8192, where the heads are as much work as the blocks: 1.15 by KL and 0.95 by
KL and cosine (1.15 and 0.99 in CPU seconds), 1.30 out of a cache.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nemojax.arch import BlockSpec, NoOp, SwiGLU, uniform
from nemojax.distill.losses import DistillWeights, Teacher, distill_loss, teacher_top_k
from nemojax.model import llama
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.train import LossFn, init_state, lm_loss, make_step
from tests.benchmarks import model

ROWS, LENGTH, TOP_K = 32, 128, 32
COMPUTE = Compute(unroll=model.LAYERS)
SUM, CACHED = "teacher + student", "kl, cached"


def programs(vocab: int) -> dict[str, Callable[[], None]]:
    """What takes turns, each a call that waits for its result."""
    parent = uniform(
        vocab_size=vocab,
        dim=model.DIM,
        num_layers=model.LAYERS,
        num_heads=model.HEADS,
        num_kv_heads=model.KV_HEADS,
        ffn_width=model.FFN,
        context=LENGTH,
    )
    whole, half = parent.blocks[0], SwiGLU(model.FFN // 2)
    thin, blind = BlockSpec(whole.attn, half), BlockSpec(NoOp(), whole.ffn)
    child = parent.replace(blocks=(whole, thin, blind, thin, blind, BlockSpec(whole.attn, half)))
    teacher = llama.init_params(parent, jax.random.key(0))
    batch = rows(vocab)
    forward = lm_loss(parent, COMPUTE)
    score = jax.jit(lambda params, batch: forward(params, None, batch, jax.random.key(0))[0])
    tell = jax.jit(teacher_top_k(parent, DistillWeights(top_k=TOP_K), COMPUTE))
    cached = {**batch, **jax.device_get(tell(teacher, batch))}

    def distilled(terms: DistillWeights) -> LossFn:
        return distill_loss(child, [Teacher(parent)], terms, COMPUTE)

    return {
        "teacher": lambda: jax.block_until_ready(score(teacher, batch)),
        "student": training(child, lm_loss(child, COMPUTE), None, batch),
        "kl": training(child, distilled(DistillWeights(cosine=0.0)), teacher, batch),
        "kl + cosine": training(child, distilled(DistillWeights()), teacher, batch),
        CACHED: training(child, distilled(DistillWeights(cosine=0.0, top_k=TOP_K)), None, cached),
    }


def training(arch: Any, loss_fn: LossFn, frozen: Any, batch: Any) -> Callable[[], None]:
    """Training steps of a student of its own, one a call."""
    tx = make_optimizer(OptimConfig(schedule="constant"), 1000)
    state = init_state(llama.init_params(arch, jax.random.key(1)), tx, jax.random.key(2))
    step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)

    def once() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        assert np.isfinite(float(metrics["loss"]))

    return once


def rows(vocab: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.repeat(np.arange(LENGTH, dtype=np.int32)[None], ROWS, 0),
    }


def measure(once: Callable[[], None], steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of a call, means over some."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        once()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=model.VOCAB, help="tokens (default: %(default)s)")
    args = parser.parse_args()
    ways = programs(args.vocab)
    for once in ways.values():
        measure(once, 2)  # compiled and warmed up here
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, once in ways.items():
            times[name].append(measure(once, args.steps))
    times[SUM] = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(times["teacher"], times["student"], strict=True)]
    print(f"vocabulary {args.vocab}, {os.cpu_count()} cores; medians of {args.rounds} rounds")
    for name, pairs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:>18}: {1e3 * wall:8.1f} ms  {1e3 * cpu:8.1f} CPU ms")
    for name in ("kl", "kl + cosine", CACHED):
        beside = "student" if name == CACHED else SUM
        for column, unit in enumerate(("wall", "CPU")):
            ratios = sorted(a[column] / b[column] for a, b in zip(times[name], times[beside], strict=True))
            middle = statistics.median(ratios)
            print(f"{name} / ({beside}), {unit}: {middle:.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]")


if __name__ == "__main__":
    main()
