"""An export served by `transformers serve`, a real process asked over HTTP: it writes what we write."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemojax import cli
from nemojax.arch import Attention, BlockSpec, SwiGLU
from nemojax.checkpoints.artifact import save_params
from nemojax.data.tokenizer import train_tokenizer
from tests.checkpoints.toy_models import MIXED, random_params

NEW = 24  # tokens of an answer
CHATS = [
    [{"role": "user", "content": "one and"}],
    [{"role": "system", "content": "detailed thinking off"}, {"role": "user", "content": "two and two"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "make three"},
    ],
]
# layers that are equal and what is exported as plain Llama; layers that differ, which is DeciLM
LAYERS = {"llama": (BlockSpec(Attention(2), SwiGLU(256)),) * 3, "decilm": MIXED.blocks}


@pytest.fixture(scope="module", params=LAYERS)
def exported(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(format, artifact, export) of a tiny model with a real tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(["one and two make three " * 20], 280, folder / "tokenizer")
    arch = MIXED.replace(blocks=LAYERS[request.param], vocab_size=tokenizer.vocab_size)
    save_params(folder / "model", arch, random_params(arch, seed=1), tokenizer_dir=folder / "tokenizer")
    assert cli.main(["export", str(folder / "model"), str(folder / "export")]) == 0
    return request.param, folder / "model", folder / "export"


@contextmanager
def transformers_serve(export: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The address of `transformers serve` on a directory, offline, on CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(export), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not is_up(address):
            said = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"transformers serve ended with {process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"transformers serve does not answer:\n{said}"
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(address: str, model: Path, messages: list[dict], **fields) -> bytes:
    body = {"model": str(model), "messages": messages, "temperature": 0, "max_tokens": NEW, **fields}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read()


def our_answers(artifact: Path, folder: Path) -> list[dict]:
    """What `nemojax generate` writes, greedily."""
    prompts, out = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    command = ["generate", str(artifact), f"--prompts={prompts}", f"--out={out}"]
    assert cli.main([*command, "--temperature=0", f"--max_new_tokens={NEW}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_transformers_serve_writes_what_we_write(exported, tmp_path):
    if not importlib.util.find_spec("accelerate"):
        pytest.skip("transformers[serving] is not installed: it wants accelerate")
    kind, artifact, export = exported
    ours = our_answers(artifact, tmp_path)
    assert len({row["text"] for row in ours}) == len(CHATS)  # the prompts matter
    flags = ["--trust-remote-code"] if kind == "decilm" else []
    with transformers_serve(export, tmp_path, *flags) as address:
        for chat, row in zip(CHATS, ours, strict=True):
            answer = json.loads(ask(address, export, chat))
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == row["text"]
            assert choice["finish_reason"] == row["finish_reason"]
            assert answer["usage"]["prompt_tokens"] == row["prompt_tokens"]
            assert answer["usage"]["completion_tokens"] == row["num_tokens"]
            # a stream leaves out bytes at its end that are not a character yet
            streamed = stream_text(ask(address, export, chat, stream=True))
            assert streamed and row["text"].startswith(streamed)
            assert not row["text"][len(streamed) :].strip("\N{REPLACEMENT CHARACTER}")


def stream_text(body: bytes) -> str:
    """The content of a whole stream of events."""
    chunks = [json.loads(line[5:]) for line in body.decode().splitlines() if line.startswith("data:")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
