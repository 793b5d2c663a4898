"""A job under way: what of it has been read, what has come, and when it ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from nemojax.generate.jobs import Constraint, Event, Finish, Job, ThinkingCounter
from nemojax.generate.speculate import NgramIndex, Speculation


@dataclass(eq=False)
class Sequence:
    """`pending` are tokens still to be read, the first of them at `position`; when there are none, the last
    token is at `position` and its keys and values are not in the cache yet. `twins` wait until `leader` has
    read the prompt that they share. `limit`: new tokens at most.
    """

    id: int
    job: Job
    limit: int
    slot: int = -1
    position: int = 0
    cached: int = 0
    pending: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    twins: list[Sequence] = dataclasses.field(default_factory=list)
    leader: Sequence | None = None
    constraint: Constraint | None = None
    allowed: np.ndarray | None = None
    thinking: ThinkingCounter | None = None
    ngrams: NgramIndex | None = None

    @classmethod
    def make(cls, number: int, job: Job, limit: int, speculation: Speculation) -> Sequence:
        sequence = cls(number, job, limit)
        if job.constraint:
            sequence.constraint = job.constraint()
            sequence.allowed = sequence.constraint.allowed()
        if job.budget:
            sequence.thinking = ThinkingCounter(job.budget, job.prompt)
        if speculation.kind == "ngram":
            sequence.ngrams = NgramIndex(speculation, job.prompt)
        return sequence

    @property
    def left(self) -> int:
        return self.limit - len(self.tokens)

    @property
    def is_reading(self) -> bool:
        return bool(self.pending) and self.leader is None

    @property
    def is_running(self) -> bool:
        return not self.pending and self.leader is None

    def reads_for(self, other: Sequence) -> bool:
        """Whether it is reading the very prompt that another one waits for."""
        return self.is_reading and not self.tokens and self.job.prompt == other.job.prompt

    def held(self) -> np.ndarray:
        """The tokens whose keys and values lie in its slot."""
        if self.leader is not None:
            return np.zeros(0, np.int32)
        return np.asarray([*self.job.prompt, *self.tokens][: self.position], np.int32)

    def take(self, tokens: list[int], logprobs: list[float], top: list, after_reading: bool) -> Event:
        """New tokens, up to the one that ends it. The first after reading lies where reading ended."""
        finish: Finish | None = None
        for n, token in enumerate(tokens, 1):
            if token in self.job.stop_ids:
                finish = "stop"
            elif len(self.tokens) + n >= self.limit:
                finish = "length"
            if finish:
                tokens, logprobs, top = tokens[:n], logprobs[:n], top[:n]
                break
        self.position += len(tokens) - after_reading
        self._add(tokens)
        if finish is None:
            self._obey(tokens)
            # a grammar at its end, and no stop id that could say so
            finish = "stop" if self.allowed is not None and not self.allowed.any() else None
        return Event(self.id, tokens, logprobs, top, finish, self.cached)

    def close_thinking(self) -> Event | None:
        """When the budget is used up, writes the end of the reasoning for the model: it is read like a
        prompt, and the model goes on from there. None while there is no need, or no room."""
        if self.thinking is None or not self.thinking.exhausted:
            return None
        assert self.job.budget
        close = list(self.job.budget.close)
        if self.left <= len(close):
            return None
        self.pending = [self.tokens[-1], *close] if self.tokens else close
        self._add(close)
        self._obey(close)
        no_top = [[] for _ in close] if self.job.top_logprobs else []
        return Event(self.id, close, [0.0] * len(close), no_top, None, self.cached)

    def _obey(self, tokens: list[int]) -> None:
        """The grammar goes on with new tokens, forced ones too."""
        if self.constraint is not None:
            for token in tokens:
                self.constraint.advance(token)
            self.allowed = self.constraint.allowed()

    def _add(self, tokens: list[int]) -> None:
        self.tokens += tokens
        if self.ngrams:
            self.ngrams.extend(tokens)
        if self.thinking:
            self.thinking.feed(tokens)
