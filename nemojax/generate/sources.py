"""Who answers a file of prompts: an artifact on this machine, or a server."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from nemojax.buckets import files_below, place, version
from nemojax.checkpoints.artifact import final_step
from nemojax.data.chat import check_length
from nemojax.generate.local import (
    LocalGenerator,
    Model,
    Reader,
    batch_config,
    encode_request,
    make_job,
    prepared,
)
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.model.llama import Compute

_HASHED_BYTES = 1 << 20  # larger files of an artifact count by name and size


class Asked(NamedTuple):
    """A row's request, under which name, and where it stands."""

    id: str | int
    request: Request
    where: str


class Source(Protocol):
    """`group`: prompts whose rows are written together. `indifferent`: fields of the configuration that its
    answers do not depend on. `quiet_seconds`: between two lines of progress."""

    group: int
    indifferent: tuple[str, ...]
    quiet_seconds: float

    def identity(self) -> dict[str, Any]:
        """What the answers depend on beside prompts and configuration."""
        ...

    def check(self, asked: Sequence[Asked]) -> None:
        """ValueError for a row that cannot be answered. Sees all rows, whatever is done of them."""
        ...

    def load(self) -> None:
        """All that may fail before something is written."""
        ...

    def answers(self, groups: Sequence[Sequence[Asked]]) -> Iterator[tuple[int, list[list[Answer]]]]:
        """(which group, the answers of each of its rows), as groups are done."""
        ...

    def close(self) -> None: ...


def is_address(artifact: str | Path) -> bool:
    """Whether a command's ARTIFACT is a server's address."""
    return str(artifact).startswith(("http://", "https://"))


class Artifact:
    """An engine for each group, so that a group's bits depend on nothing that ran before it."""

    indifferent: tuple[str, ...] = ("remote",)
    quiet_seconds = 0.0

    def __init__(
        self,
        path: str | Path,
        mesh: jax.sharding.Mesh,
        compute: Compute,
        group: int,
        max_batch: int,
        cache_dtype: Any,
    ):
        self.group = group
        self._path, self._mesh, self._compute = path, mesh, compute
        self._max_batch, self._cache_dtype = max_batch, cache_dtype
        self._reader = Reader.open(path)
        self._room = 0

    def identity(self) -> dict[str, Any]:
        return {"artifact": _digest(place(self._path))}

    def check(self, asked: Sequence[Asked]) -> None:
        context = self._reader.arch.context
        for one in asked:
            try:
                prompt = encode_request(self._reader, one.request)
                make_job(self._reader, one.request, prompt)
            except ValueError as error:
                raise ValueError(f"{one.where}: {error}") from error
            check_length(len(prompt), context - 1, one.where)
            self._room = max(self._room, len(prompt) + one.request.sampling.max_new_tokens)

    def load(self) -> None:
        self._model = prepared(Model.load(self._path, self._compute, self._mesh))

    def answers(self, groups: Sequence[Sequence[Asked]]) -> Iterator[tuple[int, list[list[Answer]]]]:
        for index, group in enumerate(groups):
            requests = [one.request for one in group]
            cfg = batch_config(self._model, sum(r.n for r in requests), self._room, self._max_batch)
            cfg = dataclasses.replace(cfg, cache_dtype=self._cache_dtype)
            yield index, LocalGenerator(self._model, cfg).answer(requests)

    def close(self) -> None:
        pass


class Server:
    """Any OpenAI-compatible server; each row is a group, and they are done in any order."""

    group = 1
    indifferent: tuple[str, ...] = ("remote", "chunk", "max_batch", "cache_dtype", "compute", "mesh")
    quiet_seconds = 2.0

    def __init__(self, cfg: RemoteConfig):
        self._generator = RemoteGenerator(cfg)

    def identity(self) -> dict[str, Any]:
        return {"model": self._generator.model()}

    def check(self, asked: Sequence[Asked]) -> None:
        """Only the server knows its context and its template."""

    def load(self) -> None:
        pass

    def answers(self, groups: Sequence[Sequence[Asked]]) -> Iterator[tuple[int, list[list[Answer]]]]:
        for index, answers in self._generator.stream([one.request for [one] in groups]):
            yield index, [answers]

    def close(self) -> None:
        self._generator.close()


def _digest(artifact: Path) -> str:
    """What an artifact holds, by content, so that it may be moved."""
    digest = hashlib.sha256()
    params = artifact / "checkpoints" / str(final_step(artifact)) / "params"
    files = [f for root in (artifact / "tokenizer", params) for f in files_below(root)]
    for path in sorted([artifact / "arch.json", *files]):
        size, _ = version(path)
        digest.update(f"{path.relative_to(artifact)} {size}\n".encode())
        digest.update(path.read_bytes() if size <= _HASHED_BYTES else b"")
    return digest.hexdigest()
