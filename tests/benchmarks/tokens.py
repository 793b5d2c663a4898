"""From text to batches: tokens a second of `nemojax tokenize`, rows of the plan, tokens of PlannedLoader.

    python tests/benchmarks/tokens.py [--workers=1,2] [--length=8192] [--vocab=32000] [--repeats=3]

The texts are Python's own standard library, a file a document, written out until there are 16 MB of them. The
tokenizer is trained on a part. Medians are printed; `threads` is one process with the threads of the Rust
library. The time of starting workers is in. Where other programs run too, CPU seconds tell more: equal ones
mean that workers cost nothing but their cores.
"""

import argparse
import json
import os
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from nemojax import tokenize
from nemojax.data.plan import Plan, PlannedLoader
from nemojax.data.shards import open_shards
from nemojax.data.sources import Source
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer

MEGABYTES = 16


def write_texts(path: Path) -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts, size = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        size += len(text)
        if size > MEGABYTES * 1e6:
            break
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def measure_tokenize(folder: Path, ways: dict[str, int], repeats: int) -> None:
    source = Source(name="code", kind="jsonl", path=str(folder / "code.jsonl"))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    result = {}
    for repeat in range(repeats):
        for way, workers in ways.items():
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if way == "threads" else "false"
            cfg = tokenize.Config(str(folder / "tokenizer"), (source,), workers=workers, shard_documents=256)
            start, cpu = time.perf_counter(), cpu_seconds()
            result = tokenize.run(cfg, folder / f"{way.replace(' ', '-')}-{repeat}")
            seconds[way].append(time.perf_counter() - start)
            busy[way].append(cpu_seconds() - cpu)
    tokens = result["tokens"] + result["heldout_tokens"]
    print(f"{result['documents']} documents, {tokens:,} tokens")
    for way, found in seconds.items():
        median, cpu = statistics.median(found), statistics.median(busy[way])
        rate = f"{tokens / median:9,.0f} tokens/s, {tokens / cpu:9,.0f} per CPU second"
        print(f"tokenize, {way:10} {median:6.2f} s  {rate}")


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_plan(length: int, repeats: int) -> None:
    """A million documents of the lengths that web pages have, in tokens."""
    sizes = np.maximum(1, np.random.default_rng(0).lognormal(6.3, 1.1, 1_000_000)).astype(np.int32)
    plan = Plan([sizes], [1.0], length=length, seed=0, long="split")
    plan.window(0)
    rates, used, rows = [], 0, 0
    for number in range(1, 1 + 4 * repeats):
        start = time.perf_counter()
        window = plan.window(number)
        rates.append(window.num_rows / (time.perf_counter() - start))
        rows += window.num_rows
        _, piece = plan.drawn(number)
        used += int(plan.pieces[0].find(piece)[2].sum())
    rate = statistics.median(rates)
    print(
        f"plan, rows of {length}: {rate:,.0f} rows/s ({rate * length:,.0f} tokens/s), "
        f"{100 * (1 - used / (rows * length)):.2f}% padding"
    )


def measure_loader(shards: Path, tokenizer_dir: Path, length: int, repeats: int) -> None:
    sources = [open_shards(shards, load_tokenizer(tokenizer_dir))]
    loader = PlannedLoader(sources, [1.0], batch_size=8, length=length, pad_id=0)
    rates = []
    for _ in range(20 * repeats):
        start = time.perf_counter()
        batch = next(loader)
        rates.append((batch["segments"] > 0).sum() / (time.perf_counter() - start))
    print(f"PlannedLoader, 8 rows of {length}: {statistics.median(rates):,.0f} tokens/s")
    start = time.perf_counter()
    sources[0].verify()
    rate = sources[0].num_tokens / (time.perf_counter() - start)
    print(f"verify: {rate:,.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ways = {f"{n} worker{'s' * (n != '1')}": int(n) for n in args.workers.split(",")} | {"threads": 1}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        texts = write_texts(folder / "code.jsonl")
        train_tokenizer(texts[::8], args.vocab, folder / "tokenizer")
        measure_tokenize(folder, ways, args.repeats)
        measure_plan(args.length, args.repeats)
        done = next(folder.glob("*/shards/code"))
        measure_loader(done, folder / "tokenizer", args.length, args.repeats)


if __name__ == "__main__":
    main()
