"""Documents -> rows of equal length, best-fit, none crossing attention.

Suffixes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nemojax.data.examples import Example, Examples, LongPolicy, split_example

Batch = dict[str, np.ndarray]
Reference = tuple[int, ...]


class Packer:
    """Best-fit packing over `lookahead` open rows of `length` positions.

    A document goes to the fullest open row that still has room; when none has and no further row may
    be opened, the fullest one is finished. It sees sizes and references only, so its state is small.
    """

    def __init__(self, length: int, lookahead: int):
        if length < 1 or lookahead < 1:
            raise ValueError(f"packing: expected length and lookahead >= 1, got {length} and {lookahead}")
        self.length, self.lookahead = length, lookahead
        self._room: list[int] = []
        self._rows: list[list[Reference]] = []

    def add(self, size: int, reference: Reference) -> list[list[Reference]]:
        """Places one document of `size` positions; the rows that this finishes (at most one)."""
        assert 1 <= size <= self.length, size
        best, best_room = -1, self.length + 1
        for index, room in enumerate(self._room):
            if size <= room < best_room:
                best, best_room = index, room
        finished = []
        if best < 0:
            if len(self._rows) == self.lookahead:
                finished.append(self._finish(self._room.index(min(self._room))))
            best = len(self._rows)
            self._rows.append([])
            self._room.append(self.length)
        self._rows[best].append(reference)
        self._room[best] -= size
        if not self._room[best]:
            finished.append(self._finish(best))
        return finished

    def _finish(self, index: int) -> list[Reference]:
        self._room.pop(index)
        return self._rows.pop(index)

    def flush(self) -> list[list[Reference]]:
        """The rows still open, in the order in which they were opened."""
        rows, self._rows, self._room = self._rows, [], []
        return rows

    def state(self) -> dict[str, Any]:
        """The open rows, ready for JSON."""
        return {"room": list(self._room), "rows": [[list(r) for r in row] for row in self._rows]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken."""
        self._room = list(state["room"])
        self._rows = [[tuple(r) for r in row] for row in state["rows"]]


def make_batch(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """Rows of examples -> tokens, targets, segments, positions [B, T] i32 and weights [B, T] f32.

    Segments count the documents of a row from 1, 0 is padding; positions restart with each document.
    Targets are shifted inside a document; padding has weight 0.
    """
    shape = (len(rows), length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    counting = np.arange(length, dtype=np.int32)
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            stop = start + example.size
            tokens[b, start:stop] = example.ids[:-1]
            targets[b, start:stop] = example.ids[1:]
            weights[b, start:stop] = example.weights[1:]
            segments[b, start:stop] = number
            positions[b, start:stop] = counting[: example.size]
            start = stop
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segments": segments,
        "positions": positions,
    }


def packed_batches(
    examples: Examples | Iterable[Example],
    batch_size: int,
    length: int,
    pad_id: int,
    long: LongPolicy = "split",
    lookahead: int = 64,
    max_batches: int | None = None,
) -> list[Batch]:
    """Every example once, in order, packed; the last batch is filled up with empty rows.

    For evaluation: all batches have the same shape, and summing loss and weight over them is exact.
    """
    pieces: dict[Reference, Example] = {}
    packer, rows = Packer(length, lookahead), []
    in_turn = examples if isinstance(examples, Iterable) else map(examples.__getitem__, range(len(examples)))
    for index, example in enumerate(in_turn):
        for number, piece in enumerate(split_example(example, length, long, f"document {index}")):
            pieces[index, number] = piece
            rows += packer.add(piece.size, (index, number))
        if max_batches is not None and len(rows) >= max_batches * batch_size:
            break
    rows += packer.flush()
    if not rows:
        raise ValueError("packing: expected at least one document, got none; check the source and its split")
    rows = rows[: max_batches * batch_size] if max_batches is not None else rows
    rows += [[]] * (-len(rows) % batch_size)
    filled = [[pieces[reference] for reference in row] for row in rows]
    return [make_batch(filled[i : i + batch_size], length, pad_id) for i in range(0, len(rows), batch_size)]


def row_per_example(examples: Sequence[Example], length: int, pad_id: int) -> Batch:
    """One example a row, right-padded; ValueError if one is longer than `length` positions."""
    for index, example in enumerate(examples):
        split_example(example, length, "error", f"example {index}")
    return make_batch([[example] for example in examples], length, pad_id)


def unpack(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, targets) of every document of a packed batch, row by row: the inverse, for inspection."""
    out = []
    for b in range(len(batch["tokens"])):
        segments = batch["segments"][b]
        for number in range(1, segments.max(initial=0) + 1):
            here = segments == number
            out.append((batch["tokens"][b][here], batch["targets"][b][here]))
    return out
