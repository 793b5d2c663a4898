"""A mixture of text sources as configuration: training batches and held-out batches from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemojax.config import field
from nemojax.data.examples import LongPolicy, text_examples
from nemojax.data.loader import Loader, make_loader
from nemojax.data.packing import Batch, packed_batches
from nemojax.data.sources import Source, load_texts
from nemojax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextData:
    sources: tuple[Source, ...] = field((Source(),), "what is trained on; weights are shares of the tokens")
    heldout: tuple[Source, ...] = field((), "what is validated on; empty: the sources' own held-out split")
    length: int = field(2048, "tokens a row")
    batch_size: int = field(8, "rows a step over all devices")
    long: LongPolicy = field("split", "documents longer than a row: split, truncate, drop or error")
    heldout_batches: int = field(8, "validation batches a source at most")
    seed: int = field(0, "order of documents")


def train_batches(
    data: TextData, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> Loader:
    """Endless packed batches of the mixture; this process's rows of them."""
    if data.batch_size % process_count:
        raise ValueError(
            f"data.batch_size: expected a multiple of {process_count} processes, got {data.batch_size}"
        )
    return make_loader(
        [text_examples(load_texts(source), tokenizer) for source in data.sources],
        [source.weight for source in data.sources],
        batch_size=data.batch_size // process_count,
        length=data.length,
        pad_id=tokenizer.pad_id,
        seed=data.seed,
        long=data.long,
        process_index=process_index,
        process_count=process_count,
    )


def heldout_batches(data: TextData, tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    """{source name: packed batches}, each held-out document once, in order."""
    sources = data.heldout or tuple(
        replace(s, split="heldout", limit=min(s.limit, 512) if s.kind == "problems" else 0)
        for s in data.sources
        if s.kind in ("pydoc", "problems")
    )
    return {
        source.name: packed_batches(
            text_examples(load_texts(source), tokenizer),
            data.batch_size,
            data.length,
            tokenizer.pad_id,
            data.long,
            max_batches=data.heldout_batches,
        )
        for source in sources
    }
