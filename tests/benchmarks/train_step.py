"""Training step of a 5.2M-parameter Llama: nemojax beside transformers + torch on the same CPU.

    python tests/benchmarks/train_step.py [--rounds=5] [--steps=5]
    python tests/benchmarks/train_step.py --sharded     # beside itself on eight virtual devices

The two run in alternating subprocesses, each warmed up; the medians over rounds of tokens per second,
of CPU seconds per step and of their ratios are printed. f32, AdamW, clipping to 1, batch 32 x 128. Both
run with memory in large pages, as the command line does.
"""

import argparse
import functools
import os
from typing import Any

from tests.benchmarks import model
from tests.benchmarks.alternate import Contender, Numbers, compare, make_parser, timed

ROWS, LENGTH = 32, 128


def run_jax(args: argparse.Namespace, devices: int = 1, **axes: int) -> Numbers:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax
    import numpy as np

    from nemojax.model import llama
    from nemojax.model.llama import Compute
    from nemojax.optim import OptimConfig, make_optimizer
    from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh
    from nemojax.train import init_state, lm_loss, make_step

    arch = model.our_arch(LENGTH)
    tx = make_optimizer(OptimConfig(schedule="constant"), 1000)
    mesh = make_mesh(MeshConfig(**axes))
    with use_mesh(mesh):
        placed = llama.param_shardings(arch, mesh) if devices > 1 else None
        make = jax.jit(lambda key: llama.init_params(arch, key), out_shardings=placed)
        state = init_state(make(jax.random.key(0)), tx, jax.random.key(1))
    places = jax.tree.map(lambda x: x.sharding, state) if devices > 1 else None
    loss = lm_loss(arch, Compute(unroll=model.LAYERS))
    step = jax.jit(make_step(loss, tx, places=places), donate_argnums=0, out_shardings=(places, None))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.repeat(np.arange(LENGTH, dtype=np.int32)[None], ROWS, 0),
    }

    def once() -> float:
        nonlocal state
        with use_mesh(mesh):
            state, metrics = step(state, None, place_batch(batch, mesh))
        return float(metrics["loss"])

    return measure(once, args.steps)


def run_torch(args: argparse.Namespace) -> Numbers:
    import torch

    llama: Any = model.torch_model(LENGTH)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, model.VOCAB, (ROWS, LENGTH))

    def once() -> float:
        loss = llama(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return measure(once, args.steps)


def measure(once, steps: int) -> Numbers:
    times = timed(once, steps, warm_up=2)
    return {"tokens_per_second": ROWS * LENGTH / times["seconds"], **times, "loss": once()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="steps of a run (default: %(default)s)")
    parser.add_argument("--sharded", action="store_true", help="one device beside meshes of eight")
    args = parser.parse_args()
    ours = ["nemojax", "jax"]
    if args.sharded:
        meshes = {"fsdp 8": {"fsdp": 8}, "data 8": {"data": 8, "fsdp": 1}, "fsdp 4 tensor 2": {"tensor": 2}}
        contenders = {"one device": Contender(run_jax, ours)} | {
            name: Contender(functools.partial(run_jax, devices=8, **axes), ours)
            for name, axes in meshes.items()
        }
    else:
        contenders = {
            "nemojax": Contender(run_jax, ours),
            "torch": Contender(run_torch, ["transformers", "torch"]),
        }
    compare(__file__, args, contenders, ["tokens_per_second", "cpu_seconds"])


if __name__ == "__main__":
    main()
