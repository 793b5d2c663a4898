"""How to serve: what clients may ask for, and what they get who do not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemojax.config import field
from nemojax.generate.engine import EngineConfig
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import Compute
from nemojax.sharding import MeshConfig


@dataclass(frozen=True)
class Limits:
    """Beyond these a request is refused: with 413 for its size, 429 for a full queue, else 400."""

    body: int = field(4 * 2**20, "bytes of a request's body")
    tokens: int = field(32768, "max_tokens of a request")
    n: int = field(16, "samples of a prompt")
    prompts: int = field(64, "prompts of a completion, or conversations to be scored, in one request")
    stops: int = field(16, "stop strings, and stop ids")
    queue: int = field(256, "sequences that may wait for a slot; beyond that 429, try again")
    io_seconds: float = field(30.0, "seconds for a client to send its request, or to go on reading an answer")
    drain_seconds: float = field(30.0, "seconds for running requests to finish after SIGTERM")

    def __post_init__(self):
        for name in ("body", "tokens", "n", "prompts", "stops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.queue < 0:
            raise ValueError(f"queue: expected 0 or more, got {self.queue}")
        for name in ("io_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < 86400:
                raise ValueError(f"{name}: expected seconds of at most a day, got {getattr(self, name)}")


@dataclass(frozen=True)
class ServeConfig:
    """A server of one model."""

    engine: EngineConfig = field(EngineConfig(), "how sequences share the devices")
    draft: str | None = field(
        None, "artifact of a small model; it proposes tokens if speculation.kind is draft"
    )
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    limits: Limits = field(Limits(), "what clients may ask for")
    sampling: SamplingConfig = field(
        SamplingConfig(max_new_tokens=4096), "how tokens are drawn where a request does not say"
    )
    thinking: Literal["on", "off"] | None = field(
        None, "toggle of a chat where a request does not say; none leaves the system text alone"
    )
    reward_token: int = field(0, "/v1/score: the token whose logit after a conversation is its reward")
    warm: bool = field(True, "compile what prompts of usual lengths need before the first request")
    access_log: bool = field(False, "a line on standard error for every request")

    def __post_init__(self):
        if self.sampling.max_new_tokens > self.limits.tokens:
            raise ValueError(
                f"sampling.max_new_tokens: expected at most limits.tokens ({self.limits.tokens}), got "
                f"{self.sampling.max_new_tokens}"
            )
