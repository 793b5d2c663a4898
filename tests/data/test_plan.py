"""The plan of rows: everything once an epoch, full rows, kept ratios, and exact resume by any processes."""

import json

import numpy as np
import pytest

from nemojax.data.examples import LongPolicy, split_example
from nemojax.data.loader import Shuffled
from nemojax.data.packing import unpack
from nemojax.data.plan import Plan, PlannedLoader, best_fit_decreasing
from nemojax.data.shards import open_shards, write_shards
from tests.data.tiny import numbered, tiny_tokenizer

RNG = np.random.default_rng(1)
LENGTHS = [RNG.integers(1, 60, 70).tolist(), [9] * 7]
LENGTH = 24


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """77 documents of two sources; every token of a source is different."""
    folder = tmp_path_factory.mktemp("plan")
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    for number, lengths in enumerate(LENGTHS):
        write_shards(folder / f"{number}", numbered(lengths), tokenizer, {}, shard_documents=16)
    return [open_shards(folder / f"{number}", tokenizer) for number in range(2)]


def loader(sources, **changes):
    options = {"batch_size": 4, "length": LENGTH, "pad_id": 0, "seed": 3, **changes}
    return PlannedLoader(sources, options.pop("weights", [3.0, 1.0]), **options)


def plan(sizes, weights=None, length=LENGTH, seed=0, long: LongPolicy = "split"):
    sizes = [np.asarray(s, np.int32) for s in sizes]
    return Plan(sizes, weights or [1.0] * len(sizes), length=length, seed=seed, long=long)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert a[key].dtype == b[key].dtype


def positions(made, sizes, window):
    """Positions of every piece of a window."""
    found = np.zeros(len(window.source), np.int64)
    for number, each in enumerate(sizes):
        mine = window.source == number
        left = np.asarray(each)[window.document[mine]] - window.part[mine] * made.length
        found[mine] = np.minimum(left, made.length)
    return found


# --- packing


def test_best_fit_decreasing():
    # 7 | 6+4 | 5+3+2 | 1: each into the fullest row with room
    assert best_fit_decreasing(np.asarray([5, 3, 7, 6, 4, 2]), 10).tolist() == [2, 0, 0, 1, 1, 2]
    assert best_fit_decreasing(np.asarray([10, 10, 1]), 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_what_fits_and_are_few(seed):
    sizes = np.random.default_rng(seed).integers(1, 500, 2000)
    rows = best_fit_decreasing(sizes, 512)
    filled = np.bincount(rows, sizes)
    assert filled.max() <= 512 and filled.min() > 0
    assert len(filled) * 512 <= sizes.sum() * 1.02


@pytest.mark.parametrize(
    ("mean", "spread", "length"), [(5.5, 1.0, 2048), (6.5, 1.2, 2048), (6.5, 1.2, 8192), (9.5, 1.0, 8192)]
)
def test_padding_stays_below_a_percent(mean, spread, length):
    """Documents of the lengths that collections of web pages, code and books have."""
    sizes = [np.maximum(1, np.random.default_rng(0).lognormal(mean, spread, 50_000)).astype(np.int32)]
    made = plan(sizes, length=length)
    for number in range(2):
        window = made.window(number)
        used = positions(made, sizes, window)
        per_row = np.add.reduceat(used, [0, *window.ends[:-1]])
        assert per_row.max() <= length
        assert 1 - used.sum() / (length * window.num_rows) < 0.01


def test_neighbouring_rows_are_not_alike():
    """Packing sorts by size; the rows must not come in that order."""
    sizes = [np.random.default_rng(0).integers(1, 2000, 5000)]
    made = plan(sizes, length=2048)
    window = made.window(0)
    counts = np.diff([0, *window.ends])
    halves = counts[: len(counts) // 2].mean(), counts[len(counts) // 2 :].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.2)


# --- what is drawn


@pytest.mark.parametrize("long", ["split", "truncate", "drop"])
def test_pieces_are_those_of_split_example(long):
    lengths = [1, 2, 25, 26, 24, 49, 50, 120, 1, 3, 73]
    examples, sizes = numbered(lengths), np.asarray(lengths) - 1
    expected = [
        (number, part, piece.size)
        for number in range(len(lengths))
        for part, piece in enumerate(split_example(examples[number], LENGTH, long))
    ]
    pieces = plan([sizes], long=long).pieces[0]
    found = pieces.find(np.arange(pieces.count))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
    assert pieces.positions == sum(size for _, _, size in expected)


def test_every_epoch_of_every_source_has_every_piece_once():
    made = plan([np.asarray(lengths) - 1 for lengths in LENGTHS], [3.0, 1.0])
    drawn = [made.drawn(number) for number in range(6)]
    for source, pieces in enumerate(made.pieces):
        mine = np.concatenate([piece[which == source] for which, piece in drawn])
        epochs = len(mine) // pieces.count
        assert epochs > 5
        split = mine[: epochs * pieces.count].reshape(epochs, pieces.count)
        assert (np.sort(split, axis=1) == np.arange(pieces.count)).all()
        assert len(np.unique(split, axis=0)) > 0.9 * epochs
        order = Shuffled(source, pieces.count, 0)
        assert [order[place][1] for place in range(100)] == mine[:100].tolist()


def test_rows_hold_what_is_drawn():
    made = plan([np.asarray(lengths) - 1 for lengths in LENGTHS])
    window, (source, piece) = made.window(3), made.drawn(3)
    rows = [entry for number in range(window.num_rows) for entry in window.row(number)]
    expected = []
    for which, number in zip(source, piece, strict=True):
        document, part, _ = made.pieces[which].find(np.asarray([number]))
        expected.append((int(which), int(document[0]), int(part[0])))
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("weights", [[0.6, 0.3, 0.1], [1.0, 1.0, 1.0], [0.9, 0.0999, 0.0001]])
def test_documents_keep_their_ratio_over_any_ten_thousand(weights):
    rng = np.random.default_rng(5)
    sizes = [rng.integers(20, 400, 3000), rng.integers(5, 60, 40), rng.integers(200, 900, 500)]
    made = plan(sizes, weights, length=1024)
    drawn = np.concatenate([made.drawn(number)[0] for number in range(-(-30_000 // made.window_pieces) + 1)])
    for source, rate in enumerate(made.rates):
        count = np.cumsum(np.concatenate([[0], drawn == source]))
        share = (count[10_000:] - count[:-10_000]) / 10_000
        assert np.abs(share - rate).max() < 0.001  # ten times better than a percentage point
    means = [s.mean() for s in sizes]
    tokens = [rate * mean for rate, mean in zip(made.rates, means, strict=True)]
    np.testing.assert_allclose(np.asarray(tokens) / sum(tokens), np.asarray(weights) / sum(weights))


def test_the_seed_decides_the_order():
    sizes = [np.asarray(LENGTHS[0]) - 1]
    assert plan(sizes).drawn(0)[1].tolist() == plan(sizes).drawn(0)[1].tolist()
    assert plan(sizes).drawn(0)[1].tolist() != plan(sizes, seed=1).drawn(0)[1].tolist()


# --- the loader


def test_rows_are_documents(sources):
    made = loader(sources)
    seen = {}
    for _ in range(100):
        batch = next(made)
        assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, (4, LENGTH))
        documents = iter(unpack(batch))
        for piece in (piece for row in made.ids for piece in row.split()):
            source, index, part = map(int, piece.split(":"))
            ids = sources[source][index].ids[part * LENGTH : (part + 1) * LENGTH + 1]
            tokens, targets = next(documents)
            np.testing.assert_array_equal(tokens, ids[:-1])
            np.testing.assert_array_equal(targets, ids[1:])
            seen[piece] = len(tokens)
    assert sum(size for piece, size in seen.items() if piece[0] == "0") == sum(LENGTHS[0]) - len(LENGTHS[0])


def sequence(sources, first, state, stages):
    """Rows of batches made by one number of processes after another, in global order."""
    ids, tokens, rows = [], [], []
    for processes, batch_size, steps in stages:
        parts = [
            loader(sources, batch_size=batch_size, process_index=p, process_count=processes)
            for p in range(processes)
        ]
        for part in parts:
            if state is not None:
                part.restore(json.loads(json.dumps(state)))
        for _ in range(steps):
            batches = [next(part)["tokens"] for part in parts]
            for row in range(batch_size):
                for part, batch in zip(parts, batches, strict=True):
                    ids.append(part.ids[row])
                    tokens.append(batch[row])
                    rows.append(int(part.rows[row]))
        states = [part.state() for part in parts]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert rows == list(range(first, first + len(rows)))
    return ids, np.stack(tokens), state


@pytest.mark.parametrize("seed", range(6))
def test_any_number_of_processes_resumes_exactly(sources, seed):
    """No row is lost and none comes twice, wherever the run stops and however it goes on."""
    rng = np.random.default_rng(seed)
    stages = [(n, int(rng.integers(1, 6)), int(rng.integers(0, 60))) for n in (1, 2, 4, 2, 1, 3)]
    ids, tokens, state = sequence(sources, 0, None, stages)
    whole_ids, whole_tokens, whole_state = sequence(sources, 0, None, [(1, 1, len(ids))])
    assert ids == whole_ids
    np.testing.assert_array_equal(tokens, whole_tokens)
    assert state == whole_state


def test_resume_far_ahead_does_not_count_from_the_start(sources):
    made = loader(sources, batch_size=400)
    for _ in range(20):
        next(made)
    state = made.state()
    assert state["window"][0] > 50 and state["row"] == 8000
    resumed = loader(sources, batch_size=400)
    resumed.restore(state)
    same(next(made), next(resumed))
    assert resumed.plan.window.cache_info().misses <= 6  # those of one batch
    np.testing.assert_array_equal(resumed.rows, np.arange(8000, 8400))


def test_processes_share_the_global_batch_row_by_row(sources):
    whole = loader(sources, batch_size=6)
    parts = [loader(sources, batch_size=2, process_index=p, process_count=3) for p in range(3)]
    for _ in range(5):
        batch = next(whole)
        for process, part in enumerate(parts):
            same(next(part), {key: value[process::3] for key, value in batch.items()})


def test_the_state_of_other_data_is_refused(sources):
    first = loader(sources)
    for changes in ({"length": 32}, {"seed": 4}, {"weights": [1.0, 1.0]}, {"long": "truncate"}):
        with pytest.raises(ValueError, match="data state: expected identity"):
            loader(sources, **changes).restore(first.state())
    with pytest.raises(ValueError, match="data state: expected identity"):
        loader(sources[::-1]).restore(first.state())
    assert loader(sources, batch_size=1, process_count=2).identity == first.identity


def test_a_batch_that_fails_can_be_asked_for_again(sources, monkeypatch):
    made, expected = loader(sources, batch_size=50), loader(sources, batch_size=50)
    for _ in range(3):
        same(next(made), next(expected))
    before, pieces = made.state(), type(sources[0]).pieces

    def fail(*_):
        raise OSError("the disk is away")

    monkeypatch.setattr(type(sources[0]), "pieces", fail)
    with pytest.raises(OSError, match="away"):
        next(made)
    assert made.state() == before
    monkeypatch.setattr(type(sources[0]), "pieces", pieces)
    same(next(made), next(expected))


# --- bad input


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_bad_weights(sources, weights):
    with pytest.raises(ValueError, match="a weight for each of 2|positive weights"):
        loader(sources, weights=weights)


def test_sources_without_usable_documents(sources):
    with pytest.raises(ValueError, match="source 1 has no usable document among 7"):
        loader(sources, length=5, long="drop")
    with pytest.raises(ValueError, match=r"source 0: expected at most 24 tokens, got 5\d in document \d+"):
        loader(sources, long="error")
    with pytest.raises(ValueError, match="process_index"):
        loader(sources, process_index=2, process_count=2)
