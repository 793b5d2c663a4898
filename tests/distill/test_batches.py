"""Batches on their way: a cache's rows come with them, in time, and after a resume."""

import numpy as np
import pytest

from nemojax.distill.batches import OfflineBatches, View
from nemojax.distill.cache_store import TeacherCache, row_hashes
from tests.distill.test_cache_store import ABOUT, fill


class Rows:
    """A loader of numbered rows, `batch_size` of them in this process of `count`."""

    identity, metrics = "rows", {"train/something": 1.0}

    def __init__(self, batch_size: int, length: int = 6):
        self.batch_size, self.length, self.made = batch_size, length, 0
        self.rows = np.zeros(0, np.int64)

    def __next__(self) -> dict[str, np.ndarray]:
        self.rows = np.arange(self.made, self.made + self.batch_size)
        self.made += self.batch_size
        tokens = (np.arange(self.length) + self.rows[:, None]).astype(np.int32)
        return {"tokens": tokens, "segments": np.ones_like(tokens)}

    @property
    def ids(self) -> list[str]:
        return [str(row) for row in self.rows]

    def state(self) -> dict:
        return {"made": self.made}

    def restore(self, state: dict) -> None:
        self.made = state["made"]


@pytest.fixture
def cache(tmp_path) -> tuple[TeacherCache, dict[str, np.ndarray]]:
    """A cache of the rows of `Rows`, and what is in it by row."""
    cache = TeacherCache(str(tmp_path))
    wrote = fill(cache, ABOUT)
    loader = Rows(4)
    for step in range(0, 5, 2):
        group = [row_hashes(next(loader)) for _ in range(min(2, 5 - step))]
        cache.commit(step, np.stack(group))
    return cache, {name: array.reshape(20, *array.shape[2:]) for name, array in wrote.items()}


def test_every_row_comes_with_its_own(cache):
    store, wrote = cache
    batches = OfflineBatches(Rows(3), store, top_k=2)
    for step in range(6):
        batch, rows = next(batches), slice(3 * step, 3 * step + 3)
        np.testing.assert_array_equal(batches.rows, np.arange(20)[rows])
        for name in ("ids", "logps", "tail"):
            np.testing.assert_array_equal(batch.pop(f"teacher_{name}"), wrote[name][rows])
        assert set(batch) == {"tokens", "segments"}
    assert batches.ids == ["15", "16", "17"] and batches.metrics == {"train/something": 1.0}
    with pytest.raises(ValueError, match="row 20, got a cache of 20 rows"):
        next(batches)


def test_what_comes_next_is_read_meanwhile(cache, monkeypatch):
    store, _ = cache
    asked = []
    read = TeacherCache.read
    monkeypatch.setattr(
        TeacherCache, "read", lambda self, rows: asked.append(int(rows[0])) or read(self, rows)
    )
    batches = OfflineBatches(Rows(4), store, 4, ahead=2)
    for wanted in ([0, 4, 8], [0, 4, 8, 12], [0, 4, 8, 12, 16], [0, 4, 8, 12, 16]):
        next(batches)
        assert asked == wanted


def test_a_resumed_run_goes_on_with_the_same_rows(cache):
    store, wrote = cache
    first = OfflineBatches(Rows(4), store, 4)
    for _ in range(2):
        next(first)
    second = OfflineBatches(Rows(4), store, 4)
    second.restore(first.state())
    np.testing.assert_array_equal(next(second)["teacher_ids"], wrote["ids"][8:12])
    second.restore(first.state())
    np.testing.assert_array_equal(next(second)["teacher_ids"], wrote["ids"][8:12])


def test_more_tokens_than_are_kept_are_refused(cache):
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=rf"from 1 to the 4 tokens that it keeps, got {top_k}"):
            OfflineBatches(Rows(4), cache[0], top_k)


def test_other_texts_are_refused_at_their_row(cache):
    loader = Rows(4)
    loader.restore({"made": 2})
    made = OfflineBatches(loader, cache[0], 4)
    loader.length = 5  # no row is as the teacher read it
    with pytest.raises(ValueError, match="row 2: expected the tokens that the teacher read"):
        next(made)


def test_the_place_of_a_view_is_the_loaders():
    loader = Rows(2)
    view = View(loader)
    view.restore({"made": 6})
    assert next(view)["tokens"][0, 0] == 6 and view.ids == ["6", "7"]
    assert view.state() == loader.state() == {"made": 8} and view.identity == "rows"
    view.bind(lambda: None)  # a loader that samples nothing has no use for weights
