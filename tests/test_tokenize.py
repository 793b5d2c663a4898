"""The stage `tokenize`: shards equal what is tokenised at once, whoever writes them, killed or not."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemojax import tokenize
from nemojax.config import from_dict
from nemojax.data.examples import text_examples
from nemojax.data.shards import HELDOUT, INDEX, open_heldout, open_shards
from nemojax.data.sources import Source, load_heldout, load_texts
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.stage import OtherRun
from nemojax.tokenize import Config, run
from tests.environment import QUICK_COMPILATION

WORDS = ["red", "green", "blue", "one", "two", "three", "and", "or", "not", "then", "1 + 2 = 3", "→ é"]
SHARD = 32


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) + f" {i}" for i in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """tokenizer/, web.jsonl, 400 texts, and code.parquet, 70."""
    import datasets

    folder = tmp_path_factory.mktemp("tokenize")
    train_tokenizer(texts(200), 400, folder / "tokenizer")
    write_jsonl(folder / "web.jsonl", texts(400))
    datasets.Dataset.from_dict({"code": texts(70, seed=1)}).to_parquet(folder / "code.parquet")
    return folder


def sources(folder) -> tuple[Source, ...]:
    web = Source(name="web", kind="jsonl", path=str(folder / "web.jsonl"), heldout_share=0.1)
    code = Source(name="code", kind="parquet", path=str(folder / "code.parquet"), field="code")
    return web, replace(code, heldout_share=0.0)


def config(folder, **changes) -> Config:
    tokenizer = str(folder / "tokenizer")
    return Config(**{"sources": sources(folder), "tokenizer": tokenizer, "shard_documents": SHARD, **changes})


@pytest.fixture(scope="module")
def serial(folder, tmp_path_factory) -> Path:
    """A work directory that this process alone has written."""
    workdir = tmp_path_factory.mktemp("serial") / "run"
    run(config(folder, workers=1), workdir)
    return workdir


def contents(workdir) -> dict[str, bytes]:
    shards = workdir / tokenize.SHARDS
    return {str(f.relative_to(shards)): f.read_bytes() for f in shards.rglob("*") if f.is_file()}


def same(a, b):
    assert len(a) == len(b) > 0
    for index in range(len(a)):
        np.testing.assert_array_equal(a[index].ids, b[index].ids)
        np.testing.assert_array_equal(a[index].weights, b[index].weights)


def test_shards_are_what_is_tokenised_at_once(folder, serial):
    tokenizer = load_tokenizer(serial)
    for source in sources(folder):
        opened = open_shards(serial / "shards" / source.name, tokenizer)
        same(opened, text_examples(load_texts(source), tokenizer))
        opened.verify()
        assert opened.index["source"]["path"] == source.path
    heldout = open_heldout(serial / "shards" / "web", tokenizer)
    assert heldout is not None and open_heldout(serial / "shards" / "code", tokenizer) is None
    same(heldout, text_examples(load_heldout(sources(folder)[0]), tokenizer))


@pytest.mark.parametrize("limit", [0, 150])
def test_files_that_are_never_held_give_the_same_shards(folder, tmp_path, limit, monkeypatch):
    """In two files, one of them packed, with blank lines; read in one go and by jumps as two hosts do."""
    lines = (folder / "web.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(lines[:130]))
    with gzip.open(tmp_path / "in" / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[130:]))
    source = Source(name="web", kind="jsonl", path=str(tmp_path / "in"), heldout_share=0.1, limit=limit)
    held, streamed = (config(folder, sources=(replace(source, stream=s),), workers=1) for s in (False, True))
    run(held, tmp_path / "held")
    run(streamed, tmp_path / "streamed")
    expected, found = contents(tmp_path / "held"), contents(tmp_path / "streamed")
    assert expected.keys() == found.keys()
    assert all(expected[name] == found[name] for name in expected if not name.endswith(INDEX))

    monkeypatch.setattr(tokenize, "PART_DOCUMENTS", 10)
    texts = tokenize.StreamedTexts(replace(source, stream=True))
    whole = load_texts(source)
    for first in (0, 7, 64, 128, 32, 40):
        assert texts[first : first + 8] == whole[first : first + 8]
    assert texts[5] == whole[5] and len(texts) == len(whole)
    assert texts.heldout == load_heldout(source)
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / "in" / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(ValueError, match="source web: expected .* texts, got fewer now; its files changed"):
        texts[: len(texts)]


def test_the_result_counts(folder, serial):
    result = json.loads((serial / "result.json").read_text())
    index = json.loads((serial / "shards" / "web" / INDEX).read_text())
    assert result["documents"] == result["sources"]["web"]["documents"] + 70
    assert result["documents"] + result["heldout_documents"] == 470
    assert result["sources"]["web"]["tokens"] == index["tokens"]
    assert len(index["shards"]) == -(-index["documents"] // SHARD) > 10
    assert not any(name.endswith((".npz", ".partial")) for name in contents(serial))


def test_long_texts_are_handed_out_in_small_lists(folder, tmp_path, serial, monkeypatch):
    monkeypatch.setattr(tokenize, "PART_CHARACTERS", 300)
    monkeypatch.setattr(tokenize, "PART_DOCUMENTS", 10)
    run(config(folder, workers=1), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(serial)


def test_what_is_done_is_not_done_again(folder, tmp_path, serial, monkeypatch):
    """Stopped in the middle of a shard: only that one and those after it are tokenised then."""
    write, done = tokenize.write_shard, []

    def stop(folder, number, parts, total):
        if len(done) == 7:
            raise KeyboardInterrupt
        write(folder, number, parts, total)
        done.append((folder.name, number))

    monkeypatch.setattr(tokenize, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config(folder, workers=1), tmp_path / "run")
    with pytest.raises(ValueError, match="run it again with the same --workdir"):
        open_shards(tmp_path / "run" / "shards" / "web", load_tokenizer(folder))
    first = [*done]
    done[:] = [("", 0)] * -100  # never stops again
    monkeypatch.setattr(tokenize, "write_shard", lambda *a: (done.append((a[0].name, a[1])), write(*a)))
    run(config(folder, workers=1), tmp_path / "run")
    assert not set(first) & set(done)
    assert contents(tmp_path / "run") == contents(serial)
    done.clear()
    run(config(folder, workers=1), tmp_path / "run")
    assert not done


def test_a_shard_of_other_texts_is_refused(folder, tmp_path):
    """What a data set on the hub can do: change between a stop and the next start."""
    whole = load_texts(sources(folder)[0])
    part = tokenize.Part(sources(folder)[0], tmp_path, lambda: whole)
    tokenizer = load_tokenizer(folder)
    with tokenize.Encoders(tokenizer, 1) as encoders:
        tokenize._write_part(part, SHARD, encoders, 0, 2)
        other = part._replace(texts=lambda: whole[:-40])
        count = tokenize._write_part(other, SHARD, encoders, 1, 2)
    with pytest.raises(ValueError, match="expected shards of one collection of .* documents, got shards of"):
        tokenize.write_index(tmp_path, count, tokenizer, {})


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "tokenizer: expected an artifact"),
        ({"workers": -1}, "expected workers from 0"),
        ({"shard_documents": 0}, "shard_documents from 1 on"),
        ({"sources": ()}, "sources: expected texts"),
        ({"sources": (Source(name="../a"),)}, "a folder is called so"),
        ({"sources": (Source(), Source())}, "sources: expected different names"),
        ({"sources": (Source(kind="tokens"),)}, "expected texts, got tokens"),
        ({"sources": (Source(stream=True),)}, "to stream, got pydoc; unset stream"),
        ({"sources": (Source(kind="jsonl", path="nowhere"),)}, "expected files at 'nowhere'"),
    ],
)
def test_bad_configurations(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "shards").exists()


@pytest.mark.parametrize("stream", [False, True])
def test_sources_too_small_to_hold_something_out(folder, tmp_path, stream):
    path = write_jsonl(tmp_path / "few.jsonl", texts(3))
    few = Source(name="few", kind="jsonl", path=path, stream=stream, heldout_share=1e-6)
    with pytest.raises(ValueError, match="source few: expected a held-out document among 3"):
        run(config(folder, sources=(few,)), tmp_path / "run")
    result = run(config(folder, sources=(replace(few, heldout_share=0.0),)), tmp_path / "whole")
    assert (result["documents"], result["heldout_documents"]) == (3, 0)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(folder, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run(config(folder, workers=1), tmp_path / "run")
    shown = capsys.readouterr().err
    assert "source code" in shown and "source web, held out" in shown and "tokens/s" in shown
    assert "70/70" in shown


def test_half_a_character_is_named(folder, tmp_path):
    rows = texts(40)
    rows[33] = "half \ud800 a character"
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    bad = Source(name="bad", kind="jsonl", path=path, heldout_share=0.0)
    with pytest.raises(ValueError, match="source bad, document 33: text: expected whole Unicode characters"):
        run(config(folder, sources=(bad,), workers=1), tmp_path / "run")


def test_another_configuration_does_not_write_over_it(folder, serial):
    with pytest.raises(OtherRun, match="shard_documents"):
        run(config(folder, shard_documents=10), serial)


# --- real processes


def job(folder, workdir, env=None, **changes) -> subprocess.Popen:
    values = {"tokenizer": str(folder / "tokenizer"), "shard_documents": SHARD, **changes}
    values["sources"] = [vars(source) for source in sources(folder)]
    code = (
        "import json, sys\nfrom nemojax.config import from_dict\nfrom nemojax.tokenize import Config, run\n"
        "if __name__ == '__main__':\n    run(from_dict(Config, json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    script = folder / "job.py"
    script.write_text(code)
    assert from_dict(Config, values)
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, str(script), json.dumps(values), str(workdir)],
            env=os.environ
            | {"XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": str(Path(__file__).parent.parent)}
            | (env or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process, workdir):
    assert process.wait(timeout=120) == 0, Path(f"{workdir}.log").read_text()[-2000:]


@pytest.mark.slow
def test_workers_write_the_same_bytes(folder, tmp_path, serial, monkeypatch):
    monkeypatch.setattr(tokenize, "PART_DOCUMENTS", 5)
    run(config(folder, workers=3), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(serial)


@pytest.mark.slow
def test_a_worker_names_a_bad_text_and_a_lost_worker_is_told(folder, tmp_path, monkeypatch):
    rows = [*texts(600)[:-1], "half \ud800 a character"]
    bad = Source(name="bad", kind="jsonl", path=write_jsonl(tmp_path / "bad.jsonl", rows), heldout_share=0.0)
    with pytest.raises(ValueError, match="source bad, document 599: text: expected whole Unicode"):
        run(config(folder, sources=(bad,), workers=2), tmp_path / "run")
    with tokenize.Encoders(load_tokenizer(folder), 2) as encoders:
        tasks = tokenize._tasks(texts(2000), 0, 2000, "source web")
        results = encoders.map(tasks)
        next(results)
        assert encoders._pool is not None
        for worker in encoders._pool._processes.values():
            worker.kill()
        with pytest.raises(ValueError, match="one of 2 workers was ended from outside"):
            list(results)


def alive(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed(folder, tmp_path, workers):
    """SIGKILL after the first shard: workers end too, and a run with other workers leaves the same bytes."""
    many = tmp_path / "inputs"
    many.mkdir()
    write_jsonl(many / "web.jsonl", [text for seed in range(60) for text in texts(400, seed)])
    for name in ("code.parquet", "tokenizer"):
        (many / name).symlink_to(folder / name)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(config(many, workers=1, shard_documents=200), whole)

    process = job(many, killed, workers=workers, shard_documents=200)
    marks = killed / "shards" / "web"
    deadline = time.monotonic() + 60
    while not list(marks.glob("shard-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers_of_it = children.read_text().split() if children.is_file() else []
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in marks.glob("shard-*.npz")}
    assert done and not (marks / INDEX).exists()
    shards = {file.with_suffix(".bin"): file.with_suffix(".bin").stat().st_mtime_ns for file in done}
    deadline = time.monotonic() + 20
    while any(map(alive, workers_of_it)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers_of_it))

    finish(job(many, killed, workers=3 - workers, shard_documents=200), killed)
    assert contents(killed) == contents(whole)
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in shards.items())


@pytest.mark.slow
def test_two_hosts_write_what_one_does(folder, tmp_path, serial):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workdir = tmp_path / "run"
    hosts = []
    for index in range(2):
        env = {"NEMOJAX_COORDINATOR": f"127.0.0.1:{port}", "NEMOJAX_NUM_PROCESSES": "2"}
        hosts.append(job(folder, workdir, env | {"NEMOJAX_PROCESS_ID": str(index)}, workers=1))
    for host in hosts:
        finish(host, workdir)
    assert contents(workdir) == contents(serial)
    assert (workdir / "DONE").is_file() and HELDOUT in os.listdir(workdir / "shards" / "web")
