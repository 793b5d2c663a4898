"""Blockwise distillation of all variants from one parent forward, beside training them one by one.

    python tests/benchmarks/bld.py [--layers=8] [--rounds=5] [--steps=4]

A parent of d 128 with two sorts of fewer KV heads, three narrower feed-forwards and a linear one of each in
every layer: 56 variants with 8 layers. One by one, a variant has a parent of the layers up to its own and no
more, which is the least that it needs. Both do the same steps on the same batches (8 x 128 tokens, f32), both
are compiled and warmed up before, and they take turns; medians over rounds are printed, of tokens that
variants are trained on per second, of CPU seconds, and of the ratios of neighbouring turns. Then the storage:
what a library of 500 small variants takes to write and to read, one after the other.

With --rounds=3 --steps=16, on one of two shared cores: 95,008 tokens/s together and 25,077 one by one, 3.80
times the wall and 3.82 times the CPU seconds; 20 ms to write a variant, 1.3 ms to read one.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec, SwiGLU, uniform
from nemojax.compress.bld import Bld, init_kind, train
from nemojax.compress.importance import measure
from nemojax.compress.library import Library, kinds_of
from nemojax.compress.space import Space, choices
from nemojax.compress.subblock import Kind
from nemojax.compress.window import Parent
from nemojax.model.llama import init_params
from nemojax.optim import OptimConfig

ROWS, LENGTH = 8, 128
SPACE = Space(kv_heads=(2, 1), attn_linear=True, ffn_ratios=(0.75, 0.5, 0.25), ffn_linear=True, multiple=32)


def parent_of(layers: int) -> ArchSpec:
    return uniform(
        vocab_size=512,
        dim=128,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        ffn_width=384,
        context=LENGTH,
    )


def batches_of(count: int, vocab_size: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        tokens = rng.integers(0, vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
        out.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "weights": np.ones((ROWS, LENGTH), np.float32),
                "segments": np.ones((ROWS, LENGTH), np.int32),
                "positions": np.repeat(np.arange(LENGTH, dtype=np.int32)[None], ROWS, 0),
            }
        )
    return out


def contenders(layers: int, steps: int) -> tuple[int, dict[str, Callable[[], list[np.ndarray]]]]:
    """(number of variants, what trains all of them once and returns the loss curves of each)."""
    arch = parent_of(layers)
    params = init_params(arch, jax.random.key(0))
    data = batches_of(steps, arch.vocab_size)
    ranks = measure(params, arch, data[:1], "magnitude")
    bld = Bld(steps=steps, optim=OptimConfig(schedule="constant", weight_decay=0.0), checkpoint_every=0)
    kinds = kinds_of(choices(SPACE, arch), arch)
    first = [init_kind(params, arch, kind, ranks) for kind in kinds]
    parent = Parent(params, arch)
    jobs: list[tuple[dict, ArchSpec, Kind, Any]] = []
    for layer in range(layers):
        until = range(layer + 1)
        short, part = parent.params_of(until), parent.arch_of(until)
        for kind, weights in zip(kinds, first, strict=True):
            alone = dataclasses.replace(kind, layers=(layer,))
            one = jax.tree.map(lambda w, i=layer: w[i : i + 1], weights)
            jobs.append((short, part, alone, one))

    def together() -> list[np.ndarray]:
        stacks, curves = train(params, arch, kinds, first, iter(data), bld)
        jax.block_until_ready(stacks)
        return [curves[k][:, i] for i in range(layers) for k in range(len(kinds))]

    def one_by_one() -> list[np.ndarray]:
        found = []
        for short, part, kind, weights in jobs:
            stacks, [curve] = train(short, part, [kind], [weights], iter(data), bld)
            jax.block_until_ready(stacks)
            found.append(curve[:, 0])
        return found

    return len(jobs), {"together": together, "one by one": one_by_one}


def timed(once: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    once()
    return time.perf_counter() - wall, time.process_time() - cpu


def report(times: dict[str, list[tuple[float, float]]], tokens: int) -> None:
    for name, pairs in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:>10}: {tokens / wall:>10,.0f} tokens/s  {wall:.3f} s  {cpu:.3f} CPU s")
    for column, unit in enumerate(("wall", "CPU")):
        first, second = times.values()
        ratios = sorted(b[column] / a[column] for a, b in zip(first, second, strict=True))
        middle = statistics.median(ratios)
        print(f"one by one / together, {unit} seconds: {middle:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")


def storage(kinds: Sequence[int], layers: int) -> None:
    """Writes and reads len(kinds) * layers variants, feed-forwards of d 32."""
    with tempfile.TemporaryDirectory() as dir:
        library = Library(dir)
        weights = {n: np.ones((32, 48), np.float32) for n in ("gate", "up", "down")}
        start = time.perf_counter()
        for width in kinds:
            for layer in range(layers):
                library.save("ffn", SwiGLU(width), layer, {"ffn": weights}, np.ones(64, np.float32), {})
        written = time.perf_counter() - start
        start, fresh = time.perf_counter(), Library(dir)
        for width in kinds:
            for layer in range(layers):
                fresh.load("ffn", SwiGLU(width), layer)
        read = time.perf_counter() - start
        count = len(kinds) * layers
        print(
            f"{count} variants: {1e3 * written / count:.2f} ms to write, {1e3 * read / count:.2f} ms to read"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="layers of the parent (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (default: %(default)s)")
    args = parser.parse_args()
    count, ways = contenders(args.layers, args.steps)
    curves = [once() for once in ways.values()]  # compiled here
    np.testing.assert_allclose(np.stack(curves[0]), np.stack(curves[1]), atol=1e-5)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, once in ways.items():
            times[name].append(timed(once))
    print(f"{count} variants, {args.layers} layers, {os.cpu_count()} cores; medians of {args.rounds} rounds")
    report(times, count * args.steps * ROWS * LENGTH)
    storage(range(1, 11), 50)


if __name__ == "__main__":
    main()
