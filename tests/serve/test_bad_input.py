"""What clients should not send: the OpenAI error shape with the right status, and the server goes on."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from tests.serve.live import CHAT, CONTEXT, PATIENCE, Live

MODEL = "tiny/model"
ASK = {"model": MODEL, "messages": CHAT, "max_tokens": 4}
TEXT = {"model": MODEL, "prompt": "one", "max_tokens": 4}
LONG = {**ASK, "max_tokens": 900, "ignore_eos": True}
CHATS, TEXTS, SCORES = "/v1/chat/completions", "/v1/completions", "/v1/score"
NESTED = b'{"items": ' * 500 + b"{}" + b"}" * 500
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}


def tool(**function) -> dict:
    return {"type": "function", "function": {"name": "f", **function}}


BODIES = {
    "no JSON": (CHATS, b"{nope", 400, None),
    "empty": (CHATS, b"", 400, None),
    "not an object": (CHATS, b"[]", 400, None),
    "invalid UTF-8": (CHATS, json.dumps(ASK).encode().replace(b"two", b"\xff\xfe"), 400, None),
    "lone surrogate": (CHATS, json.dumps(ASK).encode().replace(b"two", b"\\ud800"), 400, None),
    "lone surrogate in a key": (CHATS, b'{"\\udc00": 1}', 400, None),
    "NaN": (CHATS, json.dumps(ASK | {"temperature": float("nan")}).encode(), 400, "temperature"),
    "infinite": (CHATS, json.dumps(ASK | {"top_p": float("inf")}).encode(), 400, "top_p"),
    "NaN in a schema": (
        CHATS,
        json.dumps(ASK | {"tools": [tool(parameters={"x": float("nan")})]}).encode(),
        400,
        "tools.0.function.parameters",
    ),
    "deeply nested": (CHATS, b"[" * 100_000, 400, None),
    "no model": (CHATS, {"messages": CHAT}, 400, "model"),
    "unknown model": (CHATS, ASK | {"model": "gpt"}, 404, "model"),
    "no messages": (CHATS, ASK | {"messages": []}, 400, "messages"),
    "messages of another type": (CHATS, ASK | {"messages": "hello"}, 400, "messages"),
    "unknown role": (CHATS, ASK | {"messages": [{"role": "me", "content": "x"}]}, 400, "messages.0"),
    "content of another type": (
        CHATS,
        ASK | {"messages": [{"role": "user", "content": 5}]},
        400,
        "messages.0.content",
    ),
    "a picture": (
        CHATS,
        ASK | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content.0.type",
    ),
    "system text in the middle": (
        CHATS,
        ASK | {"messages": [*CHAT, {"role": "system", "content": "x"}]},
        400,
        "messages",
    ),
    "a result without a call": (
        CHATS,
        ASK | {"messages": [*CHAT, {"role": "tool", "content": "x", "tool_call_id": "1"}]},
        400,
        "messages",
    ),
    "an empty turn": (CHATS, ASK | {"messages": [*CHAT, {"role": "assistant"}]}, 400, "messages.1"),
    "too long": (CHATS, ASK | {"messages": [{"role": "user", "content": "x " * CONTEXT}]}, 400, "prompt"),
    "n = 0": (CHATS, ASK | {"n": 0}, 400, "n"),
    "n too large": (CHATS, ASK | {"n": 9}, 400, "n"),
    "n huge": (CHATS, ASK | {"n": 10**30}, 400, "n"),
    "n true": (CHATS, ASK | {"n": True}, 400, "n"),
    "negative temperature": (CHATS, ASK | {"temperature": -0.1}, 400, "temperature"),
    "temperature as text": (CHATS, ASK | {"temperature": "hot"}, 400, "temperature"),
    "top_p 0": (CHATS, ASK | {"top_p": 0}, 400, "top_p"),
    "top_k -2": (CHATS, ASK | {"top_k": -2}, 400, "top_k"),
    "10,000 stop strings": (CHATS, ASK | {"stop": [f"s{i}" for i in range(10_000)]}, 400, "stop"),
    "an empty stop": (CHATS, ASK | {"stop": ""}, 400, "stop"),
    "stop of numbers": (CHATS, ASK | {"stop": ["a", 5]}, 400, "stop.1"),
    "max_tokens 0": (CHATS, ASK | {"max_tokens": 0}, 400, "max_tokens"),
    "max_tokens too large": (CHATS, ASK | {"max_tokens": 901}, 400, "max_tokens"),
    "two limits": (CHATS, ASK | {"max_completion_tokens": 5}, 400, "max_tokens"),
    "seed too large": (CHATS, ASK | {"seed": 2**63}, 400, "seed"),
    "top_logprobs alone": (CHATS, ASK | {"top_logprobs": 3}, 400, "top_logprobs"),
    "21 top_logprobs": (CHATS, ASK | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "stream_options alone": (CHATS, ASK | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "misspelt": (CHATS, ASK | {"max_token": 3}, 400, "max_token"),
    "a penalty": (CHATS, ASK | {"presence_penalty": 1}, 400, "presence_penalty"),
    "logit_bias": (CHATS, ASK | {"logit_bias": {"5": 1}}, 400, "logit_bias"),
    "functions": (CHATS, ASK | {"functions": [{"name": "f"}]}, 400, "functions"),
    "audio": (CHATS, ASK | {"modalities": ["audio"]}, 400, "modalities"),
    "required without tools": (CHATS, ASK | {"tool_choice": "required"}, 400, "tool_choice"),
    "a tool that is not there": (
        CHATS,
        ASK | {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        400,
        "tool_choice",
    ),
    "a tool twice": (CHATS, ASK | {"tools": [tool(), tool()]}, 400, "tools"),
    "a tool's name": (CHATS, ASK | {"tools": [tool(name="a b")]}, 400, "tools.0.function.name"),
    "no schema": (
        CHATS,
        ASK | {"response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
    ),
    "a schema of nothing": (
        CHATS,
        ASK | {"response_format": SCHEMA | {"json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
        400,
        "json_schema",
    ),
    "a schema far away": (
        CHATS,
        ASK
        | {
            "response_format": SCHEMA
            | {"json_schema": {"name": "a", "schema": {"$ref": "http://127.0.0.1:1/"}}}
        },
        400,
        "json_schema",
    ),
    "a schema that nothing fits": (
        CHATS,
        ASK | {"response_format": SCHEMA | {"json_schema": {"name": "a", "schema": {"enum": []}}}},
        400,
        "json_schema",
    ),
    "a deep schema": (
        CHATS,
        json.dumps(ASK | {"response_format": SCHEMA})
        .encode()
        .replace(b'"schema": {}', b'"schema": ' + NESTED),
        400,
        None,
    ),
    "a schema and a call": (
        CHATS,
        ASK | {"response_format": {"type": "json_object"}, "tools": [tool()], "tool_choice": "required"},
        400,
        "json_schema",
    ),
    "no end": (
        CHATS,
        ASK | {"response_format": {"type": "json_object"}, "ignore_eos": True},
        400,
        "ignore_eos",
    ),
    "a negative budget": (CHATS, ASK | {"thinking_budget": -1}, 400, "thinking_budget"),
    "two toggles": (
        CHATS,
        ASK | {"thinking": True, "chat_template_kwargs": {"thinking": False}},
        400,
        "thinking",
    ),
    "a switch": (CHATS, ASK | {"chat_template_kwargs": {"custom": 1}}, 400, "chat_template_kwargs.custom"),
    "no prompt": (TEXTS, {"model": MODEL}, 400, "prompt"),
    "an empty list": (TEXTS, TEXT | {"prompt": []}, 400, "prompt"),
    "an empty prompt of ids": (TEXTS, TEXT | {"prompt": [[1], []]}, 400, "prompt.1"),
    "text and ids": (TEXTS, TEXT | {"prompt": [1, "a"]}, 400, None),
    "an unknown id": (TEXTS, TEXT | {"prompt": [1, 300]}, 400, "prompt"),
    "a negative id": (TEXTS, TEXT | {"prompt": [-1]}, 400, "prompt.0"),
    "too many prompts": (TEXTS, TEXT | {"prompt": ["a"] * 65}, 400, "prompt"),
    "more than the queue": (TEXTS, TEXT | {"prompt": ["a"] * 33}, 400, None),
    "too many ids": (TEXTS, TEXT | {"prompt": [1] * CONTEXT}, 400, "prompt"),
    "echo": (TEXTS, TEXT | {"echo": True}, 400, "echo"),
    "suffix": (TEXTS, TEXT | {"suffix": "x"}, 400, "suffix"),
    "best_of": (TEXTS, TEXT | {"best_of": 2}, 400, "best_of"),
    "messages of a completion": (TEXTS, TEXT | {"messages": CHAT}, 400, "messages"),
    "half a pair": (SCORES, {"model": MODEL, "text_1": "a"}, 400, None),
    "pairs that do not match": (SCORES, {"model": MODEL, "text_1": ["a", "b"], "text_2": "c"}, 400, "text_1"),
    "two forms": (SCORES, {"model": MODEL, "text_1": "a", "text_2": "b", "messages": CHAT}, 400, None),
    "a long conversation": (SCORES, {"model": MODEL, "text_1": "a " * CONTEXT, "text_2": "b"}, 400, None),
}


def check_shape(answer, status: int, param: str | None = None) -> str:
    got, body, _ = answer
    assert got == status, body
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message and "\n" not in message and len(message) < 400
    assert body["error"]["param"] == param or param is None, body
    return message


@pytest.mark.parametrize("name", BODIES)
def test_a_body(server, name):
    path, body, status, param = BODIES[name]
    check_shape(server.request(path, body), status, param)
    if isinstance(body, dict) and path != SCORES:
        check_shape(
            server.request(path, body | {"stream": True} if name != "stream_options alone" else body),
            status,
            param,
        )


def test_what_asks_for_nothing_is_no_error(server):
    """Fields that clients send at their defaults, or that cannot change an answer."""
    harmless = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "modalities": ["text"],
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "stop": None,
        "tools": [],
        "seed": -1,
        "top_k": -1,
        "response_format": {"type": "text"},
        "service_tier": "auto",
    }
    assert server.request(CHATS, ASK | harmless)[0] == 200
    assert server.request(TEXTS, TEXT | {"echo": False, "best_of": 1, "suffix": None, "prompt": ""})[0] == 200


def test_extreme_sampling(server):
    for extreme in (
        {"temperature": 1e-300},
        {"temperature": 1e-40, "top_p": 1e-300},
        {"min_p": 0.999999, "top_k": 2**31 - 1},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 100, "temperature": 2},
        {"thinking": True, "thinking_budget": 0},
        {"stop": ["x" * 50_000]},
    ):
        status, body, _ = server.request(CHATS, ASK | extreme | {"logprobs": True})
        assert status == 200 and body["usage"]["completion_tokens"] <= 4, (extreme, body)
        assert all(entry["logprob"] <= 0 for entry in body["choices"][0]["logprobs"]["content"]), extreme


def test_addresses_methods_and_types(server):
    check_shape(server.request("/v1/nothing"), 404)
    check_shape(server.request("/docs"), 404)
    answer = server.request("/v1/models", method="DELETE")
    check_shape(answer, 405)
    assert answer[2]["Allow"] == "GET"
    check_shape(server.request(CHATS), 405)
    for kind in ("text/plain", "multipart/form-data", ""):
        check_shape(server.request(CHATS, ASK, {"Content-Type": kind}), 415)
    assert server.request(CHATS, ASK, {"Content-Type": "application/json; charset=utf-8"})[0] == 200


def raw(server: Live, data: bytes) -> bytes:
    """What comes back until the server hangs up."""
    with server.connect() as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def head(length: int | None, *more: str, path: str = CHATS) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close", *more]
    lines += ["Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_giant_bodies(server):
    """Announced or in chunks; whoever asks first is told before sending anything."""
    check_shape(server.request(CHATS, b'"' + b"x" * 400_000 + b'"'), 413)
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert raw(server, head(None) + chunk * 5 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    polite = raw(server, head(10**12, "Expect: 100-continue"))
    assert polite.startswith(b"HTTP/1.1 413 ") and b'"invalid_request_error"' in polite
    # one that never ends is cut off
    endless = raw_endless(server, head(None), chunk)
    assert endless is None or endless.startswith(b"HTTP/1.1 413 ")
    body = json.dumps(ASK).encode()
    in_chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7)
    )
    assert raw(server, head(None) + in_chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def raw_endless(server: Live, start: bytes, chunk: bytes) -> bytes | None:
    """Sends chunks until the server has had enough; what it said, if that was not lost with it."""
    with server.connect() as connection:
        connection.sendall(start)
        try:
            for _ in range(10_000):
                connection.sendall(chunk)
        except OSError:
            pass
        else:
            pytest.fail("the server took a body of 600 MB")
        try:
            return connection.recv(65536)
        except OSError:
            return None


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", b""),
        (b"POST /v1/chat/com", b""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow", b""),
        (head(500), b"HTTP/1.1 408 "),
        (head(500) + b'{"model": ', b"HTTP/1.1 408 "),
        (head(None) + b"5\r\n{", b"HTTP/1.1 408 "),
        (b"no HTTP at all\r\n\r\n", b"HTTP/1.1 400 "),
        (head(-5), b"HTTP/1.1 400 "),
    ],
    ids=[
        "silence",
        "half a line",
        "half a head",
        "no body",
        "half a body",
        "half a chunk",
        "no HTTP",
        "length",
    ],
)
def test_half_open_connections_end(server, sent, said):
    """The client waits, and the server hangs up."""
    answer = raw(server, sent)
    assert answer.startswith(said) and bool(answer) == bool(said)
    if said:
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert body["error"].keys() == {"message", "type", "param", "code"}


def test_a_head_that_trickles_in_ends_too(server):
    """Each byte in time, the whole never."""
    with server.connect() as connection:
        connection.settimeout(0.2)
        data = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Slow: 1\r\n" * 1000
        deadline = time.monotonic() + PATIENCE
        for byte in data:
            assert time.monotonic() < deadline, "it still listens"
            try:
                connection.sendall(bytes([byte]))
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(server, streams):
    before = server.metrics()["sequences_total"]
    body = json.dumps(LONG | {"stream": streams, "n": 3}).encode()
    with server.connect() as connection:
        connection.sendall(head(len(body)) + body)
        server.wait_until(sequences_running=3)
        if streams:
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
    server.wait_until(sequences_running=0, sequences_waiting=0)
    assert server.metrics()["sequences_total"] == before  # none of them came to its end


def test_a_client_that_hangs_up_in_the_queue(server):
    before = server.metrics()["sequences_total"]
    body = json.dumps(LONG | {"n": 8}).encode()
    with server.connect() as first, server.connect() as second:
        for connection in (first, second):
            connection.sendall(head(len(body)) + body)
        server.wait_until(sequences_running=8, sequences_waiting=8)
        second.close()
        server.wait_until(sequences_running=0, sequences_waiting=0)
        assert first.recv(20).startswith(b"HTTP/1.1 200")
    assert server.metrics()["sequences_total"] == before + 8


@pytest.mark.parametrize("streams", [True, False])
def test_a_reader_that_stops_reading_is_let_go(server, streams):
    """Its window is full, and it does not hang up: the connection ends, others are served."""
    body = json.dumps({**LONG, "stream": streams, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head(len(body)) + body)
        server.wait_until(sequences_running=8)
        assert server.holds(connection) and server.request(CHATS, ASK)[0] == 200
        deadline = time.monotonic() + PATIENCE
        while server.holds(connection):
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.05)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
        assert parts[0].startswith(b"HTTP/1.1 200") and not parts[-1].endswith((b"}", b"0\r\n\r\n"))


def test_500_clients_at_once(server):
    """Those who find room are answered, the others are told when to try again."""

    async def one(number: int) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps(ASK | {"seed": number, "max_tokens": 8}).encode()
        writer.write(head(len(body)) + body)
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        top, _, rest = answer.partition(b"\r\n\r\n")
        return top, rest

    async def all_of_them():
        return await asyncio.gather(*(one(number) for number in range(500)))

    refused = served = 0
    for top, rest in asyncio.run(all_of_them()):
        body = json.loads(rest)
        if top.startswith(b"HTTP/1.1 200 "):
            served += 1
            assert body["choices"][0]["finish_reason"] in ("stop", "length")
        else:
            refused += 1
            assert top.startswith(b"HTTP/1.1 429 ") and b"retry-after: " in top.lower()
            assert body["error"]["code"] == "queue_full" and body["error"]["type"] == "rate_limit_error"
    assert served >= 32 and served + refused == 500 and refused


def test_the_health_is_told_under_load(server):
    """Asked from another thread while every slot is busy."""
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            server.request(CHATS, LONG | {"n": 8})

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        server.wait_until(sequences_running=8)
        for _ in range(5):
            assert server.request("/health")[0] == 200
    finally:
        done.set()
        for thread in threads:
            thread.join()
