"""Procedural problems with answers that can be checked: reasoning-gym's tasks, asked briefly.

The generators, their settings and the gold answers are reasoning-gym's; its prompts carry hundreds of
characters of instructions, so each family asks again from the entry's metadata and derives from the
same metadata a short line of working.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nemojax.data.chat import Conversation, answer_with_thinking, split_thinking
from nemojax.data.heldout import HELDOUT_BUCKETS, is_heldout
from nemojax.data.templates import (
    ask_base_conversion,
    ask_bits,
    ask_caesar,
    ask_chain_sum,
    ask_filter,
    ask_letters,
    ask_product,
    ask_rotate,
    ask_sort,
    ask_spell,
    ask_spiral,
)

Split = Literal["train", "heldout"]
Form = Literal["text", "answer", "trace", "both"]
Entry = dict[str, Any]
INTEGERS = {"min_decimals": 0, "max_decimals": 0}
WORDS = {"min_word_len": 3, "max_word_len": 6}
LONG_WORDS = {"min_word_len": 9, "max_word_len": 12}


@dataclass(frozen=True)
class Family:
    """One kind of problem: `dataset` and `settings` are reasoning-gym's, `ask` turns an entry into
    (prompt, working, answer)."""

    name: str
    dataset: str
    ask: Callable[[Entry], tuple[str, str, str]]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A question with one right answer and a line of working that leads to it."""

    family: str
    prompt: str
    trace: str
    answer: str


def _sorting(count: int) -> dict[str, Any]:
    return {"min_numbers": count, "max_numbers": count, "min_value": 0, "max_value": 99, **INTEGERS}


def _sum(terms: int, digits: int) -> dict[str, Any]:
    return {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}


FAMILIES: dict[str, Family] = {
    made.name: made
    for made in (
        Family("sort3", "number_sorting", ask_sort, _sorting(3)),
        Family("sort4", "number_sorting", ask_sort, _sorting(4)),
        Family("sort5", "number_sorting", ask_sort, _sorting(5)),
        Family("sum2x1", "chain_sum", ask_chain_sum, _sum(2, 1)),
        Family("sum2", "chain_sum", ask_chain_sum, _sum(2, 2)),
        Family("sum3", "chain_sum", ask_chain_sum, _sum(3, 2)),
        Family("spell", "spell_backward", ask_spell, WORDS),
        Family("spell_long", "spell_backward", ask_spell, LONG_WORDS),
        Family("letters", "letter_counting", ask_letters, {"min_words": 1, "max_words": 1}),
        Family(
            "base",
            "base_conversion",
            ask_base_conversion,
            {"min_base": 2, "max_base": 4, "min_value": 10, "max_value": 999},
        ),
        Family(
            "caesar",
            "caesar_cipher",
            ask_caesar,
            {"min_words": 1, "max_words": 2, "min_rotation": 1, "max_rotation": 25},
        ),
        Family("bits", "count_bits", ask_bits, {"min_n": 1024, "max_n": 32767}),
        Family(
            "filter",
            "number_filtering",
            ask_filter,
            {"min_numbers": 4, "max_numbers": 4, "min_value": 10, "max_value": 99, **INTEGERS},
        ),
        Family(
            "product",
            "products",
            ask_product,
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        ),
        Family("spiral3", "spiral_matrix", ask_spiral, {"min_n": 3, "max_n": 3}),
        Family(
            "rotate",
            "rotate_matrix",
            ask_rotate,
            {"min_n": 2, "max_n": 3, "min_rotations": 1, "max_rotations": 3},
        ),
    )
}


def family(name: str) -> Family:
    """A family by name; ValueError that lists the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"problems: unknown family {name!r}; known ones are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def entries(of: Family, seed: int) -> Iterator[Entry]:
    """reasoning-gym's entries of a family, without end.

    Its datasets seed entry i with `seed + i`, so neighbouring seeds would repeat each other; ours start
    at a hash of the seed.
    """
    import reasoning_gym

    start = int.from_bytes(hashlib.sha256(f"{of.name}:{seed}".encode()).digest()[:6], "big")
    for block in itertools.count():
        dataset = reasoning_gym.create_dataset(
            of.dataset, size=1024, seed=start + 1024 * block, **of.settings
        )
        for index in range(1024):
            yield dataset[index]


def make_problems(
    of: Family | str, num: int, seed: int, split: Split, heldout: int = HELDOUT_BUCKETS
) -> list[Problem]:
    """`num` different problems of one split.

    A prompt belongs to the held-out split when its hash falls into the first `heldout` of 100 buckets,
    whatever the seed, so no training set contains a held-out prompt. ValueError if the family is too
    small for that many.
    """
    of = family(of) if isinstance(of, str) else of
    found: dict[str, Problem] = {}
    share = heldout / 100 if split == "heldout" else 1 - heldout / 100
    patience, idle = int(2000 / max(share, 0.01)), 0
    endless = entries(of, seed)
    while len(found) < num and idle < patience:
        prompt, trace, answer = of.ask(next(endless))
        idle += 1
        if prompt not in found and is_heldout(f"{of.name}|{prompt}", heldout) == (split == "heldout"):
            found[prompt] = Problem(of.name, prompt, trace, answer)
            idle = 0
    if len(found) < num:
        raise ValueError(
            f"problems: expected {num} different {split} problems of {of.name}, found {len(found)}; "
            "ask for fewer or widen the family's settings"
        )
    return list(found.values())


def verify(problem: Problem, text: str) -> float:
    """1.0 if the answer (what follows the last `</think>`) is exactly right, apart from white space."""
    return float(split_thinking(text)[1].split() == problem.answer.split())


def commonest_answer_share(problems: Sequence[Problem]) -> float:
    """How often always giving the commonest answer would be right."""
    if not problems:
        return 0.0
    return Counter(p.answer for p in problems).most_common(1)[0][1] / len(problems)


def lines(problem: Problem, form: Form = "answer") -> list[str]:
    """The problem as plain text: `answer` "prompt answer", `trace` with the working between, or both."""
    short = f"{problem.prompt} {problem.answer}"
    long = f"{problem.prompt} {problem.trace} -> {problem.answer}"
    return {"text": [short], "answer": [short], "trace": [long], "both": [short, long]}[form]


def question(problem: Problem) -> list[dict[str, str]]:
    """The problem as the messages of a prompt."""
    return [{"role": "user", "content": problem.prompt}]


def conversation(problem: Problem, thinking: bool) -> Conversation:
    """The problem as a chat: with its working between think tags, or the bare answer."""
    text = answer_with_thinking(problem.trace, problem.answer) if thinking else problem.answer
    return Conversation((*question(problem), {"role": "assistant", "content": text}), thinking)


def conversations(problems: Sequence[Problem]) -> list[Conversation]:
    """Each problem twice, thinking on and off."""
    return [conversation(problem, thinking) for problem in problems for thinking in (True, False)]
