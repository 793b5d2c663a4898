"""Grammars, driven by a sampler that takes every allowed token with equal chance: it errs wherever it can."""

import json
import re

import jax
import jsonschema
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.data.chat import opens_thinking, render_prompt, split_thinking
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.generate.completions import complete
from nemojax.generate.constrain import WHITESPACE, compile_grammar, json_grammar, tool_grammar
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Job, job_key
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.text import parse_tool_calls, thinking_budget
from nemojax.model.llama import init_params
from tests.data.tiny import TEXTS, tiny_tokenizer

WORDS = {"type": "string", "maxLength": 6}
CLOSED = {"additionalProperties": False}
SCHEMAS = {
    "enum": {"enum": ["red", "grün", 7, None, {"a": [True]}]},
    "flat": {
        "type": "object",
        "properties": {"name": WORDS, "age": {"type": "integer", "minimum": -3, "maximum": 120}},
        "required": ["name", "age"],
        **CLOSED,
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": "é🦙"}},
        "required": ["b"],
        **CLOSED,
    },
    "nested": {
        "type": "object",
        "title": "An order",
        "description": 'with "quotes", slashes / \\ and a newline\n',
        "properties": {
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
                        "n": {"$ref": "#/$defs/n"},
                    },
                    "required": ["sku", "n"],
                    **CLOSED,
                },
            },
            "paid": {"anyOf": [{"type": "boolean"}, {"type": "string", "enum": ["later"]}]},
        },
        "required": ["lines", "paid"],
        "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9, "default": 1}},
        **CLOSED,
    },
    "numbers": {
        "type": "array",
        "items": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "unicode": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 3}, "maxItems": 2},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
}
PLACE = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city"],
    "$defs": {"city": {"enum": ["Paris", "Köln"]}},
    **CLOSED,
}
COLOUR = {"type": "object", "properties": {"city": {"enum": ["red"]}}, "required": ["city"], **CLOSED}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "weather_colour", "parameters": COLOUR}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
WEATHER = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Merges across quotes, braces and words, as a real vocabulary has them."""
    texts = [
        *TEXTS,
        json.dumps(SCHEMAS, indent=1),
        json.dumps(SCHEMAS),
        '{"name": "é🦙", "arguments": {}}] ' * 9,
    ]
    return train_tokenizer(texts * 3, 700, tmp_path_factory.mktemp("tokenizer"))


def sample(tokenizer, make, rng, limit=4000, forced=None, vocab_size=720):
    """The text of one completion; an id is drawn from those allowed, `forced` {position: ids} are not."""
    constraint, ids = make(), []
    queue = []
    while len(ids) < limit:
        allowed_V = constraint.allowed()
        assert allowed_V.shape == (vocab_size,) and allowed_V.dtype == bool
        assert not allowed_V[tokenizer.vocab_size :].any()
        queue += (forced or {}).get(len(ids), [])
        token = queue.pop(0) if queue else int(rng.choice(np.flatnonzero(allowed_V)))
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        assert token not in tokenizer.special_ids
        ids.append(token)
        constraint.advance(token)
    raise AssertionError(f"no end after {limit} tokens: {tokenizer.decode(ids)[-200:]}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_parses_and_fits_its_schema(tokenizer, name):
    make = compile_grammar(tokenizer, json_grammar(SCHEMAS[name]), 720)
    rng, texts = np.random.default_rng(0), set()
    for _ in range(40):
        text = sample(tokenizer, make, rng)
        jsonschema.validate(json.loads(text), SCHEMAS[name])
        texts.add(text)
    assert len(texts) >= 5
    if name == "unicode":
        assert any(ord(c) > 127 for c in "".join(texts))


def test_any_object_and_white_space_that_ends(tokenizer):
    """A sampler that prefers white space comes to an end: a gap takes a line and its indentation at most."""
    constraint = compile_grammar(tokenizer, json_grammar({}), 720)()
    space_ids = [i for i in range(700) if (text := tokenizer.decode([i])) and not text.strip(" \n\t\r")]
    constraint.advance(tokenizer.encode("{")[0])
    ids = []
    while (allowed := [i for i in space_ids if constraint.allowed()[i]]) and len(ids) < 100:
        ids.append(max(allowed, key=lambda i: len(tokenizer.decode([i]))))
        constraint.advance(ids[-1])
    text = tokenizer.decode(ids)
    assert re.fullmatch(WHITESPACE, text) and 1 <= len(text) <= 17
    for token in tokenizer.encode('"a": [1, {"b":null}]}'):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert np.flatnonzero(constraint.allowed()).tolist() == sorted(tokenizer.eos_ids)
    start = compile_grammar(tokenizer, json_grammar({}), 720)().allowed()
    assert {tokenizer.decode([i])[0] for i in np.flatnonzero(start)} == {"{"}


def test_completions_are_independent_and_complete_texts_only_end(tokenizer):
    make = compile_grammar(tokenizer, json_grammar({"enum": [1, 12]}), 720)
    one, other = make(), make()
    first, second = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    one.advance(first)
    assert set(np.flatnonzero(one.allowed())) == {second, *tokenizer.eos_ids}
    assert set(np.flatnonzero(other.allowed())) == {first}
    one.advance(second)
    assert set(np.flatnonzero(one.allowed())) == set(tokenizer.eos_ids)
    one.advance(tokenizer.eos_id)
    assert set(np.flatnonzero(one.allowed())) == set(tokenizer.eos_ids)


@pytest.mark.parametrize("choice", ["required", WEATHER])
def test_calls_obey_the_schema_of_their_tool(tokenizer, choice):
    make = compile_grammar(tokenizer, tool_grammar(TOOLS, choice, max_calls=3), 720)
    schemas = {"weather": PLACE, "weather_colour": COLOUR, "now": {"maxProperties": 0}}
    rng, names, most = np.random.default_rng(1), set(), 0
    for _ in range(40):
        content, calls = parse_tool_calls(sample(tokenizer, make, rng))
        assert content == "" and 1 <= len(calls) <= 3
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        names |= {call.name for call in calls}
        most = max(most, len(calls))
    assert (names, most) == (({"weather"}, 1) if choice is WEATHER else (set(schemas), 3))


def test_calls_are_written_as_the_template_teaches(tokenizer):
    """The text of a call in a prompt is a text of the grammar: histories look like what is written now."""
    call = {"function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call, {"function": {"name": "now"}}]},
    ]
    chat.append({"role": "tool", "content": "1"})
    prompt = render_prompt(tokenizer, chat, tools=TOOLS)
    written = prompt[prompt.rindex("<TOOLCALL>") : prompt.rindex("</TOOLCALL>") + 11]
    constraint = compile_grammar(tokenizer, tool_grammar(TOOLS, "required"), 720)()
    for token in tokenizer.encode(written):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert constraint.allowed()[tokenizer.eot_id]


def test_it_may_think_first(tokenizer):
    make = compile_grammar(tokenizer, json_grammar(SCHEMAS["flat"], "optional"), 720)
    rng, thought = np.random.default_rng(2), 0
    for turn in range(30):
        begin = tokenizer.encode("<think>so </thin, {") if turn % 3 else []
        end = {} if not begin else {0: begin, 30: tokenizer.encode("</think>")}
        reasoning, content = split_thinking(sample(tokenizer, make, rng, forced=end))
        jsonschema.validate(json.loads(content), SCHEMAS["flat"])
        thought += reasoning is not None
    assert 20 <= thought <= 30


def test_it_is_thinking_already_and_a_budget_ends_it(tokenizer):
    """The close of a budget is accepted wherever it falls, in the middle of a character too."""
    assert opens_thinking("<think>\n")
    make = compile_grammar(tokenizer, json_grammar(SCHEMAS["flat"], "opened"), 720)
    budget, rng = thinking_budget(tokenizer, 5), np.random.default_rng(3)
    llama = tokenizer.encode("🦙")
    assert len(llama) > 1
    for turn in range(10):
        start = [*tokenizer.encode("a b"), llama[0]] if turn % 2 else []
        text = sample(tokenizer, make, rng, forced={0: [*start, *budget.close]})
        assert text.startswith("a b\ufffd</think>" if start else "</think>")
        jsonschema.validate(json.loads(split_thinking("<think>" + text)[1]), SCHEMAS["flat"])
    with pytest.raises(AssertionError, match="no end after 50"):
        sample(tokenizer, make, np.random.default_rng(3), limit=50)  # free text goes on


def test_tags_that_are_spelled_are_tags(tmp_path):
    """A vocabulary without think tokens: the same grammar holds for what its tokens spell."""
    made = tiny_tokenizer(tmp_path / "made")
    config = json.loads((made.path / "tokenizer.json").read_text())
    config["added_tokens"] = [t for t in config["added_tokens"] if "think" not in t["content"]]
    (made.path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(made.path)
    assert tokenizer.think_id is None
    constraint = compile_grammar(tokenizer, json_grammar({"const": 1}, "optional"), tokenizer.vocab_size)()
    for token in tokenizer.encode("<think>x</think>\n1"):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert set(np.flatnonzero(constraint.allowed())) == set(tokenizer.eos_ids)


def test_a_model_that_knows_nothing_writes_what_is_asked(tokenizer):
    """Through the engine, beside sequences that are free; its vocabulary exceeds the tokenizer's."""
    arch = uniform(
        vocab_size=720, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16, context=512
    )
    engine = Engine(init_params(arch, jax.random.key(0)), arch, EngineConfig(slots=4))
    makes = [
        compile_grammar(tokenizer, json_grammar(SCHEMAS["flat"]), 720),
        None,
        compile_grammar(tokenizer, tool_grammar(TOOLS, WEATHER), 720),
    ]
    jobs = [
        Job(
            tuple(tokenizer.encode("<|begin_of_text|>hi")),
            SamplingConfig(max_new_tokens=300 if make else 30, top_k=0 if i % 2 else 50),
            job_key(0, i),
            tokenizer.eos_ids,
            constraint=make,
        )
        for i, make in enumerate(makes * 2)
    ]
    done = complete(engine, jobs)
    texts = [tokenizer.decode(completion.tokens) for completion in done]
    assert all(
        c.finished and c.tokens[-1] in tokenizer.eos_ids
        for c, job in zip(done, jobs, strict=True)
        if job.constraint
    )
    for text in (texts[0], texts[3]):
        jsonschema.validate(json.loads(text), SCHEMAS["flat"])
    for text in (texts[2], texts[5]):
        [call] = parse_tool_calls(text)[1]
        jsonschema.validate(json.loads(call.arguments), PLACE)


def test_a_token_against_the_grammar_ends_the_text(tokenizer):
    constraint = compile_grammar(tokenizer, json_grammar({}), 720)()
    constraint.advance(tokenizer.encode("x")[0])
    assert set(np.flatnonzero(constraint.allowed())) == set(tokenizer.eos_ids)


@pytest.mark.parametrize(
    "schema, message",
    [
        ([], "json_schema: expected a JSON schema, got \\[\\]"),
        ({"type": "strnig"}, "json_schema: .*Invalid type: strnig"),
        ({"enum": []}, "Unsatisfiable"),
        ({"not": {}}, "Unimplemented keys"),
        ({"$ref": "http://example.com/x"}, "json_schema"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"const": float("nan")}, "json_schema"),
        ({"const": b"x"}, "not JSON"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "Unsatisfiable"),
        ({"description": "\ud800"}, "json_schema"),
    ],
)
def test_schemas_that_have_no_grammar(schema, message):
    with pytest.raises(ValueError, match=message) as caught:
        json_grammar(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_schema_nested_too_deep_is_refused():
    schema: dict = {}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="json_schema"):
        json_grammar(schema)


@pytest.mark.parametrize(
    "tools, choice, message",
    [
        (TOOLS, "sometimes", "tool_choice: expected"),
        (TOOLS, "auto", "expected 'required' or a tool's name, for a grammar, got 'auto'"),
        (
            TOOLS,
            {"function": {"name": "rain"}},
            r"name of a tool \(weather, weather_colour, now\), got 'rain'",
        ),
        ([], "required", "expected tools with 'required'"),
        ([TOOLS[0], TOOLS[0]], "required", "every name once"),
        (
            [{"function": {"name": "f", "parameters": {"type": "array"}}}],
            "required",
            "f: expected parameters of type",
        ),
        ([{"function": {"name": "f", "parameters": {"type": 3}}}], "required", "tools: f: expected"),
        ([{"function": {"name": "f", "parameters": {"not": {}}}}], "required", "tools: f: .*Unimplemented"),
    ],
)
def test_bad_tools(tools, choice, message):
    with pytest.raises(ValueError, match=message) as caught:
        tool_grammar(tools, choice)
    assert "\n" not in str(caught.value)


def test_grammars_that_do_not_compile(tokenizer):
    with pytest.raises(ValueError, match="grammar: expected one that compiles") as caught:
        compile_grammar(tokenizer, "start: nowhere", 720)
    assert "\n" not in str(caught.value)
