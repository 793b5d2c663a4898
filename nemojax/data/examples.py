"""Tokenised documents: the ids, and for every token whether predicting it is trained."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from nemojax.data.tokenizer import Tokenizer

LongPolicy = Literal["split", "truncate", "drop", "error"]
EAGER_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Example:
    """One document of n tokens. `weights[i]` is the loss weight of predicting token i from those before
    it; the first token is never predicted. A document takes n - 1 positions of a row."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def size(self) -> int:
        """Positions that the document takes in a row."""
        return len(self.ids) - 1


class Examples(Protocol):
    """A finite, random-access collection of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class StoredExamples:
    """Examples tokenised once, kept in three flat arrays: 4 bytes a token plus 1 for its weight."""

    def __init__(self, examples: Iterable[Example]):
        ids, weights, lengths = [], [], [0]
        for example in examples:
            ids.append(np.asarray(example.ids, np.int32))
            weights.append(np.asarray(example.weights, np.float32))
            lengths.append(len(example.ids))
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.weights = np.concatenate(weights) if weights else np.zeros(0, np.float32)
        if np.all((self.weights == 0) | (self.weights == 1)):
            self.weights = self.weights.astype(np.bool_)
        self.offsets = np.cumsum(np.asarray(lengths, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self.offsets[index], self.offsets[index + 1]
        return Example(self.ids[start:stop], self.weights[start:stop])

    @property
    def longest(self) -> int:
        """Positions that the longest example takes."""
        return int(np.diff(self.offsets).max(initial=1)) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


class LazyExamples:
    """Documents tokenised when they are asked for: for collections too large to hold as tokens."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer):
        self.texts, self.tokenizer = texts, tokenizer
        self._cached = functools.lru_cache(maxsize=4096)(self._make)

    def _make(self, index: int) -> Example:
        return document(self.tokenizer, self.tokenizer.encode(self.texts[index]))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Example:
        return self._cached(int(index))


def document(tokenizer: Tokenizer, ids: Sequence[int]) -> Example:
    """A text's ids between the begin- and end-of-text tokens; every token but the first is trained."""
    full = np.asarray([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
    return Example(full, np.ones(len(full), np.float32))


def text_examples(
    texts: Sequence[str], tokenizer: Tokenizer, eager: bool | None = None
) -> StoredExamples | LazyExamples:
    """One example a text. `eager` tokenises everything now; None decides by the number of texts."""
    if eager is None:
        eager = len(texts) <= EAGER_DOCUMENTS
    if not eager:
        return LazyExamples(texts, tokenizer)
    return StoredExamples(document(tokenizer, ids) for ids in tokenizer.encode_batch(texts[:]))


def split_example(
    example: Example, length: int, policy: LongPolicy, where: str = "document"
) -> list[Example]:
    """Pieces of at most `length` positions.

    `split` keeps everything: the last token of a piece is the first of the next, so every token is
    predicted once. `truncate` keeps the first piece, `drop` none, `error` raises ValueError.
    """
    if example.size < 1:
        return []
    if example.size <= length:
        return [example]
    match policy:
        case "split":
            starts = range(0, example.size, length)
            return [
                Example(example.ids[s : s + length + 1], example.weights[s : s + length + 1]) for s in starts
            ]
        case "truncate":
            return [Example(example.ids[: length + 1], example.weights[: length + 1])]
        case "drop":
            return []
        case "error":
            raise ValueError(
                f"{where}: expected at most {length} tokens, got {example.size}; "
                "raise the length or choose long='split', 'truncate' or 'drop'"
            )


def mean_size(examples: Examples, length: int, policy: LongPolicy, sample: int = 256) -> float:
    """Mean positions that one example contributes to the rows, over up to `sample` spread examples."""
    step = max(1, len(examples) // sample)
    sizes = [
        sum(piece.size for piece in split_example(examples[i], length, policy))
        for i in range(0, len(examples), step)
    ]
    return float(np.mean(sizes)) if sizes else 0.0
