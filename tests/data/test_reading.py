"""Files near and far: a server that fails and comes back, one that stays away, files that vanish."""

import bz2
import gzip
import json
import lzma
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.reading import HttpFile, SourceUnavailable, Streaming, open_file, packed_lines
from nemojax.data.sources import Source, input_files
from tests.data.tiny import tiny_tokenizer

TEXTS = [f"document {i} says {i * i}" for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Server(ThreadingHTTPServer):
    """Files by name, at most `part` bytes an answer; `fails` answers are errors, or break off after `cut`
    bytes where that is set."""

    def __init__(self, files: dict[str, bytes], ranges: bool = True, part: int = 10**9):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.part = files, ranges, part
        self.fails, self.cut, self.asked, self.failed = 0, 0, 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        server.asked += 1
        if server.fails and not server.cut:
            server.fails, server.failed = server.fails - 1, server.failed + 1
            return self.send_error(503)
        if (whole := server.files.get(self.path[1:])) is None:
            return self.send_error(404)
        start = int(self.headers["Range"][6:-1]) if server.ranges else 0
        if start >= len(whole):
            return self.send_error(416)
        body = whole[start : start + server.part]
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        self.end_headers()
        if server.fails:
            server.fails, server.failed = server.fails - 1, server.failed + 1
            body = body[: server.cut]
        try:
            self.wfile.write(body)
        except ConnectionError:  # the client had enough
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path_factory.mktemp("files") / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "number": range(len(TEXTS))}), path, row_group_size=500)
    packed = {"a.jsonl.gz": gzip.compress(LINES), "a.jsonl.bz2": bz2.compress(LINES)}
    return {"a.jsonl": LINES, "a.jsonl.xz": lzma.compress(LINES), "a.parquet": path.read_bytes(), **packed}


def data(path: str, kind: str, tries: int = 4, wait: float = 0.01, **changes) -> TextData:
    source = Source(name="web", kind=kind, path=path, stream=True)  # type: ignore[arg-type]
    streaming = Streaming(buffer=200, tries=tries, wait=wait)
    return TextData(sources=(source,), length=64, batch_size=4, streaming=streaming, **changes)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_behind_a_url_is_read_from_anywhere(files, ranges):
    with Server(files, ranges) as server:
        with open_file(f"{server.url}/a.jsonl") as file:
            assert file.read(10) == LINES[:10]
            file.seek(70_000)
            assert file.read(9) == LINES[70_000:70_009] and file.tell() == 70_009
            assert file.seek(-5, 2) == len(LINES) - 5 and file.read() == LINES[-5:]
            file.seek(len(LINES))
            assert file.read() == b""
        for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz"):
            assert b"".join(packed_lines(f"{server.url}/{name}", 1000)) == LINES[1000:]
        with pytest.raises(FileNotFoundError, match="404"):
            HttpFile(f"{server.url}/none").read(1)
    with pytest.raises(ConnectionError):
        HttpFile(f"{server.url}/a.jsonl").read(1)


@pytest.mark.parametrize(
    "name, kind", [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.parquet", "parquet")]
)
def test_failures_change_nothing(tokenizer, files, name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("nemojax.data.reading.BUFFER_BYTES", 4096)
    (tmp_path / name).write_bytes(files[name])
    local = train_batches(data(str(tmp_path / name), kind), tokenizer)
    with Server(files, part=len(files[name]) // 9) as server:
        far = data(f"{server.url}/{name}", kind, tries=9)
        assert input_files(far.sources) == []
        loader = train_batches(far, tokenizer)
        for step in range(150):  # more than an epoch
            if step % 50 == 2 and not server.fails:
                server.fails, server.cut = 3, (1000 if step == 52 else 0)
            expected, found = next(local), next(loader)
            for key in expected:
                np.testing.assert_array_equal(expected[key], found[key])
        assert server.failed >= 3 and server.asked > 15
        assert heldout_batches(far, tokenizer)["web"]
        loader.close()


def test_a_server_that_stays_away_stops_the_run(tokenizer, files, caplog):
    """In time, with one clear error, after which the run goes on where it was."""
    with Server(files) as server:
        loader = train_batches(data(f"{server.url}/a.jsonl", "jsonl", wait=0.05), tokenizer)
        undisturbed = train_batches(data(f"{server.url}/a.jsonl", "jsonl"), tokenizer)
        for _ in range(3):
            next(loader)
            next(undisturbed)
        server.fails = 10**9
        start, steps = time.monotonic(), 0
        with pytest.raises(SourceUnavailable) as caught:
            while True:
                next(loader)
                steps += 1
        waited = time.monotonic() - start
        message = str(caught.value)
        assert message.startswith(f"source web: {server.url}/a.jsonl: expected to read it, got ")
        assert "503" in message and "(4 failures in 0 s); the run can be resumed once it is back" in message
        assert 0.05 + 0.1 + 0.2 < waited < 5
        assert "503 Service Unavailable; trying again in 0.2 s" in caplog.text
        state = json.loads(json.dumps(loader.state()))
        server.fails = 0
        for _ in range(steps):
            next(undisturbed)
        resumed = train_batches(data(f"{server.url}/a.jsonl", "jsonl"), tokenizer)
        resumed.restore(state)
        for _ in range(6):  # the one that failed goes on as well
            expected = next(undisturbed)["tokens"]
            assert (expected == next(resumed)["tokens"]).all() and (expected == next(loader)["tokens"]).all()


def test_what_is_not_there_is_not_waited_for(tokenizer, files, tmp_path):
    with Server(files) as server:
        start = time.monotonic()
        with pytest.raises(SourceUnavailable, match=r"none.jsonl: 404 Not Found \(1 failure in 0 s\)"):
            train_batches(data(f"{server.url}/none.jsonl", "jsonl", wait=60), tokenizer)
        assert time.monotonic() - start < 5 and server.asked == 1
    with pytest.raises(ValueError, match="expected files at 'memory://nothing/.*', got none"):
        train_batches(data("memory://nothing/*.jsonl", "jsonl"), tokenizer)
    for address in ("oss://b/*.jsonl", "no://b"):
        with pytest.raises(ValueError, match=f"{address[:5]}.*expected an address that fsspec reads"):
            train_batches(data(address, "jsonl", wait=60), tokenizer)


def test_other_file_systems(tokenizer):
    import fsspec

    memory = fsspec.filesystem("memory")
    for part in range(2):
        memory.pipe(f"/texts/{part}.jsonl", LINES)
    loader = train_batches(data("memory://texts/*.jsonl", "jsonl"), tokenizer)
    assert next(loader)["tokens"].shape == (4, 64)


@pytest.mark.parametrize("kind", ["jsonl", "hf"])
def test_a_file_that_vanishes_for_a_while(tokenizer, tmp_path, kind):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        mine = TEXTS[part:400:2]
        if kind == "jsonl":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in mine))
        else:
            parquet.write_table(pyarrow.table({"text": mine}), folder / f"train-{part:05}-of-00002.parquet")
    loader = train_batches(data(str(folder), kind, tries=8, wait=0.02), tokenizer)
    next(loader)
    away = folder.rename(tmp_path / "away")
    threading.Timer(0.5, lambda: away.rename(folder)).start()
    for _ in range(40):  # two epochs
        next(loader)
    folder.rename(tmp_path / "away")
    with pytest.raises(SourceUnavailable, match="the run can be resumed"):
        for _ in range(60):
            next(loader)


def test_closing_does_not_wait_for_a_source(tokenizer, files):
    with Server(files) as server:
        loader = train_batches(data(f"{server.url}/a.jsonl", "jsonl", wait=100), tokenizer)
        next(loader)
        server.fails = 10**9
        time.sleep(0.3)
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 2
        server.fails = 0
        next(loader)  # goes on where it was
        loader.close()
