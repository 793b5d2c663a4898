"""Completions of prompts with an artifact or a server: a few in memory (`answer`), or a file of them,
resumably (`run`).

With an artifact a file is worked through in chunks of prompts. The boundaries depend on nothing but the
rows' order, each chunk has an engine of its own, and it is written whole. So the output shows neither where
a run was interrupted nor how many processes shared the chunks. A server's answers come in any order: each row
is written as soon as all before it are, and those that came before their turn are kept beside the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import jax

from nemojax import buckets, hosts
from nemojax.config import field, from_dict, to_dict
from nemojax.data.chat import conversation_from_row
from nemojax.data.sources import read_jsonl_rows
from nemojax.generate import output
from nemojax.generate.jobs import MAX_TOP_LOGPROBS
from nemojax.generate.output import Row
from nemojax.generate.protocol import Answer, Request
from nemojax.generate.remote import RemoteConfig
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.sources import Artifact, Asked, Server, Source, is_address
from nemojax.model.llama import Compute
from nemojax.sharding import MeshConfig, make_mesh

FORMAT_VERSION = 2
_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingConfig))


@dataclass(frozen=True)
class AnswerConfig:
    """What ends an answer and what form it has; a row may have fields of its own."""

    stop: tuple[str, ...] = field((), "texts that end an answer and are not part of it")
    thinking_budget: int | None = field(None, "tokens of reasoning at most; then it is closed")
    json_schema: dict[str, Any] | None = field(None, "JSON schema that answers obey; {} for any object")
    top_logprobs: int = field(0, "likeliest tokens written with each token, at most 20")

    def __post_init__(self):
        if not all(self.stop):
            raise ValueError("stop: expected texts that are not empty")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget: expected 0 or more, got {self.thinking_budget}")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {self.top_logprobs}")


_ANSWER_FIELDS = tuple(f.name for f in dataclasses.fields(AnswerConfig))
_ROW_FIELDS = (
    *("id", "prompt", "messages", "thinking", "seed", "tools", "tool_choice"),
    *(*_SAMPLING_FIELDS, *_ANSWER_FIELDS),
)


@dataclass(frozen=True)
class GenerateConfig:
    """How to complete prompts; a row of a prompts file may have its own `thinking`, `seed`, sampling and
    answer fields."""

    sampling: SamplingConfig = field(SamplingConfig(), "how tokens are drawn")
    answer: AnswerConfig = field(AnswerConfig(), "what ends and forms an answer")
    thinking: Literal["on", "off"] | None = field(
        None, "on or off puts the toggle into a chat's system text; none leaves the text alone"
    )
    n: int = field(1, "samples of each prompt")
    seed: int = field(0, "seed of the sampler")
    logprobs: bool = field(False, "write each sample's token ids and their log-probabilities (nats)")
    chunk: int = field(128, "prompts written together, and at most lost by a kill of each process")
    max_batch: int = field(64, "sequences generated together")
    cache_dtype: Literal["compute", "bfloat16", "float8_e4m3fn", "int8"] = field(
        "compute", "numbers of the KV cache"
    )
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    remote: RemoteConfig = field(RemoteConfig(), "how to ask a server, where the artifact is an address")

    def __post_init__(self):
        for name in ("n", "chunk", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number in [0, 2**32), got {self.seed}")


def _open(artifact: str | Path, cfg: GenerateConfig) -> Source:
    if is_address(artifact):
        tokens = cfg.remote.tokens or cfg.logprobs
        return Server(dataclasses.replace(cfg.remote, base_url=str(artifact), tokens=tokens))
    return Artifact(artifact, make_mesh(cfg.mesh), cfg.compute, cfg.chunk, cfg.max_batch, cfg.cache_dtype)


def answer(artifact: str | Path, rows: Sequence[Row], cfg: GenerateConfig = GenerateConfig()) -> list[Row]:
    """Output rows (see `run`) of prompt rows, n for each, in order. ValueError names a bad row by number.

    `artifact`: an artifact, or the address of an OpenAI-compatible server.
    """
    with contextlib.closing(_open(artifact, cfg)) as source:
        asked = [make_request(row, i, i + 1, f"prompt {i + 1}", cfg) for i, row in enumerate(rows)]
        source.check(asked)
        source.load()
        groups = _groups(asked, source.group)
        found = dict(source.answers(groups))
    made = [answers for group in range(len(groups)) for answers in found[group]]
    return [row for one, answers in zip(asked, made, strict=True) for row in _rows(one, answers, cfg)]


def run(
    artifact: str | Path,
    prompts: str | Path,
    out: str | Path,
    cfg: GenerateConfig = GenerateConfig(),
    quiet: bool = False,
) -> dict[str, int]:
    """Completes the rows of a JSONL file into another; the same call again goes on where the last one ended.

    `artifact`: an artifact, or the address of an OpenAI-compatible server. Rows: {"prompt": text} (continued
    after BOS) or {"messages": [...]} (through the chat template), with "id" (default: the line's number),
    "thinking" (true or false), "seed", "tools", "tool_choice" and fields of `SamplingConfig` and
    `AnswerConfig` as they please. Output rows, n for each: "id", "sample", "text" and its split into
    "reasoning" (null without think tags) and "answer", "finish_reason" ("stop", "length" or "tool_calls"),
    "num_tokens" (those new), "prompt_tokens", with `tools` "tool_calls", with `logprobs` "tokens" and
    "logprobs" (null where a server does not tell), with `top_logprobs` "top". `OUT.config.json` says what
    the output was made of. Either file may be in a bucket. A sample's randomness depends on the row's own
    seed or else on seed and the row's place, and on its own index, alone. Several processes with an artifact
    take chunks in turn, each with all the weights on its own devices; all read the prompts, one writes.

    Returns {"prompts", "rows", "rows_before" (found in place), "tokens" (made now)}. ValueError, before
    anything is written, for bad rows (file and line), prompts that fill the context, an artifact that lacks
    something, and an `out` that something else made or is making.
    """
    if is_address(artifact):
        hosts.expect_one_process("generate from a server")
    else:
        hosts.start_processes()
    with (
        hosts.failing_together(),
        output.at_hand(buckets.place(prompts), buckets.place(out)) as (here, there, sender),
        contextlib.closing(_open(artifact, cfg)) as source,
    ):
        return _run(source, here, there, cfg, quiet, sender)


def _run(
    source: Source, prompts: Path, out: Path, cfg: GenerateConfig, quiet: bool, sender: output.Sender
) -> dict[str, int]:
    output.check_paths(prompts, out)
    asked = load_requests(prompts, cfg)
    source.check(asked)
    groups = _groups(asked, source.group)
    keys = [[(one.id, sample) for one in group for sample in range(cfg.n)] for group in groups]
    record = _record(source, prompts, cfg)
    told = hosts.of_all(record)
    if any(one != told[0] for one in told):
        raise ValueError(f"{prompts}: expected the same prompts and artifact in all processes, got others")

    def before() -> tuple[int, bool]:
        """Groups that are there, and whether that is not all there should be."""
        output.check_owner(out, record)
        done, size = output.whole_groups(out, keys)
        return done, done < len(groups) or size < out.stat().st_size

    done, unfinished = hosts.on_primary(before)
    tokens = 0
    if unfinished:
        source.load()  # before anything is written, for it may be damaged
        with contextlib.ExitStack() as held:
            file: FileIO | None = None

            def begin() -> int:
                nonlocal file
                out.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(output.opened(out, record))
                done, size = output.whole_groups(out, keys)  # nobody else can add to it now
                file.truncate(size)
                sender.send()  # a place that cannot be written is known before anything is made for it
                return done

            done = hosts.on_primary(begin)
            waiting = output.Ahead(out, keys, done)
            quiet = quiet or not hosts.is_primary()
            progress = held.enter_context(output.Progress(len(asked), quiet, every=source.quiet_seconds))
            tokens = _write(file, waiting, source, groups, done, cfg, progress, sender)
            waiting.remove()
    return {
        "prompts": len(asked),
        "rows": len(asked) * cfg.n,
        "rows_before": sum(map(len, keys[:done])),
        "tokens": tokens,
    }


def _groups(asked: Sequence[Asked], size: int) -> list[Sequence[Asked]]:
    return [asked[i : i + size] for i in range(0, len(asked), size)]


def _write(
    file: FileIO | None,
    ahead: output.Ahead,
    source: Source,
    groups: Sequence[Sequence[Asked]],
    done: int,
    cfg: GenerateConfig,
    progress: output.Progress,
    sender: output.Sender,
) -> int:
    """Answers the groups after the first `done`, but for those that came ahead, into `file`, which only the
    primary process has; returns the new tokens."""
    left = [place for place in range(done, len(groups)) if place not in ahead]
    progress.start(sum(map(len, groups)) - sum(len(groups[place]) for place in left))
    tokens, place = 0, done

    def write_ready() -> None:
        while (rows := ahead.pop(place)) is not None:
            write(rows)

    def write(rows: Sequence[Row]) -> None:
        nonlocal place
        if file is not None:
            output.append(file, rows)
        place += 1

    write_ready()
    for index, rows in _answered(source, [groups[i] for i in left], cfg):
        group = groups[left[index]]
        if left[index] == place:
            write(rows)
            write_ready()
        else:
            ahead.put(left[index], rows)
        new = sum(row["num_tokens"] for row in rows)
        tokens += new
        progress.advance(len(group), new)
        sender.maybe()
    assert place == len(groups)
    return tokens


def _answered(
    source: Source, groups: Sequence[Sequence[Asked]], cfg: GenerateConfig
) -> Iterator[tuple[int, list[Row]]]:
    """(which group, its rows), as groups are done. Several processes answer one each, and tell each other;
    SIGTERM to one of them stops all (`Preempted`)."""

    def found(some: Sequence[Sequence[Asked]]) -> Iterator[tuple[int, list[Row]]]:
        for index, answers in source.answers(some):
            pairs = zip(some[index], answers, strict=True)
            yield index, [row for one, few in pairs for row in _rows(one, few, cfg)]

    if (count := hosts.process_count()) == 1:
        yield from found(groups)
        return
    with hosts.Sigterm() as sigterm:
        for start in range(0, len(groups), count):
            if sigterm.stops_here():
                raise hosts.Preempted(start)
            mine = groups[start : start + count][jax.process_index() :][:1]
            told = hosts.of_all([rows for _, rows in found(mine)])
            yield from enumerate((rows for few in told for rows in few), start)


def _rows(asked: Asked, answers: Sequence[Answer], cfg: GenerateConfig) -> list[Row]:
    """The output rows of one prompt."""
    rows = []
    for sample, one in enumerate(answers):
        row: Row = {"id": asked.id, "sample": sample, "text": one.text, "reasoning": one.reasoning}
        row |= {"answer": one.content, "finish_reason": one.finish_reason}
        row |= {"num_tokens": one.num_tokens, "prompt_tokens": one.prompt_tokens}
        if asked.request.tools:
            row["tool_calls"] = [dataclasses.asdict(call) for call in one.tool_calls]
        if cfg.logprobs:
            row["tokens"] = None if one.tokens is None else list(one.tokens)
            row["logprobs"] = None if one.logprobs is None else list(one.logprobs)
        if asked.request.top_logprobs:
            row["top"] = [[list(pair) for pair in step] for step in one.top]
        rows.append(row)
    return rows


def load_requests(path: Path, cfg: GenerateConfig) -> list[Asked]:
    """The requests of a prompts file. ValueError with file and line for a bad row, or an id that is taken."""
    asked: list[Asked] = []
    seen: dict[str | int, str] = {}
    for place, (where, row) in enumerate(read_jsonl_rows(path)):
        one = make_request(row, place, int(where.rpartition(":")[2]), where, cfg)
        if one.id in seen:
            raise ValueError(f"{where}: expected an id of its own, got {one.id!r} of {seen[one.id]}")
        seen[one.id] = where
        asked.append(one)
    if not asked:
        raise ValueError(f"{path}: expected prompts, got none; give it a row such as {{'prompt': 'Once'}}")
    return asked


def make_request(row: Row, place: int, number: int, where: str, cfg: GenerateConfig) -> Asked:
    """The request of the `place`-th row (see `run`); ValueError, `where` in front, for a bad one."""
    _check_row(row, where)
    if isinstance(row.get("stop"), str):
        row = row | {"stop": [row["stop"]]}
    sampling, wanted = (
        from_dict(type(default), to_dict(default) | {k: row[k] for k in names if k in row}, f"{where}: ")
        for default, names in ((cfg.sampling, _SAMPLING_FIELDS), (cfg.answer, _ANSWER_FIELDS))
    )
    assert isinstance(sampling, SamplingConfig) and isinstance(wanted, AnswerConfig)
    request = Request(
        prompt=row.get("prompt"),
        messages=None if "prompt" in row else (),
        sampling=sampling,
        n=cfg.n,
        seed=row.get("seed", row_seed(cfg.seed, place)),
        tools=tuple(row.get("tools", ())),
        tool_choice=row.get("tool_choice", "auto"),
        **{name: getattr(wanted, name) for name in _ANSWER_FIELDS},
    )
    if "messages" in row:
        chat = conversation_from_row(row, where)
        if chat.messages[-1]["role"] == "assistant":
            raise ValueError(
                f"{where}: expected messages that end before the assistant's; leave its turn out"
            )
        thinking = {"on": True, "off": False, None: None}[cfg.thinking]
        toggle = thinking if chat.thinking is None else chat.thinking
        request = dataclasses.replace(request, messages=chat.messages, thinking=toggle)
    return Asked(row.get("id", number), request, where)


def row_seed(seed: int, place: int) -> int:
    """The seed of a row, so that rows draw independently, and the same wherever a run goes on."""
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:4])


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
    for key in ("tools", "tool_choice"):
        if key in row and "prompt" in row:
            raise ValueError(f"{where}: expected {key} with messages, got it with prompt; they are a chat's")
    if isinstance(row.get("id", 0), bool) or not isinstance(row.get("id", 0), str | int):
        raise ValueError(f"{where}: id: expected text or a whole number, got {row['id']!r:.80}")
    seed = row.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed: expected a number in [0, 2**32), got {seed!r:.80}")
    if not isinstance(row.get("tools", []), list):
        raise ValueError(f"{where}: tools: expected a list, got {row['tools']!r:.80}")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # a lone surrogate, NaN or Infinity: JSON in Python's eyes alone
        raise ValueError(f"{where}: expected Unicode text and finite numbers ({error}); repair it") from error


def _record(source: Source, prompts: Path, cfg: GenerateConfig) -> dict[str, Any]:
    """What an output depends on; artifact and prompts by content, so that they may be moved."""
    config = {key: value for key, value in to_dict(cfg).items() if key not in source.indifferent}
    return {
        "format_version": FORMAT_VERSION,
        **source.identity(),
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest(),
        "config": config,
    }
