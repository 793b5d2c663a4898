"""A chat server whose every answer a test writes itself."""

import json
import queue
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nemojax

PAGE = Path(nemojax.__file__).parent / "serve" / "page.html"
MODEL = "runs/quickstart/rl"
WAIT = 30  # seconds until a test gives up


class Exchange:
    """One request to the stub, and the pen to answer it with."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]):
        self.handler, self.body, self.headers = handler, body, handler.headers

    def refuse(self, status: int, message: str, **headers: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._head(status, "application/json", headers)
        self.handler.wfile.write(json.dumps({"error": error}).encode())

    def start(self) -> "Exchange":
        self._head(200, "text/event-stream", {})
        return self

    def raw(self, data: bytes) -> None:
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def delta(self, finish: str | None = None, **delta: str) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self.event({"object": "chat.completion.chunk", "choices": [choice]})

    def event(self, value: Any) -> None:
        self.raw(f"data: {json.dumps(value)}\n\n".encode())

    def end(self, finish: str = "stop", **usage: Any) -> None:
        self.delta(finish)
        if usage:
            self.event({"object": "chat.completion.chunk", "choices": [], "usage": usage})
        self.raw(b"data: [DONE]\n\n")

    def wait_for_disconnect(self) -> bool:
        """True once the client has closed its end."""
        self.handler.connection.settimeout(WAIT)
        try:
            return self.handler.connection.recv(1) == b""
        except ConnectionResetError:
            return True

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.handler.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()


class Stub:
    """Serves the page and one model; `answers` says what happens to the next chat request."""

    def __init__(self):
        self.answers: queue.Queue[Callable[[Exchange], None]] = queue.Queue()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.needs_key: str | None = None
        self.models = [MODEL]
        self.failures: list[BaseException] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self):
                exchange = Exchange(self, {})
                if self.path == "/":
                    exchange._head(200, "text/html; charset=utf-8", {})
                    self.wfile.write(PAGE.read_bytes())
                elif self.path != "/v1/models":
                    stub.failures.append(AssertionError(f"the page asked for {self.path}"))
                    self.send_error(404)
                elif stub.needs_key and self.headers.get("Authorization") != f"Bearer {stub.needs_key}":
                    exchange.refuse(401, "Incorrect API key provided.")
                else:
                    exchange._head(200, "application/json", {})
                    models = [{"id": name, "object": "model"} for name in stub.models]
                    self.wfile.write(json.dumps({"object": "list", "data": models}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.keys.append(self.headers.get("Authorization"))
                try:
                    stub.answers.get(timeout=WAIT)(Exchange(self, body))
                except BaseException as error:  # kept for the test: this thread has nobody to tell
                    stub.failures.append(error)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        assert not self.failures, self.failures


def say(text: str) -> Callable[[Exchange], None]:
    def answer(to: Exchange) -> None:
        to.start().delta(content=text)
        to.end(prompt_tokens=5, completion_tokens=3, total_tokens=8)

    return answer
