"""Training step of a 5.2M-parameter Llama: nemojax beside transformers + torch on the same CPU.

    python tests/benchmarks/train_step.py [--rounds=5] [--steps=5]

The two run in alternating subprocesses, each warmed up; the medians over rounds of tokens per second,
of CPU seconds per step and of their ratio are printed. f32, AdamW, clipping to 1, batch 32 x 128. Both
run with memory in large pages, as the command line does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPE = {"vocab": 1024, "dim": 256, "layers": 6, "heads": 8, "kv_heads": 4, "ffn": 768}
ROWS, LENGTH = 32, 128


def run_jax(steps: int) -> dict[str, float]:
    import jax
    import numpy as np

    from nemojax.arch import uniform
    from nemojax.model import llama
    from nemojax.model.llama import Compute
    from nemojax.optim import OptimConfig, make_optimizer
    from nemojax.train import init_state, lm_loss, make_step

    arch = uniform(
        vocab_size=SHAPE["vocab"],
        dim=SHAPE["dim"],
        num_layers=SHAPE["layers"],
        num_heads=SHAPE["heads"],
        num_kv_heads=SHAPE["kv_heads"],
        ffn_width=SHAPE["ffn"],
        context=LENGTH,
    )
    tx = make_optimizer(OptimConfig(schedule="constant"), 1000)
    state = init_state(llama.init_params(arch, jax.random.key(0)), tx, jax.random.key(1))
    step = jax.jit(make_step(lm_loss(arch, Compute(unroll=SHAPE["layers"])), tx), donate_argnums=0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab"], (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segments": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.repeat(np.arange(LENGTH, dtype=np.int32)[None], ROWS, 0),
    }

    def once():
        nonlocal state
        state, metrics = step(state, None, batch)
        return float(metrics["loss"])

    return timed(once, steps)


def run_torch(steps: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["dim"],
        intermediate_size=SHAPE["ffn"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, SHAPE["vocab"], (ROWS, LENGTH))

    def once():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return timed(once, steps)


def timed(once, steps: int) -> dict[str, float]:
    for _ in range(2):
        once()
    walls, start_cpu = [], time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        loss = once()
        walls.append(time.perf_counter() - start)
    cpu = (time.process_time() - start_cpu) / steps
    wall = statistics.median(walls)
    return {"tokens_per_second": ROWS * LENGTH / wall, "seconds": wall, "cpu_seconds": cpu, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=["jax", "torch"])
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"jax": run_jax, "torch": run_torch}[args.only](args.steps)))
        return
    rows: dict[str, list[dict[str, float]]] = {"jax": [], "torch": []}
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for _ in range(args.rounds):
        for name, results in rows.items():
            command = [sys.executable, __file__, f"--only={name}", f"--steps={args.steps}"]
            out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            results.append(json.loads(out.splitlines()[-1]))
    for name, results in rows.items():
        medians = {k: round(statistics.median(r[k] for r in results), 4) for k in results[0]}
        print(name, json.dumps(medians))
    pairs = zip(rows["jax"], rows["torch"], strict=True)
    ratio = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
    print(f"nemojax / torch, tokens per second, median of {args.rounds} pairs: {ratio:.3f}")


if __name__ == "__main__":
    main()
