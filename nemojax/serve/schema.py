"""What clients may ask: OpenAI's request bodies, with vLLM's names for what OpenAI has none for.

A field that we cannot honour is refused unless it holds its default, which asks for nothing; one that cannot
change an answer is accepted and ignored. Whatever has no name here is refused: a misspelt field silently
dropped would be an answer to another question.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Text = Annotated[str, StringConstraints(min_length=1)]


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("expected finite numbers in it") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
Ignored = Annotated[Any, Field(description="accepted and ignored: it cannot change the answer")]


class Refused:
    """The type of a field that we cannot honour: it may only hold what asks for nothing."""

    def __init__(self, hint: str, *harmless: Any):
        self._hint, self._harmless = hint, [None, *harmless]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def check(value: Any) -> Any:
            if not any(value == h and isinstance(value, bool) == isinstance(h, bool) for h in self._harmless):
                raise ValueError(f"not supported by this server; {self._hint}")
            return value

        return pydantic_core.core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {"enum": self._harmless, "description": f"not supported; {self._hint}"}


class Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class Sampling(Fields):
    """What both kinds of completion have in common."""

    model: str
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | list[Text] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="0 or -1 keeps all")] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    frequency_penalty: Annotated[Any, Refused("use repetition_penalty", 0)] = None
    presence_penalty: Annotated[Any, Refused("use repetition_penalty", 0)] = None
    logit_bias: Annotated[Any, Refused("leave it out", {})] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream to be true with it; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Fields):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class FunctionCall(Fields):
    name: Name
    arguments: str


class ToolCall(Fields):
    id: str
    type: Literal["function"]
    function: FunctionCall


class SystemMessage(Fields):
    role: Literal["system", "developer"]
    content: Content
    name: Ignored = None


class UserMessage(Fields):
    role: Literal["user"]
    content: Content
    name: Ignored = None


class AssistantMessage(Fields):
    """A turn of the model's, as it came in a response; its reasoning is not read again."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    name: Ignored = None
    annotations: Ignored = None
    refusal: Annotated[Any, Refused("this model's turns have no refusal")] = None
    audio: Annotated[Any, Refused("this model reads text")] = None
    function_call: Annotated[Any, Refused("use tool_calls")] = None

    @model_validator(mode="after")
    def _says_something(self):
        if self.content is None and self.tool_calls is None:
            raise ValueError("expected content or tool_calls in the assistant's message, got neither")
        return self


class ToolMessage(Fields):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: Ignored = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Fields):
    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    name: Name


class NamedTool(Fields):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Fields):
    name: Name
    schema_: JsonObject = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class PlainFormat(Fields):
    type: Literal["text", "json_object"]


class SchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class TemplateKwargs(Fields):
    thinking: bool | None = None


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None

    # of models with a thinking toggle
    chat_template_kwargs: TemplateKwargs | None = None
    thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, lt=2**31, description="tokens")] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, lt=2**31, description="vLLM's name")] | None = None

    parallel_tool_calls: Ignored = None
    verbosity: Annotated[Any, Refused("ask for it in the system text", "medium")] = None
    reasoning_effort: Annotated[Any, Refused("use thinking and thinking_budget")] = None
    modalities: Annotated[Any, Refused("this model writes text", ["text"])] = None
    audio: Annotated[Any, Refused("this model writes text")] = None
    prediction: Annotated[Any, Refused("leave it out")] = None
    functions: Annotated[Any, Refused("use tools")] = None
    function_call: Annotated[Any, Refused("use tool_choice")] = None
    web_search_options: Annotated[Any, Refused("leave it out")] = None
    moderation: Annotated[Any, Refused("leave it out")] = None

    @model_validator(mode="after")
    def _agrees(self):
        _same("max_tokens", self.max_tokens, "max_completion_tokens", self.max_completion_tokens)
        _same("thinking_budget", self.thinking_budget, "thinking_token_budget", self.thinking_token_budget)
        kwargs = self.chat_template_kwargs
        _same("thinking", self.thinking, "chat_template_kwargs.thinking", kwargs and kwargs.thinking)
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true with it")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: expected functions with different names")
        match self.tool_choice:
            case NamedTool(function=FunctionName(name=name)) if name not in names:
                raise ValueError(f"tool_choice: expected one of the tools, got {name!r}")
            case "required" if not names:
                raise ValueError("tool_choice: expected tools with it, got none")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def toggle(self) -> bool | None:
        kwargs = self.chat_template_kwargs
        return kwargs.thinking if self.thinking is None and kwargs is not None else self.thinking

    @property
    def budget(self) -> int | None:
        return self.thinking_token_budget if self.thinking_budget is None else self.thinking_budget


Prompt = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)


class CompletionRequest(Sampling):
    """The body of POST /v1/completions: text is continued after BOS, ids as they are."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[Any, Refused("the prompt is not repeated", False)] = None
    suffix: Annotated[Any, Refused("this model writes forward", "")] = None
    best_of: Annotated[Any, Refused("use n and choose yourself", 1)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        given = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]  # pyright: ignore[reportReturnType]
        return list(given)  # pyright: ignore[reportReturnType]


class ScoreRequest(Fields):
    """The body of POST /v1/score: pairs of what was asked and what was answered, or whole conversations."""

    model: str
    text_1: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    text_2: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1)]
        | Annotated[list[Annotated[list[Message], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = None
    user: Ignored = None
    priority: Ignored = None

    @model_validator(mode="after")
    def _one_form(self):
        if (self.text_1 is None) != (self.text_2 is None) or (self.text_1 is None) == (self.messages is None):
            raise ValueError("expected either text_1 and text_2, or messages")
        if self.text_1 is not None and self.text_2 is not None:
            left, right = _listed(self.text_1), _listed(self.text_2)
            if len(left) not in (1, len(right)):
                raise ValueError(f"text_1: expected 1 or {len(right)} texts (as text_2), got {len(left)}")
        return self

    @property
    def conversations(self) -> list[list[Message]]:
        if self.messages is not None:
            nested = isinstance(self.messages[0], list)
            return self.messages if nested else [self.messages]  # pyright: ignore[reportReturnType]
        asked, answered = _listed(self.text_1 or ""), _listed(self.text_2 or "")
        asked = asked * len(answered) if len(asked) == 1 else asked
        return [
            [UserMessage(role="user", content=a), AssistantMessage(role="assistant", content=b)]
            for a, b in zip(asked, answered, strict=True)
        ]


def _same(first: str, a: Any, second: str, b: Any) -> None:
    if a is not None and b is not None and a != b:
        raise ValueError(f"{first}: expected the same as {second} or only one of them, got {a} and {b}")


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
