"""Serving a 5.2M-parameter Llama over HTTP: `nemojax serve` beside `transformers serve` on the same CPU.

    pip install "transformers[serving]"
    python tests/benchmarks/serve.py [--rounds=3]

1, 8 and 32 clients at once stream answers of 64 tokens to prompts that differ, greedily, nothing ends a
sequence, f32. Printed for each number of clients: the median time to the first text of an answer, tokens per
second of all clients together, and the server's CPU seconds for 1,000 tokens. transformers runs both as it
is (one request at a time) and with --continuous-batching. The client shares the machine with the server.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.alternate import Contender, Numbers, compare, make_parser
from tests.benchmarks.client import NEMOJAX, TRANSFORMERS, Reply, Server, chat, prepare, serving

NEW, LENGTH = 64, 24
WORDS = ("tensor", "slot", "block", "cache", "layer", "token", "step")
REQUESTS = {1: 6, 8: 3, 32: 2}  # clients at once -> requests of each, one after the other


def run_nemojax(args: argparse.Namespace) -> Numbers:
    folder = Path(args.model)
    with serving([*NEMOJAX, "serve", str(folder / "artifact")], folder / "nemojax.log") as server:
        fields = {"ignore_eos": True, "stream_options": {"include_usage": True}}
        return measure(server, server.model_name(), fields)


def run_transformers(args: argparse.Namespace, *flags: str) -> Numbers:
    folder = Path(args.model)
    export = str(folder / "export")
    command = [*TRANSFORMERS, "serve", export, "--device=cpu", *flags]
    with serving(command, folder / "transformers.log", {"HF_HUB_OFFLINE": "1"}) as server:
        return measure(server, export, {})


def run_batching(args: argparse.Namespace) -> Numbers:
    return run_transformers(args, "--continuous-batching")


def measure(server: Server, name: str, fields: dict[str, Any]) -> Numbers:
    """The whole load once to warm up, with other prompts, then for the record."""
    body = {"model": name, "temperature": 0, "max_tokens": NEW, "stream": True, **fields}
    numbers: Numbers = {}
    for clients, requests in REQUESTS.items():
        asyncio.run(load(server.port, body, clients, requests, seed=1000 + clients))
    for clients, requests in REQUESTS.items():
        cpu, start = server.cpu_seconds(), time.perf_counter()
        replies = asyncio.run(load(server.port, body, clients, requests, seed=clients))
        wall, tokens = time.perf_counter() - start, NEW * len(replies)
        numbers |= {
            f"first_text_seconds_{clients}": statistics.median(r.first or 0 for r in replies),
            f"tokens_per_second_{clients}": tokens / wall,
            f"cpu_seconds_per_1000_{clients}": 1000 * (server.cpu_seconds() - cpu) / tokens,
        }
    return numbers


async def load(port: int, body: dict[str, Any], clients: int, requests: int, seed: int) -> list[Reply]:
    """The replies of all clients, each of which has asked `requests` times."""

    async def one(number: int) -> list[Reply]:
        rng, replies = random.Random(1000 * seed + number), []
        for _ in range(requests):
            text = " ".join(rng.choices(WORDS, k=LENGTH))
            reply = await chat(port, body | {"messages": [{"role": "user", "content": text}]})
            if not reply.complete or reply.tokens != NEW or reply.first is None:
                raise SystemExit(f"expected an answer of {NEW} tokens, got {reply}")
            replies.append(reply)
        return replies

    return sum(await asyncio.gather(*map(one, range(clients))), [])


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    contenders = {
        "nemojax": Contender(run_nemojax, ["nemojax", "jax"]),
        "transformers": Contender(run_transformers, ["transformers", "torch"]),
        "batching": Contender(run_batching, ["transformers", "torch"]),
    }
    metrics = [f"{what}_{n}" for n in REQUESTS for what in ("first_text_seconds", "tokens_per_second")]
    with tempfile.TemporaryDirectory() as folder:
        if not args.only:
            prepare(Path(folder))
        compare(__file__, args, contenders, metrics, [f"--model={folder}"])


if __name__ == "__main__":
    main()
