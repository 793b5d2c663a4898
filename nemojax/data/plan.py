"""A global plan of packed rows by index: which documents make up row r does not depend on who asks.

Endless documents of all sources are laid along one line of time: a source of which a share p of all documents
comes has its j-th at (j + 1/2) / p. A stretch of that line is a window; its documents are packed best-fit
decreasing and its rows shuffled. A window follows from its number alone, so a row number (and, so that nobody
counts from zero, the window that it lies in) is all the state there is, and process i of n reads only the
documents of every n-th row, whatever n was before.

Documents longer than a row are cut before they are shuffled, so that one book does not fill a batch: what is
drawn, mixed and packed are pieces.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nemojax.data.examples import Example, LongPolicy
from nemojax.data.loader import Shuffled
from nemojax.data.packing import Batch, make_batch
from nemojax.data.shards import TokenShards

# A window has as many rows as one pass over everything, within these limits. More rows pack better (the last
# one is half empty: 0.1% of 512), but rows are shuffled within a window, so several passes would mix.
MIN_ROWS, MAX_ROWS = 128, 512
VERSION = 1  # of what a row number means; raise it when a plan changes


class Window(NamedTuple):
    """The rows of one window: row r holds the pieces `ends[r - 1]:ends[r]` (from 0 for the first).

    A piece is part `part` of document `document` of source `source`; all [pieces] i64.
    """

    source: np.ndarray
    document: np.ndarray
    part: np.ndarray
    ends: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.ends)

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """The (source, document, part) of a row's pieces."""
        here = slice(self.ends[number - 1] if number else 0, self.ends[number])
        parts = (self.source[here].tolist(), self.document[here].tolist(), self.part[here].tolist())
        return list(zip(*parts, strict=True))


class Pieces:
    """The pieces that the documents of one source are cut into, numbered through, as `split_example` does.

    sizes: positions of each document. Only where some document is not exactly one piece is anything kept.
    """

    def __init__(self, sizes: np.ndarray, length: int, long: LongPolicy, where: str):
        self._sizes, self._length = sizes, length
        longest = int(sizes.max(initial=0))
        if long == "error" and longest > length:
            raise ValueError(
                f"{where}: expected at most {length} tokens, got {longest} in document "
                f"{int(sizes.argmax())}; raise the length or choose long='split', 'truncate' or 'drop'"
            )
        one_each = int(sizes.min(initial=1)) >= 1 and (longest <= length or long == "truncate")
        self._lasts = None if one_each else np.cumsum(_num_pieces(sizes, length, long))
        self.count = len(sizes) if self._lasts is None else int(self._lasts[-1])
        positions = sizes if long == "split" else np.where(sizes > length, length * (long != "drop"), sizes)
        self.positions = int(np.maximum(positions, 0).sum(dtype=np.int64))

    def find(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, part, positions) of the pieces of the given numbers."""
        if self._lasts is None:
            documents, parts = pieces, np.zeros_like(pieces)
        else:
            documents = np.searchsorted(self._lasts, pieces, side="right")
            before = np.where(documents > 0, self._lasts[documents - 1], 0)
            parts = pieces - before
        left = self._sizes[documents].astype(np.int64) - parts * self._length
        return documents, parts, np.minimum(left, self._length)


def _num_pieces(sizes: np.ndarray, length: int, long: LongPolicy) -> np.ndarray:
    counts = -(-sizes.astype(np.int64) // length)
    if long == "split":
        return np.maximum(counts, 0)
    return (counts == 1) if long == "drop" else np.clip(counts, 0, 1)


class Plan:
    """Rows of `length` positions from sources of documents of the given sizes, window by window.

    weights: shares of the tokens, positive. `rates` are the shares of the pieces that follow.
    """

    def __init__(
        self,
        sizes: Sequence[np.ndarray],
        weights: Sequence[float],
        *,
        length: int,
        seed: int,
        long: LongPolicy,
    ):
        if len(weights) != len(sizes) or not sizes:
            raise ValueError(f"plan: expected a weight for each of {len(sizes)} sources, got {len(weights)}")
        if not min(weights) > 0 or not math.isfinite(sum(weights)):
            raise ValueError(f"plan: expected positive weights, got {[*weights]}; leave unused sources out")
        self.length, self.seed = length, seed
        self.pieces = [Pieces(s, length, long, f"source {number}") for number, s in enumerate(sizes)]
        for number, pieces in enumerate(self.pieces):
            if not pieces.count:
                raise ValueError(
                    f"plan: source {number} has no usable document among {len(sizes[number])} "
                    f"(length={length}, long={long!r})"
                )
        # plain arithmetic of Python, which rounds alike on every machine
        means = [pieces.positions / pieces.count for pieces in self.pieces]
        shares = [float(weight) / mean for weight, mean in zip(weights, means, strict=True)]
        self.rates = [share / sum(shares) for share in shares]
        mean = sum(rate * mean for rate, mean in zip(self.rates, means, strict=True))
        rows = sum(pieces.positions for pieces in self.pieces) // length
        self.window_pieces = math.ceil(min(MAX_ROWS, max(MIN_ROWS, rows)) * length / mean)
        self._orders = [Shuffled(number, pieces.count, seed) for number, pieces in enumerate(self.pieces)]
        self.window = functools.lru_cache(maxsize=2)(self._window)

    def drawn(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, piece) of what window `number` holds, in the order of the mixture."""
        sources, pieces, times = [], [], []
        for source, (rate, order) in enumerate(zip(self.rates, self._orders, strict=True)):
            first, last = (math.floor(rate * self.window_pieces * n + 0.5) for n in (number, number + 1))
            sources.append(np.full(last - first, source, np.int64))
            pieces.append(np.fromiter((order[place][1] for place in range(first, last)), np.int64))
            times.append((np.arange(first, last) + 0.5) / rate)
        in_time = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(sources)[in_time], np.concatenate(pieces)[in_time]

    def _window(self, number: int) -> Window:
        source, piece = self.drawn(number)
        document, part, size = np.zeros_like(piece), np.zeros_like(piece), np.zeros_like(piece)
        for index, pieces in enumerate(self.pieces):
            mine = source == index
            document[mine], part[mine], size[mine] = pieces.find(piece[mine])
        row = best_fit_decreasing(size, self.length)
        # packing sorts by size, so without this the batches would too; no source draws by this number
        key = (self.seed, len(self.pieces), number)
        row = np.random.default_rng(key).permutation(row.max() + 1)[row]
        by_row = np.argsort(row, kind="stable")
        return Window(source[by_row], document[by_row], part[by_row], np.cumsum(np.bincount(row)))


def best_fit_decreasing(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, [pieces] i64: the longest first, each into the fullest row that has room."""
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    shift = len(sizes).bit_length()
    mask = (1 << shift) - 1
    open_rows: list[int] = []  # sorted; room << shift | row
    rows_in_order: list[int] = []
    num_rows = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect.bisect_left(open_rows, size << shift)
            if at < len(open_rows):
                entry = open_rows.pop(at)
            else:
                entry = length << shift | num_rows
                num_rows += 1
            # with one more piece the row is still the fullest with room for another of this size
            placed = min(count, (entry >> shift) // size)
            rows_in_order += [entry & mask] * placed
            count -= placed
            entry -= placed * size << shift
            if entry > mask:
                bisect.insort(open_rows, entry)
    rows = np.empty(len(sizes), np.int64)
    rows[order] = rows_in_order
    return rows


class PlannedLoader:
    """An endless iterator of batches by a `Plan` over token shards; this process's rows of them.

    `weights`: shares of the tokens. `batch_size`: rows of this process; the global batch has `batch_size *
    process_count` rows of `length` positions, of which process i takes every process_count-th from the i-th
    on. `identity` stands for what decides the endless sequence of rows; `rows` [batch_size] i64 are the
    numbers of the last batch's rows in it, from 0. `state()` is JSON-able, equal in all processes, and may be
    restored by any number of processes with any batch size.
    """

    def __init__(
        self,
        sources: Sequence[TokenShards],
        weights: Sequence[float],
        *,
        batch_size: int,
        length: int,
        pad_id: int,
        seed: int = 0,
        long: LongPolicy = "split",
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"plan: expected process_index < {process_count}, got {process_index}")
        self.sources, self.length, self.pad_id = sources, length, pad_id
        self.batch_size, self.process_index, self.process_count = batch_size, process_index, process_count
        self.plan = Plan([source.sizes for source in sources], weights, length=length, seed=seed, long=long)
        contents = [source.fingerprint for source in sources]
        identity = [VERSION, seed, length, long, contents, self.plan.rates]
        self.identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.rows = np.zeros(0, np.int64)
        self._used: list[list[tuple[int, int, int]]] = []
        self._row, self._at = 0, (0, 0)  # the next row; the window it lies in, and the first row of that

    def __iter__(self) -> PlannedLoader:
        return self

    def __next__(self) -> Batch:
        """tokens, targets, segments, positions i32 and weights f32, each [batch_size, length]."""
        end = self._row + self.batch_size * self.process_count
        rows = np.arange(self._row + self.process_index, end, self.process_count)
        at, used = self._at, []
        for row in rows.tolist():
            at = self._window_of(row, *at)
            used.append(self.plan.window(at[0]).row(row - at[1]))
        batch = make_batch(self._read(used), self.length, self.pad_id)
        at = self._window_of(end, *at)
        self.rows, self._used, self._row, self._at = rows, used, end, at  # last: an error above moves nothing
        return batch

    def _window_of(self, row: int, window: int, first: int) -> tuple[int, int]:
        """The window of a row and the number of that one's first row, counted on from an earlier window."""
        while row >= first + (num_rows := self.plan.window(window).num_rows):
            window, first = window + 1, first + num_rows
        return window, first

    def _read(self, rows: Sequence[Sequence[tuple[int, int, int]]]) -> list[list[Example]]:
        """What the pieces of some rows say, asked of each source all at once."""
        wanted: list[list[tuple[int, int, int | None]]] = [[] for _ in self.sources]
        for row in rows:
            for source, document, part in row:
                wanted[source].append((document, part * self.length, self.length))
        found = [iter(source.pieces(some)) for source, some in zip(self.sources, wanted, strict=True)]
        return [[next(found[source]) for source, _, _ in row] for row in rows]

    @property
    def ids(self) -> list[str]:
        """For each row of the last batch, its documents as `source:index:piece`, joined by spaces."""
        return [" ".join(":".join(map(str, piece)) for piece in row) for row in self._used]

    def state(self) -> dict[str, Any]:
        """The number of the next row; with it the window that it lies in, and the first row of that."""
        return {"identity": self.identity, "row": self._row, "window": list(self._at)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch that preceded `state()`; ValueError if the data differ."""
        if state.get("identity") != self.identity:
            raise ValueError(
                f"data state: expected identity {self.identity}, got {state.get('identity')}; the sources, "
                "their weights, seed or length changed, so start a new work directory"
            )
        window, first = state["window"]
        self._row, self._at = state["row"], (window, first)
