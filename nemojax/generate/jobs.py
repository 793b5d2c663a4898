"""What the engine is asked and what it says: token ids in, token ids out, no text.

Shape letter: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax
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


class ThinkingCounter:
    """Counts the tokens of one sequence between the think tags, as far as its budget asks."""

    def __init__(self, budget: ThinkingBudget, prompt: tuple[int, ...]):
        self._budget, self._used = budget, 0
        self._longest = max(len(budget.start), len(budget.end))
        self._inside, self._tail = False, []
        self.feed(prompt)
        self._used = 0

    def feed(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tail = [*self._tail[1 - self._longest :], token] if self._longest > 1 else [token]
            self._used += self._inside
            if self._ends_with(self._budget.start):
                self._inside = True
            elif self._ends_with(self._budget.end):
                self._inside = False

    def _ends_with(self, ids: tuple[int, ...]) -> bool:
        return tuple(self._tail[-len(ids) :]) == ids

    @property
    def exhausted(self) -> bool:
        return self._inside and self._used >= self._budget.tokens

    @property
    def room(self) -> int:
        """Tokens that can come, whatever they are, before a look is due; at least 1."""
        return max(1, self._budget.tokens - self._used)


def job_key(seed: int, sample: int = 0) -> tuple[int, int]:
    """The key of a sample: that of `fold_in(key(seed), sample)`, for seeds in [0, 2**32)."""
    high, low = np.asarray(_key_words(np.uint32(seed), np.uint32(sample))).tolist()
    return high, low


@jax.jit
def _key_words(seed: jax.Array, sample: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), sample))
