"""The `tokenize` stage: text sources -> token shards, once, for every training run that reads them.

Shard k of a source holds its documents k * shard_documents to (k + 1) * shard_documents, so what is written
depends neither on workers nor on hosts nor on how often the stage was stopped. This process reads and writes,
its workers tokenise; of several hosts, process i takes every n-th shard.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemojax.config import field, to_dict
from nemojax.data.examples import document
from nemojax.data.files import open_files
from nemojax.data.heldout import check_share, digest_of, falls_out, too_small
from nemojax.data.mixture import check_names
from nemojax.data.reading import Streaming, patiently
from nemojax.data.shards import (
    HELDOUT,
    INDEX,
    SHARD_DOCUMENTS,
    Encoded,
    clear_marks,
    dtype_for,
    encode_examples,
    is_complete,
    missing_shards,
    num_shards,
    write_index,
    write_shard,
)
from nemojax.data.sources import Source, input_files, load_heldout, load_texts
from nemojax.data.tokenizer import Tokenizer, load_tokenizer
from nemojax.log import TOKENS_PER_SECOND, describe_progress
from nemojax.stage import run_stage

SHARDS = "shards"  # WORKDIR/shards/NAME is what a source of kind `tokens` reads
PART_DOCUMENTS, PART_CHARACTERS = 256, 1 << 20  # what a worker gets at once, at most
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Config:
    tokenizer: str = field("", "artifact or work directory whose tokenizer is used")
    sources: tuple[Source, ...] = field(
        (Source(),), "what to tokenise; the part that is held out gets shards of its own, weights are ignored"
    )
    workers: int = field(0, "processes that tokenise on each host; 0: one a core")
    shard_documents: int = field(
        SHARD_DOCUMENTS, "documents a shard; what a stopped run has to do again is less than one shard"
    )


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Writes `workdir/shards/NAME` for every source; returns numbers of documents and tokens."""
    _check(cfg)
    recorded = replace(cfg, workers=0)  # decides nothing that is written: a run may resume with more or fewer
    inputs = [cfg.tokenizer, *input_files(cfg.sources)]
    return run_stage(
        "tokenize", recorded, workdir, inputs, lambda path: _tokenize(cfg, path), many_processes=True
    )


def _check(cfg: Config) -> None:
    if not cfg.tokenizer:
        raise ValueError("tokenizer: expected an artifact with a tokenizer, got none; train one first")
    if cfg.workers < 0 or cfg.shard_documents < 1:
        raise ValueError(
            "tokenize: expected workers from 0 and shard_documents from 1 on, got "
            f"{cfg.workers} and {cfg.shard_documents}"
        )
    if not cfg.sources:
        raise ValueError("sources: expected texts to tokenise, got none")
    check_names([source.name for source in cfg.sources], "sources")
    for source in cfg.sources:
        if source.kind == "tokens":
            raise ValueError(f"source {source.name}: expected texts, got tokens; train on them as they are")
        if not re.fullmatch(r"\w[\w.-]*", source.name):
            raise ValueError(
                f"source: expected a name of letters, digits, dots, dashes and underscores, got "
                f"{source.name!r}; a folder is called so"
            )


class Part(NamedTuple):
    """The training side or the held-out side of a source, and the folder of its shards."""

    source: Source
    folder: Path
    texts: Callable[[], Sequence[str]]


def _parts(source: Source, folder: Path) -> tuple[Part, Part]:
    """The held-out side and the training side."""
    heldout: Callable[[], Sequence[str]] = functools.partial(load_heldout, source)
    training: Callable[[], Sequence[str]] = functools.partial(load_texts, source)
    if source.stream:
        read = functools.cache(lambda: StreamedTexts(source))
        heldout, training = (lambda: read().heldout), read
    return Part(source, folder / HELDOUT, heldout), Part(source, folder, training)


class StreamedTexts(Sequence[str]):
    """The training side of files that are never held as a whole, here or at an address.

    One reading counts the texts and keeps where every `PART_DOCUMENTS`-th begins; slices are read from there.
    `heldout` is the other side, in the order of `load_heldout`, and held. ValueError where one is empty.
    """

    def __init__(self, source: Source):
        self._source, self._where = source, f"source {source.name}"
        check_share(source.heldout_share, self._where)
        self._closed = threading.Event()
        self._files = open_files(source, Streaming(), self._closed)
        self._step, self._starts, self._count = PART_DOCUMENTS, [], 0
        self._live: Iterator[str] = iter(())
        self._next = -1  # the text that `_live` gives next
        heldout: list[tuple[bytes, str]] = []
        for number, place, text in self._rows(0, []):
            if falls_out(text, source.heldout_share):
                heldout.append((digest_of(text), text))
            elif not source.limit or self._count < source.limit:
                if self._count % self._step == 0:
                    self._starts.append((number, place))
                self._count += 1
        self.heldout = [text for _, text in sorted(heldout)]
        if source.heldout_share and not heldout:
            raise too_small(self._where, self._count, source.heldout_share)
        if not self._count:
            raise ValueError(f"{self._where}: expected texts to train on, got none in {source.path}")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> Any:
        if not isinstance(at, slice):
            return self[at : at + 1][0]
        first, last, _ = at.indices(self._count)
        if first != self._next:
            begins = first // self._step * self._step
            number, place = self._starts[first // self._step]
            share = self._source.heldout_share
            rows = (text for _, _, text in self._rows(number, place) if not falls_out(text, share))
            self._live = itertools.islice(rows, first - begins, None)
        self._next = last
        texts = list(itertools.islice(self._live, last - first))
        if len(texts) < last - first:
            raise ValueError(f"{self._where}: expected {self._count} texts, got fewer now; its files changed")
        return texts

    def _rows(self, number: int, place: list[int]) -> Iterator[tuple[int, list[int], str]]:
        """(file, place in it, text) of what is not blank, from a place on."""
        for file in range(number, len(self._files.names)):
            before, read = place, functools.partial(self._files.rows, file)
            name = f"{self._where}: {self._files.names[file]}"
            for after, text in patiently(read, place, Streaming(), name, self._closed):
                if text.strip():
                    yield file, before, text
                before = after
            place = []


def _tokenize(cfg: Config, workdir: Path) -> dict[str, Any]:
    from nemojax import hosts

    index, count = _place()
    tokenizer = load_tokenizer(cfg.tokenizer)
    hosts.on_primary(lambda: str(tokenizer.save(workdir / "tokenizer")))
    if not (workdir / "tokenizer").is_dir():
        raise ValueError(
            f"{workdir}: expected the directory that process 0 writes to, got another; choose a --workdir on "
            "a file system that all processes share"
        )
    parts = [part for source in cfg.sources for part in _parts(source, workdir / SHARDS / source.name)]
    counts = []
    with Encoders(tokenizer, cfg.workers or _cores()) as encoders:
        for part in parts:
            counts.append(_write_part(part, cfg.shard_documents, encoders, index, count))
    made = [(part, number) for part, number in zip(parts, counts, strict=True) if number]
    for part, number in made:
        while not is_complete(part.folder) and missing_shards(part.folder, number):
            time.sleep(_POLL_SECONDS)  # of another process; if that one dies, this one is ended too
    return hosts.on_primary(lambda: _finish(made, tokenizer))


def _finish(made: Sequence[tuple[Part, int]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the index files, that of the held-out side first, and adds up what they say."""
    result: dict[str, Any] = {"documents": 0, "tokens": 0, "heldout_documents": 0, "heldout_tokens": 0}
    sources: dict[str, dict[str, int]] = {}
    for part, number in made:
        if not is_complete(part.folder):
            write_index(part.folder, number, tokenizer, to_dict(part.source))
        clear_marks(part.folder)
        index = json.loads((part.folder / INDEX).read_text())
        side = "heldout_" if part.folder.name == HELDOUT else ""
        for key in ("documents", "tokens"):
            result[f"{side}{key}"] += index[key]
            sources.setdefault(part.source.name, {})[f"{side}{key}"] = index[key]
    return {**result, "sources": sources}


def _place() -> tuple[int, int]:
    """(this process, how many there are)."""
    import jax

    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_part(part: Part, shard_documents: int, encoders: Encoders, index: int, count: int) -> int:
    """Writes this process's missing shards of a part; how many shards the part has, 0 for an empty one."""
    if is_complete(part.folder):
        return len(json.loads((part.folder / INDEX).read_text())["shards"])
    texts = part.texts()
    shards = num_shards(len(texts), shard_documents)
    mine = [number for number in missing_shards(part.folder, shards) if number % count == index]
    where = f"source {part.source.name}" + ", held out" * (part.folder.name == HELDOUT)
    tasks = (task for number in mine for task in _tasks(texts, number, shard_documents, where))
    to_do = sum(min(len(texts) - number * shard_documents, shard_documents) for number in mine)
    with Progress(where, to_do) as progress:
        for number, encoded in itertools.groupby(encoders.map(tasks), lambda pair: pair[0].shard):
            parts = (progress.count(part) for _, part in encoded)
            write_shard(part.folder, number, parts, len(texts))
            progress.show()
    return shards


class Task(NamedTuple):
    """Texts for one worker, the first of which is document `first` of `where`."""

    shard: int
    first: int
    texts: list[str]
    where: str


def _tasks(texts: Sequence[str], shard: int, shard_documents: int, where: str) -> Iterator[Task]:
    """The texts of a shard in lists of a limited size, read when they are asked for."""
    start, end = shard * shard_documents, min((shard + 1) * shard_documents, len(texts))
    for first in range(start, end, PART_DOCUMENTS):
        held: list[str] = []
        place, characters = first, 0
        for text in texts[first : min(first + PART_DOCUMENTS, end)]:
            if held and characters + len(text) > PART_CHARACTERS:
                yield Task(shard, place, held, where)
                place, held, characters = place + len(held), [], 0
            held.append(text)
            characters += len(text)
        yield Task(shard, place, held, where)


class Encoders:
    """Processes that tokenise tasks; with one, it is this process and the threads of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._encode = functools.partial(encode, str(tokenizer.path), dtype_for(tokenizer).str)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Encoded]]:
        """The tasks in their order, each with what became of it; a few are worked on ahead."""
        tasks = iter(tasks)
        ahead = [*itertools.islice(tasks, 2)]
        if len(ahead) < 2 or self._workers == 1:  # too little to start processes for
            yield from ((task, self._encode(task)) for task in itertools.chain(ahead, tasks))
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _begin_worker)
        waiting: deque = deque()
        try:
            for task in itertools.chain(ahead, tasks):
                waiting.append((task, self._pool.submit(self._encode, task)))
                if len(waiting) > 2 * self._workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            while waiting:
                task, future = waiting.popleft()
                yield task, future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"tokenize: one of {self._workers} workers was ended from outside, perhaps for want of "
                "memory; run again with fewer"
            ) from error


def _begin_worker() -> None:
    """A worker uses one thread, leaves Ctrl-C to its parent, and ends with it even if that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def encode(tokenizer_path: str, dtype: str, task: Task) -> Encoded:
    """A task's documents as a shard holds them; ValueError naming a text that has no UTF-8."""
    tokenizer = _tokenizer(tokenizer_path)
    try:
        batch = tokenizer.encode_batch(task.texts)
    except (TypeError, UnicodeError):
        for place, text in enumerate(task.texts, task.first):
            try:
                tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{task.where}, document {place}: {error}; repair the text") from None
        raise
    return encode_examples([document(tokenizer, ids) for ids in batch], np.dtype(dtype))


class Progress:
    """How far a part of a source is, on standard error: a bar on a terminal, elsewhere a line a shard."""

    def __init__(self, name: str, documents: int):
        from nemojax import hosts

        self._name, self._total = name, documents
        self._documents, self._tokens, self._started = 0, 0, time.monotonic()
        self._quiet = not hosts.is_primary() or not documents
        self._bar: Any = None
        if not self._quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            rate = progress.TextColumn("{task.fields[rate]}")
            columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn(), rate)
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=documents, rate="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, part: Encoded) -> Encoded:
        """Counts documents that have been tokenised, and hands them on."""
        self._documents += len(part.documents)
        self._tokens += len(part.ids)
        if self._bar is not None:
            rate = f"{self._tokens / (time.monotonic() - self._started):,.0f} tokens/s"
            self._bar.update(self._task, completed=self._documents, rate=rate)
        return part

    def show(self) -> None:
        """The line, after a shard."""
        if self._quiet or self._bar is not None:
            return
        seconds = time.monotonic() - self._started
        left = seconds / self._documents * (self._total - self._documents)
        rate = {TOKENS_PER_SECOND: self._tokens / seconds}
        line = describe_progress(self._name, self._documents, self._total, rate, left)
        print(line, file=sys.stderr, flush=True)
