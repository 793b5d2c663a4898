"""Endless documents of a source that is never held as a whole: read, tokenised and shuffled block by block.

A block is the next `buffer` documents (fewer where an epoch ends), cut into pieces of at most a row and
permuted. So where the blocks begin that are still in use is all the state there is, and to resume costs
reading those again. The next block is made while one is used.

Of several processes, process i reads every n-th file where there are at least n, else every n-th row.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from nemojax.data.examples import Example, LongPolicy, document, split_example
from nemojax.data.files import START, Documents, Position
from nemojax.data.reading import Streaming
from nemojax.data.sources import Source
from nemojax.data.tokenizer import Tokenizer

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 64, 1 << 18  # what a thread tokenises at a time
END_SECONDS = 5.0  # how long a thread is waited for that should end
SAMPLE, SAMPLE_CHARACTERS = (
    256,
    1 << 20,
)  # the mean size of these turns a share of tokens into one of documents


@dataclass(frozen=True)
class _Block:
    start: int  # number of its first piece
    pieces: list[Example]
    end: Position  # where the next one begins

    @property
    def stop(self) -> int:
        return self.start + len(self.pieces)


class Stream:
    """The pieces of a source by number, without end: `stream[i]` for i = 0, 1, 2, ...

    A piece is held from when it was first asked for until `forget`, and comes back with `restore`. The order
    depends on `seed`, `number` (the source's, in a mixture) and the process, not on threads. `pool`: threads
    that tokenise.
    """

    def __init__(
        self,
        source: Source,
        number: int,
        tokenizer: Tokenizer,
        streaming: Streaming,
        pool: Executor,
        *,
        length: int,
        long: LongPolicy,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._documents = Documents(source, streaming, (seed, number), process_index, process_count)
        self._tokenizer, self._pool, self._buffer = tokenizer, pool, streaming.buffer
        self._length = length
        self._long: LongPolicy = long
        self._seed = (seed, number, 1, process_index)
        self.identity = [self._documents.identity, streaming.buffer]
        self._held: dict[int, Example] = {}
        self._starts: list[int] = [0]
        self._positions: list[Position] = [START]
        self._block: _Block | None = None
        self._ahead: dict[int, Future[_Block]] = {}
        self._reading = threading.Lock()
        self._threads: list[threading.Thread] = []
        # also when the program ends: a thread that is cut off there may take the process down
        self._end = weakref.finalize(self, _finish, self._documents.closed, self._threads)
        self._live: tuple[Position, Iterator[tuple[Position, str, str]]] | None = None

    def mean_size(self) -> float:
        """Mean positions of a piece, over the first documents of files that are spread evenly."""
        sample, characters = [], 0
        for text in islice(self._documents.sample(), SAMPLE):
            sample.append(("a document", text))
            characters += len(text)
            if characters > SAMPLE_CHARACTERS:
                break
        if not (pieces := self._encode(sample)):
            raise self._documents.none_left()
        return float(np.mean([piece.size for piece in pieces]))

    def __getitem__(self, index: int) -> Example:
        if index not in self._held:
            block = self._block_of(index)
            self._held[index] = block.pieces[index - block.start]
        return self._held[index]

    def forget(self, index: int) -> None:
        """Lets go of a piece that is used."""
        self._held.pop(index, None)

    def state(self) -> dict[str, Any]:
        """Where the blocks begin that hold pieces in use, and which pieces these are; JSON-able."""
        used = {self._at(index) for index in self._held} | {len(self._starts) - 1}
        self._starts = [self._starts[at] for at in sorted(used)]
        self._positions = [self._positions[at] for at in sorted(used)]
        blocks = zip(self._starts, self._positions, strict=True)
        return {"blocks": [list(block) for block in blocks], "held": sorted(self._held)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; reads the blocks again that it names."""
        self._documents.closed.clear()
        self._ahead, self._block, self._held = {}, None, {}
        self._starts = [start for start, _ in state["blocks"]]
        self._positions = [position for _, position in state["blocks"]]
        for index in state["held"]:
            self[index]

    def close(self) -> None:
        """Ends what reads ahead; `restore` before the next piece."""
        _finish(self._documents.closed, self._threads)

    def _at(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _block_of(self, index: int) -> _Block:
        at = self._at(index)
        block = self._load(self._starts[at], self._positions[at])
        while index >= block.stop:
            self._starts.append(block.stop)
            self._positions.append(block.end)
            block = self._load(block.stop, block.end)
        return block

    def _load(self, start: int, position: Position) -> _Block:
        if self._block is None or self._block.start != start:
            ahead = self._ahead.pop(start, None) or self._begin(start, position)
            self._block = ahead.result()
            if start == self._starts[-1]:
                self._ahead = {self._block.stop: self._begin(self._block.stop, self._block.end)}
        return self._block

    def _begin(self, start: int, position: Position) -> Future[_Block]:
        """A block to come, made by a thread of its own."""
        future: Future[_Block] = Future()

        def work() -> None:
            try:
                future.set_result(self._read(start, position))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=work, name="stream", daemon=True)
        thread.start()
        self._threads[:] = [one for one in self._threads if one.is_alive()] + [thread]
        return future

    def _read(self, start: int, position: Position) -> _Block:
        """The block that begins at a position: this reads, the pool tokenises."""
        first_epoch, pieces = position[0], []
        with self._reading:
            while not pieces:
                if position[0] > first_epoch + 1:
                    raise self._documents.none_left()
                position, encoded = self._take(position)
                pieces = [piece for chunk in encoded for piece in chunk.result()]
        order = np.random.default_rng((*self._seed, start)).permutation(len(pieces))
        return _Block(start, [pieces[place] for place in order], position)

    def _take(self, position: Position) -> tuple[Position, list[Future[list[Example]]]]:
        """The next documents, given to the pool in chunks, and the position after them."""
        live, self._live = self._live, None
        documents = live[1] if live and live[0] == position else self._documents.read(position)
        encoded: list[Future[list[Example]]] = []
        chunk: list[tuple[str, str]] = []
        characters = 0
        position = [position[0] + 1, *START[1:]]
        for count, (after, where, text) in enumerate(documents, 1):
            chunk.append((where, text))
            characters += len(text)
            full = count == self._buffer
            if full or len(chunk) == CHUNK_DOCUMENTS or characters > CHUNK_CHARACTERS:
                encoded.append(self._pool.submit(self._encode, chunk))
                chunk, characters = [], 0
            if full:
                position, self._live = after, (after, documents)
                break
        if chunk:
            encoded.append(self._pool.submit(self._encode, chunk))
        return position, encoded

    def _encode(self, chunk: list[tuple[str, str]]) -> list[Example]:
        pieces: list[Example] = []
        for where, text in chunk:
            try:
                (ids,) = self._tokenizer.encode_batch([text])  # a seventh less work than `encode`
            except TypeError as error:
                raise ValueError(f"{where}: expected whole Unicode characters, got {text!r:.80}") from error
            pieces += split_example(document(self._tokenizer, ids), self._length, self._long, where)
        return pieces


def _finish(closed: threading.Event, threads: list[threading.Thread]) -> None:
    closed.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(END_SECONDS)
