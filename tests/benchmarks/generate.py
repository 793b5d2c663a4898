"""Generating with a 5.2M-parameter Llama: nemojax beside transformers on the same CPU.

    python tests/benchmarks/generate.py [--rounds=5]

32 prompts of 16 tokens, 64 new tokens each, no stop id, drawn at temperature 1, f32. The two run in
alternating subprocesses, each warmed up; the medians over rounds of generated tokens per second, of CPU
seconds and of their ratio are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPE = {"vocab": 1024, "dim": 256, "layers": 6, "heads": 8, "kv_heads": 4, "ffn": 768}
ROWS, PROMPT, NEW, REPEATS = 32, 16, 64, 5


def run_jax() -> dict[str, float]:
    import jax
    import numpy as np

    from nemojax.arch import uniform
    from nemojax.generate.engine import generate
    from nemojax.generate.sampling import SamplingConfig
    from nemojax.model.llama import init_params

    arch = uniform(
        vocab_size=SHAPE["vocab"],
        dim=SHAPE["dim"],
        num_layers=SHAPE["layers"],
        num_heads=SHAPE["heads"],
        num_kv_heads=SHAPE["kv_heads"],
        ffn_width=SHAPE["ffn"],
        context=PROMPT + NEW,
    )
    params = init_params(arch, jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, SHAPE["vocab"], (ROWS, PROMPT)).tolist()
    sampling = SamplingConfig(max_new_tokens=NEW)
    return timed(lambda: generate(params, arch, prompts, jax.random.key(1), sampling, max_batch=ROWS))


def run_torch() -> dict[str, float]:
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
        max_position_embeddings=PROMPT + NEW,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval()
    prompts = torch.randint(1, SHAPE["vocab"], (ROWS, PROMPT))
    mask = torch.ones_like(prompts)
    return timed(
        lambda: model.generate(
            prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW, min_new_tokens=NEW
        )
    )


def timed(once) -> dict[str, float]:
    once()
    walls, start = [], time.process_time()
    for _ in range(REPEATS):
        begin = time.perf_counter()
        once()
        walls.append(time.perf_counter() - begin)
    cpu = (time.process_time() - start) / REPEATS
    return {"tokens_per_second": ROWS * NEW / statistics.median(walls), "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["jax", "torch"])
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"jax": run_jax, "torch": run_torch}[args.only]()))
        return
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    rows: dict[str, list[dict[str, float]]] = {"jax": [], "torch": []}
    for _ in range(args.rounds):
        for name, results in rows.items():
            command = [sys.executable, __file__, f"--only={name}"]
            out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
            results.append(json.loads(out.splitlines()[-1]))
    for name, results in rows.items():
        print(name, json.dumps({k: round(statistics.median(r[k] for r in results), 4) for k in results[0]}))
    pairs = zip(rows["jax"], rows["torch"], strict=True)
    ratio = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
    print(f"nemojax / transformers, tokens per second, median of {args.rounds} pairs: {ratio:.3f}")


if __name__ == "__main__":
    main()
