"""A mixture of text sources as configuration: training batches and held-out batches from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemojax.config import field
from nemojax.data.examples import LongPolicy, text_examples
from nemojax.data.loader import Loader, make_loader
from nemojax.data.packing import Batch, packed_batches
from nemojax.data.sources import Source, load_heldout, load_texts
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


def train_batches(
    data: TextData, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> Loader:
    """Endless packed batches of the mixture; this process's rows of them."""
    return make_loader(
        [text_examples(load_texts(source), tokenizer) for source in training_sources(data)],
        [source.weight for source in data.sources],
        batch_size=rows_of_process(data.batch_size, process_count),
        length=data.length,
        pad_id=tokenizer.pad_id,
        seed=data.seed,
        long=data.long,
        process_index=process_index,
        process_count=process_count,
    )


def training_sources(data: TextData) -> list[Source]:
    """The sources as they are trained on: where `heldout` names texts, no share is taken out of them."""
    return (
        [replace(source, heldout_share=0.0) for source in data.sources] if data.heldout else [*data.sources]
    )


def rows_of_process(batch_size: int, process_count: int) -> int:
    """The rows of a global batch that one process makes; ValueError if they do not divide evenly."""
    if batch_size % process_count:
        raise ValueError(
            f"data.batch_size: expected a multiple of {process_count} processes, got {batch_size}"
        )
    return batch_size // process_count


def heldout_batches(data: TextData, tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    """{source name: packed batches}, each held-out document once; {} where nothing is held out."""
    if data.heldout:
        check_names([source.name for source in data.heldout], "data.heldout")
        texts = {s.name: load_texts(replace(s, heldout_share=0.0)) for s in data.heldout}
    else:
        check_names([source.name for source in data.sources], "data.sources")
        texts = {source.name: load_heldout(source) for source in data.sources}
    return {
        name: packed_batches(
            text_examples(documents, tokenizer),
            data.batch_size,
            data.length,
            tokenizer.pad_id,
            data.long,
            max_batches=data.heldout_batches,
        )
        for name, documents in texts.items()
        if len(documents)
    }


def check_names(names: Sequence[str], where: str) -> None:
    """ValueError if two sources have one name, under which reports could not tell them apart."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: expected different names, got {name!r} twice; set name")
