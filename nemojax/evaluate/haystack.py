"""Questions about texts of a length that is given in tokens, as RULER asks them.

The kinds of question, and how many needles, hops and repetitions they have, are RULER's (Hsieh et al.,
arXiv:2404.06654, section 3 and appendix B), question answering apart. The wording is ours and short, so that
short texts and small vocabularies will do: scores compare models with each other, not with published tables.

Shape letters: P pieces of a text, S places where sentences begin.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from nemojax.config import field
from nemojax.data.sources import Source, load_heldout, load_texts
from nemojax.data.tokenizer import Tokenizer

Task = Literal[
    "single", "multikey", "needles", "multivalue", "multiquery", "variables", "common_words", "frequent_words"
]
TASKS: tuple[Task, ...] = get_args(Task)
PLACED = ("single", "multikey", "needles")  # one needle is asked for, and stands at a depth

NOISE = "The river runs to the sea. The wind moves the trees. A cloud goes by. Then it is quiet again."
_PIECE = re.compile(r"\s*(?:\w+|[^\w\s]+)")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = len(_CONSONANTS) * len(_VOWELS)
_SEVERAL = 4  # keys, values or queries where there are several
_HOPS = 4
_COMMON, _OFTENER = 10, 10  # common words, and how much oftener than the others they occur
_REPEATS = (3, 2, 1)  # of the other words; fewer where the text is short
_DOTS, _FREQUENT = "...", 3  # most of a coded text is dots, which count for nothing
_FEWEST_CODED = 80  # words from which on the words in question are oftener than the next


@dataclass(frozen=True)
class HaystackConfig:
    """What is hidden, and in what."""

    kind: Literal["source", "noise"] = field("source", "texts of the source, or four sentences repeated")
    source: Source = field(
        Source(), "whose held-out texts are taken (all, where none are held out), repeated if too short"
    )
    values: Literal["numbers", "words"] = field("numbers", "what the needles hold")


@dataclass(frozen=True)
class Draft:
    """A question about a text that can grow: `write(n)` is the text with n units, `least` <= n <= `most`.

    The answer follows `cue`; all strings of `expected` belong to it, in their order in the text.
    """

    intro: str
    ask: str
    cue: str
    expected: tuple[str, ...]
    write: Callable[[int], str]
    least: int
    most: int


@dataclass(frozen=True, eq=False)
class Pieces:
    """A text in words and marks, each with the white space before it.

    `ends_P`: tokens before each piece, and behind the last. `stops_S`: pieces that begin a sentence. `known`:
    the words in lower case.
    """

    words: list[str]
    ends_P: np.ndarray
    stops_S: np.ndarray
    known: frozenset[str]

    def turned(self, rng: np.random.Generator) -> Pieces:
        """The same text begun at another sentence; what stood before it follows the end."""
        first = int(rng.choice(self.stops_S))
        return Pieces(
            self.words[first:] + self.words[:first],
            _ends(np.roll(np.diff(self.ends_P), -first)),
            np.sort((self.stops_S - first) % len(self.words)),
            self.known,
        )

    def hide(self, n: int, needles: Sequence[str], depths: Sequence[float] | np.ndarray) -> str:
        """The first n pieces, each needle between those two sentences that are nearest to its depth: 0 is the
        beginning of the text, 1 its end, measured in tokens."""
        stops_S = np.append(self.stops_S[self.stops_S < n], n)
        at_S = self.ends_P[stops_S]
        places = [int(stops_S[np.argmin(np.abs(at_S - depth * self.ends_P[n]))]) for depth in depths]
        parts, done = [], 0
        for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
            parts += [*self.words[done:place], f" {needle}"]
            done = place
        return "".join([*parts, *self.words[done:n]]).strip()


def load_pieces(cfg: HaystackConfig, tokenizer: Tokenizer, num: int) -> Pieces:
    """The first `num` pieces of the haystack's texts, which are repeated when they have fewer."""
    if cfg.kind == "noise":
        return make_pieces([NOISE], tokenizer, num, gap=" ")
    return make_pieces(load_heldout(cfg.source) or load_texts(cfg.source), tokenizer, num)


def make_pieces(texts: Sequence[str], tokenizer: Tokenizer, num: int, gap: str = "\n\n") -> Pieces:
    """`num` pieces of these texts one after another, `gap` between them."""
    found = (piece for text in itertools.cycle(texts) for piece in _PIECE.findall(gap + text.strip()))
    words = list(itertools.islice(found, num))
    sizes_P = np.array([len(ids) for ids in tokenizer.encode_batch(words)])
    stops_S = [i for i, word in enumerate(words) if _begins(words[i - 1] if i else "", word)]
    return Pieces(words, _ends(sizes_P), np.array(stops_S), frozenset(w.strip().lower() for w in words))


def draft(
    task: Task, rng: np.random.Generator, pieces: Pieces, values: str, budget: int, depth: float
) -> list[Draft]:
    """A question of this kind; several, the best first, where it depends on the length which of them fits.

    budget: tokens of the text at most. depth: of the needle that is asked for where there is one (`PLACED`).
    """
    match task:
        case "needles":
            return [_all_needles(rng, values, budget, depth)]
        case "variables":
            return [_variables(rng, pieces)]
        case "common_words":
            return _common_words(rng, budget)
        case "frequent_words":
            return [_frequent_words(rng, budget)]
        case _:
            return [_retrieval(task, rng, pieces, values, depth)]


def _retrieval(task: Task, rng: np.random.Generator, pieces: Pieces, values: str, depth: float) -> Draft:
    """A needle among none or others; four values of one key; four keys asked for."""
    num = 1 if task == "single" else _SEVERAL
    keys, held = _pairs(rng, num, values, pieces.known)
    if task == "multivalue":
        keys = keys[:1] * num
    depths = np.sort(rng.random(num))
    asked = slice(1) if task in PLACED else slice(num)
    if task in PLACED:
        depths[0] = depth
    pieces = pieces.turned(rng)
    needles = [_needle(key, value, values) for key, value in zip(keys, held, strict=True)]
    return Draft(
        *_question(list(dict.fromkeys(keys[asked])), held[asked], values),
        write=lambda n: pieces.hide(n, needles, depths),
        least=1,
        most=len(pieces.words),
    )


def _all_needles(rng: np.random.Generator, values: str, budget: int, depth: float) -> Draft:
    """A text of needles alone."""
    most = max(_SEVERAL, budget // 4)
    keys, held = _pairs(rng, most, values)
    lines = [_needle(key, value, values) for key, value in zip(keys, held, strict=True)]

    def write(n: int) -> str:
        place = round(depth * (n - 1))
        return "\n".join([*lines[1 : place + 1], lines[0], *lines[place + 1 : n]])

    return Draft(*_question(keys[:1], held[:1], values), write=write, least=1, most=most)


def _variables(rng: np.random.Generator, pieces: Pieces) -> Draft:
    """One variable has a value, each further one that of the one before; which have it?"""
    number = str(rng.integers(10_000, 100_000))
    names = [name.upper() for name in _words(rng, _HOPS + 1, pieces.known)]
    given = [number, *(f"VAR {name}" for name in names[:-1])]
    lines = [f"VAR {name} = {value}." for name, value in zip(names, given, strict=True)]
    depths, pieces = np.sort(rng.random(len(lines))), pieces.turned(rng)
    return Draft(
        intro="Variables are assigned in this text. Keep track of them.",
        ask=f"Which {len(names)} variables have the value {number}?",
        cue=f"The {len(names)} variables with the value {number} are",
        expected=tuple(names),
        write=lambda n: pieces.hide(n, lines, depths),
        least=1,
        most=len(pieces.words),
    )


def _common_words(rng: np.random.Generator, budget: int) -> list[Draft]:
    """A numbered list of words, ten of which occur ten times as often as the others; which?"""
    most = max(budget // 2, 2 * _COMMON * _OFTENER * max(_REPEATS))
    words, seed = _words(rng, _COMMON + most), int(rng.integers(2**32))

    def writer(repeats: int) -> Callable[[int], str]:
        def write(n: int) -> str:
            listed = words[:_COMMON] * (repeats * _OFTENER)
            listed += [words[_COMMON + i // repeats] for i in range(n - len(listed))]
            order = np.random.default_rng([seed, n]).permutation(n)
            return " ".join(f"{place}. {listed[i]}" for place, i in enumerate(order, 1))

        return write

    return [
        Draft(
            intro="Some words are common in this list, the others rare. Remember the common ones.",
            ask=f"Which {_COMMON} words are the commonest in the list?",
            cue=f"The {_COMMON} commonest words are",
            expected=tuple(words[:_COMMON]),
            write=writer(repeats),
            least=_COMMON * _OFTENER * repeats + _COMMON,
            most=most,
        )
        for repeats in _REPEATS
    ]


def _frequent_words(rng: np.random.Generator, budget: int) -> Draft:
    """A coded text whose words are Zipf-distributed with exponent 2; which three are the most frequent?"""
    most = max(_FEWEST_CODED, budget)
    words, seed = [_DOTS, *_words(rng, 50 + 4 * math.isqrt(most))], int(rng.integers(2**32))

    def write(n: int) -> str:
        # 1 / (k^2 zeta(2)) of the n words are the k-th; what rounding leaves are words that occur once
        counts = [int(n * 6 / (math.pi * k) ** 2) for k in range(1, math.isqrt(n) + 1)]
        counts = [count for count in counts if count]
        counts += [1] * (n - sum(counts))
        text = [word for word, count in zip(words, counts, strict=False) for _ in range(count)]
        return " ".join(text[i] for i in np.random.default_rng([seed, n]).permutation(n))

    return Draft(
        intro=f"This text is coded. Count its words, but for the dots ({_DOTS}).",
        ask=f"Which {_FREQUENT} words are the most frequent in it?",
        cue=f"The {_FREQUENT} most frequent words are",
        expected=tuple(words[1 : _FREQUENT + 1]),
        write=write,
        least=_FEWEST_CODED,
        most=most,
    )


def _question(keys: Sequence[str], held: Sequence[str], values: str) -> tuple[str, str, str, tuple[str, ...]]:
    """(introduction, question, beginning of the answer, expected values) about these keys."""
    whose = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
    intro = f"Secret {values} are hidden in this text. Remember them."
    if len(held) == 1:
        one = values.removesuffix("s")
        return intro, f"What is the secret {one} of {whose}?", f"The secret {one} of {whose} is", tuple(held)
    ask = f"What are the {len(held)} secret {values} of {whose}?"
    return intro, ask, f"The {len(held)} secret {values} of {whose} are", tuple(held)


def _needle(key: str, value: str, values: str) -> str:
    return f"The secret {values.removesuffix('s')} of {key} is {value}."


def _pairs(
    rng: np.random.Generator, num: int, values: str, known: frozenset[str] = frozenset()
) -> tuple[list[str], list[str]]:
    """Keys and what they hold, all different: words, and words or numbers of seven digits."""
    words = _words(rng, 2 * num, known)
    numbers = rng.choice(9_000_000, num, replace=False) + 1_000_000
    return words[:num], words[num:] if values == "words" else [str(number) for number in numbers]


def _words(rng: np.random.Generator, num: int, known: frozenset[str] = frozenset()) -> list[str]:
    """Different words of three syllables that mean nothing and are none of the known ones."""
    found: dict[str, None] = {}
    while len(found) < num:
        drawn = (_spell(int(number)) for number in rng.integers(_SYLLABLES**3, size=num))
        found.update(dict.fromkeys(word for word in drawn if word not in known))
    return list(found)[:num]


def _spell(number: int) -> str:
    syllables = [number // _SYLLABLES**place % _SYLLABLES for place in range(3)]
    return "".join(_CONSONANTS[s // len(_VOWELS)] + _VOWELS[s % len(_VOWELS)] for s in syllables)


def _begins(before: str, piece: str) -> bool:
    """Whether a sentence or a paragraph begins with a piece."""
    space = piece[: -len(piece.lstrip())]
    return not before or "\n\n" in space or (bool(space) and before[-1] in ".!?")


def _ends(sizes_P: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes_P)])


def largest(cost: Callable[[int], int], budget: int, low: int, high: int) -> int | None:
    """The largest n from low to high with cost(n) <= budget, None if there is none.

    `cost` grows about evenly, so that interpolation finds it in a few calls.
    """
    least, most = cost(low), cost(high)
    if least > budget:
        return None
    if most <= budget:
        return high
    while high - low > 1:
        step = (budget - least) * (high - low) // max(most - least, 1)
        n = low + min(max(step, 1), high - low - 1)
        found = cost(n)
        if found <= budget:
            low, least = n, found
        else:
            high, most = n, found
    return low
