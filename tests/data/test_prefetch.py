"""Batches made ahead: the same ones, the state of what was used, and no thread left behind."""

import gc
import threading
import time

import numpy as np
import pytest

from nemojax.data.loader import make_loader
from nemojax.data.prefetch import Prefetch
from tests.data.tiny import numbered

LENGTHS = np.random.default_rng(1).integers(3, 50, 60).tolist()


class Counting:
    """Batches that say their number; `fails` is the one that cannot be made the first time."""

    identity = "counting"

    def __init__(self, fails: int = -1, seconds: float = 0.0, last: int = 10**9):
        self.made, self.fails, self.seconds, self.last = 0, fails, seconds, last
        self.rows = np.zeros(0, np.int64)

    def __next__(self):
        time.sleep(self.seconds)
        if self.made == self.last:
            raise StopIteration
        if self.made == self.fails:
            self.fails = -1
            raise ValueError("cannot be made")
        self.rows = np.asarray([self.made])
        self.made += 1
        return {"tokens": self.rows}

    @property
    def ids(self):
        return [f"row {self.made - 1}"]

    @property
    def metrics(self):
        return {"number": self.made - 1}

    def state(self):
        return {"made": self.made}

    def restore(self, state):
        self.made = state["made"]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def ended(seconds: float = 5.0) -> bool:
    stop = time.monotonic() + seconds
    while threads() and time.monotonic() < stop:
        time.sleep(0.01)
    return not threads()


@pytest.fixture(autouse=True)
def no_others():
    """No thread of a loader that an earlier test's traceback still holds."""
    gc.collect()
    assert ended()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_all_is_that_of_the_batch_in_use(depth):
    ahead = Prefetch(Counting(), depth)
    assert ahead.state() == {"made": 0}
    for number in range(20):
        assert next(ahead)["tokens"] == [number]
        assert ahead.rows.tolist() == [number] and ahead.ids == [f"row {number}"]
        assert ahead.state() == {"made": number + 1} and ahead.metrics == {"number": number}
    ahead.restore({"made": 7})
    assert next(ahead)["tokens"] == [7]
    ahead.close()
    assert not threads()
    assert next(ahead)["tokens"] == [8]  # it starts again where it was
    ahead.close()


def test_the_loader_is_the_same_ahead():
    def loader():
        return make_loader([numbered(LENGTHS)], batch_size=4, length=24, pad_id=0)

    plain, ahead = loader(), Prefetch(loader())
    for _ in range(9):
        assert (next(plain)["tokens"] == next(ahead)["tokens"]).all()
        assert plain.state() == ahead.state() and plain.rows.tolist() == ahead.rows.tolist()
    again = loader()
    again.restore(ahead.state())
    assert (next(again)["tokens"] == next(plain)["tokens"]).all()
    assert ahead.identity == plain.identity


def test_no_more_than_depth_are_made_ahead():
    counting = Counting()
    ahead = Prefetch(counting, 3)
    next(ahead)
    time.sleep(0.1)
    assert counting.made == 4
    ahead.close()


def test_batches_are_made_while_one_is_used():
    ahead = Prefetch(Counting(seconds=0.03), 2)
    next(ahead)
    start = time.perf_counter()
    for _ in range(10):
        time.sleep(0.06)
        next(ahead)
    assert time.perf_counter() - start < 0.85  # 0.9 one after the other
    ahead.close()


def test_an_error_comes_in_its_place():
    ahead = Prefetch(Counting(fails=2), 3)
    assert [next(ahead)["tokens"][0] for _ in range(2)] == [0, 1]
    time.sleep(0.05)  # made ahead, but not raised yet
    with pytest.raises(ValueError, match="cannot be made"):
        next(ahead)
    assert ahead.state() == {"made": 2} and ahead.rows.tolist() == [1] and not threads()
    assert next(ahead)["tokens"] == [2]  # it may be asked for again
    ahead.close()
    short = Prefetch(Counting(last=2))
    assert [batch["tokens"][0] for batch in short] == [0, 1] and ended()
    with pytest.raises(ValueError, match="expected at least 0 batches, got -1"):
        Prefetch(Counting(), -1)


def test_the_thread_ends_with_its_owner():
    ahead = Prefetch(Counting())
    next(ahead)
    assert len(threads()) == 1
    del ahead
    assert ended()

    def fails():
        for _ in Prefetch(Counting()):
            raise KeyError("in the loop")

    with pytest.raises(KeyError):
        fails()
    gc.collect()
    assert ended()
