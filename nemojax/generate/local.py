"""A `Generator` in this process, and what it shares with the server: requests -> jobs, events -> answers."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from nemojax.arch import ArchSpec, load_arch
from nemojax.checkpoints.artifact import final_step, load_model
from nemojax.data.chat import check_length, encode_prompt, split_thinking
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Event, Job, job_key
from nemojax.generate.protocol import Answer, FinishReason, Request
from nemojax.model.llama import Compute, Params


class Piece(NamedTuple):
    """Text that has just been written, and whether it is reasoning, content, or the JSON of a call."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str


@dataclass(frozen=True, eq=False)
class Reader:
    """What makes jobs of requests and text of tokens: an artifact's small files, read without its weights."""

    arch: ArchSpec
    tokenizer: Tokenizer

    @classmethod
    def open(cls, artifact: str | Path) -> Reader:
        """ValueError that says what is wrong with a path where no artifact is."""
        final_step(artifact)
        arch, tokenizer = load_arch(Path(artifact) / "arch.json"), load_tokenizer(artifact)
        check_vocab(tokenizer, arch)
        return cls(arch, tokenizer)


@dataclass(frozen=True, eq=False)
class Model(Reader):
    """An artifact on its devices."""

    params: Params
    compute: Compute = Compute()
    mesh: jax.sharding.Mesh | None = None

    @classmethod
    def load(
        cls, artifact: str | Path, compute: Compute = Compute(), mesh: jax.sharding.Mesh | None = None
    ) -> Model:
        """Reads the small files first, whose faults are quicker to find."""
        reader = Reader.open(artifact)
        arch, params = load_model(artifact, mesh)
        return cls(arch, reader.tokenizer, params, compute, mesh)


def make_jobs(model: Reader, request: Request) -> list[Job]:
    """The `n` jobs of a request; submitted one after another, their prompt is read once.

    ValueError for a request that this model cannot answer.
    """
    prompt = tuple(encode_request(model, request))
    check_length(len(prompt), model.arch.context - 1, "prompt")
    stop_ids = tuple(dict.fromkeys((*model.tokenizer.eos_ids, *request.stop_ids)))
    job = Job(prompt, request.sampling, (0, 0), stop_ids, request.top_logprobs)
    return [dataclasses.replace(job, key=job_key(request.seed, i)) for i in range(request.n)]


def encode_request(model: Reader, request: Request) -> list[int]:
    """Ids of the prompt, in whichever form the request has it."""
    if request.tokens is not None:
        return list(request.tokens)
    if request.prompt is not None:
        return [model.tokenizer.bos_id, *model.tokenizer.encode(request.prompt)]
    assert request.messages is not None
    return encode_prompt(model.tokenizer, request.messages, request.thinking)


class AnswerStream:
    """The events of one job, put together: `feed` says what is new in the text, `answer` is all of it.

    When `stopped` turns true, a stop string has occurred: the job is to be cancelled, no event follows.
    """

    def __init__(self, model: Reader, request: Request, job: Job):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] = []
        self.cached = 0
        self.stopped = False
        self.finish: FinishReason | None = None
        self._model, self._request, self._job = model, request, job

    @property
    def done(self) -> bool:
        return self.finish is not None

    def feed(self, event: Event) -> list[Piece]:
        """What is new. Text that may yet turn out to begin a stop string or a tag waits for what follows."""
        assert not self.done
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.top += event.top
        self.cached = max(self.cached, event.cached)
        self.finish = event.finish
        return []

    def answer(self) -> Answer:
        """All of it, when `done`."""
        assert self.finish is not None
        decode = self._model.tokenizer.decode
        text = decode(self.tokens)
        reasoning, content = split_thinking(text)
        return Answer(
            text,
            reasoning,
            content,
            self.finish,
            len(self.tokens),
            len(self._job.prompt),
            (),
            tuple(self.tokens),
            tuple(self.logprobs),
            tuple(
                tuple((decode([token], skip_special=False), logprob) for token, logprob in step)
                for step in self.top
            ),
        )


class LocalGenerator:
    """Answers by an engine in this process. Not for several threads at once; iterators of `stream` may be
    taken in turns, and their requests are served together."""

    def __init__(self, model: Model, cfg: EngineConfig = EngineConfig()):
        self.model = model
        self.engine = Engine(model.params, model.arch, cfg, compute=model.compute, mesh=model.mesh)
        self._running: dict[int, tuple[AnswerStream, list[Piece] | None]] = {}

    def answer(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The `n` answers of each request, in order. ValueError, before anything runs, names a bad one."""
        found = dict(self.stream(requests))
        return [found[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, list[Answer]], None, None]:
        """(index, its answers) as they complete; closing the iterator cancels what is under way."""
        jobs = [self._jobs(request, f"request {index}") for index, request in enumerate(requests)]
        waiting = deque((i, job) for i, of_one in enumerate(jobs) for job in of_one)
        streams: list[list[AnswerStream]] = [[] for _ in requests]
        under_way: dict[int, int] = {}  # job -> request
        try:
            while waiting or under_way:
                # the engine's queue stays short: a job holds a grammar's state from its submission on
                while waiting and self.engine.num_waiting < self.engine.cfg.slots:
                    index, job = waiting.popleft()
                    stream = AnswerStream(self.model, requests[index], job)
                    streams[index].append(stream)
                    under_way[self._submit(job, stream)] = index
                self._step()
                for job_id, index in list(under_way.items()):
                    if job_id not in self._running:
                        del under_way[job_id]
                        if len(streams[index]) == requests[index].n and all(s.done for s in streams[index]):
                            yield index, [stream.answer() for stream in streams[index]]
        finally:
            for job_id in under_way:
                self._drop(job_id)

    def pieces(self, request: Request) -> Generator[Piece | Answer, None, None]:
        """The text of one answer as it is written, and last the answer; closing the iterator cancels it."""
        [job] = self._jobs(dataclasses.replace(request, n=1), "request")
        stream = AnswerStream(self.model, request, job)
        news: list[Piece] = []
        job_id = self._submit(job, stream, news)
        try:
            while not stream.done:
                self._step()
                yield from news
                news.clear()
            yield stream.answer()
        finally:
            self._drop(job_id)

    def _jobs(self, request: Request, name: str) -> list[Job]:
        try:
            jobs = make_jobs(self.model, request)
            self.engine.check(jobs[0])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return jobs

    def _submit(self, job: Job, stream: AnswerStream, news: list[Piece] | None = None) -> int:
        job_id = self.engine.submit(job)
        self._running[job_id] = (stream, news)
        return job_id

    def _step(self) -> None:
        """One step for everybody's jobs."""
        for event in self.engine.step():
            stream, news = self._running[event.job]
            pieces = stream.feed(event)
            if news is not None:
                news += pieces
            if stream.done:
                del self._running[event.job]
                if stream.stopped:
                    self.engine.cancel(event.job)

    def _drop(self, job_id: int) -> None:
        if self._running.pop(job_id, None) is not None:
            self.engine.cancel(job_id)
