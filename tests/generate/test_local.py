"""Requests -> jobs, events -> answers, and the generator around an engine, on a real tiny model."""

import copy
import dataclasses
import json
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.data.chat import split_thinking
from nemojax.data.tokenizer import train_tokenizer
from nemojax.generate.completions import complete
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Event, Finish, Job, job_key
from nemojax.generate.local import (
    AnswerStream,
    LocalGenerator,
    Model,
    Piece,
    batch_config,
    encode_request,
    make_jobs,
    prepared,
)
from nemojax.generate.protocol import Answer, Request, ToolCall
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import init_params

CONTEXT = 1024
SHORT = SamplingConfig(max_new_tokens=12)
CHAT = ({"role": "user", "content": "two and two"},)
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(["one and two make three " * 20], 280, folder)
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=64,
        context=CONTEXT,
    )
    return Model(arch, tokenizer, jax.tree.map(lambda w: w * 1.5, init_params(arch, jax.random.key(0))))


@pytest.fixture(scope="module")
def generator(model) -> LocalGenerator:
    return LocalGenerator(model, EngineConfig(slots=4, decode_steps=2))


@pytest.fixture(scope="module")
def endless(model) -> LocalGenerator:
    """Only their length, or what is asked for, ends its answers."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.eos_ids = ()
    return LocalGenerator(
        dataclasses.replace(model, tokenizer=tokenizer), EngineConfig(slots=4, decode_steps=2)
    )


def ids(answer: Answer) -> tuple[int, ...]:
    assert answer.tokens is not None and answer.logprobs is not None
    assert len(answer.tokens) == len(answer.logprobs)
    return answer.tokens


def test_jobs_are_what_is_asked(model):
    sampling = SamplingConfig(0.5, 3, 0.9, 7)
    request = Request(
        messages=CHAT, thinking=True, sampling=sampling, n=3, seed=5, stop_ids=(9,), top_logprobs=2
    )
    jobs = make_jobs(model, request)
    assert [job.key for job in jobs] == [job_key(5, i) for i in range(3)] and len({j.key for j in jobs}) == 3
    for job in jobs:
        assert job.sampling == sampling and job.top_logprobs == 2
        assert job.stop_ids == (*model.tokenizer.eos_ids, 9)
        assert job.constraint is None and job.budget is None
        text = model.tokenizer.decode(job.prompt, skip_special=False)
        assert "detailed thinking on" in text and text.endswith("assistant<|end_header_id|>\n\n")
    [raw] = make_jobs(model, Request(prompt="one"))
    assert raw.prompt == (model.tokenizer.bos_id, *model.tokenizer.encode("one"))
    assert make_jobs(model, Request(tokens=(4, 5)))[0].prompt == (4, 5)
    [budget] = make_jobs(model, Request(messages=CHAT, thinking_budget=6))
    assert budget.budget is not None and budget.budget.tokens == 6
    assert budget.budget.end == (model.tokenizer.end_think_id,)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt="a", thinking=True), "thinking: expected messages with it, got a prompt"),
        (Request(tokens=(1,), tools=(ADD,)), "tools: expected messages with it, got a prompt"),
        (Request(prompt="ab " * CONTEXT), f"prompt: expected at most {CONTEXT - 1} tokens, got"),
        (Request(messages=()), "expected at least one message, got none"),
        (Request(messages=({"role": "robot", "content": "x"},)), "expected messages of role"),
        (Request(messages=CHAT, thinking_budget=-1), "thinking_budget: expected 0 or more tokens, got -1"),
        (Request(messages=CHAT, json_schema={"type": "robot"}), "json_schema: expected a schema that can"),
        (Request(messages=CHAT, tools=(ADD,), tool_choice="sometimes"), "tool_choice: expected"),
        (
            Request(messages=CHAT, tools=(ADD,), tool_choice="required", json_schema={}),
            "json_schema: expected none where a tool has to be called",
        ),
        (Request(messages=CHAT, stop=("",)), "stop: expected"),
        (Request(prompt="a", top_logprobs=21), "top_logprobs: expected 0 to 20, got 21"),
        (Request(tokens=()), "prompt: expected at least one token, got none"),
        (Request(tokens=(10**6,)), "prompt: expected ids below 280"),
    ],
)
def test_what_cannot_be_answered(generator, request_, message):
    """Nothing is begun, whatever else was asked."""
    with pytest.raises(ValueError, match=message) as error:
        generator.answer([Request(prompt="one", sampling=SHORT), request_])
    assert str(error.value).startswith("request 1: ") and "\n" not in str(error.value)
    assert not generator.engine.has_work and not generator._running


def test_answers_are_the_engines(model, generator):
    """In order, each sample with its own key; the same alone and among others."""
    requests = [
        Request(prompt="one and", sampling=SHORT, n=3, seed=1),
        Request(messages=CHAT, thinking=False, sampling=SamplingConfig(temperature=0, max_new_tokens=5)),
        Request(prompt="two", sampling=SHORT, n=2, seed=2, top_logprobs=3),
    ]
    answers = generator.answer(requests)
    assert [len(row) for row in answers] == [3, 1, 2]
    engine = Engine(model.params, model.arch, EngineConfig(slots=4, decode_steps=2))
    for request, row in zip(requests, answers, strict=True):
        jobs = make_jobs(model, request)
        for job, one, wanted in zip(jobs, row, complete(engine, jobs), strict=True):
            assert one.tokens == tuple(wanted.tokens) and one.num_tokens == len(wanted.tokens)
            np.testing.assert_allclose(one.logprobs, wanted.logprobs, atol=1e-4)
            assert one.text == model.tokenizer.decode(wanted.tokens)
            assert (one.reasoning, one.content) == split_thinking(one.text)
            assert one.finish_reason == ("stop" if wanted.finished else "length")
            assert one.prompt_tokens == len(job.prompt)
    assert len({a.tokens for a in answers[0]}) == 3
    for one in answers[2]:
        assert [len(step) for step in one.top] == [3] * one.num_tokens
        for logprob, step in zip(one.logprobs or (), one.top, strict=True):
            likeliest = [p for _, p in step]
            assert likeliest == sorted(likeliest, reverse=True) and logprob <= likeliest[0] + 1e-6
    assert answers[0][0].top == ()


def test_samples_of_a_request_read_their_prompt_once(model):
    engine = LocalGenerator(model, EngineConfig(slots=8, reuse=0))
    prompt = "one and two make three " * 3
    engine.answer([Request(prompt=prompt, sampling=SHORT, n=8)])
    assert engine.engine.stats.prompt_tokens == len(encode_request(model, Request(prompt=prompt)))


def test_stream_yields_as_they_complete(endless):
    short, long = SamplingConfig(max_new_tokens=1), SamplingConfig(max_new_tokens=60)
    requests = [Request(prompt="two and", sampling=long, n=2), *[Request(prompt="one", sampling=short)] * 6]
    order = [index for index, _ in endless.stream(requests)]
    assert sorted(order) == list(range(7)) and order[-1] == 0


def test_closing_a_stream_frees_the_slots(endless):
    generator = endless
    long = SamplingConfig(max_new_tokens=150)
    stream = generator.stream(
        [Request(prompt="one", sampling=SamplingConfig(max_new_tokens=1))]
        + [Request(prompt=f"two {i}", sampling=long) for i in range(9)]
    )
    next(stream)
    assert generator.engine.has_work
    before = generator.engine.stats.cancelled
    stream.close()
    assert not generator.engine.has_work and not generator._running
    assert generator.engine.stats.cancelled > before
    assert generator.answer([Request(prompt="one", sampling=SHORT)])[0][0].num_tokens > 0


def test_two_streams_take_turns_and_share_the_engine(generator):
    requests = [Request(prompt=f"one {i}", sampling=SHORT, seed=i) for i in range(4)]
    alone = generator.answer(requests)
    first, second = generator.stream(requests), generator.stream(requests)
    found: list[dict] = [{}, {}]
    left = [first, second]
    while left:
        for number, stream in enumerate((first, second)):
            if stream in left:
                try:
                    index, answers = next(stream)
                    found[number][index] = answers
                except StopIteration:
                    left.remove(stream)
    for one in found:
        assert [[a.tokens for a in one[i]] for i in range(4)] == [[a.tokens for a in row] for row in alone]


def test_a_stop_string_ends_an_answer_and_frees_its_slot(endless):
    request = Request(prompt="one and", sampling=SamplingConfig(max_new_tokens=40), seed=1)
    [[whole]] = endless.answer([request])
    assert whole.num_tokens == 40
    stop = next(whole.text[i : i + 2] for i in range(3, 30) if "\ufffd" not in whole.text[i : i + 2])
    before = endless.engine.stats.cancelled
    [[cut]] = endless.answer([dataclasses.replace(request, stop=("never there", stop))])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert ids(cut) == ids(whole)[: len(ids(cut))] and len(ids(cut)) <= cut.num_tokens < 40
    assert endless.engine.stats.cancelled == before + 1 and not endless.engine.has_work


def test_stop_ids(endless):
    [[whole]] = endless.answer([Request(prompt="one and", sampling=SHORT, seed=1)])
    token = ids(whole)[4]
    [[cut]] = endless.answer([Request(prompt="one and", sampling=SHORT, seed=1, stop_ids=(token,))])
    assert ids(cut) == ids(whole)[: ids(whole).index(token) + 1] and cut.finish_reason == "stop"


def test_pieces_are_the_answer(generator):
    request = Request(prompt="one and", sampling=SamplingConfig(max_new_tokens=30), seed=4, n=5)
    *pieces, answer = generator.pieces(request)
    assert isinstance(answer, Answer) and all(isinstance(piece, Piece) for piece in pieces)
    assert (
        "".join(piece.text for piece in pieces) == answer.content and len([p for p in pieces if p.text]) > 2
    )
    assert answer.tokens == generator.answer([request])[0][0].tokens


def test_closing_pieces_cancels(endless):
    generator = endless
    pieces = generator.pieces(Request(prompt="one", sampling=SamplingConfig(max_new_tokens=150)))
    next(pieces)
    pieces.close()
    assert not generator.engine.has_work and not generator._running


def events(model: Model, text: str, sizes: Sequence[int], finish: Finish = "stop") -> list[Event]:
    """What an engine would say of a model that writes this, in steps of these sizes."""
    tokens = model.tokenizer.encode(text)
    out, at = [], 0
    for size in sizes:
        part = tokens[at : at + size]
        at += size
        out.append(Event(0, part, [-0.5] * len(part), [], None if at < len(tokens) else finish, 0))
        if at >= len(tokens):
            break
    return out


def assemble(
    model: Model, request: Request, text: str, size: int, finish: Finish = "stop"
) -> tuple[list[Piece], Answer]:
    [job] = make_jobs(model, request)
    stream = AnswerStream(model, request, job)
    pieces: list[Piece] = []
    for event in events(model, text, [size] * 1000, finish):
        pieces += stream.feed(event)
        if stream.done:
            break
    assert stream.done
    return pieces, stream.answer()


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>two and\n two</think> three<|eot_id|>", "two and\n two", "three"),
        ("three", None, "three"),
        ("<think></think>three", "", "three"),
        ("<think>two and", "two and", ""),
        ("a < b and <thin", None, "a < b and <thin"),
        ("zwölf €", None, "zwölf €"),
    ],
)
def test_reasoning_comes_apart(model, text, reasoning, content, size):
    pieces, answer = assemble(model, Request(messages=CHAT), text, size)
    assert (answer.reasoning, answer.content) == (reasoning, content) == split_thinking(answer.text)
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == (reasoning or "")
    assert "".join(p.text for p in pieces if p.kind == "content") == content
    assert answer.num_tokens == len(model.tokenizer.encode(text)) == len(ids(answer))


def test_reasoning_that_the_prompt_opens(model):
    _, answer = assemble(model, Request(prompt="one <think>"), "two</think>three", 2)
    assert (answer.text, answer.reasoning, answer.content) == ("two</think>three", "two", "three")


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_tool_calls_come_apart(model, size):
    text = '<think>add</think>Well. <TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>'
    pieces, answer = assemble(model, Request(messages=CHAT, tools=(ADD,)), text, size)
    assert answer.tool_calls == (ToolCall("add", '{"a": 1}'),) and answer.finish_reason == "tool_calls"
    assert (answer.reasoning, answer.content) == ("add", "Well.")
    assert [p.call for p in pieces if p.kind == "tool_call"] == list(answer.tool_calls)
    _, cut = assemble(model, Request(messages=CHAT, tools=(ADD,)), text, size, "length")
    assert cut.finish_reason == "length"
    for request in (Request(messages=CHAT), Request(messages=CHAT, tools=(ADD,), tool_choice="none")):
        _, plain = assemble(model, request, text, size)
        assert not plain.tool_calls and "TOOLCALL" in plain.content and plain.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_what_follows_a_stop_string_is_dropped(model, size):
    request = Request(prompt="a", stop=("two",))
    pieces, answer = assemble(model, request, "one and two make three", size)
    assert "".join(p.text for p in pieces) == answer.content.strip() == "one and"
    assert answer.text == "one and " and answer.finish_reason == "stop"
    kept = model.tokenizer.decode(ids(answer))
    assert kept.startswith("one and") and "three" not in kept
    assert len(ids(answer)) <= answer.num_tokens


@pytest.mark.parametrize("thinking", [True, False])
def test_json(model, thinking):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    sampling = SamplingConfig(max_new_tokens=120)
    request = Request(
        messages=CHAT,
        thinking=thinking,
        sampling=sampling,
        n=8,
        json_schema=schema,
        thinking_budget=5,
        seed=3,
    )
    [answers] = LocalGenerator(model, EngineConfig(slots=4)).answer([request])
    whole = [a for a in answers if a.finish_reason == "stop"]
    assert whole
    for answer in whole:
        value = json.loads(answer.content)
        assert isinstance(value["a"], int) and value["b"] in ("x", "y") and set(value) == {"a", "b"}
        assert thinking or answer.reasoning is None


def test_a_call_that_has_to_be_made(model):
    request = Request(
        messages=CHAT,
        thinking=False,
        sampling=SamplingConfig(temperature=0.5, max_new_tokens=120),
        tools=(ADD,),
        tool_choice={"type": "function", "function": {"name": "add"}},
        n=4,
    )
    [answers] = LocalGenerator(model, EngineConfig(slots=4)).answer([request])
    called = [answer for answer in answers if answer.finish_reason == "tool_calls"]
    assert called
    for answer in called:
        assert [call.name for call in answer.tool_calls] == ["add"] and answer.content == ""
        assert isinstance(json.loads(answer.tool_calls[0].arguments), dict)


def test_a_config_for_samples_that_are_known(model):
    cfg = batch_config(model, 5, 100, 64)
    assert (cfg.slots, cfg.context, cfg.reuse) == (8, 112, 0)
    assert batch_config(model, 500, 10**6, 64).slots == 64
    assert batch_config(model, 1, 10**6, 64).context == CONTEXT


def test_prepared_weights_change_nothing(model, generator):
    request = Request(prompt="one and", sampling=SHORT, n=2)
    again = LocalGenerator(prepared(prepared(model)), generator.engine.cfg).answer([request])
    assert again == generator.answer([request])


def test_an_event_too_many_is_a_bug(model):
    stream = AnswerStream(model, Request(prompt="a"), Job((1,)))
    stream.feed(Event(0, [5], [-1.0], [], "length", 0))
    with pytest.raises(AssertionError):
        stream.feed(Event(0, [5], [-1.0], [], "length", 0))
