"""Questions asked of a model: a checkable problem in its chat form, and the grade of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.data import chat, problems
from nemojax.data.problems import Problem
from nemojax.data.tokenizer import Tokenizer
from nemojax.rewards.format import think_format

Thinking = Literal["on", "off", "both"]
MODES: dict[str, tuple[bool, ...]] = {"on": (True,), "off": (False,), "both": (True, False)}


@dataclass(frozen=True)
class ProblemSet:
    """Which problems to ask. Train and heldout prompts of a family never meet, whatever the seed."""

    families: tuple[str, ...] = field(("sum2",), "problem families")
    count: int = field(256, "problems of each family")
    split: Literal["train", "heldout"] = field("heldout", "the half of the prompts to draw from")
    seed: int = field(0, "seed of the generator")

    def __post_init__(self):
        if not self.families or self.count < 1:
            raise ValueError("families, count: expected at least one family and one problem")


@dataclass(frozen=True)
class Question:
    """A problem with the toggle set, as the ids a model reads."""

    problem: Problem
    thinking: bool
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Grade:
    """`accuracy` in [0, 1], None when the verifier failed; `form` 1.0 when the tags obey the toggle."""

    accuracy: float | None
    form: float

    def reward(self, format_weight: float) -> float:
        """(accuracy + format_weight * form) / (1 + format_weight) in [0, 1]; NaN when the verifier failed."""
        if self.accuracy is None:
            return float("nan")
        return (self.accuracy + format_weight * self.form) / (1 + format_weight)


def load_problems(cfg: ProblemSet) -> list[Problem]:
    """`cfg.count` problems of each family, family by family."""
    return [
        problem
        for name in cfg.families
        for problem in problems.make_problems(name, cfg.count, cfg.seed, cfg.split)
    ]


def ask(problem: Problem, thinking: bool, tokenizer: Tokenizer, arch: ArchSpec) -> Question:
    """The problem as a user's turn under the system line of the toggle."""
    ids = chat.encode_prompt(tokenizer, problems.question(problem), thinking, limit=arch.context - 1)
    return Question(problem, thinking, tuple(ids))


def grade(question: Question, text: str) -> Grade:
    """The verifier's verdict on a completion's text; a verifier that raises gives None, never 0."""
    try:
        accuracy = problems.verify(question.problem, text)
    except Exception:  # reasoning-gym's scorers parse whatever a model wrote
        accuracy = None
    return Grade(accuracy, think_format(text, question.thinking))


def text_of(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """What a user reads: the completion without special tokens, thinking tags kept."""
    return tokenizer.decode(tokens, skip_special=True)
