"""Batches a second: texts in memory, token shards, and streams of every kind, each in a process of its own.

    python tests/benchmarks/input.py [--rounds=3] [--length=2048] [--batch=8] [--vocab=32000] [--seconds=5]

The texts are Python's own standard library, a file a document (about 16 MB); the tokenizer is trained on a
part of them. `start_seconds` is from nothing to the first batch, which for texts in memory holds all
tokenising. `tokens_s` are tokens that are trained on, a second of wall time, with nothing else to do;
`cpu_per_million` are the CPU seconds of all threads for a million of them.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.benchmarks.alternate import Contender, Numbers, compare, make_parser

MEGABYTES = 16
PARTS = 4
STREAMS = {
    "stream jsonl": ("jsonl", "*.jsonl", 2),
    "1 worker": ("jsonl", "*.jsonl", 1),
    "stream gz": ("jsonl", "*.jsonl.gz", 2),
    "stream parquet": ("parquet", "*.parquet", 2),
    "stream hf": ("hf", "hub", 2),
}


def make_files(folder: Path, vocab: int) -> None:
    """The texts as files of every kind, the tokenizer, and token shards."""
    import gzip

    import pyarrow
    from pyarrow import parquet

    from nemojax.data.examples import text_examples
    from nemojax.data.shards import write_shards
    from nemojax.data.tokenizer import train_tokenizer

    texts, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size > MEGABYTES * 1e6:
            break
    (folder / "hub").mkdir()
    for part in range(PARTS):
        mine = texts[part::PARTS]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in mine)
        (folder / f"{part}.jsonl").write_text(lines)
        with gzip.open(folder / f"{part}.jsonl.gz", "wt") as packed:
            packed.write(lines)
        for name in (f"{part}.parquet", f"hub/train-{part:05}-of-{PARTS:05}.parquet"):
            parquet.write_table(pyarrow.table({"text": mine}), folder / name, row_group_size=100)
    tokenizer = train_tokenizer(texts[::8], vocab, folder / "tokenizer")
    write_shards(folder / "shards", text_examples(texts, tokenizer), tokenizer, {})


def measure(way: str, args: argparse.Namespace) -> Numbers:
    from nemojax.data.mixture import TextData, train_batches
    from nemojax.data.reading import Streaming
    from nemojax.data.sources import Source
    from nemojax.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    folder = Path(args.folder)
    workers = 2
    if way in STREAMS:
        kind, files, workers = STREAMS[way]
        source = Source(name="code", kind=kind, path=str(folder / files), stream=True)  # type: ignore[arg-type]
    elif way == "tokens":
        source = Source(name="code", kind="tokens", path=str(folder / "shards"))
    else:
        source = Source(name="code", kind="jsonl", path=str(folder / "*.jsonl"))
    data = TextData(
        sources=(source,),
        length=args.length,
        batch_size=args.batch,
        streaming=Streaming(buffer=256, workers=workers),
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    start = time.perf_counter()
    batches = train_batches(data, tokenizer)
    next(batches)
    numbers = {"start_seconds": time.perf_counter() - start}
    for _ in range(4):
        next(batches)
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    times = []
    while time.perf_counter() < start + args.seconds:
        asked = time.perf_counter()
        tokens += int((next(batches)["segments"] > 0).sum())
        times.append(time.perf_counter() - asked)
    numbers["tokens_s"] = tokens / (time.perf_counter() - start)
    numbers["cpu_per_million"] = 1e6 * (time.process_time() - cpu) / tokens
    return numbers | {"batch_ms": 1e3 * statistics.median(times), "longest_ms": 1e3 * max(times)}


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    ways = {
        way: Contender(partial(measure, way), ("tokenizers", "pyarrow", "datasets"))
        for way in ("memory", "tokens", *STREAMS)
    }
    with tempfile.TemporaryDirectory() as made:
        if not args.only:
            make_files(Path(made), args.vocab)
        compare(__file__, args, ways, ["tokens_s"], extra=[f"--folder={made}"])


if __name__ == "__main__":
    sys.exit(main())
