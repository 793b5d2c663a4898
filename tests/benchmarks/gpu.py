"""What one GPU makes of a Llama shaped as 3.1 8B: training, distillation, decoding, attention, memory.

    python tests/benchmarks/gpu.py [--rounds=7] [--length=8192] [--rows=1] [--layers=N] [--tiny]

Each part runs in a process of its own, with the compiler options and the environment of backends/startup.py,
and warmed up; times are medians over rounds. A table and then one JSON object are printed.

    train      a step of next-token training, AdamW on f32 weights, bf16, products kept and the rest of blocks
               recomputed (--remat); as many layers as fit (--layers). The share of the chip's dense bf16
               peak, attention counted as causal.
    train_fp8  the same with FP8 matmuls, where `Compute` has them, and how much faster it is.
    distill    a step of KL and cosine against a teacher of the same layers, beside the sum of a forward pass
               of the teacher and a training step of the student.
    decode     tokens a second of all 32 layers in bf16 for 1, 8 and 64 rows near the end of 2,048 positions;
               bytes that a step has to move, over the memory's bandwidth, as a share of its time.
    decode_fp8 the same with block weights in e4m3.
    check      how far kernels are from plain formulas (tests/benchmarks/kernels.py).
    attention  the kernel that is chosen, and the forward and backward pass of each kernel that there is.

`memory` beside a part: bytes that the compiler planned, the peak that the device saw, and their ratio.
--tiny runs every line on small shapes, on whatever device there is; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

SHAPE: dict[str, Any] = {"vocab_size": 128256, "dim": 4096, "num_heads": 32, "num_kv_heads": 8}
SHAPE |= {"ffn_width": 14336}
TINY: dict[str, Any] = {"vocab_size": 512, "dim": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 128}
LAYERS, CAPACITY, NEW, ROWS = 32, 2048, 64, (1, 8, 64)
STATE_BYTES = 16  # of a weight in training: itself, two moments and its gradient, f32
KEEP = 0.75  # of the memory for them; the rest is for activations and chunks of logits


def arch_of(args: argparse.Namespace, layers: int) -> Any:
    from nemojax.arch import uniform

    shape = TINY if args.tiny else SHAPE
    return uniform(**shape, num_layers=layers, context=max(args.length, capacity(args)))


def capacity(args: argparse.Namespace) -> int:
    return 2 * NEW if args.tiny else CAPACITY


def layers_that_fit(args: argparse.Namespace, bytes_of_teacher: int = 0) -> int:
    """As many layers as leave room for activations; `bytes_of_teacher`: a weight of a second model."""
    import jax

    if args.layers or args.tiny:
        return args.layers or 2
    one, none = arch_of(args, 1), 2 * SHAPE["vocab_size"] * SHAPE["dim"]
    limit = (jax.devices()[0].memory_stats() or {})["bytes_limit"]
    each = STATE_BYTES + bytes_of_teacher
    return max(1, min(LAYERS, int((KEEP * limit / each - none) / one.num_block_params())))


def batch_of(args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Rows of one document, told by segments as the loaders do."""
    import numpy as np

    shape = (args.rows, args.length)
    tokens = np.random.default_rng(0).integers(0, vocab, (args.rows, args.length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "segments": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(args.length, dtype=np.int32), (args.rows, 1)),
    }


def compute_of(args: argparse.Namespace, matmul: str | None = None) -> Any:
    from nemojax.model.llama import Compute

    compute = Compute(dtype="bfloat16", remat=args.remat)
    return dataclasses.replace(compute, matmul=matmul) if matmul else compute


def median(once: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call that waits for its result, after two to warm up."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def program_of(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    import jax

    from nemojax.backends.kernels import machine

    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    return lowered.compile(compiler_options=dict(machine(jax.default_backend()).COMPILER_OPTIONS))


def memory_of(program: Any) -> dict[str, float | None]:
    """The compiler's plan beside what the device has seen since this process began."""
    import jax

    m = program.memory_analysis()
    planned = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"planned_bytes": planned, "peak_bytes": peak, "planned_over_peak": peak and planned / peak}


class Training:
    """Steps of a model of its own, one a call."""

    def __init__(self, arch: Any, loss_fn: Any, frozen: Any, batch: Any):
        import jax

        from nemojax.model import llama
        from nemojax.optim import OptimConfig, make_optimizer
        from nemojax.train import init_state, make_step

        tx = make_optimizer(OptimConfig(schedule="constant"), 1000)
        params = jax.jit(functools.partial(llama.init_params, arch))(jax.random.key(1))
        self.state = init_state(params, tx, jax.random.key(2))
        self.frozen, self.batch = frozen, jax.device_put(batch)
        self.program = program_of(make_step(loss_fn, tx), self.state, frozen, self.batch, donate=(0,))

    def __call__(self) -> None:
        self.state, metrics = self.program(self.state, self.frozen, self.batch)
        assert float(metrics["loss"]) > 0


def train(args: argparse.Namespace, matmul: str | None = None) -> dict[str, Any]:
    from nemojax.backends.chips import peak_flops
    from nemojax.backends.speed import flops_per_token
    from nemojax.train import lm_loss

    arch = arch_of(args, layers_that_fit(args))
    loss_fn = lm_loss(arch, compute_of(args, matmul), chunk=min(1024, args.length))
    training = Training(arch, loss_fn, None, batch_of(args, arch.vocab_size))
    seconds = median(training, args.rounds)
    rate, peak = args.rows * args.length / seconds, peak_flops()
    return {
        "layers": arch.num_layers,
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "mfu": peak and rate * flops_per_token(arch, args.length) / peak,
        "memory": memory_of(training.program),
    }


def train_fp8(args: argparse.Namespace) -> dict[str, Any]:
    from nemojax.model.llama import Compute

    if not hasattr(Compute(), "matmul"):
        raise ValueError("Compute has no field `matmul`")
    return train(args, args.matmul)


def distill(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from nemojax.arch import BlockSpec, NoOp, SwiGLU
    from nemojax.distill.losses import DistillWeights, Teacher, distill_loss
    from nemojax.model import llama
    from nemojax.train import lm_loss

    parent = arch_of(args, layers_that_fit(args, 2))
    whole = parent.blocks[0]
    thin, blind = BlockSpec(whole.attn, SwiGLU(whole.ffn.width // 2)), BlockSpec(NoOp(), whole.ffn)
    child = parent.replace(blocks=tuple((whole, thin, blind)[i % 3] for i in range(parent.num_layers)))
    compute, chunk = compute_of(args), min(1024, args.length)
    batch = batch_of(args, parent.vocab_size)
    teacher = jax.jit(functools.partial(llama.init_params, parent, dtype=jnp.bfloat16))(jax.random.key(0))
    loss_fn = distill_loss(child, [Teacher(parent)], DistillWeights(), compute, chunk=chunk)
    both = Training(child, loss_fn, teacher, batch)
    times = {"step_seconds": median(both, args.rounds)}
    memory = memory_of(both.program)
    del both
    forward, given = lm_loss(parent, compute, chunk=chunk), (teacher, jax.device_put(batch))
    del teacher
    score = program_of(lambda p, b: forward(p, None, b, jax.random.key(0))[0], *given)
    times["teacher_seconds"] = median(functools.partial(lambda p, b: float(score(p, b)), *given), args.rounds)
    del given
    alone = Training(child, lm_loss(child, compute, chunk=chunk), None, batch)
    times["student_seconds"] = median(alone, args.rounds)
    parts = times["teacher_seconds"] + times["student_seconds"]
    return {
        "layers": parent.num_layers,
        **times,
        "over_sum_of_parts": times["step_seconds"] / parts,
        "memory": memory,
    }


def decode_fp8(args: argparse.Namespace) -> dict[str, Any]:
    return decode(args, "fp8")


def decode(args: argparse.Namespace, matmul: Any = "default") -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from nemojax.backends.chips import chip_of
    from nemojax.generate import programs
    from nemojax.model.llama import Compute, init_params

    arch, keys = arch_of(args, args.layers or (2 if args.tiny else LAYERS)), capacity(args)
    compute = Compute(dtype="bfloat16", matmul=matmul)
    make = jax.jit(functools.partial(init_params, arch, dtype=jnp.bfloat16))
    params, split = programs.prepare(make(jax.random.key(0)), compute, None)
    chip = chip_of(jax.devices()[0])
    moved = chip and chip.hbm_bandwidth
    weights = (1 if matmul == "fp8" else 2) * arch.num_block_params() + 2 * arch.vocab_size * arch.dim
    result: dict[str, Any] = {"layers": arch.num_layers, "positions": keys, "bandwidth": moved}
    for rows in ROWS:
        seconds = median(Decoding(params, programs.How(arch, compute), rows, keys, split), args.rounds)
        seconds /= NEW - 1
        size = weights + 2 * rows * arch.kv_elements_per_token() * keys
        result[f"batch_{rows}"] = {
            "step_seconds": seconds,
            "tokens_per_second": rows / seconds,
            "bytes": size,
            "of_bandwidth": moved and size / seconds / moved,
        }
    return result


class Decoding:
    """The last steps of rows that fill their positions, all in one call."""

    def __init__(self, params: Any, how: Any, rows: int, keys: int, split: bool):
        import jax.numpy as jnp

        from nemojax.generate import programs
        from nemojax.generate.sampling import SamplingConfig
        from nemojax.model.cache import init_cache

        self.params, self.how, self.keys = params, how, keys
        self.state = programs.State(init_cache(how.arch, rows, keys, jnp.dtype("bfloat16"), split), None)
        sampling = SamplingConfig(max_new_tokens=NEW)
        self.rows = programs.pack([(5, keys - NEW, NEW, sampling, (0, i), ()) for i in range(rows)], 2)

    def __call__(self) -> None:
        import jax
        import numpy as np

        from nemojax.generate import programs

        self.state, out = programs.decode(
            self.params, self.state, self.rows, np.int32(NEW - 1), np.int32(0), how=self.how, keys=self.keys
        )
        jax.block_until_ready(out)


def attention(args: argparse.Namespace) -> dict[str, Any]:
    import jax.numpy as jnp

    from nemojax.model.attention import kernel_of

    arch = arch_of(args, 1)
    result: dict[str, Any] = {
        "chosen_packed": kernel_of(args.length, arch.head_dim, jnp.bfloat16),
        "chosen_one_document": kernel_of(args.length, arch.head_dim, jnp.bfloat16, packed=False),
    }
    for length in (args.length,) if args.tiny else (512, 1024, 2048, args.length):
        rows = max(1, args.rows * args.length // length)
        flops = 3.5 * 2 * rows * length * length * arch.num_heads * arch.head_dim  # causal; 5 matmuls back
        for kernel in ("short", "blockwise", "tokamax", "cudnn"):
            try:
                seconds = attention_seconds(arch, kernel, rows, length, args.rounds)
                measured = {"seconds": seconds, "tflops": flops / seconds / 1e12}
            except Exception as error:  # one that cannot, or does not fit, is told, and the next one tried
                measured = {"error": " ".join(str(error).split())[:160]}
            result[f"{kernel}_{length}"] = measured
    return result


def attention_seconds(arch: Any, kernel: Any, rows: int, length: int, rounds: int) -> float:
    """Of the forward and backward pass of one layer."""
    import jax
    import jax.numpy as jnp

    from nemojax.arch import Attention
    from nemojax.model.attention import attend_packed, make_context

    spec = Attention(arch.blocks[0].attn.num_kv_heads)
    heads = (arch.num_heads, spec.num_kv_heads, spec.num_kv_heads, arch.num_heads)
    arrays = [
        jax.random.normal(jax.random.key(i), (rows, length, n, arch.head_dim), jnp.bfloat16)
        for i, n in enumerate(heads)
    ]
    positions = jnp.tile(jnp.arange(length), (rows, 1))
    ctx = make_context(arch, positions, None if kernel == "cudnn" else jnp.ones_like(positions), kernel)

    def both(q: Any, k: Any, v: Any, d: Any) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: attend_packed(q, k, v, ctx, spec), q, k, v)
        return out, vjp(d)

    program = program_of(both, *arrays)
    return median(lambda: jax.block_until_ready(program(*arrays)), rounds)


def check(args: argparse.Namespace) -> dict[str, Any]:
    from tests.benchmarks.kernels import distances

    return distances(arch_of(args, 2), min(args.length, 1024))


PARTS = {
    "check": check,
    "train": train,
    "train_fp8": train_fp8,
    "distill": distill,
    "decode": decode,
    "decode_fp8": decode_fp8,
    "attention": attention,
}


def in_a_process(part: str, argv: list[str]) -> dict[str, Any]:
    """A part's numbers; "error" when it failed."""
    from nemojax.backends.startup import ENVIRONMENT

    env = {**ENVIRONMENT, **os.environ}
    command = [sys.executable, __file__, *argv, f"--part={part}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def table(results: dict[str, Any]) -> str:
    def lines(name: str, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [line for key, inner in value.items() for line in lines(f"{name}.{key}", inner)]
        shown = (
            f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
        return [f"{name:<44}{shown}"]

    return "\n".join(line for name, value in results.items() for line in lines(name, value))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--length", type=int, default=0, help="tokens of a row (default: 8192)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="layers (default: as many as fit)")
    parser.add_argument("--remat", default="dots", help="of training and distillation (default: %(default)s)")
    parser.add_argument("--matmul", default="fp8", help="of train_fp8 (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="(default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    args = parser.parse_args()
    args.length = args.length or (64 if args.tiny else 8192)
    if args.part:
        import jax

        result = PARTS[args.part](args) | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        print(json.dumps(result))
        return
    results = {part: in_a_process(part, sys.argv[1:]) for part in args.parts.split(",")}
    if "step_seconds" in results.get("train", {}) and "step_seconds" in results.get("train_fp8", {}):
        results["fp8_over_bf16"] = results["train"]["step_seconds"] / results["train_fp8"]["step_seconds"]
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
