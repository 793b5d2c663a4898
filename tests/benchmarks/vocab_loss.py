"""Memory of the vocabulary losses, beside the loss written straightforwardly, by compilers without devices.

    NEMOJAX_LIBTPU=DIR NEMOJAX_CUDA_PLUGINS=DIR python tests/benchmarks/vocab_loss.py [--length=8192]

Value and gradient of KL + cross-entropy of one row of 8,192 tokens, 4,096 wide, over 128,256 tokens in bf16,
are compiled for one v5p chip and one H100, and the bytes of temporaries printed: what a device needs beside
arguments and results. Nothing runs. DIR: where `pip install --target DIR --no-deps` put `libtpu`, and
`jax-cuda12-plugin` with `jax-cuda12-pjrt`, in the versions that belong to jax; a target without is left out.

GiB of temporaries, and in chunks of 1,024 / 512 / 256 positions:

    target, head    straightforward    chunks recomputed       one pass of chunks
    v5p, bf16             9.79         2.02 / 1.53 / 1.29      1.22 / 0.49 / 0.25
    v5p, f32              9.79         3.98 / 3.49 / 3.24      2.20 / 1.47 / 1.22
    H100, bf16           15.66         3.51 / 3.25 / 3.13      1.23 / 0.62 / 0.31
    H100, f32            15.66         4.49 / 4.23 / 4.11      2.21 / 1.59 / 1.29

An f32 matrix (`head`: the student's) has a copy in bf16 among them, 0.98 GiB. "Recomputed" is each loss of
its own over chunks whose logits are made again in the backward pass.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

TARGETS = {"v5p": "v5p:2x2x1", "H100": "h100:1"}


def prepare() -> None:
    """Sets what JAX and the compilers read when they are loaded; call it before jax is."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # without a device the compiler cannot try which kernel is best, and would write each product itself
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"


def device_of(target: str) -> Any:
    """A device that is not there; None, with a line that says why, without its compiler."""
    from nemojax.backends.topology import open_topology

    try:
        return open_topology(TARGETS[target]).devices[0]
    except ValueError as error:
        print(f"  left out: {error}")
        return None


def losses(chunk: int) -> dict[str, Callable[..., Any]]:
    import jax.numpy as jnp

    from nemojax.losses.divergence import Head, vocab_loss
    from nemojax.losses.tokens import kl_divergence, token_logps

    def straightforward(x, w, t, wt, targets, weights):
        logps, _ = token_logps(x, w, targets)
        return jnp.sum((kl_divergence(x, w, t, wt) - logps) * weights)

    def recomputed(x, w, t, wt, targets, weights):
        logps, _ = token_logps(x, w, targets, chunk=chunk)
        return jnp.sum((kl_divergence(x, w, t, wt, chunk=chunk) - logps) * weights)

    def one_pass(x, w, t, wt, targets, weights):
        terms = {"kl": 1.0, "lm": 1.0}
        return vocab_loss(Head(x, w), [Head(t, wt)], terms, weights, targets_BT=targets, chunk=chunk)[0]

    return {"straightforward": straightforward, "recomputed": recomputed, "one pass": one_pass}


def temporaries(
    loss: Callable[..., Any], device: Any, *, length: int, dim: int, vocab: int, head: str = "bfloat16"
) -> int:
    """Bytes of temporaries of value and gradient; `head`: dtype of the student's matrix."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    arguments = (
        shape(1, length, dim),
        shape(vocab, dim, dtype=jnp.dtype(head)),
        shape(1, length, dim),
        shape(vocab, dim),
        shape(1, length, dtype=jnp.int32),
        shape(1, length, dtype=jnp.float32),
    )
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    memory: Any = program.lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--chunks", default="1024,512,256", help="positions with logits at once")
    parser.add_argument("--heads", default="bfloat16,float32", help="dtypes of the student's output matrix")
    args = parser.parse_args()
    sizes = {"length": args.length, "dim": args.dim, "vocab": args.vocab}
    prepare()
    for target in TARGETS:
        print(target, flush=True)
        if (device := device_of(target)) is None:
            continue
        for head in args.heads.split(","):
            base = 0
            for chunk in (int(c) for c in args.chunks.split(",")):
                for name, loss in losses(chunk).items():
                    if name == "straightforward" and base:
                        continue
                    start = time.perf_counter()
                    size = temporaries(loss, device, **sizes, head=head)
                    base = base or size
                    print(
                        f"  head {head:<9} {name if name == 'straightforward' else f'{name}, {chunk}':<18}"
                        f"{size / 2**30:7.2f} GiB, 1/{base / size:<5.1f} compiled in "
                        f"{time.perf_counter() - start:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
