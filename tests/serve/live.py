"""A real `nemojax serve` in a process of its own, on a tiny model with random weights."""

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import save_params
from nemojax.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nemojax.model.llama import init_params
from tests.environment import QUICK_COMPILATION

CONTEXT = 1024
PATIENCE = 120  # seconds until a test gives up
CHAT = [{"role": "user", "content": "two and two"}]
# told to think, this model finds itself in the middle of it: what it writes by chance has no tags
_OPENED = """\
    {%- if messages and messages[0]['role'] == 'system' and 'thinking on' in messages[0]['content'] %}
        {{- '<think>' }}
    {%- endif %}
"""


def make_artifact(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(["one and two make three " * 20], 300, folder / "tokenizer", context=CONTEXT)
    head, end = CHAT_TEMPLATE.rstrip().rsplit("{%- endif %}", 1)
    (folder / "tokenizer" / "chat_template.jinja").write_text(f"{head}{_OPENED}{{%- endif %}}{end}\n")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=64,
        context=CONTEXT,
    )
    params = jax.tree.map(lambda w: w * 1.5, init_params(arch, jax.random.key(0)))
    return save_params(folder / "model", arch, params, tokenizer_dir=folder / "tokenizer")


def environment(cache: Path) -> dict[str, str]:
    """One device, and compiled programs shared by the servers of a session."""
    return os.environ | {
        "XLA_FLAGS": QUICK_COMPILATION,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "NEMOJAX_TRACEBACK": "",
    }


class Live:
    """A running server."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log
        self.port = int(url.rpartition(":")[2])

    def client(self, key: str = "none", **more: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **more)

    def request(
        self, path: str, body: bytes | Any = None, headers: Mapping[str, str] = {}, method: str | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """(status, JSON or text, headers)."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | dict(headers)
        asked = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            answer: Any = urllib.request.urlopen(asked, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode()
            is_json = answer.headers.get("content-type") == "application/json"
            return answer.status, json.loads(text) if is_json else text, answer.headers

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def metrics(self, headers: Mapping[str, str] = {}) -> dict[str, float]:
        status, text, _ = self.request("/metrics", headers=headers)
        assert status == 200
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("nemojax_"): float(value) for name, value in rows}

    def holds(self, connection: socket.socket) -> bool:
        """Whether the process has its end of a connection, by Linux' table: inode 0 is nobody's any more."""
        ends = [f"0100007F:{port:04X}" for port in (self.port, connection.getsockname()[1])]
        rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        return any(row[1:3] == ends and row[9] != "0" for row in rows)

    def wait_until(self, **wanted: float) -> None:
        """Until metrics have these values."""
        deadline = time.monotonic() + PATIENCE
        while True:
            now = self.metrics()
            if all(now[name] == value for name, value in wanted.items()):
                return
            assert time.monotonic() < deadline, {name: now[name] for name in wanted}
            time.sleep(0.02)

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def serving(artifact: Path, cache: Path, *flags: str) -> Iterator[Live]:
    """A server until the end of the block; what it says on standard error is beside the artifact."""
    log = artifact.parent / f"serve-{time.monotonic_ns()}.log"
    command = serve_command(artifact, "--port=0", "--config.warm=False", *flags)
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment(cache), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"{line!r}\n{log.read_text()}"
        yield Live(process, found[0], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def serve_command(artifact: Path | str, *flags: str) -> Sequence[str]:
    return [sys.executable, "-m", "nemojax.cli", "serve", str(artifact), *flags]
