"""The official `openai` client against a real server."""

import json

import jax.numpy as jnp
import numpy as np
import openai
import pytest
from scipy.special import log_softmax

from nemojax.checkpoints.artifact import load_model
from nemojax.data.tokenizer import load_tokenizer
from nemojax.generate.engine import EngineConfig
from nemojax.generate.local import LocalGenerator, Model
from nemojax.generate.protocol import Request
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import apply
from tests.serve.live import CHAT, CONTEXT

MODEL = "tiny/model"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Rome"]}, "days": {"type": "boolean"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}},
}
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"enum": [3, 4, 5]}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture
def chat(client):
    def ask(messages=CHAT, **fields):
        return client.chat.completions.create(
            **{"model": MODEL, "messages": messages, "max_tokens": 24} | fields
        )

    return ask


@pytest.fixture
def complete(client):
    def ask(prompt="one and", **fields):
        return client.completions.create(**{"model": MODEL, "prompt": prompt, "max_tokens": 16} | fields)

    return ask


def joined(chunks, n=1):
    """What the chunks of a stream say, choice by choice."""
    out = [{"content": "", "reasoning": "", "calls": {}, "tokens": [], "finish": None} for _ in range(n)]
    for chunk in chunks:
        for choice in chunk.choices:
            one, delta = out[choice.index], choice.delta
            assert one["finish"] is None, "something came after the end"
            one["content"] += delta.content or ""
            one["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                name, arguments = one["calls"].get(call.index, ("", ""))
                one["calls"][call.index] = (
                    name + (call.function.name or ""),
                    arguments + call.function.arguments,
                )
            if choice.logprobs:
                one["tokens"] += [(t.token, t.logprob) for t in choice.logprobs.content]
            one["finish"] = choice.finish_reason
    return out


def test_models(client):
    assert [card.id for card in client.models.list()] == [MODEL]
    card = client.models.retrieve(MODEL)
    assert card.id == MODEL and card.owned_by == "nemojax" and card.max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("another")
    assert error.value.code == "model_not_found"


def test_an_answer(chat, artifact):
    done = chat(seed=3)
    tokenizer = load_tokenizer(artifact)
    assert done.object == "chat.completion" and done.model == MODEL and done.id.startswith("chatcmpl-")
    [choice] = done.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert choice.message.tool_calls is None and choice.logprobs is None
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking on<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\ntwo and two<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n"
    )
    usage = done.usage
    assert usage.prompt_tokens == len(tokenizer.encode(text)) and usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + 24
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_a_seed_repeats_and_without_one_nothing_does(chat):
    texts = [
        chat(**fields).choices[0].message.content for fields in [{"seed": 1}] * 2 + [{"seed": 2}] + [{}] * 2
    ]
    assert texts[0] == texts[1] and len({*texts[1:]}) == 4


def test_prompts_are_read_once(chat):
    question = [{"role": "user", "content": "a question that nobody has asked before"}]
    first, second = (chat(question, n=2).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < first.prompt_tokens - 1
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens - 1


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "temperature": 0.8},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 150},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}},
        {"extra_body": {"thinking": True, "thinking_budget": 9}},
        {"top_p": 0.9, "extra_body": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}},
        {"max_tokens": 150, "extra_body": {"ignore_eos": True}},
    ],
    ids=["n", "logprobs", "tools", "schema", "thinking", "extras", "long"],
)
def test_a_stream_says_what_an_answer_says(chat, fields):
    fields = {"seed": 5, **fields}
    whole = chat(**fields)
    n = fields.get("n", 1)
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, **fields))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.completion_tokens_details == whole.usage.completion_tokens_details
    for one, choice in zip(joined(chunks, n), whole.choices, strict=True):
        message = choice.message
        assert one["content"] == (message.content or "") and one["finish"] == choice.finish_reason
        assert one["reasoning"] == (getattr(message, "reasoning_content", None) or "")
        calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
        assert list(one["calls"].values()) == calls
        told = choice.logprobs.content if choice.logprobs else []
        assert [token for token, _ in one["tokens"]] == [t.token for t in told]
        np.testing.assert_allclose([p for _, p in one["tokens"]], [t.logprob for t in told], atol=1e-4)


def test_tokens_come_one_by_one(chat):
    chunks = list(chat(stream=True, max_tokens=40, extra_body={"ignore_eos": True}))
    assert len(chunks) > 5 and all(chunk.usage is None for chunk in chunks)


def test_completions_of_texts_and_of_ids(complete, artifact):
    tokenizer = load_tokenizer(artifact)
    prompts = ["one and", "three"]
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    whole = complete(prompts, seed=7, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [c.text for c in complete(ids, seed=7, n=2).choices] == [c.text for c in whole.choices]
    assert complete(ids[1], seed=8).choices[0].text == whole.choices[2].text  # its seed is the next one
    assert whole.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    texts = [""] * 4
    for chunk in complete(prompts, seed=7, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_log_probabilities_are_those_of_the_training_forward(complete, artifact):
    """Through HTTP, prompt caches and batches: of what was sampled, and of the likeliest."""
    done = complete(
        "one and two", n=3, seed=2, logprobs=4, temperature=0.7, extra_body={"return_token_ids": True}
    )
    arch, params = load_model(artifact)
    for choice in done.choices:
        prompt, new = choice.prompt_token_ids, choice.token_ids
        tokens = jnp.asarray([[*prompt, *new]], jnp.int32)
        logits = np.asarray(apply(params, arch, {"tokens": tokens})[0])[0, len(prompt) - 1 : -1]
        expected = log_softmax(logits / 0.7, axis=-1)
        got = choice.logprobs
        np.testing.assert_allclose(got.token_logprobs, expected[np.arange(len(new)), new], atol=1e-4)
        for row, top in zip(expected, got.top_logprobs, strict=True):
            np.testing.assert_allclose(max(top.values()), row.max(), atol=1e-4)
        assert len(got.tokens) == len(new) == len(got.text_offset) == 16


def test_greedy(chat):
    done = chat(temperature=0, logprobs=True, n=2, max_tokens=8)
    first, second = (choice.message.content for choice in done.choices)
    assert first == second and {t.logprob for t in done.choices[0].logprobs.content} == {0.0}


def test_stop_strings(chat):
    whole = chat(seed=11, max_tokens=60, extra_body={"ignore_eos": True})
    text = whole.choices[0].message.content
    stop = next(text[i : i + 2] for i in range(8, len(text)) if text[i : i + 2].strip() == text[i : i + 2])
    fields = {"seed": 11, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    for stops in (stop, ["never there", stop]):
        short = chat(stop=stops, **fields)
        assert short.choices[0].message.content == text[: text.index(stop)].rstrip()
        assert short.choices[0].finish_reason == "stop"
        assert short.usage.completion_tokens < whole.usage.completion_tokens
        [one] = joined(chat(stop=stops, stream=True, **fields))
        assert one["content"] == short.choices[0].message.content and one["finish"] == "stop"
    ids = chat(seed=11, extra_body={"return_token_ids": True, "ignore_eos": True}).choices[0].token_ids
    stopped = chat(seed=11, extra_body={"stop_token_ids": [ids[6]], "ignore_eos": True})
    assert stopped.usage.completion_tokens == ids.index(ids[6]) + 1
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("seed", range(3))
def test_tools_that_must_be_called(chat, seed):
    done = chat(tools=[WEATHER, CLOCK], tool_choice="required", seed=seed, max_tokens=200)
    [choice] = done.choices
    if choice.finish_reason == "tool_calls":  # a random model may call until its tokens end
        assert choice.message.content is None
        for call in choice.message.tool_calls:
            assert call.type == "function" and call.id.startswith("call_")
            assert call.function.name in ("weather", "clock")
    named = {"type": "function", "function": {"name": "weather"}}
    done = chat(
        tools=[WEATHER, CLOCK], tool_choice=named, seed=seed, max_tokens=120, extra_body={"thinking": False}
    )
    [choice] = done.choices
    [call] = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
    assert arguments.keys() == {"city", "days"} and arguments["city"] in ("Bonn", "Rome")


def test_a_conversation_with_tools_goes_on(chat):
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    shorter = chat(messages[:2], tools=[CLOCK], tool_choice="auto", max_tokens=4)
    longer = chat(messages, tools=[CLOCK], tool_choice="none", max_tokens=4)
    assert longer.usage.prompt_tokens > shorter.usage.prompt_tokens
    assert longer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema(chat, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    done = chat(response_format=wanted, seed=seed, max_tokens=80, extra_body={"thinking": False})
    answer = json.loads(done.choices[0].message.content)
    assert (
        answer.keys() == {"sum", "sure"} and answer["sum"] in (3, 4, 5) and isinstance(answer["sure"], bool)
    )
    assert done.choices[0].finish_reason == "stop"
    anything = chat(response_format={"type": "json_object"}, seed=seed, extra_body={"thinking": False})
    assert anything.choices[0].message.content.startswith("{")


def test_reasoning_comes_apart_and_ends_in_its_budget(chat, artifact):
    tokenizer = load_tokenizer(artifact)
    fields = {"seed": 4, "max_tokens": 30}
    extra = {"thinking_budget": 10, "return_token_ids": True, "ignore_eos": True}
    forms = ({"thinking": True}, {"chat_template_kwargs": {"thinking": True}})
    answers = [chat(**fields, extra_body=extra | form) for form in forms]
    for done in answers:
        message, ids = done.choices[0].message, done.choices[0].token_ids
        assert ids[10] == tokenizer.end_think_id and len(ids) == 30
        assert message.reasoning_content == tokenizer.decode(ids[:10]).strip()
        assert message.content == tokenizer.decode(ids[11:]).strip()
        assert done.usage.completion_tokens_details.reasoning_tokens == 11
    off, left_alone = chat(extra_body={"thinking": False}), chat()
    on = answers[0].usage.prompt_tokens
    assert on == left_alone.usage.prompt_tokens + 1 and off.usage.prompt_tokens != on  # <think>


def test_refusals_are_the_clients_exceptions(chat, complete):
    with pytest.raises(openai.NotFoundError) as error:
        chat(model="another")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        chat([{"role": "user", "content": "word " * CONTEXT}])
    assert error.value.code == "context_length_exceeded" and f"{CONTEXT - 1} tokens" in str(error.value)
    for fields, param in (({"n": 0}, "n"), ({"temperature": -1}, "temperature"), ({"n": 9}, "n")):
        with pytest.raises(openai.BadRequestError) as error:
            chat(**fields)
        assert error.value.param == param
    with pytest.raises(openai.BadRequestError, match="use repetition_penalty"):
        complete(frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="did you mean 'thinking'"):
        chat(extra_body={"thinkin": True})
    with pytest.raises(openai.BadRequestError, match="below 300"):
        complete([1, 300])


def test_here_and_over_http_are_one(server, artifact):
    """The same requests to the engine in this process and to the server: the same answers."""
    sampling = SamplingConfig(temperature=0.9, max_new_tokens=12)
    requests = [
        Request(prompt="one and", sampling=sampling, seed=5, n=2),
        Request(messages=tuple(CHAT), sampling=sampling, seed=6, stop=("e",)),
        Request(messages=tuple(CHAT), thinking=False, sampling=sampling, seed=7),
    ]
    here = LocalGenerator(Model.load(artifact), EngineConfig(slots=8)).answer(requests)
    with RemoteGenerator(RemoteConfig(f"{server.url}/v1", MODEL)) as remote:
        there = remote.answer(requests)
    for ours, theirs in zip(here, there, strict=True):
        kept = [[(a.text, a.content, a.finish_reason) for a in answers] for answers in (ours, theirs)]
        assert kept[0] == kept[1]
