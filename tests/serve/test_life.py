"""How a server begins and ends: addresses, keys, signals."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time

import openai
import pytest

from nemojax import cli
from nemojax.serve.commands import bind, is_loopback, read_keys
from tests.serve.live import CHAT, PATIENCE, environment, make_artifact, serve_command, serving

LONG = {"model": "model", "messages": CHAT, "max_tokens": 900, "n": 4, "extra_body": {"ignore_eos": True}}
SLOW = ("--config.engine.slots=2", "--config.engine.decode_steps=1", "--config.limits.queue=2")


def refused(capsys, *flags: str) -> str:
    """The line with which the command declines."""
    assert cli.main(["serve", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("nemojax: ")
    return err


def test_only_this_machine_without_a_key(capsys, tmp_path, artifact):
    for host in ("0.0.0.0", "::", "192.0.2.1", ""):
        line = refused(capsys, str(artifact), f"--host={host}")
        assert "--api_key_file" in line and "--force" in line
    keys = tmp_path / "keys"
    keys.write_text("# nothing but this\n\n")
    assert "expected one key a line" in refused(
        capsys, str(artifact), "--host=0.0.0.0", f"--api_key_file={keys}"
    )
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4


def test_what_is_refused_before_anything_is_read(capsys, tmp_path, artifact):
    assert str(tmp_path) in refused(capsys, str(tmp_path / "nothing"), "--port=0")
    assert "65536" in refused(capsys, str(artifact), "--port=70000")
    assert "invalid int" in refused(capsys, str(artifact), "--port=http")
    assert "did you mean" in refused(capsys, str(artifact), "--port=0", "--config.limits.bodies=1")
    assert "limits.queue: expected 0 or more" in refused(capsys, str(artifact), "--config.limits.queue=-1")
    assert "limits.tokens (10)" in refused(capsys, str(artifact), "--config.limits.tokens=10")
    assert "reward_token" in refused(capsys, str(artifact), "--port=0", "--config.reward_token=300")
    assert "draft" in refused(capsys, str(artifact), "--port=0", f"--config.draft={artifact}")
    assert "missing" in refused(capsys, str(artifact), "--port=0", f"--api_key_file={tmp_path / 'missing'}")
    assert "unknown argument" in refused(capsys, str(artifact), "--prot=1")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert "in use; choose another" in refused(capsys, str(artifact), f"--port={port}")


def test_help(capsys):
    assert cli.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--api_key_file" in text and "limits.drain_seconds" in text and "engine.slots" in text


def test_keys_of_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n  second  \n")
    assert read_keys(path) == ["first", "second"]
    for text in (b"two words\n", b"schl\xc3\xbcssel\n", b"\xff\n"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="keys"):
            read_keys(path)


def test_a_key_opens_what_it_should(tmp_path, artifact, cache):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    with serving(artifact, cache, f"--api_key_file={keys}", "--host=0.0.0.0", *SLOW) as live:
        for path in ("/", "/health", "/openapi.json"):
            assert live.request(path)[0] == 200
        for header in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "first"},
            {"Authorization": "Basic first"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                status, body, headers = live.request(path, headers=header)
                assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
                assert body["error"]["code"] == "invalid_api_key"
        assert (
            live.request("/v1/chat/completions", b"{" * 10, headers={"Authorization": "Bearer \xe4"})[0]
            == 401
        )
        assert [card.id for card in live.client("second").models.list()] == ["model"]
        with pytest.raises(openai.AuthenticationError):
            live.client("third").models.list()
        counted = live.metrics({"Authorization": "Bearer first"})
        assert counted['requests_total{route="other",status="401"}'] >= 12


def test_the_page(server):
    status, text, headers = server.request("/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and "<title>" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish(artifact, cache, number):
    """A stream under way ends as it should; who comes meanwhile is sent away; the exit code is 0."""
    with serving(artifact, cache, *SLOW) as live:
        stream = live.client().chat.completions.create(**LONG, stream=True)
        first = next(stream)
        live.process.send_signal(number)
        deadline = time.monotonic() + PATIENCE
        while live.request("/health")[0] == 200:
            assert time.monotonic() < deadline
        with pytest.raises(openai.InternalServerError, match="shutting down") as error:
            live.client().chat.completions.create(**LONG)
        assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
        ends = [choice.finish_reason for chunk in (first, *stream) for choice in chunk.choices]
        assert ends.count("length") == 4
        assert live.process.wait(PATIENCE) == 0
        assert "Traceback" not in live.log.read_text()
        with pytest.raises(ConnectionError):
            live.connect()


def test_what_does_not_finish_in_time_is_cut_off(artifact, cache):
    """Sixteen long answers, two at a time: more than a machine gets done while this process has to wait."""
    flags = (*SLOW, "--config.limits.queue=14", "--config.limits.drain_seconds=0.05")
    with serving(artifact, cache, *flags) as live:
        stream = live.client().chat.completions.create(**LONG | {"n": 16}, stream=True)
        next(stream)
        assert live.terminate() == 0
        finished = set()
        with contextlib.suppress(openai.APIConnectionError):
            for chunk in stream:
                finished |= {choice.index for choice in chunk.choices if choice.finish_reason}
        assert len(finished) < 16 and "Traceback" not in live.log.read_text()


def test_a_second_signal_ends_it_at_once(artifact, cache):
    with serving(artifact, cache, *SLOW) as live:
        stream = live.client().chat.completions.create(**LONG, stream=True)
        next(stream)
        live.process.send_signal(signal.SIGTERM)
        while live.request("/health")[0] == 200:
            pass
        assert live.terminate() == 0
        assert "Traceback" not in live.log.read_text()


def test_idle_it_ends_and_rests(artifact, cache):
    """Without work it uses no processor, and SIGTERM ends it without delay."""
    with serving(artifact, cache, *SLOW) as live:
        live.client().chat.completions.create(**LONG | {"max_tokens": 4, "n": 1})

        def seconds() -> float:
            fields = open(f"/proc/{live.process.pid}/stat").read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = seconds()
        time.sleep(1.0)
        assert seconds() - before < 0.5
        assert live.terminate() == 0


def test_a_full_queue_is_said_so(artifact, cache):
    with serving(artifact, cache, *SLOW) as live:
        stream = live.client().chat.completions.create(**LONG, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as error:
            live.client().chat.completions.create(**LONG)
        assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
        stream.close()
        live.wait_until(sequences_running=0, sequences_waiting=0)
        assert (
            live.client().chat.completions.create(**LONG | {"max_tokens": 2, "n": 1}).usage.completion_tokens
            == 2
        )


def test_a_warm_server_with_a_draft(tmp_path, artifact, cache):
    """Programs are compiled before the address is told; a draft model proposes, the answers are the same."""
    draft = make_artifact(tmp_path / "draft")
    flags = ("--config.warm=True", "--config.engine.speculation.kind=draft", f"--config.draft={draft}", *SLOW)
    ask = {**LONG, "max_tokens": 12, "n": 1, "temperature": 0}
    with serving(artifact, cache, *flags) as fast, serving(artifact, cache, *SLOW) as plain:
        assert fast.metrics()["generated_tokens_total"] > 0 == plain.metrics()["generated_tokens_total"]
        first, second = (live.client().chat.completions.create(**ask) for live in (fast, plain))
        assert first.choices[0].message.content == second.choices[0].message.content


def test_ipv6(artifact, cache):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    command = serve_command(artifact, "--host=::1", "--port=0", "--config.warm=False")
    process = subprocess.Popen(command, env=environment(cache), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and "http://[::1]:" in process.stdout.readline()
    finally:
        process.kill()
        process.wait()


def test_several_clients_share_a_batch(server):
    """Together they hold several slots at a time."""
    most = 0
    body = {"model": "tiny/model", "messages": CHAT, "max_tokens": 400, "ignore_eos": True}
    threads = [
        threading.Thread(
            target=server.request, args=("/v1/chat/completions", json.dumps(body | {"seed": i}).encode())
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, server.metrics()["sequences_running"])
    assert most > 1
