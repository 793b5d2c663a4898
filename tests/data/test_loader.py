"""The loader: deterministic, resumable bit for bit, sharded by row, mixed by tokens."""

import json

import numpy as np
import pytest

from nemojax.data.examples import LazyExamples, text_examples
from nemojax.data.loader import Shuffled, make_loader
from tests.data.tiny import TEXTS, numbered, tiny_tokenizer

LENGTHS = np.random.default_rng(1).integers(3, 50, 60).tolist()


def loader(**changes):
    options = {"batch_size": 4, "length": 24, "pad_id": 0, "seed": 3, "lookahead": 6, **changes}
    return make_loader([numbered(LENGTHS), numbered([9] * 7)], [3.0, 1.0], **options)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert a[key].dtype == b[key].dtype


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_resume_is_exact(steps):
    whole, resumed = loader(), loader()
    for _ in range(steps):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    next(resumed)  # a used loader restores as well as a fresh one
    resumed.restore(state)
    for _ in range(12):
        same(next(whole), next(resumed))
        assert whole.ids == resumed.ids and whole.rows.tolist() == resumed.rows.tolist()
    assert whole.state() == resumed.state()


def test_seed_decides_the_order():
    same(next(loader()), next(loader()))
    assert (next(loader())["tokens"] != next(loader(seed=4))["tokens"]).any()


def test_the_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="data state: expected identity"):
        loader().restore(loader(length=32).state())


def test_processes_share_the_global_batch_row_by_row():
    whole = loader(batch_size=6)
    parts = [loader(batch_size=2, process_index=p, process_count=3) for p in range(3)]
    for _ in range(5):
        batch, shards = next(whole), [next(part) for part in parts]
        for process, shard in enumerate(shards):
            same(shard, {key: value[process::3] for key, value in batch.items()})
            assert parts[process].rows.tolist() == whole.rows[process::3].tolist()
    assert parts[0].state() == parts[2].state()


def test_rows_are_numbered_through():
    """Whatever the batch size: what is kept by row number is found again."""
    large, small = loader(batch_size=6), loader(batch_size=2)
    batch = next(large)
    for first in (0, 2, 4):
        same(next(small), {key: value[first : first + 2] for key, value in batch.items()})
        assert small.rows.tolist() == [first, first + 1] and small.rows.dtype == np.int64
    next(large)
    assert large.rows.tolist() == list(range(6, 12)) and large.identity == small.identity
    assert loader(seed=4).identity != large.identity


def test_mixture_weights_are_shares_of_tokens():
    first, second = numbered([65] * 40), numbered([5] * 400)
    mixed = make_loader([first, second], [1.0, 3.0], batch_size=8, length=64, pad_id=0)
    short = total = 0
    for _ in range(60):
        batch = next(mixed)
        used = batch["segments"] > 0
        restarts = (batch["positions"] == 0) & used
        # only the short documents share a row
        short += used[restarts.sum(1) > 1].sum()
        total += used.sum()
    assert short / total == pytest.approx(0.75, abs=0.05)


def test_an_epoch_sees_every_document_once():
    order = Shuffled(source=2, size=13, seed=0)
    epochs = [[order[13 * epoch + i][1] for i in range(13)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_lazy_documents_give_the_same_batches(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    lazy = text_examples(TEXTS, tokenizer, eager=False)
    assert isinstance(lazy, LazyExamples)

    def first(examples):
        return next(make_loader([examples], batch_size=2, length=200, pad_id=tokenizer.pad_id))

    same(first(lazy), first(text_examples(TEXTS, tokenizer)))


def test_long_documents_are_split_across_rows_when_lazy(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    split = make_loader(
        [text_examples(TEXTS, tokenizer, eager=False)], batch_size=2, length=8, pad_id=tokenizer.pad_id
    )
    whole = split.state()
    batches = [next(split) for _ in range(6)]
    split.restore(whole)
    for batch in batches:
        same(batch, next(split))


@pytest.mark.parametrize(
    "changes, message",
    [({"weights": [1.0]}, "a weight for each of 2"), ({"weights": [1.0, 0.0]}, "positive weights")],
)
def test_bad_weights(changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader([numbered([9]), numbered([9])], batch_size=1, length=8, pad_id=0, **changes)


def test_a_source_without_usable_documents():
    with pytest.raises(ValueError, match="source 0 has no usable document"):
        make_loader([numbered([90])], batch_size=1, length=8, pad_id=0, long="drop")
    with pytest.raises(ValueError, match="process_index"):
        loader(process_index=2, process_count=2)
