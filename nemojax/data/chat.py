"""Conversations -> token ids with a loss mask, and the thinking toggle.

A conversation is rendered message by message and each part is tokenised on its own, exactly as the
sampler sees it (prompt first, then what the model writes), so the mask falls on token borders.
"""

from __future__ import annotations

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

THINKING_ON, THINKING_OFF = THINKING[True], THINKING[False]
Message = Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages {"role", "content"} and the toggle: True, False, or None to leave the system text alone.

    where: `file:line` that it was read from, for errors.
    """

    messages: tuple[Message, ...]
    thinking: bool | None = None
    where: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """What the user says: a question answered twice, thinking and not, is held out or trained as one."""
        said = [m for m in self.messages if m["role"] == "user"] or self.messages
        return "\n\n".join(f"{m['role']}: {m['content'].strip()}" for m in said)


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


def render(tokenizer: Tokenizer, messages: Sequence[Message], generation: bool = False) -> str:
    """The text of a conversation; `generation` adds the header of the assistant's turn."""
    import jinja2

    template = compile_template(tokenizer.chat_template or CHAT_TEMPLATE)
    try:
        return template.render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=generation,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{tokenizer.path}: the chat template refuses this conversation ({error})"
        ) from error


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool | None = None) -> str:
    """The text that the assistant continues."""
    check_messages(messages, "prompt")
    return render(tokenizer, with_toggle(messages, thinking), generation=True)


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    thinking: bool | None = None,
    limit: int | None = None,
) -> list[int]:
    """Ids of the prompt; ValueError if it has more than `limit` tokens (the context less room to answer)."""
    ids = tokenizer.encode(render_prompt(tokenizer, messages, thinking))
    check_length(len(ids), limit, "prompt")
    return ids


def check_length(num_tokens: int, limit: int | None, where: str) -> None:
    """ValueError if something has more tokens than fit."""
    if limit is not None and num_tokens > limit:
        raise ValueError(f"{where}: expected at most {limit} tokens, got {num_tokens}; shorten it")


def check_messages(messages: Sequence[Message], where: str) -> None:
    """ValueError unless every message has a known role and text, and a system text comes first only."""
    if not messages:
        raise ValueError(f"{where}: expected at least one message, got none")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"{where}: expected messages of role {', '.join(ROLES)} with text content, "
                f"got {dict(message)!r:.80} at {index}"
            )
        if role == "system" and index:
            raise ValueError(f"{where}: expected the system message first, got it at {index}")


def _parts(tokenizer: Tokenizer, conversation: Conversation, where: str) -> list[tuple[str, bool]]:
    """(text, written by the assistant) parts whose concatenation is the rendered conversation."""
    check_messages(conversation.messages, where)
    messages = with_toggle(conversation.messages, conversation.thinking)
    parts: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render(tokenizer, messages[:index], generation=True)
        whole = render(tokenizer, messages[: index + 1])
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


def answer_with_thinking(reasoning: str, content: str) -> str:
    """The assistant's text with its reasoning between think tags: the inverse of `split_thinking`."""
    return f"{THINK}{reasoning}{END_THINK}{content}"


def load_conversations(path: str | Path) -> list[Conversation]:
    """Conversations of JSONL files; `path` is a file, a directory or a pattern.

    Rows are {"messages": [...], "thinking": true|false|absent} or {"input", "output", "reasoning":
    "on"|"off"}; ValueError with file and line for anything else.
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
    return Conversation(tuple(given), thinking, where)


def conversations(pairs: Iterable[tuple[str, str]], thinking: bool | None = None) -> list[Conversation]:
    """Single-turn conversations from (user, assistant) texts."""
    return [
        Conversation(({"role": "user", "content": u}, {"role": "assistant", "content": a}), thinking)
        for u, a in pairs
    ]
