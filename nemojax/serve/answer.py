"""Answers in OpenAI's words: whole, or in the chunks of a stream, both made of the same news."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from nemojax.data.tokenizer import Tokenizer
from nemojax.generate.local import AnswerStream
from nemojax.generate.protocol import ToolCall
from nemojax.generate.text import token_bytes, token_text
from nemojax.serve.errors import ApiError
from nemojax.serve.replies import (
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    Reply,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from nemojax.serve.schema import ChatRequest, CompletionRequest, Sampling
from nemojax.serve.service import News, Run

LEAST = -9999.0  # what OpenAI writes for a token that cannot come: JSON has no infinity
END = "[DONE]"


class Writer:
    """What both kinds of completion have in common. A writer is made for one request and used once."""

    kind = ""

    def __init__(self, run: Run, body: Sampling, tokenizer: Tokenizer):
        self.run, self.tokenizer = run, tokenizer
        self.with_usage, self.with_ids = body.with_usage, bool(body.return_token_ids)
        self.head: dict[str, Any] = {
            "id": f"{self.kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> Reply:
        """The answer, when all of it is there."""
        try:
            seen: list[list[News]] = [[] for _ in self.run.samples]
            async with aclosing(self.run.news()) as all_news:
                async for news in all_news:
                    seen[news.choice].append(news)
            return self.reply(seen)
        finally:
            self.run.close()

    async def stream(self) -> AsyncGenerator[str, None]:
        """The chunks of a stream, as JSON. Waits until there is one: what fails before it has a status."""
        chunks = self._chunks()
        try:
            start = await anext(chunks)
        except BaseException:
            await chunks.aclose()
            self.run.close()
            raise
        return self._rest(start, chunks)

    async def _rest(self, start: str, chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(chunks):
                yield start
                async for chunk in chunks:
                    yield chunk
        finally:
            self.run.close()

    async def _chunks(self) -> AsyncGenerator[str, None]:
        begun: set[int] = set()
        sent = False
        try:
            async with aclosing(self.run.news()) as all_news:
                async for news in all_news:
                    for choice in self.pieces(news, news.choice not in begun):
                        yield self.chunk([choice]).json_text()
                        sent = True
                    begun.add(news.choice)
        except ApiError as error:
            if not sent:
                raise
            yield json.dumps(error.body, ensure_ascii=False)  # the status was sent long ago
            return
        if self.with_usage:
            yield self.chunk([], usage=self.run.usage()).json_text()
        yield END

    def reply(self, seen: Sequence[Sequence[News]]) -> Reply:
        raise NotImplementedError

    def pieces(self, news: News, is_first: bool) -> list[Any]:
        """What news add to their choice, as choices of chunks; none if there is nothing to be told yet."""
        raise NotImplementedError

    def chunk(self, choices: list[Any], usage: Usage | None = None) -> Reply:
        raise NotImplementedError

    def usages(self, usage: Usage | None) -> dict[str, Any]:
        """OpenAI's streams say null until the last chunk says how much."""
        return {"usage": usage} if self.with_usage else {}

    def ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self.with_ids else {}


class ChatWriter(Writer):
    """Answers of POST /v1/chat/completions."""

    kind = "chatcmpl"

    def __init__(self, run: Run, body: ChatRequest, tokenizer: Tokenizer):
        super().__init__(run, body, tokenizer)
        self._with_logprobs = bool(body.logprobs)
        self._calls = [0] * len(run.samples)

    def reply(self, seen: Sequence[Sequence[News]]) -> ChatCompletion:
        choices = []
        for index, (sample, of_one) in enumerate(zip(self.run.samples, seen, strict=True)):
            answer = sample.answer()
            calls = [piece.call for news in of_one for piece in news.pieces if piece.call]
            message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
            if answer.reasoning is not None:
                message["reasoning_content"] = answer.reasoning
            if calls:
                message["tool_calls"] = [_called(call) for call in calls]
                message["content"] = answer.content or None
            choices.append(
                ChatChoice(
                    index=index,
                    message=ChatMessage(**message),
                    logprobs=self._logprobs(sample, 0, sample.kept),
                    finish_reason=answer.finish_reason,
                    **self.ids(sample.tokens[: sample.kept]),
                )
            )
        ids: dict[str, Any] = {"prompt_token_ids": list(self.run.prompts[0])} if self.with_ids else {}
        return ChatCompletion(
            **self.head, object="chat.completion", choices=choices, usage=self.run.usage(), **ids
        )

    def pieces(self, news: News, is_first: bool) -> list[Any]:
        sample = self.run.samples[news.choice]
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if is_first else {}
        for piece in news.pieces:
            match piece.kind:
                case "reasoning":
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + piece.text
                case "content":
                    delta["content"] = delta.get("content", "") + piece.text
        calls = [piece.call for piece in news.pieces if piece.call]
        if calls:
            first = self._calls[news.choice]
            delta["tool_calls"] = [_called(call, first + i) for i, call in enumerate(calls)]
            self._calls[news.choice] += len(calls)
        choices = []
        if delta or news.end > news.first and (self._with_logprobs or self.with_ids):
            logprobs = self._logprobs(sample, news.first, news.end)
            ids = sample.tokens[news.first : news.end]
            choices.append(self._choice(news.choice, delta, logprobs, None, ids))
        if news.finish is not None:
            choices.append(self._choice(news.choice, {}, None, news.finish, ()))
        return choices

    def _choice(self, index: int, delta: dict, logprobs: Any, finish: Any, ids: Sequence[int]) -> Any:
        return ChatChunkChoice(
            index=index, delta=ChatMessage(**delta), logprobs=logprobs, finish_reason=finish, **self.ids(ids)
        )

    def chunk(self, choices: list[Any], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=choices, **self.usages(usage))

    def _logprobs(self, sample: AnswerStream, first: int, end: int) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        entries = [
            TokenLogprob(
                **self._entry(token, logprob), top_logprobs=[TopLogprob(**self._entry(*pair)) for pair in top]
            )
            for token, logprob, top in _columns(sample, first, end)
        ]
        return ChatLogprobs(content=entries, refusal=None)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(self.tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


class TextWriter(Writer):
    """Answers of POST /v1/completions: all text as it is, reasoning and its tags included."""

    kind = "cmpl"

    def __init__(self, run: Run, body: CompletionRequest, tokenizer: Tokenizer):
        super().__init__(run, body, tokenizer)
        self._with_logprobs, self._top = body.logprobs is not None, body.logprobs or 0

    def reply(self, seen: Sequence[Sequence[News]]) -> Completion:
        choices = [
            self._choice(
                News(index, "".join(news.text for news in of_one), [], 0, of_one[-1].end, of_one[-1].finish)
            )
            for index, of_one in enumerate(seen)
        ]
        return Completion(**self.head, object="text_completion", choices=choices, usage=self.run.usage())

    def pieces(self, news: News, is_first: bool) -> list[Any]:
        told = news.end > news.first and (self._with_logprobs or self.with_ids)
        return [self._choice(news)] if news.text or told or news.finish else []

    def _choice(self, news: News) -> TextChoice:
        sample = self.run.samples[news.choice]
        ids = self.ids(sample.tokens[news.first : news.end])
        if ids and news.first == 0:
            ids["prompt_token_ids"] = list(self.run.prompts[news.choice])
        return TextChoice(
            index=news.choice,
            text=news.text,
            logprobs=self._logprobs(sample, news.first, news.end) if self._with_logprobs else None,
            finish_reason=news.finish,
            **ids,
        )

    def chunk(self, choices: list[Any], usage: Usage | None = None) -> Completion:
        return Completion(**self.head, object="text_completion", choices=choices, **self.usages(usage))

    def _logprobs(self, sample: AnswerStream, first: int, end: int) -> TextLogprobs:
        rows = _columns(sample, first, end)
        return TextLogprobs(
            tokens=[token_text(self.tokenizer, token) for token, _, _ in rows],
            token_logprobs=[max(logprob, LEAST) for _, logprob, _ in rows],
            top_logprobs=[self._likeliest(*row) for row in rows] if self._top else None,
            text_offset=sample.offsets[first:end],
        )

    def _likeliest(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By text, the likelier of two tokens with one text; the token that was drawn is among them."""
        out: dict[str, float] = {}
        for other, value in sorted([*top, (token, logprob)], key=lambda pair: -pair[1]):
            out.setdefault(token_text(self.tokenizer, other), max(value, LEAST))
        return out


def _called(call: ToolCall, index: int | None = None) -> CalledTool:
    place = {} if index is None else {"index": index}
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return CalledTool(**place, id=f"call_{secrets.token_hex(12)}", type="function", function=function)


def _columns(
    sample: AnswerStream, first: int, end: int
) -> list[tuple[int, float, Sequence[tuple[int, float]]]]:
    """(token, its log-probability, the likeliest tokens) of some of a sample's tokens."""
    top = sample.top[first:end] or [[] for _ in range(first, end)]
    return list(zip(sample.tokens[first:end], sample.logprobs[first:end], top, strict=True))
