"""Completions of prompts with an artifact: a few in memory (`answer`), or a file of them, resumably (`run`).

A file is worked through in chunks of prompts. The boundaries depend on nothing but the rows' order, and a
chunk has a key of its own; it is written whole, and what a kill left of one is cut off and made again. So
the output does not show where a run was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from nemojax.arch import ArchSpec, load_arch
from nemojax.checkpoints.artifact import final_step, load_model
from nemojax.config import field, from_dict, to_dict
from nemojax.data.chat import check_length, conversation_from_row, encode_prompt, split_thinking
from nemojax.data.sources import read_jsonl_rows
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.generate.engine import generate
from nemojax.generate.sampling import SamplingConfig
from nemojax.log import TOKENS_PER_SECOND, describe_progress
from nemojax.model.llama import Compute, Params
from nemojax.sharding import MeshConfig, make_mesh

FORMAT_VERSION = 1
SIDECAR = ".config.json"  # beside the output: what it was made of
_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingConfig))
_ROW_FIELDS = ("id", "prompt", "messages", "thinking", *_SAMPLING_FIELDS)
_HASHED_BYTES = 1 << 20  # larger files of an artifact count by name and size

Row = dict[str, Any]


@dataclass(frozen=True)
class GenerateConfig:
    """How to complete prompts; a row of a prompts file may have its own `thinking` and sampling fields."""

    sampling: SamplingConfig = field(SamplingConfig(), "how tokens are drawn")
    thinking: Literal["on", "off"] | None = field(
        None, "on or off puts the toggle into a chat's system text; none leaves the text alone"
    )
    n: int = field(1, "samples of each prompt")
    seed: int = field(0, "seed of the sampler")
    logprobs: bool = field(False, "write each sample's token ids and their log-probabilities (nats)")
    chunk: int = field(128, "prompts written together, and at most lost by a kill")
    max_batch: int = field(64, "sequences generated together")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")

    def __post_init__(self):
        for name in ("n", "chunk", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number in [0, 2**32), got {self.seed}")


class Request(NamedTuple):
    """A prompt's ids, and how to go on from them."""

    id: str | int
    tokens: list[int]
    sampling: SamplingConfig


class Reader(NamedTuple):
    """What makes requests of rows: small files of an artifact, read without its weights."""

    arch: ArchSpec
    tokenizer: Tokenizer


class Model(NamedTuple):
    """An artifact on its devices."""

    arch: ArchSpec
    tokenizer: Tokenizer
    params: Params
    mesh: jax.sharding.Mesh


def answer(artifact: str | Path, rows: Sequence[Row], cfg: GenerateConfig = GenerateConfig()) -> list[Row]:
    """Output rows (see `run`) of prompt rows, n for each, in order. ValueError names a bad row by number."""
    reader = _open_reader(artifact)
    numbered = [(f"prompt {number}", number, row) for number, row in enumerate(rows, 1)]
    requests = [make_request(reader, row, number, where, cfg) for where, number, row in numbered]
    return _complete(_load(artifact, reader, make_mesh(cfg.mesh)), requests, cfg, 0, _capacity(requests))


def run(
    artifact: str | Path,
    prompts: str | Path,
    out: str | Path,
    cfg: GenerateConfig = GenerateConfig(),
    quiet: bool = False,
) -> dict[str, int]:
    """Completes the rows of a JSONL file into another; the same call again goes on where the last one ended.

    Rows: {"prompt": text} (continued after BOS) or {"messages": [...]} (through the chat template), with
    "id" (default: the line's number), "thinking" (true or false) and fields of `SamplingConfig` as they
    please. Output rows, n for each: "id", "sample", "text" and its split into "reasoning" (null without
    think tags) and "answer", "finish_reason" ("stop" or "length"), "num_tokens" (those new), "prompt_tokens"
    and with `logprobs` also "tokens" and "logprobs". `OUT.config.json` says what the output was made of.
    A sample's randomness depends on seed, n, chunk, its row's place and its own index alone.

    Returns {"prompts", "rows", "rows_before" (found in place), "tokens" (made now)}. ValueError, before
    anything is written, for bad rows (file and line), prompts that fill the context, an artifact that lacks
    something, and an `out` that something else made or is making.
    """
    prompts, out = Path(prompts), Path(out)
    reader = _open_reader(artifact)
    _check_paths(prompts, out)
    requests = load_requests(reader, prompts, cfg)
    chunks = [requests[i : i + cfg.chunk] for i in range(0, len(requests), cfg.chunk)]
    record, mesh = _record(artifact, prompts, cfg), make_mesh(cfg.mesh)
    _check_owner(out, record)
    done, size = _whole_chunks(out, chunks, cfg.n)
    tokens = 0
    if done < len(chunks) or size < out.stat().st_size:
        model = _load(artifact, reader, mesh)  # before anything is written, for it may be damaged
        out.parent.mkdir(parents=True, exist_ok=True)
        with _opened(out, record) as file:
            done, size = _whole_chunks(out, chunks, cfg.n)  # nobody else can add to it now
            file.truncate(size)
            with _Progress(len(requests), min(done * cfg.chunk, len(requests)), quiet) as progress:
                for index, chunk in enumerate(chunks[done:], done):
                    rows = _complete(model, chunk, cfg, index, _capacity(requests))
                    _append(file, rows)
                    new = sum(row["num_tokens"] for row in rows)
                    tokens += new
                    progress.advance(len(chunk), new)
    before = sum(len(chunk) for chunk in chunks[:done]) * cfg.n
    return {
        "prompts": len(requests),
        "rows": len(requests) * cfg.n,
        "rows_before": before,
        "tokens": tokens,
    }


def load_requests(reader: Reader, path: Path, cfg: GenerateConfig) -> list[Request]:
    """The requests of a prompts file. ValueError with file and line for a bad row, or an id that is taken."""
    requests: list[Request] = []
    seen: dict[str | int, str] = {}
    for where, row in read_jsonl_rows(path):
        request = make_request(reader, row, int(where.rpartition(":")[2]), where, cfg)
        if request.id in seen:
            raise ValueError(f"{where}: expected an id of its own, got {request.id!r} of {seen[request.id]}")
        seen[request.id] = where
        requests.append(request)
    if not requests:
        raise ValueError(f"{path}: expected prompts, got none; give it a row such as {{'prompt': 'Once'}}")
    return requests


def make_request(reader: Reader, row: Row, number: int, where: str, cfg: GenerateConfig) -> Request:
    """The request of a row (see `run`); ValueError, `where` in front, for one that cannot be completed."""
    _check_row(row, where)
    own = {name: row[name] for name in _SAMPLING_FIELDS if name in row}
    sampling = from_dict(SamplingConfig, to_dict(cfg.sampling) | own, f"{where}: ")
    if "prompt" in row:
        tokens = [reader.tokenizer.bos_id, *reader.tokenizer.encode(row["prompt"])]
    else:
        thinking = {"on": True, "off": False, None: None}[cfg.thinking]
        chat = conversation_from_row(row, where)
        if chat.messages[-1]["role"] == "assistant":
            raise ValueError(
                f"{where}: expected messages that end before the assistant's; leave its turn out"
            )
        try:
            toggle = thinking if chat.thinking is None else chat.thinking
            tokens = encode_prompt(reader.tokenizer, chat.messages, toggle)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    check_length(len(tokens), reader.arch.context - 1, where)
    return Request(row.get("id", number), tokens, sampling)


def _check_row(row: Row, where: str) -> None:
    for key in row:
        if key not in _ROW_FIELDS:
            near = difflib.get_close_matches(key, _ROW_FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known ones are {', '.join(_ROW_FIELDS)}"
            raise ValueError(f"{where}: {key}: unknown field; {hint}")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{where}: expected either prompt or messages, got {', '.join(row) or 'nothing'}")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise ValueError(f"{where}: prompt: expected text, got {row['prompt']!r:.80}")
    if "prompt" in row and "thinking" in row:
        raise ValueError(
            f"{where}: expected thinking with messages, got it with prompt; the toggle is a chat's"
        )
    if isinstance(row.get("id", 0), bool) or not isinstance(row.get("id", 0), str | int):
        raise ValueError(f"{where}: id: expected text or a whole number, got {row['id']!r:.80}")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # a lone surrogate, NaN or Infinity: JSON in Python's eyes alone
        raise ValueError(f"{where}: expected Unicode text and finite numbers ({error}); repair it") from error


def _open_reader(artifact: str | Path) -> Reader:
    final_step(artifact)  # says what is wrong with a path where no artifact is
    arch, tokenizer = load_arch(Path(artifact) / "arch.json"), load_tokenizer(artifact)
    check_vocab(tokenizer, arch)
    return Reader(arch, tokenizer)


def _load(artifact: str | Path, reader: Reader, mesh: jax.sharding.Mesh) -> Model:
    arch, params = load_model(artifact, mesh)
    return Model(arch, reader.tokenizer, params, mesh)


def _capacity(requests: Sequence[Request]) -> int:
    """Room for the longest completion of all chunks, so that they share their programs."""
    return max((request.sampling.max_new_tokens for request in requests), default=0)


def _complete(
    model: Model, requests: Sequence[Request], cfg: GenerateConfig, chunk: int, capacity: int
) -> list[Row]:
    """The output rows of one chunk. Samples of a prompt follow each other: the prompt is read once."""
    samples = [(request, sample) for request in requests for sample in range(cfg.n)]
    completions = generate(
        model.params,
        model.arch,
        [request.tokens for request, _ in samples],
        jax.random.fold_in(jax.random.key(cfg.seed), chunk),
        [request.sampling for request, _ in samples],
        model.tokenizer.eos_ids,
        max_batch=cfg.max_batch,
        compute=cfg.compute,
        mesh=model.mesh,
        new_capacity=capacity,
    )
    rows = []
    for (request, sample), completion in zip(samples, completions, strict=True):
        text = model.tokenizer.decode(completion.tokens)
        reasoning, content = split_thinking(text)
        row: Row = {"id": request.id, "sample": sample, "text": text, "reasoning": reasoning}
        row |= {"answer": content, "finish_reason": "stop" if completion.finished else "length"}
        row |= {"num_tokens": len(completion.tokens), "prompt_tokens": len(request.tokens)}
        if cfg.logprobs:
            row |= {"tokens": completion.tokens, "logprobs": completion.logprobs}
        rows.append(row)
    return rows


# The output file: who made it, how far it is, and one chunk more.


def _check_paths(prompts: Path, out: Path) -> None:
    if not prompts.is_file():
        raise ValueError(f"{prompts}: expected a JSONL file of prompts, got no such file; check the path")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out}: expected a file to write, got something else; choose another --out")
    sidecar = _sidecar(out)
    if prompts.resolve() in (out.resolve(), sidecar.resolve()) or out.exists() and out.samefile(prompts):
        raise ValueError(f"{out}: expected another file than the prompts, got the same; choose another --out")


def _sidecar(out: Path) -> Path:
    return out.with_name(out.name + SIDECAR)


def _record(artifact: str | Path, prompts: Path, cfg: GenerateConfig) -> dict[str, Any]:
    """What an output depends on; artifact and prompts by content, so that they may be moved."""
    return {
        "format_version": FORMAT_VERSION,
        "artifact": _artifact_digest(Path(artifact)),
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "config": to_dict(cfg),
    }


def _artifact_digest(artifact: Path) -> str:
    digest = hashlib.sha256()
    params = artifact / "checkpoints" / str(final_step(artifact)) / "params"
    files = [f for root in (artifact / "tokenizer", params) for f in root.rglob("*") if f.is_file()]
    for path in sorted([artifact / "arch.json", *files]):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(artifact)} {size}\n".encode())
        digest.update(path.read_bytes() if size <= _HASHED_BYTES else b"")
    return digest.hexdigest()


def _check_owner(out: Path, record: Mapping[str, Any]) -> None:
    """ValueError unless `out` is free, empty, or of this very record."""
    if not out.is_file() or not out.stat().st_size:
        return
    sidecar = _sidecar(out)
    if not sidecar.is_file():
        raise ValueError(
            f"{out}: expected {sidecar.name} beside it, got none: not ours; choose another --out"
        )
    try:
        stored = json.loads(sidecar.read_text())
    except ValueError as error:
        raise ValueError(f"{sidecar}: expected JSON, got something else; choose another --out") from error
    there, here = _flat(stored), _flat(record)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if differing:
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ValueError(
            f"{out}: the output of another run, which differs in {', '.join(differing[:6])}{more}; choose "
            "another --out"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}."""
    if not isinstance(value, Mapping):
        return {prefix or "it": value}
    children = [_flat(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in value.items()]
    return {key: leaf for child in children for key, leaf in child.items()}


@contextlib.contextmanager
def _opened(out: Path, record: Mapping[str, Any]) -> Iterator[FileIO]:
    """The output, held for this process (the system lets go of it however the process ends)."""
    with out.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another process writes it; wait or choose another --out") from None
        _check_owner(out, record)  # now that nobody else can change it
        sidecar = _sidecar(out)
        if not out.stat().st_size:
            partial = sidecar.with_name(f"{sidecar.name}.partial")
            try:
                partial.write_text(json.dumps(record, indent=2) + "\n")
                partial.replace(sidecar)
            finally:
                partial.unlink(missing_ok=True)
        yield file


def _whole_chunks(out: Path, chunks: Sequence[Sequence[Request]], n: int) -> tuple[int, int]:
    """(how many chunks are there whole, the bytes that they take); ValueError for a row of another place."""
    lines = out.read_bytes().splitlines(keepends=True) if out.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    wanted = [(request.id, sample) for chunk in chunks for request in chunk for sample in range(n)]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found = (row["id"], row["sample"])
        except (ValueError, KeyError, TypeError):
            found = None
        if number > len(wanted) or found != wanted[number - 1]:
            raise ValueError(f"{out}:{number}: not the row that belongs there; delete the file to start anew")
    done, end = 0, 0
    while done < len(chunks) and end + len(chunks[done]) * n <= len(lines):
        end += len(chunks[done]) * n
        done += 1
    return done, sum(map(len, lines[:end]))


def _append(file: FileIO, rows: Sequence[Row]) -> None:
    data = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


class _Progress:
    """Prompts done, tokens/s and time left on standard error: on a terminal one line that is redrawn."""

    def __init__(self, total: int, done: int, quiet: bool):
        self._total, self._done, self._quiet = total, done, quiet
        self._tokens, self._start = 0, time.monotonic()
        self._first: tuple[int, float] | None = None
        self._status: Any = None

    def __enter__(self) -> _Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(f"generate {self._done}/{self._total}")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def advance(self, prompts: int, tokens: int) -> None:
        now = time.monotonic()
        self._done, self._tokens = self._done + prompts, self._tokens + tokens
        left = None
        if self._first is None:  # the first chunk has waited for the compiler
            self._first = (self._done, now)
        else:
            done, start = self._first
            left = (now - start) / (self._done - done) * (self._total - self._done)
        speed = {TOKENS_PER_SECOND: self._tokens / (now - self._start)}
        text = describe_progress("generate", self._done, self._total, speed, left)
        if self._status is not None:
            self._status.update(text)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)
