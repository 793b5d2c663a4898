"""Grammars that a completion must obey: JSON of a schema, and tool calls.

A grammar is text in llguidance's Lark dialect, over the bytes that tokens stand for: it knows no
tokenizer. `compile_grammar` joins the two. Shape letter: V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import llguidance
import numpy as np

from nemojax.data.tokenizer import END_THINK, THINK, Tokenizer
from nemojax.data.tools import (
    END_TOOLCALL,
    TOOLCALL,
    Tool,
    check_tools,
    tool_name,
    tools_that_must_be_called,
)
from nemojax.generate.jobs import Constraint
from nemojax.generate.text import token_bytes

MAX_CALLS = 16  # a model that likes to call goes on until its tokens run out
# Nothing, a space, or a new line with its indentation: a model that loops on white space gets nowhere.
WHITESPACE = r" |\n {0,16}"
# "none": the answer begins with what is constrained. "optional": it may think first. "opened": the prompt
# ends in `<think>`, so it is thinking already.
Reasoning = Literal["none", "optional", "opened"]
_STARTS: dict[Reasoning, str] = {"none": "body", "optional": "thought? body", "opened": "rest body"}


def json_grammar(schema: Mapping[str, Any], reasoning: Reasoning = "none") -> str:
    """JSON that a schema describes; {} stands for any object. ValueError if it has no grammar."""
    return _grammar(f"body: {_json(schema, 'json_schema')}\n", reasoning)


def tool_grammar(
    tools: Sequence[Tool], tool_choice: Any, reasoning: Reasoning = "none", max_calls: int = MAX_CALLS
) -> str:
    """1 to `max_calls` calls of the tools that `tool_choice` asks for, in the tags that the template teaches,
    their arguments as each tool's schema has them; exactly one call of a tool chosen by name.

    ValueError for tools, a choice or a schema that are none, and for a choice that asks for nothing
    (`tools_that_must_be_called`).
    """
    check_tools(tools)
    chosen = tools_that_must_be_called(tools, tool_choice)
    if not chosen:
        raise ValueError(
            f"tool_choice: expected 'required' or a tool's name, for a grammar, got {tool_choice!r}"
        )
    more = 0 if isinstance(tool_choice, Mapping) else max_calls - 1
    others = f" ({_literal(', ')} call){{0,{more}}}" if more else ""
    lines = [
        f"body: {_literal(TOOLCALL + '[')} call{others} {_literal(']' + END_TOOLCALL)}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(chosen))),
    ]
    for i, tool in enumerate(chosen):
        head = _literal(f'{{"name": "{tool_name(tool)}", "arguments": ')
        lines.append(f"call_{i}: {head} arguments_{i} {_literal('}')}")
        lines.append(f"arguments_{i}: {_json(_parameters(tool), f'tools: {tool_name(tool)}')}")
    return _grammar("\n".join(lines) + "\n", reasoning)


def compile_grammar(tokenizer: Tokenizer, grammar: str, vocab_size: int) -> Callable[[], Constraint]:
    """What makes a constraint for each new completion, over `vocab_size` ids (at least the tokenizer's).

    ValueError for a grammar that is none, or that goes beyond llguidance's limits.
    """
    known = _tokens(tokenizer, vocab_size)
    first = llguidance.LLMatcher(known, grammar, log_level=0)
    if first.is_error():
        raise ValueError(f"grammar: expected one that compiles, got {_one_line(first.get_error())}")
    return lambda: _Matcher(first.deep_copy(), tokenizer, vocab_size)


class _Matcher:
    """The state of one completion (see `Constraint`).

    A grammar that grows beyond llguidance's limits ends the text where it is, and so does a token that was
    forced on the completion against it: from there on only what ends a sequence is allowed.
    """

    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: Tokenizer, vocab_size: int):
        self._matcher = matcher
        self._special = np.fromiter(tokenizer.special_ids, np.int64)
        self._ends = np.asarray(tokenizer.eos_ids)
        self._vocab_size = vocab_size
        self._allowed_V: np.ndarray | None = None

    def allowed(self) -> np.ndarray:
        """bool [V]."""
        if self._allowed_V is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed_V = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
            # the free text of a reasoning takes any bytes, and special tokens are bytes to llguidance
            allowed_V[self._special] = False
            allowed_V[self._ends] = self._matcher.is_accepting() or self._matcher.is_stopped()
            self._allowed_V = allowed_V
        return self._allowed_V

    def advance(self, token: int) -> None:
        """Goes on with a token; an end of sequence changes nothing."""
        self._allowed_V = None
        if token not in self._ends:
            self._matcher.consume_token(token)


@functools.lru_cache(maxsize=4)
def _tokens(tokenizer: Tokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    """The vocabulary as llguidance wants it. Kept: a large one takes long to sort."""
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Vocabulary(tokenizer)),
        n_vocab=vocab_size,
        eos_token=list(tokenizer.eos_ids),
    )


class _Vocabulary:
    """The attributes that llguidance reads: the bytes of every token, so that think tags that are tokens
    are no different from think tags that are spelled."""

    def __init__(self, tokenizer: Tokenizer):
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eot_id
        self.special_token_ids = sorted(tokenizer.special_ids | set(tokenizer.eos_ids))
        self.tokens = [token_bytes(tokenizer, token) for token in range(tokenizer.vocab_size)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _grammar(body: str, reasoning: Reasoning) -> str:
    lines = [f"start: {_STARTS[reasoning]}"]
    if reasoning != "none":
        lines += [
            f"thought: {_literal(THINK)} rest",
            "rest: free GAP",
            f"free[suffix={_literal(END_THINK)}]: ANY",
            r"GAP: /[ \n]{0,4}/",
            # all but what no character is: any bytes, for a budget may cut a character in two
            r"ANY: ~/[^\s\S]/",
        ]
    return "\n".join([*lines, body])


def _literal(text: str) -> str:
    return json.dumps(text)


def _json(schema: Mapping[str, Any], where: str) -> str:
    """A schema inside of a grammar. ValueError, `where` in front, if it cannot be."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}: expected a JSON schema, got {schema!r:.80}")
    try:
        text = json.dumps(
            (dict(schema) or {"type": "object"}) | {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON schema, got one that is not JSON ({error})") from error
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(f"start: %json {text}")
    if failed:
        raise ValueError(f"{where}: expected a schema that can constrain, got {_one_line(messages[0])}")
    return f"%json {text}"


def _parameters(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments, always of an object; a function without one takes none."""
    parameters = tool["function"].get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if parameters.get("type", "object") != "object":
        raise ValueError(
            f"tools: {tool_name(tool)}: expected parameters of type object, got {parameters['type']!r:.80}"
        )
    return {"type": "object", **parameters}


def _one_line(message: str) -> str:
    """What llguidance says, less the place in the grammar and the grammar itself."""
    text = message.split("\n   1 |")[0].split("\n<state>")[0]
    return " ".join(text.split("failed to compile JSON schema: ")[-1].split())[:200]
