"""One model being served: requests in OpenAI's words -> ours -> jobs -> answers as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nemojax.data.chat import plain_messages, render
from nemojax.generate.jobs import Job
from nemojax.generate.local import AnswerStream, Model, Piece, make_jobs
from nemojax.generate.protocol import FinishReason, Request
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.score import check_sequences, score
from nemojax.serve.config import ServeConfig
from nemojax.serve.errors import ApiError, too_busy
from nemojax.serve.metrics import Metrics
from nemojax.serve.replies import CompletionDetails, PromptDetails, Usage
from nemojax.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Message,
    PlainFormat,
    Sampling,
    SchemaFormat,
    ScoreRequest,
)
from nemojax.serve.worker import Overloaded, Stopped, Stream, Worker

_TOO_LONG = re.compile(r"(prompt|conversation \d+): expected (at most|fewer than) \d+ tokens")


class News(NamedTuple):
    """What is new in one of the samples: text, the same in pieces, tokens `first` to `end`, why it ended."""

    choice: int
    text: str
    pieces: list[Piece]
    first: int
    end: int
    finish: FinishReason | None


@dataclass(frozen=True, eq=False)
class Service:
    """Everything that routes need. Errors of its methods are ApiErrors."""

    name: str
    model: Model
    worker: Worker
    metrics: Metrics
    cfg: ServeConfig
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return min(self.cfg.engine.context or self.model.arch.context, self.model.arch.context)

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"model: expected {self.name!r}, got {name[:80]!r}; GET /v1/models lists what is served",
                param="model",
                code="model_not_found",
            )

    async def start(self, requests: Sequence[Request], ignore_eos: bool = False) -> Run:
        """Queues the samples of requests. ApiError 400 for what cannot be answered, 429 without room, 503."""

        def prepare() -> list[list[Job]]:
            jobs = [make_jobs(self.model, request) for request in requests]
            if not ignore_eos:
                return jobs
            if any(group[0].constraint for group in jobs):
                raise ValueError("ignore_eos: expected neither response_format nor a forced call with it")
            return [
                [dataclasses.replace(job, stop_ids=request.stop_ids) for job in group]
                for request, group in zip(requests, jobs, strict=True)
            ]

        self._check_room(sum(request.n for request in requests))
        try:
            # a long prompt takes a while to be cut into tokens, a grammar to be compiled
            jobs = await asyncio.to_thread(prepare)
            stream = self.worker.submit([job for group in jobs for job in group])
        except (ValueError, Overloaded, Stopped) as error:
            raise self.explain(error) from error
        return Run(self, requests, jobs, stream)

    def _check_room(self, num: int) -> None:
        if num > self.worker.capacity:
            raise ApiError(
                400, f"expected at most {self.worker.capacity} samples at once, got {num}; ask for less"
            )
        try:
            self.worker.check_room(num)  # before any work is done for it
        except (Overloaded, Stopped) as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> ApiError:
        """The error of the client's, or of ours, that stopped a request."""
        match error:
            case ApiError():
                return error
            case Overloaded():
                return too_busy(f"{self.worker.open} sequences run or wait, no more fit; try again later")
            case Stopped() if self.worker.draining or self.worker.dead:
                headers = {"Retry-After": "5", "Connection": "close"}
                return ApiError(503, f"{error}; try again later", code="unavailable", headers=headers)
            case ValueError():
                long = _TOO_LONG.match(str(error))
                param = str(error).partition(":")[0]
                return ApiError(
                    400,
                    str(error),
                    param=param if re.fullmatch(r"[a-z_.]+", param) else None,
                    code="context_length_exceeded" if long else None,
                )
            case _:
                return ApiError(
                    500, "the server failed to answer this; its log says why", code="internal_error"
                )

    # requests in OpenAI's words -> ours

    def chat(self, body: ChatRequest) -> Request:
        self.check_model(body.model)
        default = {"on": True, "off": False, None: None}[self.cfg.thinking]
        choice = body.tool_choice
        return Request(
            messages=tuple(message_dict(message) for message in body.messages),
            thinking=default if body.toggle is None else body.toggle,
            sampling=self._sampling(body, body.token_limit),
            **self._common(body),
            top_logprobs=body.top_logprobs or 0,
            thinking_budget=body.budget,
            json_schema=_json_schema(body),
            tools=tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
            tool_choice=(choice or "auto")
            if choice is None or isinstance(choice, str)
            else choice.model_dump(),
        )

    def completions(self, body: CompletionRequest) -> list[Request]:
        """One for each prompt; their seeds follow each other."""
        self.check_model(body.model)
        self._limit("prompt", len(body.prompts), self.cfg.limits.prompts, "prompts")
        common = self._common(body)
        sampling = self._sampling(body, body.max_tokens)
        return [
            Request(
                **({"prompt": prompt} if isinstance(prompt, str) else {"tokens": tuple(prompt)}),
                sampling=sampling,
                **common | {"seed": (common["seed"] + number) % 2**32},
                top_logprobs=body.logprobs or 0,
            )
            for number, prompt in enumerate(body.prompts)
        ]

    def _common(self, body: Sampling) -> dict[str, Any]:
        limits = self.cfg.limits
        self._limit("n", body.n or 1, limits.n)
        self._limit("stop", len(body.stops), limits.stops, "stop strings")
        self._limit("stop_token_ids", len(body.stop_token_ids or ()), limits.stops, "ids")
        return {
            "n": body.n or 1,
            "seed": secrets.randbits(32) if body.seed is None else body.seed % 2**32,
            "stop": body.stops,
            "stop_ids": tuple(body.stop_token_ids or ()),
        }

    def _sampling(self, body: Sampling, limit: int | None) -> SamplingConfig:
        own = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        own |= {"top_k": None if body.top_k is None else max(body.top_k, 0), "max_new_tokens": limit}
        self._limit("max_tokens", limit or 0, self.cfg.limits.tokens)
        return dataclasses.replace(
            self.cfg.sampling, **{name: value for name, value in own.items() if value is not None}
        )

    def _limit(self, param: str, got: int, most: int, what: str = "") -> None:
        if got > most:
            raise ApiError(
                400, f"{param}: expected at most {f'{most} {what}'.strip()}, got {got}", param=param
            )

    # scores

    async def scores(self, body: ScoreRequest) -> tuple[list[float], int]:
        """Rewards of conversations, and how many tokens were read for them."""
        self.check_model(body.model)
        self._limit(
            "text_2" if body.messages is None else "messages",
            len(body.conversations),
            self.cfg.limits.prompts,
        )
        model, token = self.model, self.cfg.reward_token

        def encode() -> list[list[int]]:
            texts = []
            for number, conversation in enumerate(body.conversations):
                given = [message_dict(message) for message in conversation]
                texts.append(render(model.tokenizer, plain_messages(given, f"conversation {number}")))
            sequences = model.tokenizer.encode_batch(texts)
            check_sequences(model.arch, sequences, token)
            return sequences

        try:
            sequences = await asyncio.to_thread(encode)
            rewards = await self.worker.call(
                lambda: score(
                    model.params, model.arch, sequences, token, compute=model.compute, mesh=model.mesh
                )
            )
        except (ValueError, Overloaded, Stopped) as error:
            raise self.explain(error) from error
        return rewards, sum(map(len, sequences))


class Run:
    """Samples under way: `news` of all of them until all are done. Whoever has one closes it."""

    def __init__(
        self, service: Service, requests: Sequence[Request], jobs: Sequence[Sequence[Job]], stream: Stream
    ):
        self._service, self._jobs, self._stream = service, jobs, stream
        self.samples = [
            AnswerStream(service.model, request, job)
            for request, group in zip(requests, jobs, strict=True)
            for job in group
        ]
        self.prompts = [job.prompt for group in jobs for job in group]

    def close(self) -> None:
        """Frees the slots of what is not done."""
        self._stream.close()

    async def news(self) -> AsyncGenerator[News, None]:
        """ApiError for what the engine refuses, or if it breaks."""
        try:
            async for index, event in self._stream:
                sample = self.samples[index]
                if sample.done:  # tokens that came behind a stop string
                    continue
                first = sample.kept
                pieces = sample.feed(event)
                if sample.stopped:
                    self._stream.end(index)
                yield News(index, sample.last_text, pieces, first, sample.kept, sample.finish)
        except (ValueError, Stopped) as error:
            raise self._service.explain(error) from error

    def usage(self) -> Usage:
        """Each prompt counts once, however many samples it has."""
        starts = list(itertools.accumulate((len(group) for group in self._jobs[:-1]), initial=0))
        prompt = sum(len(self.prompts[i]) for i in starts)
        new = sum(len(sample.tokens) for sample in self.samples)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(self.samples[i].cached for i in starts)),
            completion_tokens_details=CompletionDetails(
                reasoning_tokens=sum(self._reasoning(sample) for sample in self.samples)
            ),
        )

    def _reasoning(self, sample: AnswerStream) -> int:
        """Tokens up to the end of the reasoning, its tags included."""
        reasoning = sample.answer().reasoning
        if reasoning is None:
            return 0
        tokenizer = self._service.model.tokenizer
        if tokenizer.end_think_id is None:  # tags of several tokens: about
            return min(len(tokenizer.encode(reasoning)), len(sample.tokens))
        closed = tokenizer.end_think_id in sample.tokens
        return sample.tokens.index(tokenizer.end_think_id) + 1 if closed else len(sample.tokens)


def message_dict(message: Message) -> dict[str, Any]:
    """What `plain_messages` makes messages of; reasoning of earlier turns is not read again."""
    return message.model_dump(exclude_none=True, exclude={"reasoning_content", "name"})


def _json_schema(body: ChatRequest) -> dict[str, Any] | None:
    match body.response_format:
        case PlainFormat(type="json_object"):
            return {}
        case SchemaFormat(json_schema=wanted):
            return wanted.schema_
        case _:
            return None
