"""Servers started, watched and ended, and a client of chat completions that costs next to nothing.

The client shares two cores with the server it measures: it writes bytes to a socket and splits lines, one
connection a request.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import model

CONTEXT = 512
NEMOJAX = [sys.executable, "-m", "nemojax.cli"]
TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers"]


def prepare(folder: Path) -> Path:
    """Makes `folder/artifact` with random weights and a trained tokenizer, and `folder/export` of it, in
    which nothing ends a sequence."""
    import jax

    from nemojax.checkpoints.artifact import save_params
    from nemojax.checkpoints.hf import export_hf
    from nemojax.data.tokenizer import train_tokenizer
    from nemojax.model.llama import init_params

    sources = sorted((Path(__file__).parents[2] / "nemojax").rglob("*.py"))
    tokenizer = train_tokenizer((p.read_text() for p in sources), model.VOCAB, folder / "tokenizer")
    assert tokenizer.vocab_size == model.VOCAB
    arch = model.our_arch(CONTEXT)
    params = init_params(arch, jax.random.key(0))
    save_params(folder / "artifact", arch, params, tokenizer_dir=folder / "tokenizer")
    export_hf(folder / "artifact", folder / "export")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / "export" / name).read_text())
        (folder / "export" / name).write_text(json.dumps(values | {"eos_token_id": None}))
    return folder


@dataclass
class Server:
    """A process that answers HTTP on loopback."""

    process: subprocess.Popen
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """User and system time so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident memory in MiB (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # pyright: ignore[reportOptionalSubscript]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=30) as response:
            return response.read()

    def model_name(self) -> str:
        return json.loads(self.get("/v1/models"))["data"][0]["id"]

    def stop(self) -> int:
        """Ends it as a service manager does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(60)
        self.process.kill()
        return self.process.wait()


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, env: Mapping[str, str] = {}) -> Iterator[Server]:
    """Starts `command` with --host and --port, waits until /health answers, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    full = [*command, "--host=127.0.0.1", f"--port={port}"]
    with log.open("wb") as out:
        process = subprocess.Popen(full, env=os.environ | dict(env), stdout=out, stderr=subprocess.STDOUT)
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + 300
        while not _is_up(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(full)} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield server
    finally:
        server.stop()


def _is_up(server: Server) -> bool:
    try:
        return bool(server.get("/health"))
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@dataclass
class Reply:
    """What came back: `text` and `tokens` (by the server's usage, None without one) when `complete`.

    `first` and `seconds` are from sending to the first text and to the end.
    """

    status: int = 0
    retry_after: float = 0.0
    text: str = ""
    tokens: int | None = None
    finish: str | None = None
    complete: bool = False
    first: float | None = None
    seconds: float = 0.0
    body: dict[str, Any] = field(default_factory=dict)


async def chat(port: int, body: Mapping[str, Any], hang_up_after: int | None = None) -> Reply:
    """POST /v1/chat/completions. `hang_up_after`: so many events with text, then the connection is cut.

    OSError or EOFError if the connection ends before the answer does.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    data, reply, start = json.dumps(body).encode(), Reply(), time.perf_counter()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        headers = await _read_head(reader, reply)
        if "text/event-stream" in headers.get("content-type", ""):
            await _read_events(_chunks(reader), reply, start, hang_up_after)
        else:
            await _read_json(reader, headers, reply)
    finally:
        reply.seconds = time.perf_counter() - start
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return reply


async def _read_head(reader: asyncio.StreamReader, reply: Reply) -> dict[str, str]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    reply.status = int(lines[0].split()[1])
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    reply.retry_after = float(headers.get("retry-after", 0))
    return headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The chunks of a chunked body."""
    while line := await reader.readline():
        if not (size := int(line.split(b";")[0], 16)):
            return
        yield (await reader.readexactly(size + 2))[:-2]
    raise EOFError("the connection ended inside a body")


async def _read_events(
    chunks: AsyncIterator[bytes], reply: Reply, start: float, hang_up_after: int | None
) -> None:
    rest, texts = b"", 0
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == line or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise OSError(f"error in the stream: {event['error']}")
            if event.get("usage"):
                reply.tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                reply.finish = choice.get("finish_reason") or reply.finish
                delta = choice["delta"]
                if new := (delta.get("content") or "") + (delta.get("reasoning_content") or ""):
                    reply.first = reply.first or time.perf_counter() - start
                    reply.text += new
                    texts += 1
        if hang_up_after is not None and texts >= hang_up_after:
            return
    reply.complete = reply.finish is not None


async def _read_json(reader: asyncio.StreamReader, headers: Mapping[str, str], reply: Reply) -> None:
    length = headers.get("content-length")
    data = await (reader.readexactly(int(length)) if length else reader.read())
    reply.body = json.loads(data)
    if reply.status == 200:
        choice = reply.body["choices"][0]
        message = choice["message"]
        reply.text = (message.get("reasoning_content") or "") + (message.get("content") or "")
        reply.finish, reply.tokens = choice["finish_reason"], reply.body["usage"]["completion_tokens"]
        reply.complete = True
