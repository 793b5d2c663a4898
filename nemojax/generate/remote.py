"""A `Generator` that asks an OpenAI-compatible server: vLLM, a fleet of them behind one address, our own.

Requests run in an event loop in a thread of its own, so that it can be called from anywhere, a running
event loop included. What may pass is asked again (Brooker, "Exponential Backoff And Jitter", 2015: full
jitter); what a server refuses is said at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nemojax.config import field
from nemojax.generate.local import Piece
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.wire import CHAT, ChunkReader, Json, make_body, parse_answers, path_of, total_tokens

if TYPE_CHECKING:
    import httpx2

_RETRIED = (408, 409, 429)  # and all of 5xx
_MAX_RETRY_AFTER = 600.0  # s; a server that wants longer is asked again then
_BURST = 1.0  # s; requests of so long may go out together
_CHARACTERS_A_TOKEN = 4  # a guess, corrected by what the answer says
_SHOWN = 300  # characters of a server's message


@dataclass(frozen=True)
class RemoteConfig:
    """A server, and how hard to press it. The key itself never stands in a configuration."""

    base_url: str = field("", "address up to and with /v1")
    model: str = field("", "the model's name there; empty: the only one that it serves")
    api_key_env: str = field("", "environment variable that holds the key; empty: no key")
    max_concurrency: int = field(32, "requests under way at a time")
    requests_per_minute: float = field(0.0, "requests sent a minute at most; 0: no limit")
    tokens_per_minute: float = field(0.0, "tokens a minute at most, read and written; 0: no limit")
    timeout: float = field(600.0, "s for one answer")
    connect_timeout: float = field(10.0, "s for a connection")
    max_retries: int = field(6, "tries after the first, where another may succeed")
    backoff: float = field(0.5, "s; before try k it waits a random part of backoff * 2**k")
    max_backoff: float = field(60.0, "s that this part is of at most")
    tokens: bool = field(False, "ask for token ids, as vLLM gives them, and log-probabilities")

    def __post_init__(self):
        for name in ("timeout", "connect_timeout", "max_backoff"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number of seconds, got {getattr(self, name)}")
        for name in ("requests_per_minute", "tokens_per_minute", "max_retries", "backoff"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.max_concurrency < 1:
            raise ValueError(f"max_concurrency: expected 1 or more, got {self.max_concurrency}")


class Pace:
    """A token bucket that holds a second's worth: so and so much a minute, or no limit."""

    def __init__(self, per_minute: float):
        self._seconds = 60 / per_minute if per_minute else 0.0  # for one
        self._free = float("-inf")  # when what was taken is paid off

    def take(self, now: float, amount: float = 1.0) -> float:
        """Takes `amount` and says how long to wait (s) before using it; later takers wait behind."""
        self._free = max(self._free, now - _BURST)
        wait = max(0.0, self._free - now)
        self._free += amount * self._seconds
        return wait

    def correct(self, amount: float) -> None:
        """It cost so much more than what was taken (less, if negative)."""
        self._free += amount * self._seconds

    def hold(self, until: float) -> None:
        """Nobody goes before `until`."""
        self._free = max(self._free, until)


class RemoteGenerator:
    """Answers by a server's /chat/completions (messages) and /completions (text, ids).

    Answers of one request share an HTTP request; a server that gives fewer is asked for the rest. A request
    that fails for good ends the call: ValueError where the server refuses it or what it says is no answer,
    OSError where the server cannot be reached or keeps failing, in both with address, status and message.
    Threads may share it; concurrency and rates are limited over all of them. `close` it, or use it in a
    `with`; the interpreter's end closes it too.
    """

    def __init__(self, cfg: RemoteConfig):
        self.cfg = cfg
        self.base_url = _check_url(cfg.base_url)
        self._headers = _headers(cfg)
        self._requests, self._tokens = Pace(cfg.requests_per_minute), Pace(cfg.tokens_per_minute)
        self._random = random.Random()
        self._model = cfg.model
        self._start = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> RemoteGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way. A later call starts anew."""
        with self._start:
            if self._loop is not None:
                self._finalizer()
                self._loop = None

    def answer(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The `n` answers of each request, in order."""
        found = dict(self.stream(requests))
        return [found[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, list[Answer]], None, None]:
        """(index, its answers) as they complete; closing the iterator cancels what is under way."""
        yield from self._running(lambda put: self._work(requests, put))

    def pieces(self, request: Request) -> Generator[Piece | Answer, None, None]:
        """The text of one answer as it is written, and last the answer; closing the iterator cancels it.

        It is asked again only as long as nothing of it has come.
        """
        yield from self._running(lambda put: self._talk(request, put))

    def model(self) -> str:
        """The name of the model that is asked for."""
        [name] = self._running(self._put_model)
        return name

    # In the caller's thread.

    def _running(self, work: Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]) -> Iterator[Any]:
        """What `work`, in the loop, hands to its `put`, until it is done; then its error, if there is one."""
        out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        done = object()
        task: asyncio.Task[None] | None = None

        def begin(loop: asyncio.AbstractEventLoop) -> None:
            nonlocal task
            task = loop.create_task(work(out.put))
            task.add_done_callback(lambda _: out.put(done))

        def cancel() -> None:
            if task is not None:
                task.cancel()

        loop = self._started(begin)
        item = None
        try:
            while (item := out.get()) is not done:
                yield item
        finally:
            if item is not done:
                with contextlib.suppress(RuntimeError):  # closed meanwhile: then all is cancelled
                    loop.call_soon_threadsafe(cancel)
                while out.get() is not done:
                    pass
        assert task is not None
        if task.cancelled():
            raise OSError(f"{self.base_url}: closed while requests were under way")
        if (error := task.exception()) is not None:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error

    def _started(self, begin: Callable[[asyncio.AbstractEventLoop], None]) -> asyncio.AbstractEventLoop:
        """The loop, which will call `begin`."""
        import httpx2

        cfg = self.cfg
        with self._start:  # so that nothing begins in a loop that is being closed
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._slots = asyncio.Semaphore(cfg.max_concurrency)
                self._client = httpx2.AsyncClient(
                    headers=self._headers,
                    timeout=httpx2.Timeout(cfg.timeout, connect=cfg.connect_timeout, pool=None),
                    limits=httpx2.Limits(max_connections=cfg.max_concurrency),
                )
                thread = threading.Thread(target=_run, args=(self._loop,), name="remote", daemon=True)
                thread.start()
                self._finalizer = weakref.finalize(self, _stop, self._loop, thread, self._client)
            self._loop.call_soon_threadsafe(begin, self._loop)
            return self._loop

    # In the loop's thread.

    async def _work(self, requests: Sequence[Request], put: Callable[[Any], None]) -> None:
        """`max_concurrency` workers, so that a million requests are no million tasks."""
        pending = iter(enumerate(requests))

        async def worker() -> None:
            for index, request in pending:
                put((index, await self._answers(request, f"request {index}")))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.cfg.max_concurrency, len(requests))):
                group.create_task(worker())

    async def _answers(self, request: Request, name: str) -> list[Answer]:
        url = f"{self.base_url}/{path_of(request)}"
        answers: list[Answer] = []
        while len(answers) < request.n:
            left = request.n - len(answers)
            body = await self._body(request, name, left, len(answers))
            size = _prompt_size(request) + left * request.sampling.max_new_tokens
            data = await self._ask("POST", url, name, body, size)
            top = request.top_logprobs
            answers += parse_answers(data, path_of(request) == CHAT, f"{url}: {name}", top)[:left]
        return answers

    async def _body(self, request: Request, name: str, n: int, taken: int = 0) -> Json:
        model = await self._name()
        try:
            return make_body(request, model, n, taken, self.cfg.tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    async def _talk(self, request: Request, put: Callable[[Any], None]) -> None:
        url = f"{self.base_url}/{path_of(request)}"
        chunks: ChunkReader | None = None
        body = await self._body(request, "request", 1)
        body |= {"stream": True, "stream_options": {"include_usage": True}}

        async def read(response: httpx2.Response) -> Json:
            nonlocal chunks
            chunks = ChunkReader(path_of(request) == CHAT, f"{url}: request")
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    for piece in chunks.feed(_json(data.encode())):
                        put(piece)
            return chunks.usage

        size = _prompt_size(request) + request.sampling.max_new_tokens
        await self._ask("POST", url, "request", body, size, read, lambda: chunks is not None and chunks.begun)
        assert chunks is not None
        for piece in chunks.finish():
            put(piece)

    async def _put_model(self, put: Callable[[Any], None]) -> None:
        put(await self._name())

    async def _name(self) -> str:
        """The model's name; where none is configured, that of the only one."""
        if not self._model:
            url = f"{self.base_url}/models"
            listed = await self._ask("GET", url, "model")
            rows = listed.get("data") if isinstance(listed, dict) else None
            names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            if len(names) != 1 or not isinstance(names[0], str):
                some = ", ".join(map(str, names[:8])) or "none"
                raise ValueError(f"{url}: expected one model, got {some}; say which with model")
            self._model = names[0]
        return self._model

    async def _ask(
        self,
        method: str,
        url: str,
        name: str,
        body: Json | None = None,
        size: int = 0,
        read: Callable[[httpx2.Response], Awaitable[Any]] | None = None,
        begun: Callable[[], bool] = lambda: False,
    ) -> Any:
        """What `read` makes of the answer (its JSON, if None), tried again while that may help and nothing
        of it has been passed on (`begun`)."""
        content = _encode(body, f"{url}: {name}")
        for attempt in itertools.count():
            await self._turn(size)
            try:
                data = await self._try(method, url, content, read or _whole)
            except _Failed as failed:
                self._tokens.correct(-size)
                tries = f" after {attempt + 1} tries" * (attempt > 0)
                line = f"{url}: {name}: expected an answer, got {failed.why}{tries}"
                if not failed.passes:
                    raise ValueError(f"{line}; change the request or the address") from failed
                if attempt >= self.cfg.max_retries or begun():
                    raise OSError(f"{line}; see whether the server is up, or raise max_retries") from failed
                await asyncio.sleep(self._delay(attempt, failed.retry_after))
            except ValueError as error:
                told = str(error)
                raise ValueError(told if told.startswith(url) else f"{url}: {name}: {told}") from error
            else:
                if (cost := total_tokens(data)) is not None:
                    self._tokens.correct(cost - size)
                return data

    async def _turn(self, size: int) -> None:
        """Waits until the rates allow one more request of so many tokens."""
        now = time.monotonic()
        wait = max(self._requests.take(now), self._tokens.take(now, size))
        if wait > 0:
            await asyncio.sleep(wait)

    def _delay(self, attempt: int, retry_after: float | None) -> float:
        """s before the next try. What a server asks to wait, all requests wait."""
        jitter = self._random.uniform(0, min(self.cfg.max_backoff, self.cfg.backoff * 2.0**attempt))
        if retry_after is None:
            return jitter
        self._requests.hold(time.monotonic() + retry_after)
        return retry_after + jitter

    async def _try(
        self, method: str, url: str, content: bytes | None, read: Callable[[httpx2.Response], Awaitable[Any]]
    ) -> Any:
        import httpx2

        headers = {"content-type": "application/json"} if content is not None else {}
        try:
            async with (
                self._slots,
                asyncio.timeout(self.cfg.timeout),
                self._client.stream(method, url, content=content, headers=headers) as response,
            ):
                if response.is_success:
                    return await read(response)
                code, told = response.status_code, response.headers.get("retry-after")
                message = _message(await response.aread())
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _Failed(f"none within {self.cfg.timeout:g} s", True) from error
        except httpx2.RequestError as error:
            raise _Failed(f"{type(error).__name__} {error}".strip(), True) from error
        raise _Failed(f"status {code}{message}", code in _RETRIED or code >= 500, _seconds(told))


class _Failed(Exception):
    """Why a try came to nothing, whether another may succeed, and how long the server asks to wait (s)."""

    def __init__(self, why: str, passes: bool, retry_after: float | None = None):
        super().__init__(why)
        self.why, self.passes, self.retry_after = why, passes, retry_after


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx2.AsyncClient) -> None:
    async def end() -> None:
        try:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.aclose()
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    if threading.current_thread() is not thread:  # the garbage collector may come by in any
        thread.join()


async def _whole(response: httpx2.Response) -> Any:
    return _json(await response.aread())


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"expected JSON, got {_shown(text)!r}; check the address") from None


def _encode(body: Json | None, where: str) -> bytes | None:
    try:
        return None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # a lone surrogate, NaN, an object of Python's
        raise ValueError(f"{where}: expected Unicode text and JSON values ({error}); repair it") from error


def _message(body: bytes) -> str:
    """A server's words about an error, in a few characters."""
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    while isinstance(data, dict):
        data = next((data[key] for key in ("error", "message", "detail") if key in data), None)
    text = _shown(body) if data is None else _shown(str(data).encode())
    return f" ({text})" if text else ""


def _shown(text: bytes) -> str:
    shown = " ".join(text.decode(errors="replace").split())
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _seconds(told: str | None) -> float | None:
    """A Retry-After header: seconds, or a date (RFC 9110, section 10.2.3); None for anything else."""
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER) if math.isfinite(seconds) else None


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url: expected an address such as http://127.0.0.1:8000/v1, got {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("base_url: expected scheme, host, port and path alone; name a key with api_key_env")
    return url.rstrip("/")


def _headers(cfg: RemoteConfig) -> dict[str, str]:
    if not cfg.api_key_env:
        return {}
    key = os.environ.get(cfg.api_key_env, "").strip()
    if not key or not key.isascii():
        raise ValueError(f"api_key_env: expected a key in ${cfg.api_key_env}, got none; export it first")
    return {"authorization": f"Bearer {key}"}


def _prompt_size(request: Request) -> int:
    """About how many tokens a prompt has."""
    if request.tokens is not None:
        return len(request.tokens)
    texts = [request.prompt] if request.messages is None else [m.get("content") for m in request.messages]
    return sum(len(text) for text in texts if isinstance(text, str)) // _CHARACTERS_A_TOKEN
