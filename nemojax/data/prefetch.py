"""Batches made ahead of the step that uses them, by a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from nemojax.data.packing import Batch
from nemojax.hosts import of_all

END_SECONDS = 5.0  # how long a thread is waited for that should end


class Batches(Protocol):
    """What makes batches: `identity` stands for what decides the endless sequence of rows, `rows` are the
    numbers of the last batch's rows in it, and `ids` say what its rows hold."""

    identity: str
    rows: np.ndarray

    @property
    def ids(self) -> list[str]: ...
    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class _Made(NamedTuple):
    batch: Batch
    state: dict[str, Any]
    rows: np.ndarray
    ids: list[str]
    metrics: Mapping[str, float]


class Prefetch:
    """The batches of another iterator, up to `depth` of them made in advance (0: none, and no thread).

    `state()`, `rows`, `ids` and `metrics` are those of the last batch that was handed out, however far the
    thread is. An error of the iterator is raised where its batch would have come; to ask again tries again.
    The thread ends with `close`, or when nobody holds this any more.
    """

    def __init__(self, batches: Batches, depth: int = 2):
        if depth < 0:
            raise ValueError(f"data.prefetch: expected at least 0 batches, got {depth}")
        self._batches, self._depth = batches, depth
        self.identity = batches.identity
        self._last = _Made({}, batches.state(), batches.rows, [], {})
        self._thread: threading.Thread | None = None
        self._end: weakref.finalize | None = None
        self._is_ahead = False  # whether the iterator, left alone, would leave batches out

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Batch:
        if not self._depth:
            self._last = _make(self._batches)
            return self._last.batch
        if self._thread is None:
            self._start()
        found = self._queue.get()
        self._room.release()
        if isinstance(found, BaseException):
            assert self._thread and self._end
            self._thread.join()  # it has ended by itself
            self._thread = None
            self._end.detach()
            raise found
        self._last = found
        return found.batch

    @property
    def rows(self) -> np.ndarray:
        return self._last.rows

    @property
    def ids(self) -> list[str]:
        return self._last.ids

    @property
    def metrics(self) -> Mapping[str, float]:
        return self._last.metrics

    def state(self) -> dict[str, Any]:
        """Where the iterator stood after the last batch that was handed out."""
        return self._last.state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on after the batch that preceded `state()`."""
        self.close()
        self._batches.restore(state)
        self._last, self._is_ahead = _Made({}, state, self._batches.rows, [], {}), False

    def close(self) -> None:
        """Ends the thread. The next batch starts another, and none is left out."""
        if self._thread is not None and self._end is not None:
            self._end()
            self._thread.join()
            self._thread, self._is_ahead = None, True

    def _start(self) -> None:
        if self._is_ahead:
            self._batches.restore(self._last.state)
            self._is_ahead = False
        self._queue: queue.SimpleQueue[_Made | BaseException] = queue.SimpleQueue()
        self._room, stopped = threading.Semaphore(self._depth), threading.Event()
        # the thread must not know this object: it could never be let go of
        work = (self._batches, self._queue, self._room, stopped)
        self._thread = threading.Thread(target=_work, args=work, name="prefetch", daemon=True)
        self._thread.start()
        # also when the program ends: a thread that is cut off there may take the process down
        self._end = weakref.finalize(self, _finish, stopped, self._room, self._batches, self._thread)


class PrefetchShares(Prefetch):
    """`Prefetch` where each process reads a share of its own: a state is that of all processes.

    `state` and `restore` must be called by all of them.
    """

    def __init__(self, batches: Batches, depth: int, process_index: int, process_count: int):
        super().__init__(batches, depth)
        self._index, self._count = process_index, process_count

    def state(self) -> dict[str, Any]:
        together = max(1, jax.process_count() // self._count)  # read the same share
        return {"processes": of_all(self._last.state)[::together]}

    def restore(self, state: dict[str, Any]) -> None:
        states = state.get("processes", [state] * self._count)
        if len(states) != self._count:
            raise ValueError(
                f"data state: expected that of {self._count} processes, got that of {len(states)}; sources "
                "with stream go on with as many processes as they began with, so run that many, or write "
                "shards with nemojax tokenize, from which any number goes on"
            )
        super().restore(states[self._index])


def _make(batches: Batches) -> _Made:
    batch = next(batches)
    return _Made(batch, batches.state(), batches.rows, batches.ids, dict(getattr(batches, "metrics", {})))


def _work(
    batches: Batches, made: queue.SimpleQueue, room: threading.Semaphore, stopped: threading.Event
) -> None:
    while True:
        room.acquire()
        if stopped.is_set():
            return
        try:
            made.put(_make(batches))
        except BaseException as error:
            made.put(error)
            return


def _finish(
    stopped: threading.Event, room: threading.Semaphore, batches: Batches, thread: threading.Thread
) -> None:
    stopped.set()
    room.release()
    getattr(batches, "close", lambda: None)()
    if thread is not threading.current_thread():
        thread.join(END_SECONDS)
