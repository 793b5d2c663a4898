"""Endless, shuffled, weighted batches with exact resume.

Grain draws the order of documents (random access, so a position is its whole state); `Packer` turns
them into rows. Every process draws the same order and keeps every n-th row, so the global batch does
not depend on the number of processes. Where a source is a stream this would have every process read and
tokenise everything: there each packs a share of its own of all documents.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemojax.data.examples import Example, Examples, LongPolicy, StoredExamples, mean_size, split_example
from nemojax.data.packing import Batch, Packer, Reference, make_batch
from nemojax.data.stream import Stream

ENDLESS = 2**62


class Shuffled:
    """Endless (source, index) pairs: each epoch is a new permutation, drawn from (seed, epoch).

    Of `count` equal shares of the endless sequence this is the one from `first` on.

    Grain's own index shuffle walks a cipher over at least 2**16 values, which costs milliseconds an
    element on collections of a few documents.
    """

    def __init__(self, source: int, size: int, seed: int, first: int = 0, count: int = 1):
        self.source, self.size, self.seed = source, size, seed
        self.first, self.count = first, count
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, self.source, epoch)).permutation(self.size)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(self.first + index * self.count, self.size)
        return self.source, int(self._epoch(epoch)[place])

    def __repr__(self) -> str:
        return f"Shuffled(source={self.source}, size={self.size}, seed={self.seed})"


class InOrder:
    """Endless (source, index) pairs of a source that shuffles itself."""

    def __init__(self, source: int):
        self.source = source

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.source, index

    def __repr__(self) -> str:
        return f"InOrder(source={self.source})"


class Loader:
    """An endless iterator of batches; `state()` is JSON-able and `restore` continues bit-identically.

    `identity` stands for what decides the endless sequence of rows; `rows` [batch_size] i64 are the numbers
    of the last batch's rows in it, from 0, whatever the number of processes and the size of a batch.
    """

    def __init__(
        self,
        sources: Sequence[Examples | Stream],
        document_weights: Sequence[float],
        *,
        batch_size: int,
        length: int,
        seed: int,
        pad_id: int,
        long: LongPolicy,
        lookahead: int,
        process_index: int,
        process_count: int,
    ):
        import grain

        self.sources, self.length, self.pad_id = sources, length, pad_id
        self.long: LongPolicy = long
        self.batch_size, self.process_index, self.process_count = batch_size, process_index, process_count
        self._streams = {number: s for number, s in enumerate(sources) if isinstance(s, Stream)}
        # (which, of how many): the share of documents that is drawn here, and that of the rows drawn here
        mine, all_of_them = (process_index, process_count), (0, 1)
        drawn, self._kept = (mine, all_of_them) if self._streams else (all_of_them, mine)
        streams = [
            grain.MapDataset.source(
                InOrder(number) if isinstance(source, Stream) else Shuffled(number, len(source), seed, *drawn)
            )
            for number, source in enumerate(sources)
        ]
        mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, list(document_weights))
        # by index: grain's iterators cost twice as much a document
        self._order: Any = mixed
        self._drawn = 0
        self._packer = Packer(length, lookahead)
        self._rows: list[list[Reference]] = []
        self._used: list[list[Reference]] = []
        self._made = 0
        identity = [
            seed,
            length,
            long,
            lookahead,
            [s.identity if isinstance(s, Stream) else getattr(s, "fingerprint", len(s)) for s in sources],
            [float(w) for w in document_weights],
        ]
        self.identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.rows = np.zeros(0, np.int64)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """tokens, targets, segments, positions i32 and weights f32, each [batch_size, length]."""
        which, count = self._kept
        needed = self.batch_size * count
        while len(self._rows) < needed:
            self._draw()
        mine = self._rows[which:needed:count]
        batch = make_batch([[self._piece(r) for r in row] for row in mine], self.length, self.pad_id)
        self._rows, self._used = self._rows[needed:], mine
        made = self._made + self.batch_size * self.process_count
        self.rows = np.arange(self._made + self.process_index, made, self.process_count)
        self._made = made
        for number, stream in self._streams.items():
            for index in {index for row in mine for source, index, _ in row if source == number}:
                stream.forget(index)
        return batch

    def _draw(self) -> None:
        source, index = self._order[self._drawn]
        pieces = self._pieces(source, index)
        self._drawn += 1  # only now: a stream that failed may be asked again
        for number, piece in enumerate(pieces):
            self._rows += self._packer.add(piece.size, (source, index, number))

    def _pieces(self, source: int, index: int) -> list[Example]:
        return split_example(self.sources[source][index], self.length, self.long, f"source {source}, {index}")

    def _piece(self, reference: Reference) -> Example:
        source, index, number = reference
        return self._pieces(source, index)[number]

    @property
    def ids(self) -> list[str]:
        """For each row of the last batch, its documents as `source:index:piece`, joined by spaces."""
        return [" ".join(":".join(map(str, reference)) for reference in row) for row in self._used]

    def state(self) -> dict[str, Any]:
        """Where the order, the open rows and the waiting rows stand; of all processes if none is a stream."""
        state = {
            "identity": self.identity,
            "made": self._made,
            "order": {"next_index": self._drawn},
            "packer": self._packer.state(),
            "rows": [[list(reference) for reference in row] for row in self._rows],
        }
        streams = {str(number): stream.state() for number, stream in self._streams.items()}
        return state | {"streams": streams} if streams else state

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch that preceded `state()`; ValueError if the data differ."""
        if state.get("identity") != self.identity:
            raise ValueError(
                f"data state: expected identity {self.identity}, got {state.get('identity')}; the sources, "
                "their weights, seed or length changed, so start a new work directory"
            )
        self._drawn = state["order"]["next_index"]
        self._packer.restore(state["packer"])
        self._made = state["made"]
        self._rows = [[tuple(reference) for reference in row] for row in state["rows"]]
        for number, stream in self._streams.items():
            stream.restore(state["streams"][str(number)])

    def close(self) -> None:
        """Ends what streams read ahead; `restore` before the next batch."""
        for stream in self._streams.values():
            stream.close()


def make_loader(
    sources: Sequence[Examples | Stream],
    weights: Sequence[float] | None = None,
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    seed: int = 0,
    long: LongPolicy = "split",
    lookahead: int = 32,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """A `Loader` of packed rows over several collections of examples.

    `weights`: share of the *tokens* that comes from each source (None: all equal). `batch_size`: rows of
    this process; the global batch has `batch_size * process_count` rows of `length` positions.
    """
    shares = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
    if len(shares) != len(sources) or not sources:
        raise ValueError(f"loader: expected a weight for each of {len(sources)} sources, got {len(shares)}")
    if not min(shares) > 0 or not math.isfinite(sum(shares)):
        raise ValueError(f"loader: expected positive weights, got {shares}; leave unused sources out")
    if not 0 <= process_index < process_count:
        raise ValueError(f"loader: expected process_index < {process_count}, got {process_index}")
    sources = [_in_pieces(source, length, long) for source in sources]
    sizes = [_mean_size(number, source, length, long) for number, source in enumerate(sources)]
    documents = np.asarray([share / size for share, size in zip(shares, sizes, strict=True)])
    return Loader(
        sources,
        [max(round(float(w), 9), 1e-9) for w in documents / documents.sum()],
        batch_size=batch_size,
        length=length,
        seed=seed,
        pad_id=pad_id,
        long=long,
        lookahead=lookahead,
        process_index=process_index,
        process_count=process_count,
    )


def _mean_size(number: int, source: Examples | Stream, length: int, long: LongPolicy) -> float:
    if isinstance(source, Stream):
        return source.mean_size()
    if not (size := mean_size(source, length, long)):
        raise ValueError(
            f"loader: source {number} has no usable document among {len(source)} "
            f"(length={length}, long={long!r})"
        )
    return size


def _in_pieces(source: Examples | Stream, length: int, long: LongPolicy) -> Examples | Stream:
    """Documents at hand are cut before they are shuffled, so that one book does not fill a batch."""
    if not isinstance(source, StoredExamples) or source.longest <= length:
        return source
    return StoredExamples(
        piece
        for index in range(len(source))
        for piece in split_example(source[index], length, long, f"document {index}")
    )
