"""A real server on this machine that fails on purpose; what was asked of it is counted."""

import asyncio
import threading
import time
from email.utils import formatdate

import pytest

from nemojax.generate.protocol import Request
from nemojax.generate.remote import Pace, RemoteConfig, RemoteGenerator
from nemojax.generate.sampling import SamplingConfig
from tests.generate.asking import ask, chat, config, texts
from tests.generate.unreliable import wait_until

KEY = "a-secret-of-this-test"


def test_answers_in_order_and_all_of_them(server):
    requests = [chat(f"q{i}", n=2) for i in range(20)] + [Request(prompt="p"), Request(tokens=(3, 4))]
    found = ask(server, *requests, max_concurrency=8)
    assert texts(found) == [[f"q{i} 0", f"q{i} 1"] for i in range(20)] + [["p 0"], ["[3, 4] 0"]]
    assert server.paths == {"/v1/chat/completions": 20, "/v1/completions": 2}
    one = found[-1][0]
    assert (one.prompt_tokens, one.num_tokens, one.finish_reason) == (5, 4, "stop")
    assert one.tokens is None and one.logprobs is None and one.top == () and one.reasoning is None
    assert server.keys == [None] * 22


def test_nothing_is_asked_for_nothing(server):
    assert ask(server) == [] and not server.bodies


def test_the_limit_of_concurrency_is_reached_and_kept(server):
    """Requests come in threes: fewer would wait at the barrier for ever, more would show in the peak."""
    server.gate = threading.Barrier(3)
    assert len(ask(server, *[chat(str(i)) for i in range(12)], max_concurrency=3)) == 12
    assert server.peak == 3


def test_the_limit_holds_over_threads(server):
    with RemoteGenerator(config(server, max_concurrency=2)) as generator:
        found: list = []
        threads = [
            threading.Thread(
                target=lambda i=i: found.append(generator.answer([chat(f"{i}{j}") for j in "abcd"]))
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(texts(answers)[0][0] for answers in found) == ["0a 0", "1a 0", "2a 0", "3a 0"]
    assert 1 <= server.peak <= 2


def test_stream_yields_as_they_complete(server):
    server.script = [lambda body: "slow" if body["messages"][0]["content"] == "first" else None] * 3
    with RemoteGenerator(config(server)) as generator:
        stream = generator.stream([chat("first"), chat("second"), chat("third")])
        early = {next(stream)[0], next(stream)[0]}
        server.release.set()
        assert early == {1, 2} and [index for index, _ in stream] == [0]


def test_closing_the_stream_cancels_what_is_under_way(server):
    slow = {"b", "c"}
    server.script = [lambda body: "slow" if body["messages"][0]["content"] in slow else None] * 300
    with RemoteGenerator(config(server, max_concurrency=3)) as generator:
        stream = generator.stream([chat(name) for name in ("a", "b", "c", *"defg" * 50)])
        next(stream)
        wait_until(lambda: server.slow == 2)
        stream.close()
        wait_until(lambda: server.cut_off == 2)
        wait_until(lambda: server.now == 0)
        server.script = []
        assert len(server.bodies) < 203
        assert texts(generator.answer([chat("again")])) == [["again 0"]]


@pytest.mark.parametrize("entry", [408, 409, 429, 500, 502, 503, 599, "drop", "cut"])
def test_what_may_pass_is_tried_again(server, entry):
    server.script = [entry, entry]
    assert texts(ask(server, chat("q"))) == [["q 0"]]
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]


def test_a_slow_answer_is_tried_again(server):
    server.script = ["slow"]
    assert texts(ask(server, chat("q"), timeout=0.2)) == [["q 0"]]
    wait_until(lambda: server.cut_off == 1)
    server.script = ["slow"] * 2
    with pytest.raises(OSError, match=r"/v1/chat/completions: request 0: .*none within 0.2 s after 2 tries"):
        ask(server, chat("q"), timeout=0.2, max_retries=1)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 307])
def test_what_a_server_refuses_is_not_tried_again(server, status):
    server.script = [status]
    with pytest.raises(ValueError) as error:
        ask(server, chat("q"))
    assert len(server.bodies) == 1
    assert str(error.value) == (
        f"{server.url}/chat/completions: request 0: expected an answer, got status {status} (no luck: "
        f"{status}); change the request or the address"
    )


def test_the_last_failure_is_told(server):
    server.script = [500] * 3
    with pytest.raises(
        OSError, match="got status 500 \\(no luck: 500\\) after 3 tries; see whether the server"
    ):
        ask(server, chat("q"), max_retries=2)
    assert len(server.bodies) == 3


def test_one_failure_ends_the_call_and_cancels_the_others(server):
    def entry(body: dict):
        if body["messages"][0]["content"] == "bad":
            wait_until(lambda: server.slow == 2)
            return 400
        return "slow"

    server.script = [entry] * 3
    with pytest.raises(ValueError, match="request 1: expected an answer, got status 400"):
        ask(server, chat("x"), chat("bad"), chat("y"), max_concurrency=3)
    wait_until(lambda: server.cut_off == 2)


def test_nobody_is_there():
    with (
        RemoteGenerator(
            RemoteConfig("http://127.0.0.1:9/v1", "toy", max_retries=2, backoff=0.001)
        ) as generator,
        pytest.raises(OSError, match=r"127\.0\.0\.1:9/v1/chat/completions: .*ConnectError.* after 3 tries"),
    ):
        generator.answer([chat("q")])


@pytest.mark.parametrize("kind", ["seconds", "date", "nonsense", "past"])
def test_retry_after_is_honoured(server, kind, monkeypatch):
    """The generator waits at least what the server asks, and only then comes back."""
    told = {
        "seconds": "0.25",
        "date": formatdate(time.time() + 1, usegmt=True),
        "nonsense": "soon",
        "past": formatdate(0, usegmt=True),
    }[kind]
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    server.script = [(429, {"error": {"message": "busy"}}, {"retry-after": told})]
    assert texts(ask(server, chat("q"))) == [["q 0"]]
    if kind == "seconds":
        assert slept[0] >= 0.25
    elif kind in ("nonsense", "past"):
        assert slept[0] <= 0.001
    assert len(server.bodies) == 2


def test_backoff_doubles_with_full_jitter_up_to_its_cap(server):
    generator = RemoteGenerator(config(server, backoff=1.0, max_backoff=8.0))
    for attempt, most in enumerate((1, 2, 4, 8, 8, 8)):
        delays = [generator._delay(attempt, None) for _ in range(400)]
        assert 0 <= min(delays) < 0.1 * most and 0.9 * most < max(delays) <= most
    assert generator._delay(0, 5.0) >= 5.0


def test_pace():
    pace = Pace(120)  # one each half second, two at once at most
    assert [pace.take(100.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert pace.take(102.0) == 0
    assert pace.take(1000.0) == 0  # rest is not saved up
    assert [pace.take(1000.0) for _ in range(3)] == [0, 0, 0.5]
    pace.hold(1010.0)
    assert pace.take(1003.0) == 7.0
    tokens = Pace(6000)  # a hundred a second
    assert tokens.take(0.0, 500) == 0 and tokens.take(0.0, 1) == 4.0
    tokens.correct(-400)
    assert tokens.take(0.0, 1) == pytest.approx(0.01)
    free = Pace(0)
    assert [free.take(1.0, 1e9) for _ in range(3)] == [0, 0, 0]


def test_rates_are_asked_of_the_clock(server, monkeypatch):
    """What the bucket says is slept, by every request beyond the first second's."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    requests = [chat(str(i)) for i in range(200)]
    assert len(ask(server, *requests, requests_per_minute=60)) == 200
    assert len(waits) > 150 and max(waits) > 150  # s: a minute lets sixty through


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>not found</html>", "expected JSON, got '<html>not found</html>'; check the address"),
        (b'{"choices": [{"message"', "expected JSON, got"),
        (b"\xff\xfe", "expected JSON"),
        (b"null", "expected an OpenAI-compatible answer with 'choices', got None"),
        (b"[]", "expected an OpenAI-compatible answer with 'choices', got []"),
        (b"{}", "with 'choices', got {}; check the address"),
        (b'{"choices": []}', "expected at least one choice, got none"),
        (b'{"choices": [3]}', "expected choices that are objects, got 3"),
        (b'{"choices": [{"index": 0}]}', "with 'finish_reason'"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "with 'message'"),
        (b'{"choices": [{"finish_reason": "stop", "message": {"content": 3}}]}', "content to be text, got 3"),
        (
            b'{"choices": [{"finish_reason": "stop", "message": {"tool_calls": {}}}]}',
            "expected tool_calls to be a list",
        ),
        (
            b'{"choices": [{"finish_reason": "stop", "message": {"tool_calls": [{"function": {}}]}}]}',
            "with 'name'",
        ),
    ],
)
def test_what_is_no_answer(server, body, message):
    server.script = [body]
    with pytest.raises(ValueError) as error:
        ask(server, chat("q"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{server.url}/chat/completions: request 0: ")
    assert len(server.bodies) == 1


def test_a_server_that_gives_fewer_samples(server):
    """The rest is asked for, with seeds of its own; one that gives more is cut."""

    def few(body: dict) -> dict:
        return server.reply("/v1/chat/completions", body | {"n": 1})

    server.script = [few, few, lambda body: server.reply("/v1/chat/completions", body | {"n": 9})]
    assert texts(ask(server, chat("q", n=4, seed=7))) == [["q 0", "q 0", "q 0", "q 1"]]
    assert [(body["n"], body["seed"]) for body in server.bodies] == [(4, 7), (3, 8), (2, 9)]


def test_only_what_is_asked_for_is_sent(server):
    ask(server, chat("q"), Request(prompt="p"))
    sent = {"model": "toy", "temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "n": 1, "seed": 0}
    chatted, raw = sorted(server.bodies, key=lambda body: "prompt" in body)  # they are sent side by side
    assert chatted == sent | {"messages": [{"role": "user", "content": "q"}]}
    assert raw == sent | {"prompt": "p"}


def test_everything_that_can_be_asked_for(server):
    tools = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)
    asked = chat(
        "q",
        thinking=True,
        sampling=SamplingConfig(0.5, 7, 0.9, 33, 0.1, 1.2),
        seed=11,
        stop=("END", "\n\n"),
        stop_ids=(5,),
        top_logprobs=3,
        thinking_budget=20,
        json_schema={"type": "object"},
        tools=tools,
        tool_choice="required",
    )
    ask(server, asked, tokens=True)
    assert server.bodies == [
        {
            "model": "toy",
            "messages": [
                {"role": "system", "content": "detailed thinking on"},
                {"role": "user", "content": "q"},
            ],
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.9,
            "max_tokens": 33,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "n": 1,
            "seed": 11,
            "stop": ["END", "\n\n"],
            "stop_token_ids": [5],
            "logprobs": True,
            "top_logprobs": 3,
            "thinking_token_budget": 20,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
            },
            "tools": list(tools),
            "tool_choice": "required",
            "return_token_ids": True,
        }
    ]
    server.bodies.clear()
    ask(server, Request(prompt="p", json_schema={}, top_logprobs=2))
    assert (
        server.bodies[0]["response_format"] == {"type": "json_object"} and server.bodies[0]["logprobs"] == 2
    )


def test_it_works_inside_a_running_loop(server):
    async def inside() -> list:
        return ask(server, chat("q"))

    assert texts(asyncio.run(inside())) == [["q 0"]]


def test_the_model_is_found_where_there_is_one(server):
    with RemoteGenerator(config(server, model="")) as generator:
        assert generator.model() == "toy"
        generator.answer([chat("q"), chat("r")])
    assert {body["model"] for body in server.bodies} == {"toy"} and server.paths["/v1/models"] == 1
    server.models = ["one", "two"]
    with pytest.raises(ValueError, match="/models: expected one model, got one, two; say which with model"):
        ask(server, chat("q"), model="")


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    server.script = [401]
    with pytest.raises(ValueError) as error:
        ask(server, chat("q"), api_key_env="A_KEY")
    assert server.keys == [f"Bearer {KEY}"] and KEY not in str(error.value)
    assert KEY not in repr(config(server, api_key_env="A_KEY"))
    monkeypatch.delenv("A_KEY")
    with pytest.raises(ValueError, match=r"api_key_env: expected a key in \$A_KEY, got none"):
        ask(server, chat("q"), api_key_env="A_KEY")


def test_it_starts_anew_after_it_was_closed(server):
    generator = RemoteGenerator(config(server))
    for _ in range(2):
        assert texts(generator.answer([chat("q")])) == [["q 0"]]
        generator.close()
        generator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "remote"]


def test_closing_ends_what_other_threads_wait_for(server):
    server.script = ["slow"]
    generator = RemoteGenerator(config(server))
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            generator.answer([chat("q")])
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: server.slow == 1)
    generator.close()
    thread.join(30)
    assert "closed while requests were under way" in str(errors[0])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt="p", thinking=True), "request 0: thinking: expected messages with it"),
        (Request(prompt="p", tools=({},)), "request 0: tools: expected messages with it"),
        (Request(prompt="\ud800"), "request 0: expected Unicode text and JSON values"),
        (chat("q", json_schema={"a": {1, 2}}), "request 0: expected Unicode text and JSON values"),
    ],
)
def test_bad_requests(server, request_, message):
    with pytest.raises(ValueError, match=message):
        ask(server, request_)
    assert not server.bodies


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_url": "127.0.0.1:8000/v1"}, "base_url: expected an address such as"),
        ({"base_url": "ftp://127.0.0.1/v1"}, "base_url: expected an address such as"),
        ({"base_url": "http://me:pass@127.0.0.1/v1"}, "name a key with api_key_env"),
        ({"max_concurrency": 0}, "max_concurrency: expected 1 or more, got 0"),
        ({"timeout": 0.0}, "timeout: expected a positive number of seconds, got 0"),
        ({"max_retries": -1}, "max_retries: expected 0 or more, got -1"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute: expected 0 or more, got nan"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(ValueError, match=message) as error:
        RemoteGenerator(RemoteConfig(**({"base_url": "http://127.0.0.1:9/v1"} | values)))
    assert "pass@" not in str(error.value)
