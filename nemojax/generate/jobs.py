"""What the engine is asked and what it says: token ids in, token ids out, no text.

Shape letter: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from nemojax.generate.sampling import SamplingConfig

MAX_TOP_LOGPROBS = 20
Finish = Literal["stop", "length"]


class Constraint(Protocol):
    """A grammar that a completion must obey, with the state of one completion."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool [V]. A complete text allows what ends a sequence."""
        ...

    def advance(self, token: int) -> None:
        """The completion has gone on with `token`."""
        ...


@dataclass(frozen=True)
class ThinkingBudget:
    """At most `tokens` between `start` and `end` (the ids of `<think>` and `</think>`): then `close` is
    written for the model, which goes on from there. `close` ends with `end`."""

    tokens: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    close: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One sequence to be continued.

    `key`: the two words of its own PRNG key (`job_keys`); the token at position p is drawn with
    `fold_in(key, p)`, so what else is in the batch changes nothing. `stop_ids` end the sequence and are its
    last token. `top_logprobs`: how many of the likeliest tokens to report at each step (at most 20).
    `constraint` makes the grammar's state anew for every job.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    key: tuple[int, int] = (0, 0)
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    constraint: Callable[[], Constraint] | None = None
    budget: ThinkingBudget | None = None


class Event(NamedTuple):
    """News of a job: tokens since the last event, the log-probability (nats) of each under exactly the
    distribution it was drawn from (0 for a token that was forced), and when asked for the likeliest tokens
    of each step, [(id, log-probability), ...] from the likeliest down.

    `finish`: None while it goes on; "stop" for a stop id, "length" for `max_new_tokens` or the context.
    `cached`: tokens of the prompt that were taken from the cache instead of being read.
    """

    job: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: Finish | None
    cached: int
