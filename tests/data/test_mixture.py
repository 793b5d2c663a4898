"""Mixtures: ratios that hold in every stretch, weights that make sense, token shards among texts."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nemojax.data.examples import text_examples
from nemojax.data.loader import make_loader
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.shards import write_shards
from nemojax.data.sources import Source, input_files, load_texts
from tests.data.tiny import TEXTS, numbered, tiny_tokenizer

WINDOW = 10_000


@pytest.mark.parametrize(
    "weights",
    [
        [3, 1],
        [0.4, 0.15, 0.15, 0.15, 0.15],
        [0.001, 0.0099, 0.77, 0.11],
        [1.0, *[1.00999] * 9],
        [1 / 97, 1 / 89, 1 / 83, 5],
        [1e-12, 1.0],
        [7e-7, 3, 1e-3, 0.5, 0.5000001, 11],
    ],
    ids=str,
)
def test_ratios_hold_in_any_ten_thousand_documents(weights):
    sources = [numbered([5] * 7) for _ in weights]  # equal sizes: shares of tokens are shares of documents
    loader = make_loader(sources, weights, batch_size=1, length=4, pad_id=0)
    drawn = np.asarray([loader._order[place][0] for place in range(2 * WINDOW)])
    for source, weight in enumerate(weights):
        count = np.cumsum([0, *(drawn == source)])
        ratios = (count[WINDOW:] - count[:-WINDOW]) / WINDOW
        assert np.abs(ratios - weight / sum(weights)).max() < 0.01


def test_weights_that_make_no_mixture(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    sums = Source(name="sum2", kind="problems", limit=50)

    def mixed(*weights):
        sources = [replace(source, weight=w) for source, w in zip((Source(), sums), weights, strict=True)]
        return train_batches(TextData(sources=tuple(sources), length=32, batch_size=2), tokenizer)

    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"source sum2: expected a weight of at least 0, got {weight}"):
            mixed(1.0, weight)
    with pytest.raises(ValueError, match="expected one with a weight above 0, got none of pydoc, sum2"):
        mixed(0.0, 0.0)
    with pytest.raises(ValueError, match="expected one with a weight above 0, got none of no sources"):
        train_batches(TextData(sources=()), tokenizer)
    alone = train_batches(TextData(length=32, batch_size=2), tokenizer)
    without = mixed(1.0, 0.0)  # a weight of 0 leaves a source out
    for _ in range(3):
        assert (next(alone)["tokens"] == next(without)["tokens"]).all()
    assert alone.identity == without.identity


def test_token_shards_alone_and_among_texts(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    examples = text_examples(load_texts(Source()), tokenizer)
    write_shards(tmp_path / "shards", examples, tokenizer, {})
    write_shards(tmp_path / "shards" / "heldout", text_examples(TEXTS, tokenizer), tokenizer, {})
    tokens = Source(name="tokens", kind="tokens", path=str(tmp_path / "shards"))
    alone = TextData(sources=(tokens,), length=64, batch_size=4)
    batches = train_batches(alone, tokenizer)
    next(batches)
    parts = [train_batches(alone, tokenizer, process, 2) for process in range(2)]
    for part in parts:  # any number of processes goes on
        part.restore(json.loads(json.dumps(batches.state())))
    whole = next(batches)
    for process, part in enumerate(parts):
        assert (next(part)["tokens"] == whole["tokens"][process::2]).all()
        assert part.rows.tolist() == batches.rows[process::2].tolist()
    heldout = heldout_batches(alone, tokenizer)["tokens"]
    assert sum(int((batch["segments"] > 0).sum()) for batch in heldout) > 50
    assert input_files([tokens]) == [tmp_path / "shards/index.json", tmp_path / "shards/heldout/index.json"]

    mixed = replace(alone, sources=(tokens, Source(name="sum2", kind="problems", limit=50)))
    loader, other = train_batches(mixed, tokenizer), train_batches(mixed, tokenizer)
    next(loader)
    other.restore(loader.state())
    assert (next(loader)["tokens"] == next(other)["tokens"]).all()
    with pytest.raises(ValueError, match="expected no limit and no stream with tokens, got limit=3"):
        train_batches(replace(alone, sources=(replace(tokens, limit=3),)), tokenizer)
    with pytest.raises(ValueError, match="expected texts, got tokens"):
        load_texts(tokens)
    with pytest.raises(ValueError, match="expected a directory of tokens"):
        train_batches(replace(alone, sources=(replace(tokens, path=str(tmp_path)),)), tokenizer)
