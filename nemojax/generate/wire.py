"""Requests and answers as OpenAI-compatible servers write them: JSON bodies out, JSON bodies in.

Extra fields are vLLM's (top_k, min_p, repetition_penalty, stop_token_ids, thinking_token_budget,
return_token_ids). They are left out at their defaults, so that servers which know OpenAI's alone accept
what asks for nothing more; such a default is then the server's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from nemojax.data.chat import answer_with_thinking, plain_messages, split_thinking, with_toggle
from nemojax.data.tokenizer import THINK
from nemojax.data.tools import END_TOOLCALL, TOOLCALL
from nemojax.generate.local import Piece
from nemojax.generate.protocol import Answer, FinishReason, Request, ToolCall
from nemojax.generate.text import ReasoningStream

CHAT, COMPLETIONS = "chat/completions", "completions"
Json = dict[str, Any]
_OWN_FIELDS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def path_of(request: Request) -> str:
    """The end of the address that answers such a request."""
    return COMPLETIONS if request.messages is None else CHAT


def make_body(request: Request, model: str, n: int, taken: int = 0, tokens: bool = False) -> Json:
    """The JSON body that asks for `n` samples after the first `taken`, which draw with seeds of their own.

    tokens: ask for token ids and log-probabilities. ValueError for what has no meaning without a chat.
    """
    sampling = request.sampling
    body: Json = {
        "model": model,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "n": n,
        "seed": request.seed + taken,
    }
    body |= {k: getattr(sampling, k) for k, off in _OWN_FIELDS.items() if getattr(sampling, k) != off}
    if request.stop:
        body["stop"] = list(request.stop)
    if request.stop_ids:
        body["stop_token_ids"] = list(request.stop_ids)
    if request.thinking_budget is not None:
        body["thinking_token_budget"] = request.thinking_budget
    if request.json_schema is not None:
        body["response_format"] = _response_format(request.json_schema)
    if tokens:
        body["return_token_ids"] = True
    told = tokens or request.top_logprobs > 0
    if request.messages is None:
        _check_without_chat(request)
        body["prompt"] = request.prompt if request.tokens is None else list(request.tokens)
        return body | ({"logprobs": request.top_logprobs} if told else {})
    messages = request.messages
    if request.thinking is not None:  # in the system text, whose form must be known; else all is theirs
        messages = with_toggle(plain_messages(messages), request.thinking)
    body["messages"] = [dict(m) for m in messages]
    if request.tools:
        body |= {"tools": [dict(tool) for tool in request.tools], "tool_choice": request.tool_choice}
    return body | ({"logprobs": True, "top_logprobs": request.top_logprobs} if told else {})


def _response_format(schema: Mapping[str, Any]) -> Json:
    if not schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema), "strict": True}}


def _check_without_chat(request: Request) -> None:
    for name, given in (("thinking", request.thinking is not None), ("tools", bool(request.tools))):
        if given:
            raise ValueError(f"{name}: expected messages with it, got a prompt; it is a chat's")


def parse_answers(body: Any, chat: bool, where: str, top: int = 0) -> list[Answer]:
    """The answers of a response, in the order of their indices, with at most `top` of the likeliest tokens
    (completions add the chosen one). Where a server counts tokens over all samples only, each has its share
    by length of text. ValueError, `where` in front, for another shape."""
    choices = _get(body, "choices", list, where)
    if not choices:
        raise ValueError(f"{where}: expected at least one choice, got none")
    if all(isinstance(choice, Mapping) and isinstance(choice.get("index"), int) for choice in choices):
        choices = sorted(choices, key=lambda choice: choice["index"])
    usage = body.get("usage") if isinstance(body.get("usage"), Mapping) else {}
    prompt_ids = body.get("prompt_token_ids")
    prompt_tokens = _count(usage.get("prompt_tokens"), prompt_ids)
    parts = [_parse_choice(choice, chat, where) for choice in choices]
    for part in parts:
        steps = tuple(step[:top] for step in part.get("top", ()))
        part["top"] = steps if any(steps) else ()
    counts = _counts(parts, usage.get("completion_tokens"))
    return [
        Answer(num_tokens=count, prompt_tokens=prompt_tokens, **part)
        for part, count in zip(parts, counts, strict=True)
    ]


def total_tokens(body: Any) -> int | None:
    """Tokens that a response says it cost; None where it does not tell."""
    usage = body.get("usage") if isinstance(body, Mapping) else None
    total = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return total if isinstance(total, int) else None


def _parse_choice(choice: Any, chat: bool, where: str) -> Json:
    """The fields of an `Answer` but for the numbers of tokens."""
    if not isinstance(choice, Mapping):
        raise ValueError(f"{where}: expected choices that are objects, got {choice!r:.80}")
    finish = finish_reason(_get(choice, "finish_reason", str, where))
    part: Json = {"finish_reason": finish}
    if chat:
        message = _get(choice, "message", Mapping, where)
        part["tool_calls"] = _tool_calls(message.get("tool_calls"), where)
        content = message.get("content")
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"{where}: expected a message's content to be text, got {content!r:.80}")
        part |= message_text(reasoning_of(message), content, part["tool_calls"], finish)
        part["finish_reason"] = "tool_calls" if part["tool_calls"] and finish == "stop" else finish
    else:
        part |= _completion_text(_get(choice, "text", str, where))
    ids = choice.get("token_ids")
    part["tokens"] = tuple(ids) if _are(ids, int) else None
    told = choice.get("logprobs")
    return part | (_logprobs(told, where) if isinstance(told, Mapping) else {})


class ChunkReader:
    """The chunks of one streamed answer -> pieces as they come, and the answer at the end.

    Calls come as pieces when the answer is over. ValueError, `where` in front, for chunks of another shape,
    OSError for an error that the server reports in between, and for a stream that ends in the middle.
    """

    def __init__(self, chat: bool, where: str):
        self.begun = False
        self.usage: Json = {}
        self._chat, self._where = chat, where
        self._tags = ReasoningStream()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: dict[int, list[str]] = {}  # index -> name, arguments
        self._finish: FinishReason | None = None

    def feed(self, chunk: Any) -> list[Piece]:
        """What is new."""
        if isinstance(chunk, Mapping) and chunk.get("error"):
            raise OSError(f"{self._where}: the server broke off: {chunk['error']!r:.300}; ask again")
        choices = _get(chunk, "choices", list, self._where)
        if isinstance(chunk.get("usage"), Mapping):
            self.usage = {"usage": chunk["usage"]}
        reasoning = content = ""
        for choice in choices:
            if isinstance(choice, Mapping) and isinstance(choice.get("finish_reason"), str):
                self._finish = finish_reason(choice["finish_reason"])
            if self._chat:
                delta = _get(choice, "delta", Mapping, self._where)
                reasoning += reasoning_of(delta) or ""
                content += delta.get("content") or ""
                self._add_calls(delta.get("tool_calls"))
            else:
                content += _get(choice, "text", str, self._where)
        self._reasoning.append(reasoning)
        self._content.append(content)
        if not any(self._reasoning):  # else it has come apart already
            reasoning, content = self._tags.feed(content)
        return self._pieces(reasoning, content)

    def finish(self) -> list[Piece | Answer]:
        """What was held back, and the answer."""
        if self._finish is None:
            raise OSError(f"{self._where}: expected an answer to its end, got {self._length()} pieces of it")
        pieces = self._pieces(*self._tags.flush())
        calls = tuple(ToolCall(name, arguments) for name, arguments in self._calls.values())
        pieces += [Piece("tool_call", call.arguments, call) for call in calls]
        reasoning = "".join(self._reasoning) or None
        usage = self.usage.get("usage", {})
        content = "".join(self._content)
        if self._chat:
            texts = message_text(reasoning, content, calls, self._finish)
        else:
            texts = _completion_text(content)
        return [
            *pieces,
            Answer(
                **texts,
                finish_reason="tool_calls" if calls and self._finish == "stop" else self._finish,
                num_tokens=_count(usage.get("completion_tokens"), None),
                prompt_tokens=_count(usage.get("prompt_tokens"), None),
                tool_calls=calls,
            ),
        ]

    def _pieces(self, reasoning: str, content: str) -> list[Piece]:
        pieces = [Piece("reasoning", reasoning), Piece("content", content)]
        found = [piece for piece in pieces if piece.text]
        self.begun = self.begun or bool(found)
        return found

    def _add_calls(self, given: Any) -> None:
        for call in given or ():
            function = _get(call, "function", Mapping, self._where)
            index = call.get("index") if isinstance(call.get("index"), int) else 0
            known = self._calls.setdefault(index, ["", ""])
            known[0] += function.get("name") or ""
            known[1] += function.get("arguments") or ""

    def _length(self) -> int:
        return len([text for text in (*self._reasoning, *self._content) if text])


def finish_reason(given: str) -> FinishReason:
    """A server's word for why it ended; whatever is neither a limit nor a call has simply ended."""
    if given in ("tool_calls", "function_call"):
        return "tool_calls"
    return "length" if given in ("length", "max_tokens") else "stop"


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """What a message, or a piece of one, says under either name that servers give to reasoning."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name]:
            return message[name]
    return None


def message_text(
    reasoning: str | None, content: str, calls: Sequence[ToolCall], finish: FinishReason
) -> Json:
    """`text`, `reasoning` and `content` of an answer whose reasoning came apart, or else stands in tags.

    Calls, which come apart too, stand at the end of the text as our template has them.
    """
    written = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in calls]
    said = content + (f"{TOOLCALL}[{', '.join(written)}]{END_TOOLCALL}" if calls else "")
    if reasoning is None:
        reasoning, content = split_thinking(content)
        return {"text": said, "reasoning": reasoning, "content": content}
    cut = finish == "length" and not said
    text = THINK + reasoning if cut else answer_with_thinking(reasoning, said)
    return {"text": text, "reasoning": reasoning.strip(), "content": content.strip()}


def _completion_text(text: str) -> Json:
    """A text that goes on from a prompt, its reasoning told apart as an engine here would."""
    tags = ReasoningStream()
    reasoning, content = (a + b for a, b in zip(tags.feed(text), tags.flush(), strict=True))
    return {"text": text, "reasoning": reasoning if tags.found else None, "content": content}


def _tool_calls(given: Any, where: str) -> tuple[ToolCall, ...]:
    if given is None:
        return ()
    if not _are(given, Mapping):
        raise ValueError(f"{where}: expected tool_calls to be a list of objects, got {given!r:.80}")
    functions = [_get(call, "function", Mapping, where) for call in given]
    return tuple(ToolCall(_get(f, "name", str, where), _get(f, "arguments", str, where)) for f in functions)


def _logprobs(told: Mapping[str, Any], where: str) -> Json:
    """`logprobs` and `top` of either endpoint's form."""
    if isinstance(told.get("content"), list):  # a chat's: one object a token
        entries = told["content"]
        values = [_get(entry, "logprob", int | float, where) for entry in entries]
        tops = [
            [(_get(t, "token", str, where), float(_get(t, "logprob", int | float, where))) for t in top]
            for entry in entries
            if isinstance(top := entry.get("top_logprobs"), list)
        ]
    elif _are(told.get("token_logprobs"), int | float):  # a completion's: columns
        values, rows = told["token_logprobs"], told.get("top_logprobs")
        tops = [list(row.items()) for row in rows] if _are(rows, Mapping) else []
    else:
        return {}
    ranked = [tuple(sorted(((t, float(p)) for t, p in top), key=lambda pair: -pair[1])) for top in tops]
    return {"logprobs": tuple(map(float, values)), "top": tuple(ranked)}


def _counts(parts: Sequence[Json], total: Any) -> list[int]:
    """New tokens of each sample: as told, else its share of the total, 0 where the server tells nothing."""
    left = _count(total, None)
    for name, trusted in (("tokens", True), ("logprobs", len(parts) > 1 or not left)):
        if trusted and all(part.get(name) is not None for part in parts):
            return [len(part[name]) for part in parts]
    sizes = [max(len(part["text"]), 1) for part in parts]
    counts = []
    for i, size in enumerate(sizes):  # what is left is shared by who is left, so that the sum is the total
        counts.append(round(left * size / sum(sizes[i:])))
        left -= counts[-1]
    return counts


def _count(told: Any, ids: Any) -> int:
    if isinstance(told, int) and not isinstance(told, bool):
        return told
    return len(ids) if isinstance(ids, list) else 0


def _are(values: Any, kind: Any) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _get(value: Any, key: str, kind: Any, where: str) -> Any:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(
            f"{where}: expected an OpenAI-compatible answer with {key!r}, got {value!r:.120}; check the "
            "address"
        )
    return found
