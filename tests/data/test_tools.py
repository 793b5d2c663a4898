"""Tools: what the template says of them (here and in transformers), and the calls that models write."""

import json

import pytest

from nemojax.data import chat
from nemojax.data.tokenizer import CHAT_TEMPLATE
from nemojax.data.tools import (
    check_tools,
    parse_bare_calls,
    parse_calls,
    tools_that_must_be_called,
)
from tests.data.tiny import tiny_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": 'The "city" <é>'}},
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS},
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
QUESTION = {"role": "user", "content": "Is it warm in Köln?"}


def call(name, arguments, number=0):
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, number=0):
    return {"role": "tool", "content": text, "tool_call_id": f"call_{number}"}


CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [call("get_weather", '{"city":  "K\\u00f6ln", "n": 1.50}'), call("now", {"zone": "é"}, 1)],
}
RESULTS = [result('{"celsius": 21}'), result("12:00", 1)]
ANSWER = {"role": "assistant", "content": "<think>21</think>Yes."}
CHATS = {
    "question": [QUESTION],
    "system": [{"role": "system", "content": "detailed thinking off\n\nBe brief."}, QUESTION],
    "calls": [QUESTION, CALLS],
    "results": [QUESTION, CALLS, *RESULTS],
    "words and a call": [QUESTION, {**CALLS, "content": "<think>look</think>"}, *RESULTS, ANSWER],
    "twice": [QUESTION, CALLS, *RESULTS, CALLS, *RESULTS, ANSWER, QUESTION],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["as made", "as exported"])
def theirs(request, tokenizer, tmp_path_factory):
    """The tokenizer in transformers, from its own directory and from one that an export fills."""
    from transformers import AutoTokenizer

    path = tokenizer.path
    if request.param == "as exported":
        path = tokenizer.save(tmp_path_factory.mktemp("exported"))
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["without", "with"])
def test_transformers_renders_the_same(tokenizer, theirs, name, tools):
    for generation in (False, True):
        text = theirs.apply_chat_template(
            CHATS[name], tools=tools or None, tokenize=False, add_generation_prompt=generation
        )
        assert text == chat.render(tokenizer, CHATS[name], generation, tools)
        assert ("<AVAILABLE_TOOLS>" in text) == bool(tools)


def test_what_the_template_says(tokenizer):
    text = chat.render_prompt(tokenizer, CHATS["results"], False, TOOLS)
    listed = text.partition("<AVAILABLE_TOOLS>")[2].partition("</AVAILABLE_TOOLS>")[0]
    assert json.loads(listed) == [tool["function"] for tool in TOOLS]
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ndetailed thinking off\n\nYou can call"
    )
    assert (
        "assistant<|end_header_id|>\n\n"
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city":  "K\\u00f6ln", "n": 1.50}}, '
        '{"name": "now", "arguments": {"zone": "é"}}]</TOOLCALL><|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\n"
        '<TOOL_RESPONSE>[{"celsius": 21}, 12:00]</TOOL_RESPONSE><|eot_id|>'
    ) in text
    ids = chat.encode_prompt(tokenizer, CHATS["results"], False, tools=TOOLS)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.encode(text) == ids


def test_without_tools_nothing_has_changed(tokenizer):
    """The text that models were trained on before there were tools."""
    chats = [CHATS["question"], CHATS["system"], [QUESTION, ANSWER, QUESTION]]
    for messages in chats:
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else "detailed thinking on"
        turns = [("system", system), *((m["role"], m["content"]) for m in messages[has_system:])]
        said = "".join(f"<|start_header_id|>{r}<|end_header_id|>\n\n{c}<|eot_id|>" for r, c in turns)
        assert chat.render(tokenizer, messages) == "<|begin_of_text|>" + said


def test_what_the_model_wrote_is_what_its_history_shows(tokenizer):
    """A call parsed and sent back as OpenAI's clients do renders as it was written: the cache knows it."""
    written = '<TOOLCALL>[{"name": "get_weather", "arguments": {"city":"Köln",  "n": 1.50}}]</TOOLCALL>'
    _, calls = parse_calls(written)
    message = {"role": "assistant", "content": "", "tool_calls": [call(*calls[0])]}
    head = chat.render_prompt(tokenizer, [QUESTION], None, TOOLS)
    assert chat.render(tokenizer, [QUESTION, message], tools=TOOLS) == head + written + "<|eot_id|>"


def test_only_calls_and_answers_are_trained(tokenizer):
    conversation = chat.Conversation((QUESTION, CALLS, *RESULTS, ANSWER), True, tools=(WEATHER, NOW))
    example = chat.encode_chat(tokenizer, conversation)
    trained = tokenizer.decode(example.ids[example.weights > 0], skip_special=False)
    assert trained.startswith('<TOOLCALL>[{"name": "get_weather"')
    assert trained.endswith("]</TOOLCALL><|eot_id|><think>21</think>Yes.<|eot_id|>")
    assert "RESPONSE" not in trained and "AVAILABLE" not in trained
    row = {"messages": [QUESTION, CALLS, *RESULTS, ANSWER], "thinking": True, "tools": TOOLS}
    assert chat.conversation_from_row(row, "x") == conversation
    with pytest.raises(ValueError, match=r"rows:3: tools\[0\]: expected"):
        chat.conversation_from_row({**row, "tools": [{"name": "f"}]}, "rows:3")


# What Llama 3.1's own template does with tools, in short: it wants arguments that are objects.
FOREIGN = """{{- bos_token }}
{%- if tools is not none %}{{ tools | length }} tools:
{%- for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{{ eos_token }}
{%- elif message.role == 'tool' %}<ipython>{{ message.content | tojson }}{{ message.tool_call_id }}
{%- else %}<{{ message.role }}>{{ message.content | trim }}{% endif %}
{%- endfor %}"""


def test_a_template_of_its_own_gets_tools_and_calls(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FOREIGN)
    one = {"role": "assistant", "tool_calls": [call("now", '{"zone":"UTC"}')]}
    text = chat.render_prompt(tokenizer, [QUESTION, one, result("12")], None, TOOLS)
    assert f"2 tools:{json.dumps(WEATHER, ensure_ascii=False)}" in text
    assert '{"name": "now", "parameters": {"zone": "UTC"}}<|eot_id|>' in text
    assert text.endswith('<ipython>"12"call_0')
    flat = {"role": "assistant", "tool_calls": [{"name": "now", "arguments": ""}]}
    assert '"parameters": {}}' in chat.render_prompt(tokenizer, [QUESTION, flat])
    with pytest.raises(ValueError, match=r"refuses this conversation \(one call at once\)"):
        chat.render_prompt(tokenizer, [QUESTION, CALLS])
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="expected a chat template that describes tools"):
        chat.render_prompt(tokenizer, [QUESTION], None, TOOLS)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content + 1 }}")
    with pytest.raises(ValueError, match="refuses this conversation"):
        chat.render_prompt(tokenizer, [QUESTION])


def test_the_template_is_shipped(tokenizer):
    assert (tokenizer.path / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


@pytest.mark.parametrize(
    "text, content, calls",
    [
        (
            '<TOOLCALL>[{"name": "f", "arguments": {"a": [1, 2.50]}}]</TOOLCALL>',
            "",
            [("f", '{"a": [1, 2.50]}')],
        ),
        ('<TOOLCALL>[{"arguments":{},"name":"f"},{"name":"g"}]</TOOLCALL>', "", [("f", "{}"), ("g", "{}")]),
        ('<TOOLCALL> {"name": "f", "parameters": {}} </TOOLCALL>', "", [("f", "{}")]),
        ('<TOOLCALL>[{"name": "f", "arguments": "{\\"a\\": 1}"}]</TOOLCALL>', "", [("f", '{"a": 1}')]),
        ('hi <TOOLCALL>[{"name": "f", "extra": null}]', "hi", [("f", "{}")]),
        ('{"name": "f", "parameters": {"a": "}"}}', "", [("f", '{"a": "}"}')]),
        ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
    ],
)
def test_calls_that_parse(text, content, calls):
    assert parse_calls(text) == (content, tuple(calls))


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "<TOOLCALL>",
        "<TOOLCALL></TOOLCALL>",
        "<TOOLCALL>[]</TOOLCALL>",
        "<TOOLCALL>[1]</TOOLCALL>",
        '<TOOLCALL>[{"name": "f", "arguments": {"a": 1,}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f",}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f"},]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f"} {"name": "g"}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": [1]}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": "x"}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": {"a": NaN}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "", "arguments": {}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": 3, "arguments": {}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "\\ud800", "arguments": {}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", 1: 2}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f"}] and then </TOOLCALL>',
        "<TOOLCALL>" + "[" * 100_000,
        '<TOOLCALL>[{"name": "f", "arguments": ' + '{"a":' * 100_000,
        '{"name": "f"}',
        '{"name": "f", "parameters": {}} is what I would call',
        '{"name": "Ann", "parameters": {}, "age": 3}',
        '{"a":' * 100_000,
        "{",
        '{"name": ' + "9" * 5000 + ', "parameters": {}}',
    ],
)
def test_what_is_no_call_stays(text):
    assert parse_calls(text) == (text.strip(), ())


def test_numbers_and_escapes_reach_the_tool_as_written():
    arguments = '{"big": 12345678901234567890.0, "e": 1E+2,  "s": "\\u00e9\\/"}'
    assert parse_bare_calls(f'{{"name": "f", "parameters": {arguments}}}') == (("f", arguments),)


@pytest.mark.parametrize(
    "tools, message",
    [
        ("f", "expected a list of at most 128 tools"),
        ([NOW] * 129, "at most 128"),
        (["f"], r"tools\[0\]: expected"),
        ([{"type": "retrieval", "function": {"name": "f"}}], r"tools\[0\]: expected"),
        ([NOW, {"function": {"name": "a b"}}], r"tools\[1\]: expected a name of at most 64"),
        ([{"function": {}}], "expected a name"),
        ([{"function": {"name": "x" * 65}}], "expected a name"),
        ([NOW, NOW], "expected every name once, got 'now' again"),
        ([{"function": {"name": "f", "parameters": []}}], "expected parameters to be a schema"),
        ([{"function": {"name": "f", "description": 3}}], "expected a description that is text"),
    ],
)
def test_bad_tools(tokenizer, tools, message):
    with pytest.raises(ValueError, match=message):
        check_tools(tools)
    with pytest.raises(ValueError, match=message):
        chat.encode_prompt(tokenizer, [QUESTION], tools=tools)


def test_which_tools_must_be_called():
    assert tools_that_must_be_called(TOOLS, "auto") == tools_that_must_be_called(TOOLS, "none") == ()
    assert tools_that_must_be_called(TOOLS, "required") == (WEATHER, NOW)
    assert tools_that_must_be_called(TOOLS, {"type": "function", "function": {"name": "now"}}) == (NOW,)
