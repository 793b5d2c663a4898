"""`nemojax serve` under saturating load for minutes: is its memory flat, and is any request lost?

    python tests/benchmarks/soak.py [--minutes=10] [--clients=48]

Clients ask without pause: streams and whole answers mixed, of 1 to 96 tokens, seeded, some of both cut off
by their client on purpose, a few requests that have to be refused. 429 is waited out and asked again.
Every answer is checked: its status, its end, its number of tokens, and that the same greedy request always
gets the same text. At the end nothing may be left running in the server, and SIGTERM must end it with 0.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.benchmarks.client import NEMOJAX, Reply, Server, chat, prepare, serving

HANG_UPS, STREAMS, BAD = 0.1, 0.6, 0.02  # shares of requests
QUESTIONS = 40  # different greedy requests, whose texts are remembered
TIMEOUT = 120.0  # seconds after which an answer counts as lost
FLAT = 0.02  # growth of memory from the second quarter to the last that is called flat


class Soak:
    """The load and what has come of it."""

    def __init__(self, server: Server, seed: int):
        self.server, self.seed = server, seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.texts: dict[int, Counter[str]] = {}
        self.firsts: list[float] = []
        self.memory: list[tuple[float, float, int]] = []  # seconds, MiB, tokens so far
        self.tokens = 0
        self.name = server.model_name()
        self.start = time.monotonic()

    async def run(self, clients: int, seconds: float) -> None:
        self.start = time.monotonic()
        until = self.start + seconds
        watcher = asyncio.ensure_future(self._watch(until, max(1.0, seconds / 120)))
        await asyncio.gather(*(self._client(number, until) for number in range(clients)))
        await watcher

    async def _watch(self, until: float, every: float) -> None:
        while time.monotonic() < until:
            self._note_memory()
            await asyncio.sleep(every)
        self._note_memory()

    def _note_memory(self) -> None:
        self.memory.append((time.monotonic() - self.start, self.server.memory(), self.tokens))

    async def _client(self, number: int, until: float) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < until:
            await self._exchange(rng)

    async def _exchange(self, rng: random.Random) -> None:
        question = rng.randrange(QUESTIONS)
        body = self._question(question)
        if rng.random() < BAD:
            await self._refused(body)
            return
        is_stream = rng.random() < STREAMS
        body["stream"] = is_stream
        if is_stream:
            body["stream_options"] = {"include_usage": True}
        cut = rng.random() < HANG_UPS
        hang_up_after = rng.randrange(4) if cut and is_stream else None
        patience = rng.uniform(0, 0.5) if cut and not is_stream else None
        while True:
            reply = await self._ask(body, hang_up_after, patience)
            if reply is None or reply.status != 429:
                break
            self.counts["429"] += 1
            if not reply.retry_after:
                self._note_wrong("429 without Retry-After")
            await asyncio.sleep((reply.retry_after or 1) * rng.uniform(0.5, 1.0))
        if reply is not None:
            self._judge(question, body, reply, hang_up_after)

    def _question(self, question: int) -> dict[str, Any]:
        """A request; its number says all about it."""
        rng = random.Random(question)
        words = " ".join(rng.choices(("one", "two", "three", "four", "five"), k=rng.randrange(1, 60)))
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": rng.randrange(1, 97),
            "temperature": 0 if question % 2 else 1,
            "seed": question,
            "ignore_eos": True,
        }

    async def _ask(
        self, body: dict[str, Any], hang_up_after: int | None = None, patience: float | None = None
    ) -> Reply | None:
        self.counts["sent"] += 1
        try:
            return await asyncio.wait_for(chat(self.server.port, body, hang_up_after), patience or TIMEOUT)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            if patience is not None and isinstance(error, TimeoutError):
                self.counts["hung up"] += 1
                return None
            self.counts["lost"] += 1
            self._note_wrong(f"lost: {type(error).__name__} {error}")
            return None

    async def _refused(self, body: dict[str, Any]) -> None:
        reply = await self._ask(body | {"max_tokens": -1})
        if reply is not None:
            self.counts["refused"] += 1
            if reply.status != 400 or "message" not in reply.body.get("error", {}):
                self._note_wrong(f"a bad request got {reply.status} {reply.body}")

    def _judge(self, question: int, body: dict[str, Any], reply: Reply, hang_up_after: int | None) -> None:
        if reply.first is not None:
            self.firsts.append(reply.first)
        if hang_up_after is not None and not reply.complete and reply.status == 200:
            self.counts["hung up"] += 1
            return
        if reply.status != 200 or not reply.complete:
            self._note_wrong(f"status {reply.status}, complete {reply.complete}: {reply.body}")
            return
        self.counts["answered"] += 1
        self.tokens += reply.tokens or 0
        if reply.tokens != body["max_tokens"] or reply.finish != "length":
            self._note_wrong(f"expected {body['max_tokens']} tokens, got {reply.tokens}, {reply.finish}")
        self.texts.setdefault(question, Counter())[reply.text] += 1

    def _note_wrong(self, what: str) -> None:
        self.counts["wrong"] += 1
        self.wrong.append(what)

    def differing(self) -> int:
        """Answers that are not what most answers to the same request were."""
        return sum(sum(c.values()) - max(c.values()) for c in self.texts.values())


def memory_growth(memory: list[tuple[float, float, int]]) -> tuple[float, float, float]:
    """Median MiB of the second quarter and of the last, and their relative difference."""
    quarter = max(1, len(memory) // 4)
    early = statistics.median(mib for _, mib, _ in memory[quarter : 2 * quarter] or memory)
    late = statistics.median(mib for _, mib, _ in memory[-quarter:])
    return early, late, late / early - 1


def left_over(server: Server, seconds: float = 30) -> dict[str, float]:
    """What the server still runs or holds in its queue when nobody asks any more."""
    until = time.monotonic() + seconds
    while True:
        text = server.get("/metrics").decode()
        left = {
            name: float(value)
            for name, value in re.findall(r"^nemojax_(sequences_(?:running|waiting)) (\S+)$", text, re.M)
        }
        assert len(left) == 2, f"expected gauges of what runs and waits in /metrics, got {left}"
        if not any(left.values()) or time.monotonic() > until:
            return left
        time.sleep(0.2)


def print_report(soak: Soak, left: dict[str, float], code: int) -> bool:
    """Prints the table; whether all is well."""
    seconds = soak.memory[-1][0]
    print(f"{'minute':>8}{'MiB':>10}{'tokens':>12}")
    step = max(1, len(soak.memory) // 12)
    for at, mib, tokens in [*soak.memory[:-1:step], soak.memory[-1]]:
        print(f"{at / 60:8.2f}{mib:10.1f}{tokens:12,}")
    early, late, growth = memory_growth(soak.memory)
    print(f"memory: {early:.1f} MiB in the second quarter, {late:.1f} in the last, {100 * growth:+.2f}%")
    for name in ("sent", "answered", "hung up", "refused", "429", "lost", "wrong"):
        print(f"{name:>10} {soak.counts[name]:,}")
    print(f"different texts for the same seeded request: {soak.differing()}")
    print(f"tokens per second: {soak.tokens / seconds:,.0f}, median time to the first text: ", end="")
    print(f"{statistics.median(soak.firsts):.2f} s" if soak.firsts else "none")
    print(f"left in the server: {json.dumps(left)}; exit code after SIGTERM: {code}")
    for what, times in Counter(soak.wrong).most_common(10):
        print(f"  {times} x {what[:300]}")
    flat, clean = (
        growth < FLAT,
        not (soak.counts["lost"] or soak.counts["wrong"] or any(left.values()) or code),
    )
    print(f"memory flat: {'yes' if flat else 'NO'}; nothing lost, wrong or left: {'yes' if clean else 'NO'}")
    return flat and clean


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=48, help="more than the server has slots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", default="", help="more arguments for `nemojax serve`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(Path(name))
        command = [*NEMOJAX, "serve", str(folder / "artifact"), *args.serve.split()]
        with serving(command, folder / "serve.log") as server:
            soak = Soak(server, args.seed)
            asyncio.run(soak.run(args.clients, 60 * args.minutes))
            left = left_over(server)
            code = server.stop()
        return 0 if print_report(soak, left, code) else 1


if __name__ == "__main__":
    sys.exit(main())
