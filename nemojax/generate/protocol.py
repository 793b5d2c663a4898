"""Text in, text out: the interface of everything that generates, here or on a server far away.

Curation, judging, evaluation and RL take a `Generator` and do not care which. Two exist: `LocalGenerator`
(generate/local.py), the engine in this process, and `RemoteGenerator` (generate/remote.py), any
OpenAI-compatible server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nemojax.generate.sampling import SamplingConfig

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Request:
    """One prompt, in exactly one of three forms, and how to answer it.

    `prompt`: raw text, continued after BOS; `tokens`: ids as they are; `messages`: a chat of
    {"role", "content"} (and in OpenAI's form tool_calls and tool results). `thinking` puts the toggle into
    the system text, None leaves it alone. Sample i of `n` draws with a key of `seed` and i. `stop` strings
    end the answer and are not part of it. `json_schema`: {} for any JSON object. `tools` are OpenAI's.
    """

    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    thinking: bool | None = None
    sampling: SamplingConfig = SamplingConfig()
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    thinking_budget: int | None = None
    json_schema: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"

    def __post_init__(self):
        given = [name for name in ("prompt", "tokens", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"request: expected one of prompt, tokens and messages, got {got}")
        if self.n < 1:
            raise ValueError(f"n: expected 1 or more, got {self.n}")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; `arguments` is JSON text, as it wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """One sample. `text` is all of it, `reasoning` what stood between the think tags (None without),
    `content` what is left for the reader. `tokens` and `logprobs` (nats, under the distribution sampled
    from) are None where a server does not tell; `top` is [(token text, log-probability), ...] a token."""

    text: str
    reasoning: str | None
    content: str
    finish_reason: FinishReason
    num_tokens: int
    prompt_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    top: tuple[tuple[tuple[str, float], ...], ...] = ()


class Generator(Protocol):
    """Answers requests, many at a time."""

    def answer(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The `n` answers of each request, in order. ValueError for a request that cannot be answered."""
        ...

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Answer]]]:
        """(index, its answers) of each request as soon as it is done, in any order."""
        ...
