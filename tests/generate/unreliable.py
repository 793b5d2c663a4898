"""An OpenAI-compatible server on this machine that fails on purpose and counts what is asked of it."""

import contextlib
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator


class Server(http.server.ThreadingHTTPServer):
    """Does what `script` says to the next requests, one entry each, then answers as `reply` does.

    An entry: a number (status), (status, body, headers), "drop" (the connection ends), "cut" (in the middle
    of the body), "slow" (no answer until `release` is set), bytes (that body), or a callable (body -> entry).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []
        self.lock, self.release = threading.Lock(), threading.Event()
        self.bodies: list[dict] = []
        self.paths: Counter[str] = Counter()
        self.keys: list[str | None] = []
        self.now = self.peak = self.slow = self.cut_off = 0
        self.gate: threading.Barrier | None = None  # so many requests must be there at once
        self.models = ["toy"]
        self.chunks: list[dict | str] | None = None  # what a stream says, if not the reply in words
        self.pause_after = -1  # so many chunks, then a stream waits for `release`

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that leave are what some tests are about

    def reply(self, path: str, body: dict) -> dict:
        if path.endswith("/chat/completions"):
            said = body["messages"][-1]["content"]
            choices = [{"message": {"role": "assistant", "content": f"{said} {i}"}} for i in range(body["n"])]
        else:
            choices = [{"text": f"{body['prompt']} {i}"} for i in range(body["n"])]
        for index, choice in enumerate(choices):
            choice |= {"index": index, "finish_reason": "stop"}
        n = len(choices)
        usage = {"prompt_tokens": 5, "completion_tokens": 4 * n, "total_tokens": 5 + 4 * n}
        return {"object": "x", "choices": choices[::-1], "usage": usage}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.paths[self.path] += 1
        rows = [{"id": name, "object": "model"} for name in self.server.models]
        self._send(200, json.dumps({"object": "list", "data": rows}).encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.paths[self.path] += 1
            server.keys.append(self.headers.get("authorization"))
            server.now += 1
            server.peak = max(server.peak, server.now)
            entry = server.script.pop(0) if server.script else None
        try:
            if server.gate is not None:
                server.gate.wait(30)
            self._act(entry, body)
        finally:
            with server.lock:
                server.now -= 1

    def _act(self, entry, body: dict) -> None:
        if callable(entry):
            entry = entry(body)
        match entry:
            case None if body.get("stream"):
                self._stream(body)
            case None:
                self._send(200, json.dumps(self.server.reply(self.path, body)).encode())
            case int():
                self._send(entry, json.dumps({"error": {"message": f"no luck:\n {entry}"}}).encode())
            case (status, dict(content), headers):
                self._send(status, json.dumps(content).encode(), headers)
            case dict():
                self._send(200, json.dumps(entry).encode())
            case bytes():
                self._send(200, entry)
            case "drop":
                self.close_connection = True
            case "cut":
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            case "slow":
                if self._wait():
                    self._act(None, body)

    def _wait(self) -> bool:
        """Whether the client is still there when the time has come."""
        server = self.server
        with server.lock:
            server.slow += 1
        # what a client that has left looks like: its end of the connection is closed
        self.connection.settimeout(0.02)
        while not server.release.is_set():
            try:
                if self.connection.recv(1) == b"":
                    with server.lock:
                        server.cut_off += 1
                    self.close_connection = True
                    return False
            except TimeoutError:
                continue
        self.connection.settimeout(None)
        return True

    def _stream(self, body: dict) -> None:
        """Server-sent events, a word each."""
        server = self.server
        chunks = server.chunks
        if chunks is None:
            reply = server.reply(self.path, body)
            [choice] = reply["choices"]
            words = (choice["text"] if "text" in choice else choice["message"]["content"]).split(" ")
            said = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
            deltas = [{"text": w} if "text" in choice else {"delta": {"content": w}} for w in said]
            chunks = [{"choices": [{"index": 0, "finish_reason": None} | delta]} for delta in deltas]
            end = {"text": ""} if "text" in choice else {"delta": {}}
            chunks += [
                {"choices": [{"index": 0, "finish_reason": "stop"} | end]},
                {"choices": [], "usage": reply["usage"]},
            ]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, chunk in enumerate(chunks):
            if number == server.pause_after and not self._wait():
                return
            data = chunk if isinstance(chunk, str) else json.dumps(chunk)
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()
        if server.chunks is None:
            self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
