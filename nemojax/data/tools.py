"""Tools as OpenAI describes them, and the calls that a model writes.

Calls stand in `<TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>` (Llama-Nemotron's convention,
which the chat template teaches), or the whole answer is `{"name": ..., "parameters": {...}}` (Llama 3.1's).
Whatever is not exactly that is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TOOLCALL, END_TOOLCALL = "<TOOLCALL>", "</TOOLCALL>"
MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SPACE = re.compile(r"[ \t\r\n]*")
_BARE_KEYS = {"type", "id", "name", "parameters", "arguments"}

Tool = Mapping[str, Any]


class Call(NamedTuple):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


def check_tools(tools: Any, where: str = "tools") -> None:
    """ValueError unless these are OpenAI's {"type": "function", "function": {"name", ...}}, names apart."""
    if not isinstance(tools, Sequence) or isinstance(tools, str) or len(tools) > MAX_TOOLS:
        raise ValueError(f"{where}: expected a list of at most {MAX_TOOLS} tools, got {tools!r:.80}")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise ValueError(
                f'{where}[{index}]: expected {{"type": "function", "function": {{...}}}}, got {tool!r:.80}'
            )
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}[{index}]: expected a name of at most 64 letters, digits, dots, dashes and "
                f"underscores, got {name!r:.80}"
            )
        if name in names:
            raise ValueError(f"{where}[{index}]: expected every name once, got {name!r} again")
        if not isinstance(function.get("description"), str | None):
            raise ValueError(f"{where}[{index}]: expected a description that is text, got {function!r:.80}")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ValueError(f"{where}[{index}]: expected parameters to be a schema, got {parameters!r:.80}")
        names.add(name)


def tool_name(tool: Tool) -> str:
    """The name of a checked tool."""
    return tool["function"]["name"]


def tools_that_must_be_called(tools: Sequence[Tool], tool_choice: Any) -> tuple[Tool, ...]:
    """Of which tools one has to be called; none for "auto" and "none". ValueError for an unknown choice."""
    if tool_choice in ("auto", "none", None):
        return ()
    if tool_choice == "required":
        if not tools:
            raise ValueError("tool_choice: expected tools with 'required', got none")
        return tuple(tools)
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(
            'tool_choice: expected "none", "auto", "required" or {"type": "function", "function": '
            f'{{"name": ...}}}}, got {tool_choice!r:.80}'
        )
    chosen = tuple(tool for tool in tools if tool_name(tool) == name)
    if not chosen:
        known = ", ".join(map(tool_name, tools)) or "none"
        raise ValueError(f"tool_choice: expected the name of a tool ({known}), got {name!r:.80}")
    return chosen


def call_of_message(call: Any, where: str) -> Call:
    """One of a message's `tool_calls`; its arguments may be JSON text or an object.

    ValueError for anything else.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ValueError(
            f'{where}: expected tool_calls like {{"function": {{"name": ..., "arguments": ...}}}}, '
            f"got {call!r:.80}"
        )
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    if not isinstance(_decoded(text or "{}"), dict):
        raise ValueError(
            f"{where}: expected arguments of {name} that are a JSON object, got {arguments!r:.80}"
        )
    return Call(name, text or "{}")


def parse_calls(text: str) -> tuple[str, tuple[Call, ...]]:
    """(what is left for the reader, the calls) of an answer; what does not parse is left. Never raises."""
    bare = parse_bare_calls(text)
    if bare:
        return "", bare
    left, calls = parse_tagged_calls(text)
    return left.strip(), calls


def parse_tagged_calls(text: str) -> tuple[str, tuple[Call, ...]]:
    """(the text around, the calls) of all `<TOOLCALL>[...]</TOOLCALL>`; the end of the text closes too."""
    left, calls, start, at = [], [], 0, 0
    while (at := text.find(TOOLCALL, at)) >= 0:
        found = read_tagged_calls(text, at)
        if found is None:
            at += len(TOOLCALL)
            continue
        left.append(text[start:at])
        calls += found[0]
        start = at = found[1]
    return "".join([*left, text[start:]]), tuple(calls)


def read_tagged_calls(text: str, at: int) -> tuple[list[Call], int] | None:
    """The calls of the block whose tag stands at `at`, and where it ends; None if it is not a whole one."""
    try:
        calls, at = _read_list(text, at + len(TOOLCALL))
    except (ValueError, RecursionError):
        return None
    at = _skip(text, at)
    if text.startswith(END_TOOLCALL, at):
        return calls, at + len(END_TOOLCALL)
    return (calls, at) if at == len(text) else None


def parse_bare_calls(text: str) -> tuple[Call, ...]:
    """The calls of a text that is nothing but {"name", "parameters"}, or several with `;` between."""
    calls, at = [], 0
    try:
        while at < len(text) or not calls:
            call, keys, at = _read_object(text, at)
            if call is None or not keys <= _BARE_KEYS or not keys & {"parameters", "arguments"}:
                return ()
            calls.append(call)
            at = _skip(text, at)
            if text.startswith(";", at):
                at = _skip(text, at + 1)
    except (ValueError, RecursionError):
        return ()
    return tuple(calls)


def may_begin_bare_call(text: str) -> bool:
    """Whether a text that begins like this can still become a bare call."""
    at = _skip(text, 0)
    if at == len(text):
        return True
    if text[at] != "{":
        return False
    rest = text[_skip(text, at + 1) :]
    keys = [f'"{key}"' for key in _BARE_KEYS]
    return any(rest.startswith(key) or key.startswith(rest) for key in keys)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _decoded(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        value = _DECODER.decode(text)
        text.encode()  # half a surrogate pair can be decoded but never sent
    except (ValueError, RecursionError):
        return None
    return value


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"expected {mark} at {at}")
    return at + len(mark)


def _read_list(text: str, at: int) -> tuple[list[Call], int]:
    """[call, ...] or one call alone, from `at`, and where it ends. ValueError for anything else."""
    single = text.startswith("{", _skip(text, at))
    at = at if single else _expect(text, at, "[")
    calls = []
    while True:
        call, _, at = _read_object(text, at)
        if call is None:
            raise ValueError(f"expected a call before {at}")
        calls.append(call)
        if single:
            return calls, at
        at = _skip(text, at)
        if text.startswith("]", at):
            return calls, at + 1
        at = _expect(text, at, ",")


def _read_object(text: str, at: int) -> tuple[Call | None, set[str], int]:
    """The call that the object from `at` is (None: none), its keys, and where it ends.

    Values are kept as they were written: numbers and escapes reach the tool unchanged.
    """
    at = _skip(text, _expect(text, at, "{"))
    values: dict[str, str] = {}
    while not text.startswith("}", at):
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError(f"expected a key before {at}")
        start = _skip(text, _expect(text, at, ":"))
        _, at = _DECODER.raw_decode(text, start)
        values[key] = text[start:at]
        at = _skip(text, at)
        if not text.startswith("}", at):
            at = _skip(text, _expect(text, at, ","))
            if text.startswith("}", at):
                raise ValueError(f"expected a key at {at}")
    return _as_call(values), set(values), at + 1


def _as_call(values: Mapping[str, str]) -> Call | None:
    name = _decoded(values.get("name", ""))
    written = values.get("arguments", values.get("parameters", "{}"))
    given = _decoded(written)
    if isinstance(given, str):  # JSON text within JSON text, as OpenAI's clients write it
        written = given or "{}"
        given = _decoded(written)
    if not isinstance(name, str) or not name or not isinstance(given, dict):
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return Call(name, written)
