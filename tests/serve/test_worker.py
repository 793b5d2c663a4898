"""The engine's thread: streams, cancellation, a bounded queue, and an engine that breaks."""

import asyncio

import jax
import pytest

from nemojax.arch import uniform
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Job, job_key
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import init_params
from nemojax.serve.metrics import Metrics
from nemojax.serve.worker import MAX_FAILURES, Overloaded, Stopped, Worker

ARCH = uniform(vocab_size=64, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32, context=64)


class Fragile(Engine):
    """An engine whose next steps fail on demand."""

    def __init__(self, faults: list[Exception]):
        super().__init__(init_params(ARCH, jax.random.key(0)), ARCH, EngineConfig(slots=2, decode_steps=2))
        self._faults = faults

    def step(self):
        if self._faults:
            raise self._faults.pop()
        return super().step()


def job(sample: int = 0, new: int = 8, prompt: tuple[int, ...] = (1, 2, 3)) -> Job:
    return Job(prompt, SamplingConfig(max_new_tokens=new), job_key(0, sample))


def with_worker(test, queue: int = 2, faults: list[Exception] | None = None, makers: list | None = None):
    """Runs `test(worker)` in a loop of its own and ends the worker."""
    makers = [] if makers is None else makers

    def make() -> Fragile:
        if makers:
            raise makers.pop()
        return Fragile(faults if faults is not None else [])

    async def main():
        worker = Worker(make, 2, queue, Metrics())
        try:
            await worker.start()
            return await asyncio.wait_for(test(worker), 120)
        finally:
            worker.stop()

    return asyncio.run(main())


async def tokens_of(worker: Worker, *jobs: Job) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in jobs]
    async with worker.submit(jobs) as stream:
        async for index, event in stream:
            out[index] += event.tokens
    return out


def test_streams_are_what_the_engine_says():
    async def test(worker):
        together = await tokens_of(worker, job(0), job(1), job(2))
        alone = [(await tokens_of(worker, job(i)))[0] for i in range(3)]
        assert together == alone and [len(tokens) for tokens in alone] == [8] * 3
        assert worker.open == 0 and worker.running == 0

    with_worker(test)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    async def test(worker):
        async with worker.submit([job(i, 50) for i in range(3)]) as stream:
            with pytest.raises(Overloaded):
                worker.submit([job(), job()])
            with pytest.raises(Overloaded):
                worker.check_room(2)
            assert worker.open == 3
            assert [len(t) for t in await tokens_of(worker, job(4, 2))] == [2]
            assert stream.left >= 1
        assert worker.open == 0

    with_worker(test)


def test_closing_frees_slots_and_ending_frees_one():
    async def test(worker):
        async with worker.submit([job(0, 60), job(1, 60)]) as stream:
            await anext(stream)
            stream.end(0)
            assert worker.open == 1
            stream.end(0)
            assert worker.open == 1
            seen = [index async for index, event in stream if event.finish]
            assert seen == [1]
        stream = worker.submit([job(0, 60), job(1, 60), job(2, 60)])
        await anext(stream)
        stream.close()
        stream.close()
        assert worker.open == 0
        assert await tokens_of(worker, job(3, 3), job(4, 3)) and worker.open == 0

    with_worker(test)


def test_a_job_that_is_refused_says_why_and_harms_no_other():
    async def test(worker):
        good = worker.submit([job(0, 20)])
        for bad in (job(prompt=()), job(prompt=(64,)), job(prompt=(1,) * 64)):
            with pytest.raises(ValueError, match="prompt: expected"):
                await tokens_of(worker, job(1), bad)
        assert sum([len(event.tokens) async for _, event in good]) == 20
        assert worker.open == 0

    with_worker(test, queue=4)


def test_an_engine_that_breaks_is_replaced():
    """What ran fails, what comes later is answered as before."""
    faults: list[Exception] = []

    async def test(worker):
        expected = await tokens_of(worker, job(0))
        streams = [worker.submit([job(i, 50)]) for i in range(2)]
        await anext(streams[0])
        faults.append(RuntimeError("out of memory"))
        for stream in streams:
            with pytest.raises(Stopped, match="the engine broke"):
                async for _ in stream:
                    pass
        assert worker.open == 0 and worker.dead is None
        assert await tokens_of(worker, job(0)) == expected

    with_worker(test, faults=faults)


@pytest.mark.parametrize("how", ["again and again", "no new one"])
def test_an_engine_that_cannot_be_replaced_ends_the_worker(how):
    """Nobody waits for ever: those who ran, those who waited, and those who come later are told."""
    faults: list[Exception] = []
    makers: list[Exception] = []

    async def test(worker):
        died = asyncio.Event()
        worker.on_death = died.set
        waiting = [worker.submit([job(i, 50)]) for i in range(4)]
        await anext(waiting[0])
        if how == "no new one":
            makers.append(RuntimeError("no device"))
        faults.extend(RuntimeError("broken") for _ in range(MAX_FAILURES))
        for stream in waiting:
            with pytest.raises(Stopped):
                async for _ in stream:
                    pass
        for _ in range(MAX_FAILURES):
            if worker.dead is None:
                with pytest.raises(Stopped):
                    await tokens_of(worker, job())
        await died.wait()
        assert worker.dead and worker.open == 0
        with pytest.raises(Stopped):
            worker.submit([job()])

    with_worker(test, faults=faults, makers=makers)


def test_an_engine_that_cannot_be_made():
    async def test(worker):
        pytest.fail("it started")

    with pytest.raises(ValueError, match="no device"):
        with_worker(test, makers=[ValueError("no device")])


def test_other_work_goes_between_steps():
    async def test(worker):
        async with worker.submit([job(0, 60)]) as stream:
            await anext(stream)
            assert await worker.call(lambda: 6 * 7) == 42
            with pytest.raises(ZeroDivisionError):
                await worker.call(lambda: 1 // 0)
            assert worker.open == 1
        assert await worker.call(lambda: "idle too") == "idle too"

    with_worker(test)


def test_draining_waits_for_what_runs():
    async def test(worker):
        stream = worker.submit([job(0, 40)])
        drained = asyncio.ensure_future(worker.drained())
        await asyncio.sleep(0)
        with pytest.raises(Stopped, match="shutting down"):
            worker.submit([job()])
        assert sum([len(event.tokens) async for _, event in stream]) == 40
        await drained

    with_worker(test)
