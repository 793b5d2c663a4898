"""Streams: read bit by bit, the same whatever the threads, resumed exactly, shared by processes."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemojax.data.heldout import heldout_side
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.packing import unpack
from nemojax.data.reading import Streaming
from nemojax.data.sources import Source, load_texts
from nemojax.data.stream import Stream
from nemojax.data.tokenizer import Tokenizer
from tests.data.tiny import tiny_tokenizer

TEXTS = [f"document {i} says {i * i}" + " word" * (i % 23) for i in range(600)]
HELDOUT = {TEXTS[place] for place in heldout_side(TEXTS, 0.02)}
TRAINED = set(TEXTS) - HELDOUT
KINDS = ["jsonl", "text", "parquet", "hf"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """TEXTS in every kind of file: KIND/*."""
    import pyarrow
    from pyarrow import parquet

    out = tmp_path_factory.mktemp("texts")
    for kind in KINDS:
        (out / kind).mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (out / "jsonl" / "a.jsonl").write_text("\n".join(lines[:300]))  # with blank lines
    with gzip.open(out / "jsonl" / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[300:])
    for number, text in enumerate(TEXTS[:40]):
        (out / "text" / f"{number:03}.txt").write_text(text)
    for part in range(3):
        table = pyarrow.table({"text": TEXTS[part::3]})
        parquet.write_table(table, out / "parquet" / f"{part}.parquet", row_group_size=70)
        parquet.write_table(table, out / "hf" / f"train-{part:05}-of-00003.parquet")
    return out


def source(folder: Path, kind: str = "jsonl", **changes) -> Source:
    return Source(name="mine", kind=kind, path=str(folder / kind), stream=True, **changes)  # type: ignore[arg-type]


def data(*sources: Source, buffer: int = 50, workers: int = 2, **changes) -> TextData:
    streaming = Streaming(buffer=buffer, workers=workers, wait=0.01)
    return TextData(sources=sources, length=64, batch_size=4, streaming=streaming, **changes)


def documents(tokenizer, batches) -> list[str]:
    return [tokenizer.decode(tokens) for batch in batches for tokens, _ in unpack(batch)]


def same(a, b):
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_resumed_exactly(tokenizer, folder, kind):
    mixed = data(source(folder, kind), Source(weight=0.5), prefetch=0)
    whole, resumed = train_batches(mixed, tokenizer), train_batches(mixed, tokenizer)
    for steps in (0, 3, 30):
        for _ in range(steps):
            next(whole)
        state = json.loads(json.dumps(whole.state()))
        resumed.restore(state)
        for _ in range(6):
            same(next(whole), next(resumed))
            assert whole.ids == resumed.ids and whole.rows.tolist() == resumed.rows.tolist()
        assert whole.state() == resumed.state()
    assert len(json.dumps(state)) < 4000  # positions, no texts
    assert whole.identity == resumed.identity


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_training_text_once(tokenizer, folder, kind):
    with ThreadPoolExecutor(2) as pool:
        stream = Stream(
            source(folder, kind), 0, tokenizer, Streaming(buffer=64), pool, length=200, long="error", seed=1
        )
        expected = sorted(TRAINED if kind != "text" else TRAINED & set(TEXTS[:40]))

        def epoch(number):
            first = number * len(expected)
            return [tokenizer.decode(stream[first + i].ids) for i in range(len(expected))]

        first, second = epoch(0), epoch(1)
    assert sorted(first) == sorted(second) == expected
    assert first != second and first != expected


def test_neither_threads_nor_blocks_in_use_change_the_order(tokenizer, folder):
    one, three = (train_batches(data(source(folder), workers=n), tokenizer) for n in (1, 3))
    for _ in range(10):
        same(next(one), next(three))


def test_processes_share_the_documents(tokenizer, folder):
    """By files where there are enough of them, else row by row."""
    for kind, count in (("parquet", 2), ("jsonl", 2), ("parquet", 4)):
        seen: Counter[str] = Counter()
        rows = []
        for process in range(count):
            with ThreadPoolExecutor(1) as pool:
                stream = Stream(
                    source(folder, kind),
                    0,
                    tokenizer,
                    Streaming(buffer=64),
                    pool,
                    length=200,
                    long="error",
                    seed=1,
                    process_index=process,
                    process_count=count,
                )
                mine, index = [], 0
                while not mine or stream.state()["blocks"][-1][1][0] == 0:  # the first epoch
                    mine.append(tokenizer.decode(stream[index].ids))
                    index += 1
                seen.update(mine[:-1])
            loader = train_batches(
                data(source(folder, kind), Source(weight=0.5), prefetch=0), tokenizer, process, count
            )
            next(loader)
            rows.append(loader.rows.tolist())
        assert set(seen) == TRAINED and set(seen.values()) == {1}
        assert sorted(sum(rows, [])) == list(range(4))


def test_another_number_of_processes_is_refused(tokenizer, folder):
    mixed = data(source(folder), prefetch=0)
    one, two = train_batches(mixed, tokenizer), train_batches(mixed, tokenizer, 1, 2)
    with pytest.raises(ValueError, match="expected that of 2 processes, got that of 1; .* run that many"):
        two.restore(one.state())
    with pytest.raises(ValueError, match="expected identity"):
        one.restore(train_batches(replace(mixed, seed=5), tokenizer).state())
    in_memory = train_batches(data(replace(source(folder), stream=False)), tokenizer)
    with pytest.raises(ValueError, match="expected identity"):
        in_memory.restore(one.state())
    with pytest.raises(ValueError, match="expected identity"):
        one.restore(in_memory.state())


def test_what_is_held_out_is_never_trained_on(tokenizer, folder):
    for kind in ("jsonl", "parquet", "hf"):
        streamed = data(source(folder, kind), heldout_batches=50)
        batches = heldout_batches(streamed, tokenizer)["mine"]
        assert set(documents(tokenizer, batches)) == HELDOUT
    loader = train_batches(streamed, tokenizer)
    trained = documents(tokenizer, [next(loader) for _ in range(140)])
    whole = [text for text in trained if text.startswith("document")]  # long ones come in pieces
    assert whole and not set(whole) & HELDOUT
    few = heldout_batches(replace(streamed, heldout_batches=1, batch_size=1), tokenizer)["mine"]
    assert len(few) == 1 and set(documents(tokenizer, few)) < HELDOUT
    named = replace(streamed, heldout=(replace(source(folder), name="other"),))
    assert len(documents(tokenizer, heldout_batches(named, tokenizer)["other"])) > len(HELDOUT)
    assert heldout_batches(data(source(folder, heldout_share=0.0)), tokenizer) == {}
    with pytest.raises(ValueError, match="expected a held-out document among 600"):
        heldout_batches(data(source(folder, heldout_share=1e-9)), tokenizer)


def test_a_limit_ends_the_epoch(tokenizer, folder):
    limited = train_batches(data(source(folder, limit=5), buffer=3), tokenizer)
    seen = Counter(documents(tokenizer, [next(limited) for _ in range(20)]))
    whole = [number for text, number in seen.items() if text.startswith("document")]
    assert len(whole) == 5 and min(whole) > 5, seen


def test_long_documents_are_cut_before_they_are_shuffled(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "word " * 3000}) + "\n" + '{"text": "short"}\n' * 50
    )
    book = Source(name="mine", kind="jsonl", path=str(tmp_path), stream=True, heldout_share=0.0)
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(book, 0, tokenizer, Streaming(), pool, length=64, long="split", seed=0)
        sizes = [stream[place].size for place in range(60)]
    assert 10 < sum(size == 64 for size in sizes) < 55 and max(sizes) == 64


def test_bad_rows_are_named(tokenizer, tmp_path):
    path = tmp_path / "bad.jsonl"
    mine = Source(name="mine", kind="jsonl", path=str(path), stream=True, heldout_share=0.0)
    good = '{"text": "fine"}\n' * 300
    for line, message in (
        ('{"text": ', "bad.jsonl:301: expected one JSON object a line"),
        ("[1]", "bad.jsonl:301: expected a JSON object, got list"),
        ('{"body": "x"}', "bad.jsonl:301: expected text in field 'text', got body"),
        ('{"text": "\\ud800"}', "bad.jsonl:301: expected whole Unicode characters"),
    ):
        path.write_text(good + line + "\n")
        loader = train_batches(data(mine), tokenizer)
        with pytest.raises(ValueError, match=message):
            for _ in range(100):
                next(loader)
    packed = tmp_path / "bad.jsonl.gz"
    packed.write_bytes(gzip.compress(good.encode())[:-12])
    with pytest.raises(ValueError, match="bad.jsonl.gz: cannot unpack it"):
        loader = train_batches(data(replace(mine, path=str(packed))), tokenizer)
        for _ in range(100):
            next(loader)
    path.write_text('{"text": " "}\n\n')
    with pytest.raises(ValueError, match="expected texts to train on, got none"):
        train_batches(data(mine), tokenizer)
    path.write_text(good)
    with pytest.raises(ValueError, match="expected at most 2 tokens, got"):
        next(train_batches(replace(data(mine), length=2, long="error"), tokenizer))


def test_bad_tables_and_files(tokenizer, folder, tmp_path):
    for kind in ("parquet", "hf"):
        with pytest.raises(ValueError, match="source mine: expected column 'body', got text"):
            train_batches(data(source(folder, kind, field="body")), tokenizer)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot read .*a.parquet as parquet"):
        train_batches(data(source(tmp_path, "parquet")), tokenizer)
    with pytest.raises(ValueError, match="cannot load data set"):
        train_batches(data(source(tmp_path, "hf")), tokenizer)
    with pytest.raises(ValueError, match="expected kind hf, jsonl, parquet, text to stream, got pydoc"):
        train_batches(data(Source(stream=True)), tokenizer)
    with pytest.raises(
        ValueError, match="expected a path of this machine, got https://host/a.jsonl; set str"
    ):
        load_texts(Source(name="mine", kind="jsonl", path="https://host/a.jsonl"))
    with pytest.raises(ValueError, match="streaming.workers: expected at least 1, got 0"):
        Streaming(workers=0)


PROCESS = """
import json, sys
from pathlib import Path
import jax

jax.config.update("jax_platforms", "cpu")
index, address, folder, tokenizer, out = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, index)
from nemojax.config import from_dict
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.tokenizer import load_tokenizer

source = {"name": "mine", "kind": "jsonl", "path": folder, "stream": True}
data = {"sources": [source, {"weight": 0.5}], "length": 64, "batch_size": 4, "streaming": {"buffer": 50}}
make = lambda: train_batches(from_dict(TextData, data), load_tokenizer(tokenizer), index, 2)
whole, resumed = make(), make()
for _ in range(9):
    next(whole)
state = json.loads(json.dumps(whole.state()))
resumed.restore(state)
for _ in range(5):
    a, b = next(whole), next(resumed)
    assert all((a[key] == b[key]).all() for key in a) and whole.rows.tolist() == resumed.rows.tolist()
Path(out, f"{index}.json").write_text(json.dumps([state, whole.rows.tolist()]))
"""


@pytest.mark.slow
def test_two_processes_keep_one_state(tokenizer, folder, tmp_path):
    from tests.processes.run import free_address

    address = free_address()
    arguments = [address, str(folder / "jsonl"), str(tokenizer.path), str(tmp_path)]
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(i), *arguments], stderr=subprocess.PIPE)
        for i in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()[-2000:]
    (first, rows), (second, others) = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == second and len(first["processes"]) == 2 and first["processes"][0] != first["processes"][1]
    assert sorted(rows + others) == list(range(13 * 4, 14 * 4))
