"""A `Generator` in this process, and what it shares with the server: requests -> jobs, events -> answers."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from nemojax.arch import ArchSpec, load_arch
from nemojax.buckets import place
from nemojax.checkpoints.artifact import final_step, load_model
from nemojax.data.chat import check_length, encode_prompt, opens_thinking, plain_messages
from nemojax.data.tokenizer import THINK, THINKING, Tokenizer, check_vocab, load_tokenizer
from nemojax.data.tools import tools_that_must_be_called
from nemojax.generate import programs
from nemojax.generate.completions import BATCH
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Constraint, Event, Job, job_key
from nemojax.generate.protocol import Answer, FinishReason, Request, ToolCall
from nemojax.generate.shares import weights_here
from nemojax.generate.text import ReasoningStream, TextStream, ToolStream, thinking_budget, token_text
from nemojax.model.llama import Compute, Params
from nemojax.sharding import use_mesh

_TAIL = 32  # ids of a prompt's end in which `<think>` is looked for


class Piece(NamedTuple):
    """Text that has just been written, reasoning or content; or a whole call, the text its arguments."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    call: ToolCall | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """What makes jobs of requests and text of tokens: an artifact's small files, read without its weights."""

    arch: ArchSpec
    tokenizer: Tokenizer

    @classmethod
    def open(cls, artifact: str | Path) -> Reader:
        """ValueError that says what is wrong with a path where no artifact is."""
        final_step(artifact)
        arch, tokenizer = load_arch(place(artifact) / "arch.json"), load_tokenizer(artifact)
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
        """Reads the small files first, whose faults are quicker to find; weights as they will be used."""
        reader = Reader.open(artifact)
        with use_mesh(mesh):
            ready = functools.partial(programs.prepare_weight, compute=compute)
            arch, params = load_model(artifact, mesh, finish=ready)
        return cls(arch, reader.tokenizer, params, compute, mesh)


def make_jobs(model: Reader, request: Request) -> list[Job]:
    """The `n` jobs of a request; submitted one after another, their prompt is read once.

    ValueError for a request that this model cannot answer.
    """
    prompt = encode_request(model, request)
    check_length(len(prompt), model.arch.context - 1, "prompt")
    job = make_job(model, request, prompt)
    return [dataclasses.replace(job, key=job_key(request.seed, i)) for i in range(request.n)]


def make_job(model: Reader, request: Request, prompt: Sequence[int]) -> Job:
    """A job of a request whose prompt has these ids, without a key. ValueError as in `make_jobs`."""
    TextStream(model.tokenizer, request.stop)  # says what is wrong with stop strings
    limit = request.thinking_budget
    return Job(
        tuple(prompt),
        request.sampling,
        stop_ids=tuple(dict.fromkeys((*model.tokenizer.eos_ids, *request.stop_ids))),
        top_logprobs=request.top_logprobs,
        constraint=_make_constraint(model, request, prompt),
        budget=None if limit is None else thinking_budget(model.tokenizer, limit),
    )


def encode_request(model: Reader, request: Request) -> list[int]:
    """Ids of the prompt, in whichever form the request has it. ValueError for one that cannot be read."""
    if request.messages is not None:
        messages = plain_messages(request.messages)
        return encode_prompt(model.tokenizer, messages, request.thinking, tools=request.tools)
    for name, given in (("thinking", request.thinking is not None), ("tools", bool(request.tools))):
        if given:
            raise ValueError(f"{name}: expected messages with it, got a prompt; it is a chat's")
    if request.tokens is not None:
        return list(request.tokens)
    assert request.prompt is not None
    return [model.tokenizer.bos_id, *model.tokenizer.encode(request.prompt)]


def _opens_thinking(model: Reader, prompt: Sequence[int]) -> bool:
    return opens_thinking(model.tokenizer.decode(prompt[-_TAIL:], skip_special=False))


def _make_constraint(
    model: Reader, request: Request, prompt: Sequence[int]
) -> Callable[[], Constraint] | None:
    """The grammar of a request: calls that have to be made, or else its schema; None without either."""
    schema, forced = request.json_schema, tools_that_must_be_called(request.tools, request.tool_choice)
    if schema is None and not forced:
        return None
    from nemojax.generate.constrain import json_grammar, tool_grammar

    if _opens_thinking(model, prompt):
        reasoning = "opened"
    else:
        reasoning = "optional" if _may_think(request) else "none"
    if schema is None:
        grammar = tool_grammar(request.tools, request.tool_choice, reasoning)
        assert grammar is not None
    elif forced:
        raise ValueError("json_schema: expected none where a tool has to be called; leave one of them out")
    else:
        grammar = json_grammar(schema, reasoning)
    return _compile(model.tokenizer, grammar, model.arch.vocab_size)


def _may_think(request: Request) -> bool:
    """A chat may think before it answers, unless the toggle in its system text is off."""
    if not request.messages or request.thinking is not None:
        return bool(request.thinking)
    first = request.messages[0]
    return first["role"] != "system" or not str(first["content"]).startswith(THINKING[False])


@functools.lru_cache(maxsize=64)
def _compile(tokenizer: Tokenizer, grammar: str, vocab_size: int) -> Callable[[], Constraint]:
    """Compiled once for all rows that share it."""
    from nemojax.generate.constrain import compile_grammar

    return compile_grammar(tokenizer, grammar, vocab_size)


def prepared(model: Model) -> Model:
    """The weights as engines use them, so that a second engine does not make them again; of several processes
    each has them all on its own devices (`weights_here`)."""
    weights, mesh = weights_here(model.params, model.arch, model.mesh, model.compute)
    with use_mesh(mesh):
        params, _ = programs.prepare(weights, model.compute, mesh)
    return dataclasses.replace(model, params=params, mesh=mesh)


def batch_config(model: Reader, num_samples: int, room: int, max_batch: int) -> EngineConfig:
    """An engine for so many samples, known beforehand, of which the longest takes `room` with its prompt."""
    slots = min(max_batch, _round_up(num_samples, 8))
    return dataclasses.replace(BATCH, slots=slots, context=min(_round_up(room, 16), model.arch.context))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class AnswerStream:
    """The events of one job, put together: `feed` says what is new in the text, `answer` is all of it.

    When `stopped` turns true, a stop string has occurred: it is `done`, and the job is to be cancelled.
    `tokens`, `logprobs` and `top` are those up to now, the ones of a stop string included. `cached`: tokens
    of the prompt that were not read again.
    """

    def __init__(self, model: Reader, request: Request, job: Job):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] = []
        self.cached = 0
        self.finish: FinishReason | None = None
        self._tokenizer, self._job = model.tokenizer, job
        self._text = TextStream(model.tokenizer, request.stop)
        opened = _opens_thinking(model, job.prompt)
        self._reasoning = ReasoningStream(opened)
        # what a chat's template opened is part of the answer; a raw text goes on where it ended
        self._opening = THINK if opened and request.messages is not None else ""
        self._tools = ToolStream() if request.tools and request.tool_choice != "none" else None
        self._written: list[str] = []
        self._pieces: list[Piece] = []

    @property
    def done(self) -> bool:
        return self.finish is not None

    @property
    def stopped(self) -> bool:
        return self._text.stopped

    @property
    def kept(self) -> int:
        """How many of the tokens are certain to have a part in the text."""
        return self._text.kept

    @property
    def offsets(self) -> list[int]:
        """For each token, the place in the text of the first character that it has a part in."""
        return self._text.offsets

    @property
    def last_text(self) -> str:
        """What the last `feed` was in one piece."""
        return self._written[-1]

    def feed(self, event: Event) -> list[Piece]:
        """What is new. Text that may yet turn out to begin a stop string, a tag or a call waits."""
        assert not self.done
        text = self._text.feed(event.tokens)
        if event.finish is not None:
            text += self._text.flush()
        count = len(self._text.offsets) - len(self.tokens)  # what came behind a stop string is dropped
        self.tokens += event.tokens[:count]
        self.logprobs += event.logprobs[:count]
        self.top += event.top[:count]
        self.cached = max(self.cached, event.cached)
        self.finish = "stop" if self.stopped else event.finish
        pieces = self._split(text)
        self._written.append(text)
        self._pieces += pieces
        if self.finish == "stop" and any(piece.call for piece in self._pieces):
            self.finish = "tool_calls"
        return pieces

    def _split(self, text: str) -> list[Piece]:
        reasoning, content = self._reasoning.feed(text)
        calls: tuple[ToolCall, ...] = ()
        if self.done:
            reasoning, content = (
                a + b for a, b in zip((reasoning, content), self._reasoning.flush(), strict=True)
            )
        if self._tools is not None:
            content, calls = self._tools.feed(content)
            if self.done:
                rest, last = self._tools.flush()
                content, calls = content + rest, calls + last
        pieces = [Piece("reasoning", reasoning), Piece("content", content)]
        return [piece for piece in pieces if piece.text] + [Piece("tool_call", c.arguments, c) for c in calls]

    def answer(self) -> Answer:
        """All of it, when `done`; of the tokens, those that have a part in the text."""
        assert self.finish is not None
        kept = self._text.kept

        def joined(kind: str) -> str:
            return "".join(piece.text for piece in self._pieces if piece.kind == kind)

        return Answer(
            text=self._opening + "".join(self._written),
            reasoning=joined("reasoning") if self._reasoning.found else None,
            content=joined("content"),
            finish_reason=self.finish,
            num_tokens=len(self.tokens),
            prompt_tokens=len(self._job.prompt),
            tool_calls=tuple(piece.call for piece in self._pieces if piece.call),
            tokens=tuple(self.tokens[:kept]),
            logprobs=tuple(self.logprobs[:kept]),
            top=tuple(
                tuple((token_text(self._tokenizer, token), logprob) for token, logprob in step)
                for step in self.top[:kept]
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
        left = [request.n for request in requests]
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
                        left[index] -= 1
                        if not left[index]:
                            yield index, [stream.answer() for stream in streams[index]]
        finally:
            for job_id in under_way:
                self._drop(job_id)

    def pieces(self, request: Request) -> Generator[Piece | Answer, None, None]:
        """The text of one answer as it is written, and last the answer; closing the iterator cancels it.

        It yields after each step, an empty piece if there is nothing new, so that one can stop at any time.
        """
        [job] = self._jobs(dataclasses.replace(request, n=1), "request")
        stream = AnswerStream(self.model, request, job)
        news: list[Piece] = []
        job_id = self._submit(job, stream, news)
        try:
            while not stream.done:
                self._step()
                yield from news or [Piece("content", "")]
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
