"""Conversations -> token ids with a loss mask, and the thinking toggle.

A conversation is rendered message by message and each part is tokenised on its own, exactly as the
sampler sees it (prompt first, then what the model writes), so the mask falls on token borders.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemojax.data.examples import Example, LongPolicy, StoredExamples
from nemojax.data.sources import read_jsonl_rows
from nemojax.data.tokenizer import (
    CHAT_TEMPLATE,
    END_THINK,
    ROLES,
    THINK,
    THINKING,
    Tokenizer,
    compile_template,
)
from nemojax.data.tools import Tool, call_of_message, check_tools

TOOL = "tool"  # the role of what a tool returned
THINKING_ON, THINKING_OFF = THINKING[True], THINKING[False]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages {"role", "content"} and the toggle: True, False, or None to leave the system text alone.

    An assistant's message may have OpenAI's `tool_calls`, and results follow it in messages of role tool.
    `tools` are those that the system text describes. where: `file:line` that it was read from, for errors.
    """

    messages: tuple[Message, ...]
    thinking: bool | None = None
    where: str = field(default="", compare=False)
    tools: tuple[Tool, ...] = ()

    @property
    def question(self) -> str:
        """What the user says: a question answered twice, thinking and not, is held out or trained as one."""
        said = [m for m in self.messages if m["role"] == "user"] or self.messages
        return "\n\n".join(f"{m['role']}: {(m.get('content') or '').strip()}" for m in said)


def with_toggle(messages: Sequence[Message], thinking: bool | None) -> list[Message]:
    """The messages with `detailed thinking on|off` as the system text, or in front of the user's own."""
    if thinking is None:
        return list(messages)
    toggle = THINKING[thinking]
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": toggle}, *messages]
    text = messages[0]["content"]
    for known in THINKING.values():
        text = text.removeprefix(known).lstrip("\n") if text.startswith(known) else text
    return [{"role": "system", "content": f"{toggle}\n\n{text}" if text else toggle}, *messages[1:]]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], generation: bool = False, tools: Sequence[Tool] = ()
) -> str:
    """The text of a conversation; `generation` adds the header of the assistant's turn.

    ValueError if the checkpoint's own template refuses it, or knows no tools where there are some.
    """
    import jinja2

    source = tokenizer.chat_template or CHAT_TEMPLATE
    if tools and "tools" not in source:
        raise ValueError(
            f"{tokenizer.path}: expected a chat template that describes tools, got one that does not; "
            "ask without tools or replace chat_template.jinja"
        )
    given = [dict(m) for m in messages] if source == CHAT_TEMPLATE else [_with_objects(m) for m in messages]
    try:
        return compile_template(source).render(
            messages=given,
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=generation,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{tokenizer.path}: the chat template refuses this conversation ({error})"
        ) from error


def _with_objects(message: Message) -> dict[str, Any]:
    """The message as templates of others expect it: arguments are objects, and there is a content.

    Ours keeps arguments that are JSON text as the model wrote them, so that the cache knows the prompt.
    """
    if not message.get("tool_calls"):
        return dict(message)
    calls = [call_of_message(call, "tool_calls") for call in message["tool_calls"]]
    own = [call if "function" in call else {"function": call} for call in message["tool_calls"]]
    functions = [
        {**call, "type": "function", "function": {"name": name, "arguments": json.loads(arguments)}}
        for call, (name, arguments) in zip(own, calls, strict=True)
    ]
    return {**message, "content": message.get("content") or "", "tool_calls": functions}


def render_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    thinking: bool | None = None,
    tools: Sequence[Tool] = (),
) -> str:
    """The text that the assistant continues."""
    check_messages(messages, "prompt")
    check_tools(tools)
    return render(tokenizer, with_toggle(messages, thinking), generation=True, tools=tools)


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    thinking: bool | None = None,
    limit: int | None = None,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Ids of the prompt; ValueError if it has more than `limit` tokens (the context less room to answer)."""
    ids = tokenizer.encode(render_prompt(tokenizer, messages, thinking, tools))
    check_length(len(ids), limit, "prompt")
    return ids


def check_length(num_tokens: int, limit: int | None, where: str) -> None:
    """ValueError if something has more tokens than fit."""
    if limit is not None and num_tokens > limit:
        raise ValueError(f"{where}: expected at most {limit} tokens, got {num_tokens}; shorten it")


def check_messages(messages: Sequence[Message], where: str) -> None:
    """ValueError unless every message has a known role and text, a system text comes first only, and tool
    results follow calls. An assistant's message with `tool_calls` needs no content (None or absent)."""
    if not messages:
        raise ValueError(f"{where}: expected at least one message, got none")
    before: Message = {}
    for index, message in enumerate(messages):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        has_text = isinstance(content, str) or (content is None and bool(calls))
        if not isinstance(role, str) or role not in (*ROLES, TOOL) or not has_text:
            raise ValueError(
                f"{where}: expected messages of role {', '.join((*ROLES, TOOL))} with text content, "
                f"got {dict(message)!r:.80} at {index}"
            )
        if role == "system" and index:
            raise ValueError(f"{where}: expected the system message first, got it at {index}")
        if role == TOOL and not (before.get("role") == TOOL or before.get("tool_calls")):
            raise ValueError(f"{where}: expected a tool's result after tool_calls, got one at {index}")
        if calls and (role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str)):
            raise ValueError(
                f"{where}: expected a list of tool_calls in an assistant's message, got {calls!r:.80} "
                f"at {index}"
            )
        for call in calls or ():
            call_of_message(call, f"{where}: message {index}")
        before = message


def plain_messages(given: Any, where: str = "messages") -> tuple[Message, ...]:
    """Messages as OpenAI's clients send them -> as the rest of this file takes them, checked.

    Content may be a list of {"type": "text", "text"} parts (joined by newlines), `developer` is the system,
    results come in the order of their calls, and fields that no template reads are dropped. ValueError for
    anything else.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{where}: expected a list of messages, got {given!r:.80}")
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(given):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: expected messages that are objects, got {message!r:.80} at {index}")
        plain = {
            key: message[key] for key in ("role", "content", "tool_calls", "tool_call_id") if key in message
        }
        plain["content"] = _plain_text(message.get("content"), f"{where}: message {index}")
        if plain.get("role") == "developer":
            plain["role"] = "system"
        if not plain.get("tool_calls"):
            plain.pop("tool_calls", None)
        messages.append(plain)
    check_messages(messages, where)
    return tuple(_results_in_order(messages))


def _plain_text(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f'{where}: expected parts like {{"type": "text", "text": ...}}, got {part!r:.80}'
            )
    return "\n".join(part["text"] for part in content)


def _results_in_order(messages: Sequence[Message]) -> list[Message]:
    """Tool results sorted like the calls before them, where ids tell: what the model reads has no ids."""
    ordered: list[Message] = []
    places: dict[Any, int] = {}
    for is_result, run in itertools.groupby(messages, lambda m: m["role"] == TOOL):
        group = list(run)
        if is_result and all(m.get("tool_call_id") in places for m in group):
            group.sort(key=lambda m: places[m["tool_call_id"]])
        calls = group[-1].get("tool_calls") or ()
        places = {call.get("id"): place for place, call in enumerate(calls)}
        ordered += group
    return ordered


def _parts(tokenizer: Tokenizer, conversation: Conversation, where: str) -> list[tuple[str, bool]]:
    """(text, written by the assistant) parts whose concatenation is the rendered conversation."""
    check_messages(conversation.messages, where)
    messages = with_toggle(conversation.messages, conversation.thinking)
    parts: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render(tokenizer, messages[:index], generation=True, tools=conversation.tools)
        whole = render(tokenizer, messages[: index + 1], tools=conversation.tools)
        if not (head.startswith(done) and whole.startswith(head)):
            raise ValueError(
                f"{where}: the chat template changes earlier turns, so no loss mask is exact; "
                "use single-turn conversations or a template that keeps them"
            )
        parts += [(head[len(done) :], False), (whole[len(head) :], True)]
        done = whole
    if not parts:
        raise ValueError(f"{where}: expected an assistant message to train on, got none")
    return parts


def _example(tokenizer: Tokenizer, parts: Sequence[tuple[list[int], bool]]) -> Example:
    ids, weights = [], []
    for part, trained in parts:
        ids += part
        # what a template writes after the end of the turn is not the model's to say
        stop = max((i for i, token in enumerate(part) if token in tokenizer.eos_ids), default=len(part) - 1)
        weights += [1.0 if trained and i <= stop else 0.0 for i in range(len(part))]
    return Example(np.asarray(ids, np.int32), np.asarray(weights, np.float32))


def encode_chat(
    tokenizer: Tokenizer, conversation: Conversation, limit: int | None = None, where: str = "chat"
) -> Example:
    """A conversation as an example: assistant tokens are trained, their end of turn included.

    ValueError if it has more than `limit` tokens.
    """
    parts = _parts(tokenizer, conversation, where)
    example = _example(tokenizer, [(tokenizer.encode(text), trained) for text, trained in parts])
    check_length(len(example.ids), limit, where)
    return example


def chat_examples(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    length: int,
    long: LongPolicy = "error",
    where: str = "chat",
) -> tuple[StoredExamples, int]:
    """Examples of at most `length` positions, and how many conversations were dropped as too long.

    `truncate` cuts the end off (and drops what then has no assistant token); `split` is refused.
    """
    if long == "split":
        raise ValueError(
            "chat: expected long to be error, drop or truncate, got 'split'; a turn has no halves"
        )
    places = [chat.where or f"{where} {number}" for number, chat in enumerate(conversations)]
    parts = [_parts(tokenizer, chat, place) for chat, place in zip(conversations, places, strict=True)]
    encoded = iter(tokenizer.encode_batch([text for chat in parts for text, _ in chat]))
    kept, dropped = [], 0
    for chat, place in zip(parts, places, strict=True):
        example = _example(tokenizer, [(next(encoded), trained) for _, trained in chat])
        if example.size > length:
            if long == "error":
                check_length(len(example.ids), length + 1, place)
            example = Example(example.ids[: length + 1], example.weights[: length + 1])
            if long == "drop" or not example.weights.any():
                dropped += 1
                continue
        kept.append(example)
    return StoredExamples(kept), dropped


def split_thinking(text: str) -> tuple[str | None, str]:
    """(reasoning, content) of an answer; reasoning is None without think tags.

    Content is what follows the last `</think>`; it is empty if the reasoning never ends.
    """
    before, closed, content = text.rpartition(END_THINK)
    if closed:
        return before.replace(THINK, "", 1).strip(), content.strip()
    before, opened, reasoning = text.partition(THINK)
    return (reasoning.strip(), "") if opened else (None, text.strip())


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends in an open `<think>`, as some templates do: the answer then begins
    with reasoning, and only `THINK + answer` splits as it should."""
    return prompt.rstrip().endswith(THINK)


def answer_with_thinking(reasoning: str, content: str) -> str:
    """The assistant's text with its reasoning between think tags: the inverse of `split_thinking`."""
    return f"{THINK}{reasoning}{END_THINK}{content}"


def load_conversations(path: str | Path) -> list[Conversation]:
    """Conversations of JSONL files; `path` is a file, a directory or a pattern.

    Rows are {"messages": [...], "thinking": true|false|absent} or {"input", "output", "reasoning":
    "on"|"off"}, and "tools" if there are some; ValueError with file and line for anything else.
    """
    found = [conversation_from_row(row, where) for where, row in read_jsonl_rows(path)]
    if not found:
        raise ValueError(f"{path}: expected conversations, got none; add rows or leave the file out")
    return found


def conversation_from_row(row: Mapping[str, Any], where: str) -> Conversation:
    """One row of `load_conversations`."""
    if "input" in row and "output" in row:
        user, thinking = row["input"], {"on": True, "off": False}.get(row.get("reasoning", ""))
        given: Any = [{"role": "user", "content": user}] if isinstance(user, str) else user
        if isinstance(given, list):
            given = [*given, {"role": "assistant", "content": row["output"]}]
    else:
        given, thinking = row.get("messages"), row.get("thinking")
    if not isinstance(given, list) or not all(isinstance(m, Mapping) for m in given):
        raise ValueError(
            f"{where}: expected messages, or input and output, got {', '.join(row) or 'nothing'}"
        )
    if not (thinking is None or isinstance(thinking, bool)):
        raise ValueError(f"{where}: expected thinking to be true or false, got {thinking!r}")
    check_messages(given, where)
    tools = row.get("tools") or ()
    check_tools(tools, f"{where}: tools")
    return Conversation(tuple(given), thinking, where, tuple(tools))


def conversations(pairs: Iterable[tuple[str, str]], thinking: bool | None = None) -> list[Conversation]:
    """Single-turn conversations from (user, assistant) texts."""
    return [
        Conversation(({"role": "user", "content": u}, {"role": "assistant", "content": a}), thinking)
        for u, a in pairs
    ]
