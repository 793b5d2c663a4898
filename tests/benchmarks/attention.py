"""Kernels of attention beside each other in a training step, by compilers without devices.

    NEMOJAX_LIBTPU=DIR NEMOJAX_CUDA_PLUGINS=DIR[:DIR...] python tests/benchmarks/attention.py
        [--targets=v5e,v6e,H100] [--length=8192] [--layers=2]

Value and gradient of the loss of layers shaped as Llama 3.1 8B's over one row of packed documents, bf16, are
compiled with each kernel that a target has: GiB of temporaries, the compiler's own estimate of the seconds
(TPU; it counts neither the work inside a kernel nor the steps of a loop, so it compares nothing but the
rest), seconds to compile, and the custom calls in the program. Nothing runs. DIRs: where
`pip install --target DIR --no-deps` put `libtpu`; and `jax-cuda12-plugin` with `jax-cuda12-pjrt`, and where
wanted `nvidia-cudnn-cu12`, and `tokamax` with what it needs.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import vocab_loss  # noqa: E402 (imports nothing heavy)

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "H100": "h100:1"}
KERNELS = {"tpu": ("blockwise", "splash"), "cuda": ("blockwise", "tokamax", "cudnn")}
HEADS, KV_HEADS, DIM, FFN = 32, 8, 4096, 14336


def mesh_of(target: str) -> Any:
    """One device of a target."""
    from nemojax.backends.topology import open_topology
    from nemojax.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig(), open_topology(TOPOLOGIES[target]).devices[:1])


def compiled(kernel: str, mesh: Any, length: int, layers: int, vocab: int) -> Any:
    """Value and gradient of the loss, compiled with one kernel. ValueError where it cannot serve."""
    import jax
    import jax.numpy as jnp

    from nemojax.arch import uniform
    from nemojax.backends.kernels import machine
    from nemojax.losses.tokens import token_logps
    from nemojax.model import llama
    from nemojax.model.attention import make_context

    arch = uniform(
        vocab_size=vocab,
        dim=DIM,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        ffn_width=FFN,
        context=length,
    )
    compute = llama.Compute("bfloat16", remat="full")
    whole = kernel == "cudnn"  # which knows no documents

    def loss(params: Any, batch: Any) -> jax.Array:
        ctx = make_context(arch, batch["positions"], None if whole else batch["segments"], kernel)  # pyright: ignore
        h_BTD = llama.embed(params, batch["tokens"], compute)
        h_BTD, _, _ = llama.apply_blocks(params, arch, h_BTD, ctx, compute=compute)
        x_BTD = llama.final_norm(params, arch, h_BTD)
        logps_BT, _ = token_logps(x_BTD, llama.head_weight(params), batch["tokens"], chunk=1024)
        return -jnp.mean(logps_BT)

    place = jax.NamedSharding(mesh, jax.P())
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (llama.abstract_params(arch), dict.fromkeys(("tokens", "positions", "segments"), ids)),
    )
    options = dict(machine(mesh.devices.flat[0].platform).COMPILER_OPTIONS)
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(compiler_options=options)


def describe(program: Any, seconds: float) -> str:
    calls = sorted(
        set(re.findall(r'custom_call_target="([^"]+)"', program.as_text()))
        | set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", program.as_text()))
    )
    from nemojax.backends.hlo import estimated_cycles

    cycles, _ = estimated_cycles(program.as_text())
    return (
        f"{program.memory_analysis().temp_size_in_bytes / 2**30:7.3f} GiB"
        + (f"  {cycles:.4g} cycles beside them" if cycles else "")
        + f"  compiled in {seconds:.0f} s  {' '.join(calls)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default="v5e,v6e,H100")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the row (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=128256)
    args = parser.parse_args()
    vocab_loss.prepare()
    for target in args.targets.split(","):
        print(target, flush=True)
        mesh = mesh_of(target)
        for kernel in KERNELS["cuda" if target == "H100" else "tpu"]:
            start = time.perf_counter()
            try:
                program = compiled(kernel, mesh, args.length, args.layers, args.vocab)
                line = describe(program, time.perf_counter() - start)
            except ValueError as error:
                line = str(error)
            print(f"  {kernel:<10}{line}", flush=True)


if __name__ == "__main__":
    main()
