"""Token ids -> text as they come: what of it is certain, where a stop string ends it, reasoning, tool calls.

The streams hold back what more tokens could still change; `flush` says that none will come.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from nemojax.data.tokenizer import END_THINK, THINK, Tokenizer
from nemojax.data.tools import (
    END_TOOLCALL,
    TOOLCALL,
    may_begin_bare_call,
    parse_calls,
    parse_tagged_calls,
    read_tagged_calls,
)
from nemojax.generate.jobs import ThinkingBudget
from nemojax.generate.protocol import ToolCall

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token of SentencePiece that is one byte


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token adds to a text, in UTF-8 that may begin or end within a character.

    A special token, which adds nothing, gives its name; an id beyond the vocabulary gives nothing.
    """
    name = tokenizer.token(token)
    if name is None:
        return b""
    if token in tokenizer.special_ids:
        return name.encode()
    if tokenizer.byte_level:
        return _bytes_of_letters(name)
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """`token_bytes` for a reader: bytes that are no whole character become U+FFFD."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


@functools.cache
def _letters() -> dict[str, int]:
    """The letter of each byte in a byte-level vocabulary: printable Latin-1 stands for itself, the rest for
    the characters from U+0100 on (Radford et al., 2019, GPT-2's code)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _bytes_of_letters(name: str) -> bytes:
    letters = _letters()
    try:
        return bytes([letters[letter] for letter in name])
    except KeyError:  # an added token may hold anything: it stands for itself
        return name.encode()


class _Decoder(Protocol):
    """Ids to text, one at a time."""

    def push(self, token: int) -> tuple[int, str]:
        """The place in the text of the first character that the token has a part in, and what is now
        certain of the text."""
        ...

    def finish(self) -> str:
        """What was waiting for more tokens."""
        ...


class _ByteDecoder:
    """Byte-level vocabularies: the tokens' bytes, cut into characters as they become whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def push(self, token: int) -> tuple[int, str]:
        written = b"" if token in self._tokenizer.special_ids else token_bytes(self._tokenizer, token)
        if not written:
            return self._count, ""
        first = self._utf8.decode(written[:1])  # alone, to see whose character it belongs to
        waits = bool(self._utf8.getstate()[0])
        start = self._count + len(first) - (0 if waits else 1)
        text = first + self._utf8.decode(written[1:])
        self._count += len(text)
        return start, text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other vocabulary: each piece is decoded with the piece before it, whose text is taken off again.

    A run of single-byte tokens is one piece: SentencePiece decodes it as a whole or not at all.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._run: list[int] = []
        self._count = 0

    def push(self, token: int) -> tuple[int, str]:
        name = self._tokenizer.token(token)
        if name is None or token in self._tokenizer.special_ids:
            return self._count, ""
        if _BYTE.fullmatch(name):
            self._run.append(token)
            return self._count, ""
        run = self.finish()
        return self._count, run + self._settle([token])

    def finish(self) -> str:
        run, self._run = self._run, []
        return self._settle(run) if run else ""

    def _settle(self, piece: list[int]) -> str:
        known = self._tokenizer.decode(self._before)
        text = self._tokenizer.decode([*self._before, *piece])[len(known) :]
        self._before = piece
        self._count += len(text)
        return text


def _partial_end(text: str, words: Iterable[str]) -> int:
    """Length of the longest end of a text that begins one of the words but is not all of it."""
    longest = 0
    for word in words:
        for size in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:size]):
                longest = size
                break
    return longest


class TextStream:
    """The text of ids as it becomes certain, up to the first stop string that is complete.

    All pieces together are `tokenizer.decode(ids)` cut before that stop string (of two that end at one
    character, the longer counts), however the ids were split into feeds. A token costs the same at any
    length.

    `stopped`: a stop string has occurred; what is fed afterwards is ignored.
    `kept`: how many leading tokens are certain to have a part in the text (all of them after a `flush`
    without a stop string): ids and log-probabilities are cut to it, and stream up to it.
    `offsets`: for each token fed, the place in the text of the first character that it has a part in.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: expected strings of at least one character, got {stop!r:.80}")
        self.stopped = False
        self.kept = 0
        self.offsets: list[int] = []
        self._stop = tuple(dict.fromkeys(stop))
        self._decoder: _Decoder = (_ByteDecoder if tokenizer.byte_level else _WindowDecoder)(tokenizer)
        self._held = ""
        self._length = 0

    def feed(self, tokens: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            offset, text = self._decoder.push(int(token))
            self.offsets.append(offset)
            pieces.append(self._release(text))
        self._count_kept()
        return "".join(pieces)

    def flush(self) -> str:
        """The rest of the text, when no token will follow."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
            self.kept = len(self.offsets)
        else:
            self._count_kept()
        return text

    def _release(self, text: str) -> str:
        if not text:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)[1]
        else:
            end = len(text) - _partial_end(text, self._stop)
        self._held = text[end:]
        self._length += end
        return text[:end]

    def _count_kept(self) -> None:
        while self.kept < len(self.offsets) and self.offsets[self.kept] < self._length:
            self.kept += 1


class _Stripped:
    """Pieces of a text -> pieces of the text without white space at its ends."""

    def __init__(self):
        self._begun = False
        self._space: list[str] = []

    def feed(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
        if not text:
            return ""
        self._begun = True
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return ""
        out = "".join([*self._space, body])
        self._space = [text[len(body) :]]
        return out


class ReasoningStream:
    """Pieces of an answer -> pieces of its reasoning and of what is left for the reader.

    `opened`: the prompt ends in `<think>` (`opens_thinking`), so the answer begins with reasoning.
    `found`: there is reasoning, be it empty.

    All pieces together are `split_thinking(text)` (of `THINK + text` when opened) for what models write:
    at most one `<think>` at the beginning and one `</think>` after it. It cannot take back what it gave, so
    it differs where that reads on to the end first: text before a late `<think>` stays content, the first
    `</think>` ends the reasoning and further ones are content, and one without a `<think>` is content.
    """

    def __init__(self, opened: bool = False):
        self.found = opened
        self._inside, self._over = opened, False
        self._held = ""
        self._reasoning, self._content = _Stripped(), _Stripped()

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that have become certain with this piece."""
        text = self._held + text
        reasoning = content = ""
        if not self.found:
            content, tag, text = self._upto(text, THINK)
            self.found = self._inside = tag
        if self._inside:
            reasoning, tag, text = self._upto(text, END_THINK)
            self._inside, self._over = not tag, tag
        if self._over:
            content, text = content + text, ""
        self._held = text
        return self._reasoning.feed(reasoning), self._content.feed(content)

    def flush(self) -> tuple[str, str]:
        """What was held back in case it became a tag."""
        text, self._held = self._held, ""
        return (self._reasoning.feed(text), "") if self._inside else ("", self._content.feed(text))

    @staticmethod
    def _upto(text: str, tag: str) -> tuple[str, bool, str]:
        """(text before the tag, whether it is there, what follows or may become it)."""
        before, found, after = text.partition(tag)
        if found:
            return before, True, after
        end = len(text) - _partial_end(text, (tag,))
        return text[:end], False, text[end:]


class ToolStream:
    """Pieces of content -> pieces of it without tool calls, and each call as soon as it is whole.

    All of it together is `parse_tool_calls` of the whole. What looks like a call is held back until it is
    one, and comes out as content at the end, if it never is.
    """

    def __init__(self):
        self._held = ""
        self._at_start = True
        self._content = _Stripped()

    def feed(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """(content, calls) that have become certain with this piece."""
        self._held += text
        if self._at_start and may_begin_bare_call(self._held):
            return "", ()
        self._at_start = False
        content: list[str] = []
        calls: list[ToolCall] = []
        while self._held:
            at = self._held.find(TOOLCALL)
            end = at if at >= 0 else len(self._held) - _partial_end(self._held, (TOOLCALL,))
            content.append(self._held[:end])
            self._held = self._held[end:]
            if at < 0:
                break
            begun = self._held[len(TOOLCALL) :].lstrip()
            if begun and begun[0] not in "[{":  # the tag is only talked about
                content.append(TOOLCALL)
                self._held = self._held[len(TOOLCALL) :]
                continue
            whole = read_tagged_calls(self._held, 0) if END_TOOLCALL in begun else None
            if whole is None or not self._held.endswith(END_TOOLCALL, 0, whole[1]):
                break
            calls += [ToolCall(*call) for call in whole[0]]
            self._held = self._held[whole[1] :]
        return self._content.feed("".join(content)), tuple(calls)

    def flush(self) -> tuple[str, tuple[ToolCall, ...]]:
        """What was held back: calls, or else content."""
        content, calls = (parse_calls if self._at_start else parse_tagged_calls)(self._held)
        self._held = ""
        return self._content.feed(content), tuple(ToolCall(*call) for call in calls)


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """(what is left for the reader, the calls) of an answer's content. Never raises: what does not parse
    stays."""
    content, calls = parse_calls(text)
    return content, tuple(ToolCall(*call) for call in calls)


def thinking_budget(tokenizer: Tokenizer, tokens: int) -> ThinkingBudget:
    """At most `tokens` of reasoning, in the ids of this tokenizer.

    A tag that is one token closes the reasoning as it stands, which is how `answer_with_thinking` writes
    what our models learn from. A tag of several tokens gets a line of its own, as the models that spell it
    write it: behind a word its first character would belong to another token than `end` has. For the same
    reason the end of a reasoning that such a model closes in mid-line goes unseen by a budget of ids.
    ValueError for a negative number or a vocabulary that cannot spell the tags.
    """
    if tokens < 0:
        raise ValueError(f"thinking_budget: expected 0 or more tokens, got {tokens}")
    start, end = tuple(tokenizer.encode(THINK)), tuple(tokenizer.encode(END_THINK))
    for tag, ids in ((THINK, start), (END_THINK, end)):
        if tokenizer.decode(ids).strip() != tag:
            raise ValueError(f"{tokenizer.path}: expected a vocabulary that spells {tag}, for a budget")
    newline = () if len(end) == 1 else tuple(tokenizer.encode("\n"))
    return ThinkingBudget(tokens, start, end, (*newline, *end))
