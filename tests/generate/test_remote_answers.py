"""What a server's answers hold, whole and in pieces."""

import pytest

from nemojax.generate.local import Piece
from nemojax.generate.protocol import Answer, Request, ToolCall
from nemojax.generate.remote import RemoteGenerator
from tests.generate.asking import ask, chat, config
from tests.generate.unreliable import Server, wait_until


def message(content: str | None, finish: str = "stop", **more) -> dict:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
    choice["message"] |= {k: more.pop(k) for k in list(more) if k not in ("logprobs", "token_ids")}
    return {"choices": [choice | more], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}


@pytest.mark.parametrize(
    ("body", "text", "reasoning", "content"),
    [
        (message("<think>a b</think>c"), "<think>a b</think>c", "a b", "c"),
        (message("c", reasoning_content="a b"), "<think>a b</think>c", "a b", "c"),
        (message("c", reasoning="a b"), "<think>a b</think>c", "a b", "c"),
        (message(None, "length", reasoning_content="a b"), "<think>a b", "a b", ""),
        (message("<think>a b", "length"), "<think>a b", "a b", ""),
        (message("c", reasoning_content=None), "c", None, "c"),
    ],
)
def test_reasoning(server, body, text, reasoning, content):
    server.script = [body]
    [[answer]] = ask(server, chat("q"))
    assert (answer.text, answer.reasoning, answer.content) == (text, reasoning, content)


def test_tool_calls(server):
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    server.script = [message(None, "tool_calls", tool_calls=calls), message("", "stop", tool_calls=calls)]
    for _ in range(2):
        [[answer]] = ask(server, chat("q"))
        assert answer.tool_calls == (ToolCall("add", '{"a": 1}'),)
        assert (answer.finish_reason, answer.content) == ("tool_calls", "")


def test_token_ids_and_logprobs(server):
    entries = [
        {
            "token": "a",
            "logprob": -1,
            "top_logprobs": [{"token": "b", "logprob": -2.0}, {"token": "a", "logprob": -1}],
        },
        {"token": "c", "logprob": -0.5, "top_logprobs": []},
    ]
    server.script = [message("ac", logprobs={"content": entries}, token_ids=[7, 9])]
    [[answer]] = ask(server, chat("q", top_logprobs=2))
    assert (answer.tokens, answer.logprobs, answer.num_tokens) == ((7, 9), (-1.0, -0.5), 2)
    assert answer.top == ((("a", -1.0), ("b", -2.0)), ())
    server.script = [message("ac", logprobs={"content": entries}, token_ids=[7, 9])]
    [[answer]] = ask(server, chat("q", top_logprobs=1))
    assert answer.top == ((("a", -1.0),), ())
    columns = {"tokens": ["a"], "token_logprobs": [-1.5], "top_logprobs": [{"b": -2.5, "a": -1.5}]}
    server.script = [
        {
            "choices": [{"text": "a", "finish_reason": "length", "logprobs": columns}],
            "prompt_token_ids": [1, 2],
        }
    ]
    [[answer]] = ask(server, Request(prompt="p", top_logprobs=2))
    assert (answer.logprobs, answer.top) == ((-1.5,), ((("a", -1.5), ("b", -2.5)),))
    assert (answer.num_tokens, answer.prompt_tokens, answer.finish_reason) == (1, 2, "length")


def test_tokens_of_several_samples_are_shared_by_length(server):
    choices = [
        {"index": i, "finish_reason": "stop", "text": text}
        for i, text in enumerate(("a", "b" * 8, "", "c" * 5))
    ]
    server.script = [{"choices": choices, "usage": {"prompt_tokens": 2, "completion_tokens": 31}}]
    [answers] = ask(server, Request(prompt="p", n=4))
    counts = [answer.num_tokens for answer in answers]
    assert sum(counts) == 31 and counts[1] > counts[3] > counts[0]


def delta(finish: str | None = None, **message) -> dict:
    return {"choices": [{"index": 0, "delta": message, "finish_reason": finish}]}


def stream(server: Server, request: Request, **values) -> tuple[list[tuple[str, str]], Answer]:
    with RemoteGenerator(config(server, **values)) as generator:
        *pieces, answer = generator.pieces(request)
    assert isinstance(answer, Answer)
    return [(p.kind, p.text) for p in pieces if isinstance(p, Piece)], answer


@pytest.mark.parametrize("request_", [chat("a b c"), Request(prompt="a b c")])
def test_pieces(server, request_):
    pieces, answer = stream(server, request_)
    assert pieces == [("content", "a"), ("content", " b"), ("content", " c"), ("content", " 0")]
    assert (answer.text, answer.content, answer.finish_reason) == ("a b c 0", "a b c 0", "stop")
    assert (answer.num_tokens, answer.prompt_tokens) == (4, 5)
    assert server.bodies[0]["stream"] is True and server.bodies[0]["n"] == 1


@pytest.mark.parametrize(
    "chunks",
    [
        [delta(reasoning_content="a "), delta(reasoning_content="b"), delta(content="c"), delta("stop")],
        [delta(reasoning="a "), delta(reasoning="b"), delta(content="c"), delta("stop", content="")],
        [delta(content="<thi"), delta(content="nk>a b</th"), delta(content="ink>c"), delta("stop")],
    ],
)
def test_reasoning_in_pieces(server, chunks):
    server.chunks = [*chunks, "[DONE]"]
    pieces, answer = stream(server, chat("q"))
    assert "".join(text for kind, text in pieces if kind == "reasoning") == "a b"
    assert "".join(text for kind, text in pieces if kind == "content") == "c"
    assert (answer.text, answer.reasoning, answer.content) == ("<think>a b</think>c", "a b", "c")


def test_calls_in_pieces(server):
    def part(**function) -> dict:
        return delta(tool_calls=[{"index": 0, "function": function}])

    server.chunks = [
        part(name="add", arguments=""),
        part(arguments='{"a"'),
        part(arguments=": 1}"),
        delta("stop"),
    ]
    pieces, answer = stream(server, chat("q"))
    assert pieces == [("tool_call", '{"a": 1}')]
    assert answer.tool_calls == (ToolCall("add", '{"a": 1}'),) and answer.finish_reason == "tool_calls"


def test_a_stream_is_asked_for_again_until_it_begins(server):
    server.script = [503, "drop", "cut"]
    assert stream(server, chat("a"))[1].text == "a 0" and len(server.bodies) == 4


@pytest.mark.parametrize(
    ("chunks", "error", "message"),
    [
        ([delta(content="a")], OSError, "expected an answer to its end, got 1 pieces of it"),
        ([delta(content="a"), {"error": {"message": "out of memory"}}], OSError, "broke off.*out of memory"),
        ([delta(content="a"), "not JSON"], ValueError, "expected JSON, got 'not JSON'"),
        ([{"object": "other"}], ValueError, "with 'choices'"),
        ([{"choices": [{"finish_reason": "stop"}]}], ValueError, "with 'delta'"),
    ],
)
def test_a_stream_that_breaks_off(server, chunks, error, message):
    server.chunks = chunks
    with pytest.raises(error, match=message) as caught:
        stream(server, chat("q"))
    assert str(caught.value).count(server.url) == 1 and len(server.bodies) == 1


def test_a_stream_that_falls_silent(server):
    """What has begun is not asked for again."""
    server.pause_after = 1
    with pytest.raises(OSError, match="none within 0.3 s"):
        stream(server, chat("a b"), timeout=0.3)
    assert len(server.bodies) == 1


def test_closing_pieces_hangs_up(server):
    server.pause_after = 1
    with RemoteGenerator(config(server)) as generator:
        pieces = generator.pieces(chat("a b c"))
        assert next(pieces) == Piece("content", "a")
        pieces.close()
        wait_until(lambda: server.cut_off == 1)
