"""Training step of a 5.2M-parameter Llama: nemojax beside transformers + torch on the same CPU.

    python tests/benchmarks/train_step.py [--rounds=5] [--steps=5]

The two run in alternating subprocesses, each warmed up; the medians over rounds of tokens per second,
of CPU seconds per step and of their ratios are printed. f32, AdamW, clipping to 1, batch 32 x 128. Both
run with memory in large pages, as the command line does.
"""

import argparse
from typing import Any

from tests.benchmarks import model
from tests.benchmarks.alternate import Contender, Numbers, compare, make_parser, timed

ROWS, LENGTH = 32, 128


def run_jax(args: argparse.Namespace) -> Numbers:
    import jax
    import numpy as np

    from nemojax.model import llama
    from nemojax.model.llama import Compute
    from nemojax.optim import OptimConfig, make_optimizer
    from nemojax.train import init_state, lm_loss, make_step

    arch = model.our_arch(LENGTH)
    tx = make_optimizer(OptimConfig(schedule="constant"), 1000)
    state = init_state(llama.init_params(arch, jax.random.key(0)), tx, jax.random.key(1))
    step = jax.jit(make_step(lm_loss(arch, Compute(unroll=model.LAYERS)), tx), donate_argnums=0)
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
        state, metrics = step(state, None, batch)
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
    args = parser.parse_args()
    contenders = {
        "nemojax": Contender(run_jax, ["nemojax", "jax"]),
        "torch": Contender(run_torch, ["transformers", "torch"]),
    }
    compare(__file__, args, contenders, ["tokens_per_second", "cpu_seconds"])


if __name__ == "__main__":
    main()
