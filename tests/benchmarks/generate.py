"""Generating with a 5.2M-parameter Llama: nemojax beside transformers and Tunix on the same CPU.

    python -m venv .venv-tunix && .venv-tunix/bin/pip install google-tunix==0.1.7
    python tests/benchmarks/generate.py [--rounds=5] [--tunix_python=.venv-tunix/bin/python]

32 prompts of 16 tokens, 64 new tokens each, no stop id, drawn at temperature 1 from the whole vocabulary,
f32. Each is made once, ours with its slots, as a server has it; caches are just large enough, and
--tunix_cache gives Tunix a larger one. They run in alternating subprocesses, each warmed up; a run is the
median of five batches. Printed are medians over rounds of generated tokens per second and of CPU seconds a
batch, and of the ratios.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from tests.benchmarks import model
from tests.benchmarks.alternate import Contender, Numbers, compare, make_parser, timed

ROWS, PROMPT, NEW, REPEATS = 32, 16, 64, 5


def run_jax(args: argparse.Namespace) -> Numbers:
    import jax

    from nemojax.generate.completions import BATCH, complete
    from nemojax.generate.engine import Engine
    from nemojax.generate.jobs import Job
    from nemojax.generate.sampling import SamplingConfig
    from nemojax.model.llama import init_params

    arch = model.our_arch(PROMPT + NEW)
    engine = Engine(init_params(arch, jax.random.key(0)), arch, dataclasses.replace(BATCH, slots=ROWS))
    sampling = SamplingConfig(max_new_tokens=NEW)
    jobs = [Job(tuple(prompt), sampling, (0, i)) for i, prompt in enumerate(make_prompts())]

    def once() -> int:
        return sum(len(completion.tokens) for completion in complete(engine, jobs))

    return measure(once)


def run_torch(args: argparse.Namespace) -> Numbers:
    import torch

    llama: Any = model.torch_model(PROMPT + NEW).eval()
    prompts = torch.tensor(make_prompts())
    mask = torch.ones_like(prompts)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "min_new_tokens": NEW}
    return measure(lambda: llama.generate(prompts, attention_mask=mask, **options)[:, PROMPT:].numel())


class Words:
    """A tokenizer of ids written as numbers: Tunix's sampler takes text."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is put before the prompt then

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def run_tunix(args: argparse.Namespace) -> Numbers:
    from tunix.generate.sampler import CacheConfig, Sampler  # pyright: ignore[reportMissingImports]

    cache = CacheConfig(args.tunix_cache, model.LAYERS, model.KV_HEADS, model.DIM // model.HEADS)
    sampler = Sampler(model.tunix_model(), Words(), cache)
    prompts = [" ".join(map(str, row)) for row in make_prompts()]
    options = {"temperature": 1.0, "top_p": 1.0, "eos_tokens": [-1], "seed": 1}

    def once() -> int:
        done = sampler(prompts, max_generation_steps=NEW, max_prompt_length=PROMPT, **options)
        return sum(len(tokens) for tokens in done.tokens)

    return measure(once)


def make_prompts() -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(1, model.VOCAB, (ROWS, PROMPT)).tolist()


def measure(once: Callable[[], int]) -> Numbers:
    """`once` says how many tokens it has generated."""
    assert (made := once()) == ROWS * NEW, f"expected {ROWS * NEW} tokens, got {made}"
    times = timed(once, REPEATS)
    return {"tokens_per_second": ROWS * NEW / times["seconds"], "cpu_seconds": times["cpu_seconds"]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--tunix_python",
        default=os.environ.get("NEMOJAX_TUNIX"),
        help="python of an environment with google-tunix (default: $NEMOJAX_TUNIX; else it is left out)",
    )
    parser.add_argument(
        "--tunix_cache",
        type=int,
        default=PROMPT + NEW,
        help="positions of its cache, all of which it attends to; it has no default of its own (default: "
        "%(default)s, the fewest that do)",
    )
    args = parser.parse_args()
    contenders = {
        "nemojax": Contender(run_jax, ["nemojax", "jax"]),
        "transformers": Contender(run_torch, ["transformers", "torch"]),
        "tunix": Contender(
            run_tunix,
            ["google-tunix", "jax", "flax"],
            python=args.tunix_python or "",
            missing="" if args.tunix_python else "no --tunix_python",
        ),
    }
    compare(__file__, args, contenders, ["tokens_per_second", "cpu_seconds"])


if __name__ == "__main__":
    main()
