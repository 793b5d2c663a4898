"""The documents of a source, read from its files row by row from any row on: what streams are made of.

A place in a file is [rows before it] and for JSONL also [bytes before it]; [] is its start.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemojax.data.heldout import check_share, falls_out, too_small
from nemojax.data.reading import (
    SourceUnavailable,
    Streaming,
    is_remote,
    open_file,
    packed_lines,
    patiently,
    unpacked,
)
from nemojax.data.sources import Source, check_column, json_object, load_hub, source_files, text_in, text_of

Position = list[Any]  # [epoch, files of it that are done, documents of it that were kept, place in the file]
START: Position = [0, 0, 0, []]
BATCH_ROWS = 256
SURVEYED_FILES = 8
SURVEY = 20_000  # documents among which a stream's held-out ones are looked for


class Files(Protocol):
    """Rows of text in numbered files; `names` are for errors, `identity` is JSON-able."""

    names: Sequence[str]
    identity: Any

    def rows(self, number: int, place: list[int]) -> Iterator[tuple[list[int], str]]:
        """(where to go on, text) of every row from `place` on; a row without text is blank."""
        ...


class _NamedFiles:
    """Files that have names, here or elsewhere."""

    def __init__(self, source: Source):
        self.source = source
        self.names: Sequence[str] = [str(name) for name in source_files(source)]
        self.identity = [
            [name] if is_remote(name) else [Path(name).name, Path(name).stat().st_size] for name in self.names
        ]


class JsonlFiles(_NamedFiles):
    """One JSON object a line."""

    def rows(self, number: int, place: list[int]) -> Iterator[tuple[list[int], str]]:
        row, start = place or (0, 0)
        for line in packed_lines(self.names[number], start):
            row, start = row + 1, start + len(line)
            where = f"{self.names[number]}:{row}"
            text = text_in(json_object(line, where), self.source, where) if line.strip() else ""
            yield [row, start], text


class TextFiles(_NamedFiles):
    """A file is a text."""

    def rows(self, number: int, place: list[int]) -> Iterator[tuple[list[int], str]]:
        if place:
            return
        with unpacked(self.names[number]) as file:
            try:
                text = io.TextIOWrapper(file, encoding="utf-8").read()
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.names[number]}: expected UTF-8 text, got {error}") from error
        yield [1], text


class ParquetFiles(_NamedFiles):
    """A column of Parquet files, one group of rows at a time."""

    def rows(self, number: int, place: list[int]) -> Iterator[tuple[list[int], str]]:
        import pyarrow
        from pyarrow import parquet

        name, column = self.names[number], self.source.field
        row = place[0] if place else 0
        try:
            with open_file(name) as opened, parquet.ParquetFile(opened) as file:
                check_column(file.schema_arrow.names, self.source)
                before = 0
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    skip, before = max(0, row - before), before + size
                    if skip >= size:
                        continue
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                        for value in batch.column(0)[skip:].to_pylist():
                            row += 1
                            yield [row], text_of(value, column, f"{name}:{row}")
                        skip = max(0, skip - len(batch))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"source {self.source.name}: cannot read {name} as parquet ({str(error).splitlines()[0]})"
            ) from error


class HubFiles:
    """A data set of the hub, or a directory laid out like one, through `datasets`."""

    def __init__(self, source: Source):
        self.source, self._table = source, load_hub(source, stream=True)
        count = self._table.num_shards
        self.names: Sequence[str] = [
            f"{source.path} ({source.split}, part {number + 1})" for number in range(count)
        ]
        self.identity = [source.path, source.split, count]

    def rows(self, number: int, place: list[int]) -> Iterator[tuple[list[int], str]]:
        row = place[0] if place else 0
        column = self.source.field
        part = self._table.shard(len(self.names), number)
        for batch in (part.skip(row) if row else part).iter(BATCH_ROWS):
            check_column(list(batch), self.source)
            for value in batch[column]:
                row += 1
                yield [row], text_of(value, column, f"{self.names[number]}:{row}")


def open_files(source: Source, streaming: Streaming, closed: threading.Event) -> Files:
    """The files of a source that can be streamed; ValueError for another, or if there are none."""
    kinds: dict[str, Callable[[Source], Files]] = {"jsonl": JsonlFiles, "text": TextFiles}
    kinds |= {"parquet": ParquetFiles, "hf": HubFiles}
    if source.kind not in kinds:
        raise ValueError(
            f"source {source.name}: expected kind {', '.join(sorted(kinds))} to stream, got {source.kind}; "
            "unset stream"
        )

    def found(_: None) -> Iterator[tuple[None, Files]]:
        yield None, kinds[source.kind](source)

    where = f"source {source.name}: {source.path}"
    return next(patiently(found, None, streaming, where, closed))[1]


def survey(files: Files, streaming: Streaming, where: str, closed: threading.Event) -> Iterator[str]:
    """The texts of some files in turn, spread evenly over all, then those of others; blank ones left out."""
    step = -(-len(files.names) // SURVEYED_FILES)
    waiting = iter([n for first in range(step) for n in range(first, len(files.names), step)])

    def opened(number: int) -> Iterator[tuple[list[int], str]]:
        name = f"{where}: {files.names[number]}"
        return patiently(partial(files.rows, number), [], streaming, name, closed, must_exist=True)

    reading = deque(opened(number) for number in islice(waiting, SURVEYED_FILES))
    while reading:
        rows = reading.popleft()
        if (found := next(rows, None)) is not None:
            reading.append(rows)
            if found[1].strip():
                yield found[1]
        elif (number := next(waiting, None)) is not None:
            reading.append(opened(number))


class Documents:
    """What one process trains on of a source: an endless sequence, of which every epoch is in files' order.

    Process i of n reads every n-th file where there are at least n, else every n-th row, and its part of a
    `limit`. Without one each epoch goes through the files in another order, drawn from `seed`. `closed`:
    set it, and reading ends with `SourceUnavailable`.
    """

    def __init__(
        self,
        source: Source,
        streaming: Streaming,
        seed: tuple[int, ...] = (0,),
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.source, self.where = source, f"source {source.name}"
        check_share(source.heldout_share, self.where)
        self.closed = threading.Event()
        self._streaming, self._seed = streaming, seed
        self._index, self._count = process_index, process_count
        self._files = open_files(source, streaming, self.closed)
        self._numbers = np.arange(len(self._files.names))
        self._by_file = len(self._numbers) >= process_count
        if self._by_file:
            self._numbers = self._numbers[process_index::process_count]
        self._limit = -(-max(0, source.limit - process_index) // process_count) if source.limit else None
        neutral = vars(replace(source, name="", path="", weight=1.0))
        self.identity = [self._files.identity, neutral, process_count]

    def read(self, position: Position) -> Iterator[tuple[Position, str, str]]:
        """(position after it, `file:row`, text) of what is left of the epoch of a position."""
        epoch, done, kept, place = position
        order = self._numbers
        if self._limit is None:  # with one, every epoch has the same documents
            order = np.random.default_rng((*self._seed, 0, epoch)).permutation(order)
        for turn in range(done, len(order)):
            number = int(order[turn])
            name, rows = self._files.names[number], partial(self._files.rows, number)
            for after, text in patiently(rows, place, self._streaming, f"{self.where}: {name}", self.closed):
                if self.closed.is_set():
                    raise SourceUnavailable(f"{self.where}: {name}: reading was ended")
                if kept == self._limit:
                    return
                if self._is_mine(after[0]) and self._is_trained(text):
                    kept += 1
                    yield [epoch, turn, kept, after], f"{name}:{after[0]}", text
            place = []

    def sample(self) -> Iterator[str]:
        """The first texts that any process trains on."""
        return filter(self._is_trained, self.survey())

    def survey(self) -> Iterator[str]:
        """The first texts of all, blank ones left out."""
        return survey(self._files, self._streaming, self.where, self.closed)

    def heldout(self) -> Iterator[str]:
        """The texts that are held out among the first `SURVEY`; ValueError if none are.

        A text is held out for what it says, as everywhere, so none of these is ever trained on.
        """
        num, found = 0, False
        for text in islice(self.survey(), SURVEY):
            num += 1
            if falls_out(text, self.source.heldout_share):
                found = True
                yield text
        if not found:
            raise too_small(self.where, num, self.source.heldout_share)

    def none_left(self) -> ValueError:
        """The error for a source without anything to train on."""
        return ValueError(
            f"{self.where}: expected texts to train on, got none in {self.source.path} for process "
            f"{self._index + 1} of {self._count}; add more, or lower heldout_share"
        )

    def _is_mine(self, row: int) -> bool:
        return self._by_file or (row - 1) % self._count == self._index

    def _is_trained(self, text: str) -> bool:
        return bool(text.strip()) and not falls_out(text, self.source.heldout_share)
