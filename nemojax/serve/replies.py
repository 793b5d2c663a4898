"""What the server answers: OpenAI's objects. A field that was not set is left out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def json_text(self) -> str:
        return self.model_dump_json(exclude_unset=True, by_alias=True)


class PromptDetails(Reply):
    cached_tokens: int


class CompletionDetails(Reply):
    reasoning_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Reply):
    name: str = ""
    arguments: str


class CalledTool(Reply):
    index: int = 0
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Reply):
    """Of a whole answer, or what a chunk adds to one."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] = []
    refusal: None = None


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    token_ids: list[int] = []


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []


class ChatChunkChoice(Reply):
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    token_ids: list[int] = []


class ChatChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class Completion(Reply):
    """Whole, or a chunk of a stream, whose last has the usage alone."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="tokens of prompt and answer together")


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class ScoreUsage(Reply):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class Score(Reply):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(Reply):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: ScoreUsage


class Health(Reply):
    status: Literal["ok"]


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    error: ErrorBody


def json_of(reply: Reply) -> Any:
    return reply.model_dump(mode="json", exclude_unset=True, by_alias=True)
