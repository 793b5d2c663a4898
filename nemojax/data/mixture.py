"""A mixture of text sources as configuration: training batches and held-out batches from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from nemojax.config import field
from nemojax.data.examples import Example, Examples, LongPolicy, document, text_examples
from nemojax.data.files import Documents
from nemojax.data.loader import make_loader
from nemojax.data.packing import Batch, packed_batches
from nemojax.data.plan import PlannedLoader
from nemojax.data.prefetch import Prefetch, PrefetchShares
from nemojax.data.reading import Streaming
from nemojax.data.shards import open_heldout, open_shards
from nemojax.data.sources import Source, load_heldout, load_texts
from nemojax.data.stream import Stream
from nemojax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextData:
    sources: tuple[Source, ...] = field((Source(),), "what is trained on; weights are shares of the tokens")
    heldout: tuple[Source, ...] = field(
        (), "what is validated on, whole; empty: the part of `sources` that is held out"
    )
    length: int = field(2048, "tokens a row")
    batch_size: int = field(8, "rows a step over all devices")
    long: LongPolicy = field("split", "documents longer than a row: split, truncate, drop or error")
    heldout_batches: int = field(8, "validation batches a source at most")
    seed: int = field(0, "order of documents")
    prefetch: int = field(2, "batches made ahead of the step that uses them, 0 for none")
    streaming: Streaming = field(Streaming(), "how sources with `stream` are read")


def train_batches(
    data: TextData, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> Prefetch:
    """Endless packed batches of the mixture; this process's rows of them.

    Token shards alone go by a plan that any number of processes resumes; else `make_loader` packs.
    ValueError for weights that are negative or all zero.
    """
    sources, weights = _weighted(training_sources(data))
    options: dict[str, Any] = {
        "batch_size": rows_of_process(data.batch_size, process_count),
        "length": data.length,
        "pad_id": tokenizer.pad_id,
        "seed": data.seed,
        "long": data.long,
        "process_index": process_index,
        "process_count": process_count,
    }
    if all(source.kind == "tokens" for source in sources):
        shards = [open_shards(_shards_of(source), tokenizer) for source in sources]
        return Prefetch(PlannedLoader(shards, weights, **options), data.prefetch)
    if not any(source.stream for source in sources):
        examples = [_examples(source, tokenizer) for source in sources]
        return Prefetch(make_loader(examples, weights, **options), data.prefetch)
    pool = ThreadPoolExecutor(data.streaming.workers, "tokenise")
    shared = {name: options[name] for name in ("length", "long", "seed", "process_index", "process_count")}
    mixed = [
        Stream(source, number, tokenizer, data.streaming, pool, **shared)
        if source.stream
        else _examples(source, tokenizer)
        for number, source in enumerate(sources)
    ]
    return PrefetchShares(make_loader(mixed, weights, **options), data.prefetch, process_index, process_count)


def training_sources(data: TextData) -> list[Source]:
    """The sources as they are trained on: where `heldout` names texts, no share is taken out of them."""
    return (
        [replace(source, heldout_share=0.0) for source in data.sources] if data.heldout else [*data.sources]
    )


def _weighted(sources: Sequence[Source]) -> tuple[list[Source], list[float]]:
    """The sources that are trained on, and their weights."""
    for source in sources:
        if not 0 <= source.weight < math.inf:
            raise ValueError(
                f"source {source.name}: expected a weight of at least 0, got {source.weight}; 0 leaves it out"
            )
    used = [source for source in sources if source.weight]
    if not used:
        names = ", ".join(source.name for source in sources) or "no sources"
        raise ValueError(f"data.sources: expected one with a weight above 0, got none of {names}")
    return used, [source.weight for source in used]


def _examples(source: Source, tokenizer: Tokenizer) -> Examples:
    if source.kind == "tokens":
        return open_shards(_shards_of(source), tokenizer)
    return text_examples(load_texts(source), tokenizer)


def _shards_of(source: Source) -> str:
    if source.limit or source.stream:
        raise ValueError(
            f"source {source.name}: expected no limit and no stream with tokens, got limit={source.limit}, "
            f"stream={source.stream}; what is in the shards was decided when they were made"
        )
    return source.path


def rows_of_process(batch_size: int, process_count: int) -> int:
    """The rows of a global batch that one process makes; ValueError if they do not divide evenly."""
    if batch_size % process_count:
        raise ValueError(
            f"data.batch_size: expected a multiple of {process_count} processes, got {batch_size}"
        )
    return batch_size // process_count


def heldout_batches(data: TextData, tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    """{source name: packed batches}, each held-out document once; {} where nothing is held out.

    Of a stream these are the first documents that are found (see `Documents.heldout`), as many as fill
    `heldout_batches`.
    """
    if data.heldout:
        check_names([source.name for source in data.heldout], "data.heldout")
        named = [replace(source, heldout_share=0.0) for source in data.heldout]
        found = {source.name: _whole(source, data, tokenizer) for source in named}
    else:
        check_names([source.name for source in data.sources], "data.sources")
        found = {source.name: _heldout(source, data, tokenizer) for source in data.sources}
    return {
        name: packed_batches(
            examples,
            data.batch_size,
            data.length,
            tokenizer.pad_id,
            data.long,
            max_batches=data.heldout_batches,
        )
        for name, examples in found.items()
        if examples is not None
    }


def _whole(source: Source, data: TextData, tokenizer: Tokenizer) -> Examples | Iterator[Example]:
    if source.stream:
        texts = Documents(source, data.streaming).survey()
        return (document(tokenizer, tokenizer.encode(text)) for text in texts)
    return _examples(source, tokenizer)


def _heldout(source: Source, data: TextData, tokenizer: Tokenizer) -> Examples | Iterator[Example] | None:
    """The documents of a source that are never trained on, None where it holds none out."""
    if source.kind == "tokens":
        return open_heldout(_shards_of(source), tokenizer)
    if source.stream:
        if not source.heldout_share:
            return None
        texts = Documents(source, data.streaming).heldout()
        return (document(tokenizer, tokenizer.encode(text)) for text in texts)
    texts = load_heldout(source)
    return text_examples(texts, tokenizer) if len(texts) else None


def check_names(names: Sequence[str], where: str) -> None:
    """ValueError if two sources have one name, under which reports could not tell them apart."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: expected different names, got {name!r} twice; set name")
