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
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any

V5P, H100 = "v5p", "H100"
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare() -> list[str]:
    """Sets what the compilers read when they are loaded, before jax is; returns the targets there are."""
    found = []
    os.environ["JAX_PLATFORMS"] = "cpu"
    libtpu = os.environ.get("NEMOJAX_LIBTPU")
    if libtpu:
        os.environ["TPU_LIBRARY_PATH"] = f"{libtpu}/libtpu/libtpu.so"
    if libtpu or importlib.util.find_spec("libtpu"):
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5p-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        found.append(V5P)
    if plugins := os.environ.get("NEMOJAX_CUDA_PLUGINS"):
        sys.path.append(plugins)
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # without a device the compiler cannot try which kernel is best, and would write each product itself
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"
        found.append(H100)
    return found


def device_of(target: str) -> Any:
    from jax.experimental import topologies

    if target == V5P:
        return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    return topologies.get_topology_desc(
        "h100", platform="cuda", target_config=TARGET, topology="1x1x1"
    ).devices[0]


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
    for target in prepare() or ["no target: name NEMOJAX_LIBTPU or NEMOJAX_CUDA_PLUGINS"]:
        print(target, flush=True)
        device = device_of(target)
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
