"""Loss masks, the toggle, think tags, lengths, and rows of conversations."""

import json

import numpy as np
import pytest

from nemojax.data import chat
from nemojax.data.chat import Conversation
from tests.data.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_TURNS = (user("2+2?"), assistant("<think>count</think>4"), user("sure?"), assistant("\nyes"))


def test_only_the_assistant_is_trained_and_its_end_of_turn(tokenizer):
    example = chat.encode_chat(tokenizer, Conversation(TWO_TURNS, True))
    trained = tokenizer.decode(example.ids[example.weights > 0], skip_special=False)
    assert trained == "<think>count</think>4<|eot_id|>\nyes<|eot_id|>"
    assert tokenizer.decode(example.ids, skip_special=False) == chat.render(
        tokenizer, chat.with_toggle(TWO_TURNS, True)
    )


@pytest.mark.parametrize("thinking", [True, False, None])
def test_the_untrained_start_is_exactly_the_prompt(tokenizer, thinking):
    example = chat.encode_chat(tokenizer, Conversation(TWO_TURNS[:2], thinking))
    prompt = chat.encode_prompt(tokenizer, TWO_TURNS[:1], thinking)
    start = int(np.argmax(example.weights))
    assert example.ids[:start].tolist() == prompt


def test_toggle():
    on = chat.with_toggle([user("x")], True)
    assert on[0] == {"role": "system", "content": "detailed thinking on"}
    off = chat.with_toggle([{"role": "system", "content": "Be brief."}, user("x")], False)
    assert off[0]["content"] == "detailed thinking off\n\nBe brief."
    assert chat.with_toggle(off, True)[0]["content"] == "detailed thinking on\n\nBe brief."
    assert chat.with_toggle(chat.with_toggle(on, False), True) == on
    assert chat.with_toggle(off, None) == off


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a b</think>c", ("a b", "c")),
        ("c", (None, "c")),
        ("<think>\n</think>\n\nc", ("", "c")),
        ("a</think>c", ("a", "c")),
        ("<think>never ends", ("never ends", "")),
        ("<think>a</think>b</think>c", ("a</think>b", "c")),
    ],
)
def test_split_thinking(text, expected):
    assert chat.split_thinking(text) == expected
    reasoning, content = expected
    if reasoning is not None and content:
        assert chat.split_thinking(chat.answer_with_thinking(reasoning, content)) == expected


def test_too_long_is_an_error_or_dropped_and_counted(tokenizer):
    short, long = Conversation((user("a"), assistant("b"))), Conversation((user("a"), assistant("b " * 200)))
    with pytest.raises(ValueError, match="prompt: expected at most 5 tokens"):
        chat.encode_prompt(tokenizer, [user("hello")], True, limit=5)
    with pytest.raises(ValueError, match="chat: expected at most 64 tokens"):
        chat.encode_chat(tokenizer, long, limit=64)
    with pytest.raises(ValueError, match="chat 1: expected at most 65 tokens"):
        chat.chat_examples([short, long], tokenizer, 64)
    kept, dropped = chat.chat_examples([short, long], tokenizer, 64, "drop")
    assert (len(kept), dropped) == (1, 1)
    kept, dropped = chat.chat_examples([short, long], tokenizer, 64, "truncate")
    assert [kept[i].size for i in range(2)][1] == 64 and dropped == 0
    assert chat.chat_examples([long], tokenizer, 8, "truncate")[1] == 1
    with pytest.raises(ValueError, match="got 'split'"):
        chat.chat_examples([short], tokenizer, 64, "split")


def test_batched_and_single_encoding_agree(tokenizer):
    conversations = [Conversation(TWO_TURNS, True), Conversation(TWO_TURNS[:2], False)]
    stored, _ = chat.chat_examples(conversations, tokenizer, 400)
    for index, conversation in enumerate(conversations):
        single = chat.encode_chat(tokenizer, conversation)
        np.testing.assert_array_equal(stored[index].ids, single.ids)
        np.testing.assert_array_equal(stored[index].weights, single.weights)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, monkeypatch):
    template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="changes earlier turns"):
        chat.encode_chat(tokenizer, Conversation(TWO_TURNS))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=r"refuses this conversation \(no\)"):
        chat.render_prompt(tokenizer, [user("x")])


@pytest.mark.parametrize(
    "messages, message",
    [
        ((), "at least one message"),
        (({"role": "bot", "content": "x"},), "messages of role"),
        (({"role": "user"},), "messages of role"),
        ((user("x"), {"role": "system", "content": "y"}), "system message first"),
        ((user("x"),), "expected an assistant message"),
    ],
)
def test_bad_conversations(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.encode_chat(tokenizer, Conversation(messages))


def test_conversations_from_jsonl(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [user("a"), assistant("b")], "thinking": True},
        {"input": "a", "output": "b", "reasoning": "off"},
        {"input": [user("a")], "output": "b"},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    loaded = chat.load_conversations(path)
    assert [c.thinking for c in loaded] == [True, False, None]
    assert all(c.messages == (user("a"), assistant("b")) for c in loaded)
    assert [c.where for c in loaded] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert {c.question for c in loaded} == {"user: a"}
    path.write_text(json.dumps(rows[0]) + '\n{"text": "a"}\n')
    with pytest.raises(ValueError, match="chats.jsonl:2: expected messages"):
        chat.load_conversations(path)
    path.write_text('{"messages": [{"role": "user", "content": "a"}], "thinking": "yes"}')
    with pytest.raises(ValueError, match="true or false, got 'yes'"):
        chat.load_conversations(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="chats.jsonl: expected conversations, got none"):
        chat.load_conversations(path)


def calls(*ids):
    return [{"id": i, "type": "function", "function": {"name": f"f{i}", "arguments": "{}"}} for i in ids]


def test_messages_as_clients_send_them():
    """Parts of text, developers, unknown fields, and results in the order of their calls."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": calls("x", "y"), "refusal": None},
        {"role": "tool", "content": "of y", "tool_call_id": "y"},
        {"role": "tool", "content": parts, "tool_call_id": "x"},
        {"role": "assistant", "content": "done", "tool_calls": []},
    ]
    plain = chat.plain_messages(given)
    assert [m["role"] for m in plain] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in plain] == ["Be brief.", "a\nb", None, "a\nb", "of y", "done"]
    assert plain[2]["tool_calls"] == calls("x", "y") and set(plain[5]) == set(plain[1]) == {"role", "content"}
    unknown = [*given[:3], {**given[3], "tool_call_id": "z"}, given[4]]
    assert [m["content"] for m in chat.plain_messages(unknown)[3:]] == ["of y", "a\nb"]
    assert chat.plain_messages(plain) == plain
    assert given[1]["content"] is parts


@pytest.mark.parametrize(
    "messages, message",
    [
        (None, "messages: expected a list of messages, got None"),
        ("hi", "expected a list of messages"),
        ([], "at least one message"),
        (["hi"], "expected messages that are objects, got 'hi' at 0"),
        ([{"role": ["user"], "content": "x"}], "messages of role system, user, assistant, tool"),
        ([{"role": "function", "content": "x"}], "messages of role"),
        ([{"role": "user", "content": None}], "with text content"),
        ([{"role": "assistant", "content": None}], "with text content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "with text content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "message 0: expected parts",
        ),
        ([{"role": "user", "content": ["x"]}], "expected parts"),
        (
            [{"role": "user", "content": "x", "tool_calls": calls("x")}],
            "tool_calls in an assistant's message",
        ),
        ([{"role": "assistant", "content": "x", "tool_calls": "f"}], "expected a list of tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": [3]}], "message 0: expected tool_calls like"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
            "expected tool_calls like",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}],
            "result after tool_calls, got one at 1",
        ),
    ],
)
def test_messages_that_are_nonsense(messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        chat.plain_messages(messages)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_text(tokenizer):
    with pytest.raises(ValueError, match="expected whole Unicode characters"):
        chat.encode_prompt(tokenizer, [user("half a pair: \ud83d")])
