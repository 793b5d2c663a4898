"""How tests ask the server, or the command for files of prompts."""

import json
from pathlib import Path

from nemojax import cli
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from tests.generate.unreliable import Server


def config(server: Server, **values) -> RemoteConfig:
    return RemoteConfig(server.url, **({"model": "toy", "backoff": 0.001, "timeout": 30.0} | values))


def chat(text: str, **values) -> Request:
    return Request(messages=({"role": "user", "content": text},), **values)


def texts(answers: list[list[Answer]]) -> list[list[str]]:
    return [[answer.text for answer in row] for row in answers]


def ask(server: Server, *requests: Request, **values) -> list[list[Answer]]:
    with RemoteGenerator(config(server, **values)) as generator:
        return generator.answer(requests)


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def command(capsys, *args: object) -> tuple[int, str, str]:
    code = cli.main(["generate", *map(str, args)])
    return code, *capsys.readouterr()
