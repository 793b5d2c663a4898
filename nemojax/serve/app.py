"""The routes, and the schema that describes them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nemojax import __version__
from nemojax.serve import replies
from nemojax.serve.answer import ChatWriter, TextWriter, Writer
from nemojax.serve.errors import ApiError
from nemojax.serve.gate import (
    GONE,
    ClientGone,
    Door,
    EventStream,
    Keys,
    error_response,
    read_body,
    while_connected,
)
from nemojax.serve.metrics import Metrics
from nemojax.serve.parse import parse
from nemojax.serve.schema import ChatRequest, CompletionRequest, ScoreRequest
from nemojax.serve.service import Service

TITLE = "nemojax serve"
_OPEN = ("/", "/health", "/openapi.json")  # what needs no key
_BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, ScoreRequest)
_SAID = {  # what each status means, for the schema
    400: "A request that cannot be answered as it is",
    401: "No key, or an unknown one",
    404: "No such model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full: try again after Retry-After",
    500: "The server's fault",
    503: "Shutting down, or broken",
}


def make_app(service: Service, keys: Keys) -> FastAPI:
    """The application that answers for `service`."""

    # FastAPI's pages about the schema load scripts from elsewhere
    app = FastAPI(title=TITLE, version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Door, keys=keys, metrics=service.metrics, is_open=lambda path: path in _OPEN)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_exception_handler(Exception, _answer_fault)
    _add_models(app, service)
    _add_completions(app, service)
    _add_scores(app, service)
    _add_state(app, service)
    schema = _schema(app, service.name, bool(keys))
    app.openapi = lambda: schema
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    card = replies.ModelCard(
        id=service.name,
        object="model",
        created=service.created,
        owned_by="nemojax",
        max_model_len=service.context,
    )

    @app.get("/v1/models", response_model=replies.ModelList, responses=_errors(401))
    async def models() -> Response:
        return _json(replies.ModelList(object="list", data=[card]))

    # a name may have slashes in it
    @app.get("/v1/models/{name:path}", response_model=replies.ModelCard, responses=_errors(401, 404))
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(card)


def _add_completions(app: FastAPI, service: Service) -> None:
    tokenizer = service.model.tokenizer

    @app.post("/v1/chat/completions", **_posted(ChatRequest, replies.ChatCompletion, replies.ChatChunk))
    async def chat(request: Request) -> Response:
        body = parse(ChatRequest, await _body(request, service))

        async def start() -> Writer:
            run = await service.start([service.chat(body)], bool(body.ignore_eos))
            return ChatWriter(run, body, tokenizer)

        return await _answer(request, start, bool(body.stream))

    @app.post("/v1/completions", **_posted(CompletionRequest, replies.Completion, replies.Completion))
    async def completions(request: Request) -> Response:
        body = parse(CompletionRequest, await _body(request, service))

        async def start() -> Writer:
            run = await service.start(service.completions(body), bool(body.ignore_eos))
            return TextWriter(run, body, tokenizer)

        return await _answer(request, start, bool(body.stream))


async def _answer(request: Request, start: Callable[[], Awaitable[Writer]], streams: bool) -> Response:
    if streams:

        async def begin() -> EventStream:
            writer = await start()
            return EventStream(await writer.stream(), writer.run.close)

        return await while_connected(request.receive, begin())

    async def finish() -> replies.Reply:
        return await (await start()).whole()

    return _json(await while_connected(request.receive, finish()))


def _add_scores(app: FastAPI, service: Service) -> None:
    @app.post("/v1/score", **_posted(ScoreRequest, replies.ScoreList))
    async def score(request: Request) -> Response:
        body = parse(ScoreRequest, await _body(request, service))
        rewards, tokens = await while_connected(request.receive, service.scores(body))
        return _json(
            replies.ScoreList(
                id=f"score-{secrets.token_hex(12)}",
                object="list",
                created=int(time.time()),
                model=service.name,
                data=[replies.Score(index=i, object="score", score=r) for i, r in enumerate(rewards)],
                usage=replies.ScoreUsage(prompt_tokens=tokens, total_tokens=tokens, completion_tokens=0),
            )
        )


def _add_state(app: FastAPI, service: Service) -> None:
    page = resources.files("nemojax.serve").joinpath("page.html")

    @app.get("/health", response_model=replies.Health, responses=_errors(503))
    async def health() -> Response:
        if service.worker.dead or service.worker.draining:
            why = service.worker.dead or "shutting down"
            raise ApiError(503, why, code="unavailable", headers={"Connection": "close"})
        return _json(replies.Health(status="ok"))

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text | _errors(401))
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": Metrics.CONTENT_TYPE})

    @app.get("/", response_class=HTMLResponse)
    async def chat_page() -> Response:
        return HTMLResponse(page.read_bytes(), headers={"Cache-Control": "no-cache"})


async def _body(request: Request, service: Service) -> bytes:
    limits = service.cfg.limits
    return await read_body(request, limits.body, limits.io_seconds)


def _json(reply: replies.Reply) -> Response:
    return Response(reply.json_text(), media_type="application/json")


async def _answer_api_error(request: Request, error: Any) -> Response:
    return error_response(error)


async def _answer_http_error(request: Request, error: Any) -> Response:
    """What Starlette refuses: unknown addresses and methods."""
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _answer_nobody(request: Request, error: Any) -> Response:
    return Response(status_code=GONE)


async def _answer_fault(request: Request, error: Any) -> Response:
    """Ours; the log has the traceback."""
    message = "the server failed to answer this; its log says why"
    return error_response(ApiError(500, message, code="internal_error"))


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {s: {"model": replies.Error, "description": _SAID[s]} for s in statuses}


def _posted(
    body: type[BaseModel], whole: type[replies.Reply], chunk: type[replies.Reply] | None = None
) -> dict[str, Any]:
    """The part of a route's schema that FastAPI cannot see, because bodies are read and checked here."""
    name = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"requestBody": {"required": True, "content": {"application/json": {"schema": name}}}}
    ok: dict[int | str, dict[str, Any]] = {}
    if chunk is not None:
        about = f"with stream: each a {chunk.__name__} as JSON, the last one [DONE]"
        event = {"type": "object", "properties": {"data": {"type": "string", "description": about}}}
        ok = {200: {"content": {"text/event-stream": {"schema": event}}}}
    return {
        "response_model": whole,
        "openapi_extra": content,
        "responses": ok | _errors(400, 401, 404, 408, 413, 415, 429, 500, 503),
    }


def _schema(app: FastAPI, name: str, locked: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema(
        [(body, "validation") for body in (*_BODIES, replies.ChatChunk)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = schema["components"]["schemas"]
    schemas.update(bodies.get("$defs", {}))
    for body in _BODIES:
        schemas[body.__name__]["properties"]["model"] = {"enum": [name]}
    if locked:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # we answer 400
            if locked and path not in _OPEN:
                operation["security"] = [{"key": []}]
    return schema
