"""What stands between the sockets and the routes: keys, sizes, patience, and who has hung up."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemojax.serve.errors import ApiError
from nemojax.serve.metrics import Metrics

T = TypeVar("T")
GONE = 499  # what nginx notes for a client that hung up: nobody reads it
_DRAINED = 4  # times the limit that a too large body is read and dropped, so that its sender sees why


class ClientGone(Exception):
    """The client hung up before it was answered."""


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


class Keys:
    """API keys, compared in a time that does not depend on how much of one is right."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, header: str | None) -> None:
        """ApiError 401 unless the Authorization header brings one of the keys."""
        if not self._digests:
            return
        scheme, _, key = (header or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            what = "an unknown key" if header else "none"
            raise ApiError(
                401,
                f"expected the header Authorization: Bearer KEY, got {what}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class Door:
    """ASGI middleware: checks keys on all that is not open to everyone, and counts the answers."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, is_open: Callable[[str], bool]):
        self.app, self.keys, self.metrics, self.is_open = app, keys, metrics, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if not self.is_open(scope["path"]):
                self.keys.check(Request(scope).headers.get("authorization"))
            await self.app(scope, receive, noting)
        except ApiError as error:  # of the keys: those of routes have been answered inside
            await error_response(error)(scope, receive, noting)
        except asyncio.CancelledError:  # only the end of the server does that; it need not be a traceback
            if status == GONE:
                ending = ApiError(503, "shutting down", code="unavailable", headers={"Connection": "close"})
                await error_response(ending)(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, status)


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body of a request with a JSON body. ApiError: 415 for another type, 413 beyond `limit` bytes, 408
    if it is not there in time. ClientGone if it never will be."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a foreign web page can send without asking has another type
        raise ApiError(415, f"expected Content-Type application/json, got {kind[:80] or 'none'}")
    announced = request.headers.get("content-length", "")
    too_large = ApiError(
        413, f"expected a body of at most {limit} bytes, got more", headers={"Connection": "close"}
    )
    if announced.isdigit() and int(announced) > limit and "expect" in request.headers:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            more = True
            while more and size <= _DRAINED * limit:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
                if size <= limit:
                    parts.append(message.get("body", b""))
                else:
                    parts.clear()
    except TimeoutError:
        raise ApiError(
            408, f"expected the whole body within {seconds:g} s", headers={"Connection": "close"}
        ) from None
    if size > limit:
        raise too_large
    return b"".join(parts)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has hung up; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; it is cancelled, and ClientGone raised, if the client hangs up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. `close` is called at the end, also if the client hangs up before."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientGone:
            pass
        finally:  # a generator that was never begun does not clean up
            self._close()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                data = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def make_protocol(seconds: float) -> type[H11Protocol]:
    """Uvicorn's HTTP, with an end to heads that do not come and to answers that nobody takes, and our words
    for what is no HTTP."""

    class PatientProtocol(H11Protocol):
        _timers: dict[str, asyncio.TimerHandle]

        def connection_made(self, transport: Any) -> None:
            self._timers = {}
            super().connection_made(transport)
            self._expect("head", self.transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # uvicorn's own time between requests ends with the first byte of the next one
            if self.cycle is None or self.cycle.response_complete:
                self._expect("head", self.transport.close)
            else:
                self._came("head")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect("room", self.transport.abort)  # to close would wait for what nobody reads

        def resume_writing(self) -> None:
            self._came("room")
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            for what in list(self._timers):
                self._came(what)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
            self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{head}\r\n\r\n".encode() + body)
            self.transport.close()

        def _expect(self, what: str, otherwise: Callable[[], None]) -> None:
            if what not in self._timers and not self.transport.is_closing():
                self._timers[what] = self.loop.call_later(seconds, otherwise)

        def _came(self, what: str) -> None:
            timer = self._timers.pop(what, None)
            if timer is not None:
                timer.cancel()

    return PatientProtocol
