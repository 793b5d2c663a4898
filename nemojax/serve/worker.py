"""An engine stepped in a thread of its own, and its events as streams for an event loop.

The loop's side counts what was accepted and is not done; the thread's side owns the engine. They meet in a
list of commands one way and in `call_soon_threadsafe`, once a step, the other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from nemojax.generate.jobs import Event, Job
from nemojax.serve.metrics import Metrics

T = TypeVar("T")
MAX_FAILURES = 3  # of an engine in a row, before the process gives up
logger = logging.getLogger("uvicorn.error")


class Stepped(Protocol):
    """The part of an `Engine` that is used here."""

    @property
    def has_work(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    def submit(self, job: Job) -> int: ...
    def cancel(self, job_id: int) -> None: ...
    def step(self) -> list[Event]: ...


class Overloaded(Exception):
    """No room in the queue: try again later."""


class Stopped(Exception):
    """The engine broke, or the server is going down."""


class Stream:
    """The events of some jobs, (index of the job, event), until all have finished.

    Raises ValueError for a job that the engine refuses, Stopped if the engine breaks. Whoever takes one
    closes it; that cancels what is not finished and frees its slots.
    """

    def __init__(self, worker: Worker, jobs: Sequence[Job]):
        self.jobs = tuple(jobs)
        self.left = len(self.jobs)
        self._worker = worker
        self._news: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self._started = time.monotonic()
        self._last: list[float | None] = [None] * len(self.jobs)
        self._open = [True] * len(self.jobs)
        self._closed = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self.left and self._news.empty():
            raise StopAsyncIteration
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def end(self, index: int) -> None:
        """Cancels one job, if it has not finished."""
        if self._open[index]:
            self._open[index] = False
            self.left -= 1
            self._worker._leave(self, 1, index)

    def close(self) -> None:
        """Cancels what is left; a second time does nothing."""
        if not self._closed:
            self._closed = True
            left, self.left = self.left, 0
            self._worker._leave(self, left)

    def _take(self, news: tuple[int, Event] | Exception, metrics: Metrics) -> int:
        """Adds news on the loop's side; returns how many jobs ended with it."""
        if self._closed:
            return 0
        if isinstance(news, Exception):
            self._news.put_nowait(news)
            ended, self.left = self.left, 0
            return ended
        index, event = news
        if not self._open[index]:
            return 0
        self._news.put_nowait(news)
        if event.tokens:
            now, before = time.monotonic(), self._last[index]
            metrics.tokens(
                len(event.tokens), now - (self._started if before is None else before), before is None
            )
            self._last[index] = now
        if event.finish is None:
            return 0
        metrics.finished(len(self.jobs[index].prompt), event.cached)
        self._open[index] = False
        self.left -= 1
        return 1


class Worker:
    """Runs an engine. `make_engine` is called in the thread, and again when an engine has broken.

    slots: sequences that run at a time; queue: how many more may wait.
    """

    def __init__(self, make_engine: Callable[[], Stepped], slots: int, queue: int, metrics: Metrics):
        self.slots, self.capacity, self.metrics = slots, slots + queue, metrics
        self.open, self.running = 0, 0
        self.dead: str | None = None
        self.draining = False
        self.on_death: Callable[[], None] = lambda: None
        self._make = make_engine
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stop = False
        self._of: dict[int, tuple[Stream, int]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        """Makes the engine; whatever that raises is raised here."""
        self._loop = asyncio.get_running_loop()
        ready = self._loop.create_future()
        self._tell(lambda: self._settle(ready, None))
        self._ready = ready
        self._thread.start()
        await ready

    def stop(self) -> None:
        """Ends the thread, after the step that it is in: the interpreter must not end under it."""
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    async def drained(self) -> None:
        """Refuses what comes from now on, and waits until all that was accepted is done."""
        self.draining = True
        await self._idle.wait()

    def check_room(self, num: int) -> None:
        """Raises what `submit` of so many jobs would raise now."""
        if self.dead is not None or self.draining:
            raise Stopped(self.dead or "the server is shutting down")
        if self.open + num > self.capacity:
            raise Overloaded

    def submit(self, jobs: Sequence[Job]) -> Stream:
        """Queues jobs together. Overloaded if they find no room; Stopped when going down."""
        self._admit(len(jobs))
        stream = Stream(self, jobs)
        self._tell(lambda: self._enter(stream))
        return stream

    async def call(self, function: Callable[[], T]) -> T:
        """Runs something else between two steps of the engine, so that they do not share the device."""
        self._admit(1)
        future: asyncio.Future[T] = self._loop.create_future()

        def command() -> None:
            if not future.cancelled():
                try:
                    self._settle(future, function())
                except Exception as error:
                    self._settle(future, error)

        self._tell(command)
        try:
            return await future
        finally:
            self._count(-1)

    # on the loop's side

    def _admit(self, num: int) -> None:
        self.check_room(num)
        self._count(num)

    def _count(self, change: int) -> None:
        self.open += change
        if self.open:
            self._idle.clear()
        else:
            self._idle.set()

    def _leave(self, stream: Stream, left: int, index: int | None = None) -> None:
        if left:
            self._count(-left)
            self._tell(lambda: self._cancel(stream, index))

    def _hand_out(self, news: list[tuple[Stream, tuple[int, Event] | Exception]], running: int) -> None:
        self.running = running
        for stream, one in news:
            self._count(-stream._take(one, self.metrics))

    def _tell(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # on the thread's side

    def _run(self) -> None:
        try:
            self._engine = self._make()
        except Exception as error:
            self._settle(self._ready, error)
            return
        failures = 0
        while not self._stop:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._stop or self._engine.has_work)
            try:
                self._obey()
                self._step()
                failures = 0
            except Exception as error:
                failures += 1
                logger.error("the engine broke; all that ran has failed", exc_info=error)
                self._recover(failures)

    def _obey(self) -> None:
        while True:
            with self._wake:
                if not self._commands:
                    return
                command = self._commands.popleft()
            command()

    def _step(self) -> None:
        events = self._engine.step() if self._engine.has_work and not self._stop else []
        news = [(*self._of[event.job], event) for event in events if event.job in self._of]
        for event in events:
            if event.finish is not None:
                self._of.pop(event.job, None)
        self._post([(stream, (index, event)) for stream, index, event in news], self._engine.num_running)

    def _enter(self, stream: Stream) -> None:
        for index, job in enumerate(stream.jobs):
            try:
                self._of[self._engine.submit(job)] = (stream, index)
            except Exception as error:  # of this request alone: nothing has reached the device
                self._cancel(stream)
                self._post([(stream, error)], self._engine.num_running)
                return

    def _cancel(self, stream: Stream, index: int | None = None) -> None:
        """All jobs of a stream that are under way, or one of them."""
        for job_id, (owner, place) in list(self._of.items()):
            if owner is not stream or index not in (None, place):
                continue
            self._engine.cancel(job_id)
            del self._of[job_id]

    def _recover(self, failures: int) -> None:
        """Fails what ran and makes a new engine, for of the old one's state nothing is known."""
        broken: set[Stream] = {stream for stream, _ in self._of.values()}
        self._post([(stream, Stopped("the engine broke")) for stream in broken], 0)
        self._of = {}
        try:
            if failures < MAX_FAILURES:
                self._engine = self._make()
                return
        except Exception as error:
            logger.error("no new engine either", exc_info=error)
        self._engine = _Dead()  # whoever still comes is told
        self._in_loop(self._die)

    def _die(self) -> None:
        self.dead = _Dead.WHY
        self.on_death()

    def _post(self, news: list[tuple[Stream, tuple[int, Event] | Exception]], running: int) -> None:
        self._in_loop(lambda: self._hand_out(news, running))

    def _settle(self, future: asyncio.Future, result: Any) -> None:
        def settle() -> None:
            if not future.done():
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

        self._in_loop(settle)

    def _in_loop(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            self._stop = True


class _Dead:
    """The engine of a worker that has given up."""

    WHY = "the engine broke and could not be made anew"
    has_work, num_running = False, 0

    def submit(self, job: Job) -> int:
        raise Stopped(self.WHY)

    def cancel(self, job_id: int) -> None:
        pass

    def step(self) -> list[Event]:
        return []
