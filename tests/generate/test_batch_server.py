"""Files of prompts that a server answers: what is asked again and what is not."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from nemojax.generate import batch, output
from nemojax.generate.batch import GenerateConfig
from nemojax.generate.output import sidecar
from nemojax.generate.remote import RemoteConfig
from tests.generate.asking import command, read, write
from tests.generate.unreliable import wait_until

REMOTE = GenerateConfig(n=2, remote=RemoteConfig(max_concurrency=3, backoff=0.001, timeout=60.0))
ASKED = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"q{i}"}]} for i in range(12)]


def said(rows) -> list[tuple]:
    return [(row["id"], row["sample"], row["text"], row["finish_reason"]) for row in rows]


WANTED = [(f"r{i}", sample, f"q{i} {sample}", "stop") for i in range(12) for sample in (0, 1)]


def test_a_server_answers_a_file(server, tmp_path, capsys):
    """The same rows in the same order, whatever fails in between."""
    server.script = [None, 503, "drop", None, 429, None, 500]
    prompts, out = write(tmp_path / "prompts.jsonl", ASKED), tmp_path / "out.jsonl"
    flags = ["--n=2", "--model=toy", "--config.remote.backoff=0.001", "--temperature=0.5", "--thinking=off"]
    code, line, progress = command(capsys, server.url, f"--prompts={prompts}", f"--out={out}", *flags)
    assert code == 0 and line.startswith(f"generate: {out} prompts=12 rows=24 rows_before=0 tokens=96")
    assert said(read(out)) == WANTED and "generate 12/12" in progress
    assert {body["temperature"] for body in server.bodies} == {0.5}
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "detailed thinking off"}
    assert len({body["seed"] for body in server.bodies}) == 12
    assert {path.name for path in tmp_path.iterdir()} == {prompts.name, out.name, sidecar(out).name}
    asked = len(server.bodies)
    assert command(capsys, server.url, f"--prompts={prompts}", f"--out={out}", *flags)[0] == 0
    assert len(server.bodies) == asked
    code, _, line = command(capsys, server.url, f"--prompts={prompts}", f"--out={out}", *flags, "--seed=1")
    assert code == 2 and "the output of another run, which differs in config.seed" in line


def test_a_server_answers_a_prompt(server, capsys):
    code, line, _ = command(capsys, server.url, "--prompt=hello", "--n=2", "--stop=END", "--json_schema={}")
    assert (code, line) == (0, "[1/2] hello 0\n[2/2] hello 1\n")
    assert server.bodies[0]["stop"] == ["END"] and server.bodies[0]["model"] == "toy"
    assert server.bodies[0]["response_format"] == {"type": "json_object"}


def test_what_a_server_has_answered_is_not_asked_again(server, tmp_path):
    """A row that fails for good ends the run; those that came before their turn are kept for the next."""
    prompts, out = write(tmp_path / "prompts.jsonl", ASKED), tmp_path / "out.jsonl"

    def entry(body: dict):
        if body["messages"][0]["content"] != "q3":
            return None
        wait_until(lambda: len(server.bodies) >= 9)  # by then some behind it are done
        return 400

    server.script = [entry] * 12
    with pytest.raises(ValueError, match="status 400"):
        batch.run(server.url, prompts, out, REMOTE, quiet=True)
    kept = {entry["group"] for entry in read(output.ahead(out))} - {0, 1, 2}
    assert said(read(out)) == WANTED[:6] and len(kept) >= 4 and 3 not in kept
    server.script = []
    wait_until(lambda: server.now == 0)
    server.bodies.clear()
    counts = batch.run(server.url, prompts, out, REMOTE, quiet=True)
    assert said(read(out)) == WANTED and counts["rows_before"] == 6
    again = {int(body["messages"][0]["content"].removeprefix("q")) for body in server.bodies}
    assert again >= set(range(3, 12)) - kept and not again & kept
    assert not output.ahead(out).exists()


@pytest.mark.parametrize(
    "cut", [b"", b'{"group": 5, "rows": [{"id": "r5", "sam', b'{"group": 5, "rows": []}\n[1]\n']
)
def test_a_damaged_line_ahead_is_asked_again(server, tmp_path, cut):
    prompts, out = write(tmp_path / "prompts.jsonl", ASKED), tmp_path / "out.jsonl"
    batch.run(server.url, prompts, out, REMOTE, quiet=True)
    whole = out.read_bytes()
    rows = read(out)
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))  # half of the third prompt
    line = json.dumps({"group": 7, "rows": rows[14:16]}).encode() + b"\n"
    output.ahead(out).write_bytes(line + cut)
    server.bodies.clear()
    batch.run(server.url, prompts, out, REMOTE, quiet=True)
    assert out.read_bytes() == whole
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == sorted(
        f"q{i}" for i in range(2, 12) if i != 7
    )


def test_answers_ahead_of_another_run_are_not_taken(server, tmp_path):
    prompts, out = write(tmp_path / "prompts.jsonl", ASKED), tmp_path / "out.jsonl"
    batch.run(server.url, prompts, out, REMOTE, quiet=True)
    rows = read(out)
    out.unlink()
    output.ahead(out).write_text(json.dumps({"group": 7, "rows": rows[14:16]}) + "\n")
    server.bodies.clear()
    batch.run(server.url, prompts, out, dataclasses.replace(REMOTE, seed=9), quiet=True)
    assert len(server.bodies) == 12


def test_a_killed_run_against_a_server_loses_what_was_in_flight(server, tmp_path):
    """SIGKILL while one answer is slow: all others are there the next time."""
    prompts, out = write(tmp_path / "prompts.jsonl", ASKED), tmp_path / "out.jsonl"
    server.script = [lambda body: "slow" if body["messages"][0]["content"] == "q1" else None] * 12
    flags = ["--n=2", "--config.remote.max_concurrency=3"]
    args = [server.url, f"--prompts={prompts}", f"--out={out}", *flags]
    process = subprocess.Popen([sys.executable, "-m", "nemojax.cli", "generate", *args])
    wait_until(lambda: output.ahead(out).exists() and output.ahead(out).read_bytes().count(b"\n") == 10)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert said(read(out)) == WANTED[:2]
    server.release.set()
    server.bodies.clear()
    batch.run(server.url, prompts, out, GenerateConfig(n=2), quiet=True)
    assert said(read(out)) == WANTED
    assert [body["messages"][0]["content"] for body in server.bodies] == ["q1"]


def test_logprobs_of_a_server(server, tmp_path):
    """Ids and log-probabilities are asked for, and null where the server does not tell."""
    prompts, out = write(tmp_path / "prompts.jsonl", ASKED[:1]), tmp_path / "out.jsonl"
    batch.run(server.url, prompts, out, dataclasses.replace(REMOTE, logprobs=True), quiet=True)
    assert [(row["tokens"], row["logprobs"]) for row in read(out)] == [(None, None)] * 2
    assert server.bodies[0]["logprobs"] is True and server.bodies[0]["return_token_ids"] is True


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["http://127.0.0.1:9/v1", "--prompt=x", "--config.remote.max_retries=0"], "ConnectError"),
        (
            ["{url}", "--prompt=x", "--model=other", "--config.remote.api_key_env=UNSET_KEY"],
            "$UNSET_KEY, got none",
        ),
        (["{tmp}", "--prompt=x", "--model=other"], "--model goes with a server's address"),
        (["{url}", "--prompt=x", "--json_schema={tmp}/none.json"], "No such file"),
        (
            ["{url}", "--prompt=x", "--json_schema={{"],
            "--json_schema: expected a JSON schema, got something else",
        ),
        (["{url}", "--prompt=x", "--top_logprobs=2"], "--top_logprobs goes with --prompts"),
    ],
)
def test_bad_arguments_with_a_server(server, tmp_path, capsys, args, message):
    args = [arg.format(url=server.url, tmp=tmp_path) for arg in args]
    code, line, error = command(capsys, *args)
    assert (code, line) == (2, "") and message in error and error.count("\n") == 1


def test_a_server_is_asked_without_a_device(server, tmp_path):
    """Which the server may hold on this machine."""
    prompts = write(tmp_path / "prompts.jsonl", ASKED[:1])
    program = """
import sys
from jax._src import xla_bridge
from nemojax.cli import main

assert main(sys.argv[1:]) == 0 and not xla_bridge._backends
"""
    args = ["generate", server.url, f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}"]
    assert subprocess.run([sys.executable, "-c", program, *args], timeout=120).returncode == 0
