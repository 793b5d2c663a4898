"""A tokenizer and examples small enough for every test of this folder."""

import numpy as np

from nemojax.data.examples import Example, StoredExamples
from nemojax.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt does so 1234 times.",
    "Numbers such as 3 14 159 are read digit by digit; words are not.",
    "Ünïcode text → stays whole, and so do\ttabs and  double spaces.",
]


def tiny_tokenizer(out, **options) -> Tokenizer:
    """A tokenizer of 400 ids."""
    return train_tokenizer(TEXTS, 400, out, **options)


def numbered(lengths) -> StoredExamples:
    """Documents of the given numbers of tokens; every token of all of them is different."""
    starts = np.cumsum([0, *lengths])
    return StoredExamples(
        Example(np.arange(start, start + n, dtype=np.int32), np.ones(n, np.float32))
        for start, n in zip(starts, lengths, strict=False)
    )
