"""The `evaluate` stage: several models side by side, on the same texts and the same problems."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from nemojax import plots
from nemojax.arch import ArchSpec
from nemojax.checkpoints.artifact import load_model
from nemojax.config import field
from nemojax.data.mixture import TextData, heldout_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.evaluate import long_context
from nemojax.evaluate.latency import LatencyConfig, measure
from nemojax.evaluate.long_context import LongContextConfig
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.evaluate.tasks import (
    Record,
    TasksConfig,
    ask,
    ask_all,
    paired_bootstrap,
    per_prompt,
    save_records,
    summarise,
)
from nemojax.generate.local import Model, Reader, prepared
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.generate.sources import is_address
from nemojax.hosts import on_primary
from nemojax.model.llama import Compute, Params
from nemojax.sharding import MeshConfig, make_mesh, use_mesh, ways_of
from nemojax.stage import run_stage, write_text


@dataclass(frozen=True)
class Config:
    models: dict[str, str] = field(
        {}, "artifacts, or servers' addresses (up to and with /v1), by the name they have in the report"
    )
    data: TextData = field(TextData(), "texts whose held-out part gives the loss")
    tasks: TasksConfig = field(TasksConfig(), "problems")
    asked: tuple[str, ...] = field(
        (), "models that are asked problems and long questions, each compared with the one before; empty: all"
    )
    long_context: LongContextConfig = field(
        LongContextConfig(), "questions about long texts, and loss by position in rows of the greatest length"
    )
    latency: LatencyConfig = field(
        LatencyConfig(), "stopwatch; of several processes the first one's, with its own devices"
    )
    conversations: int = field(4, "sample conversations a model, family and setting of the toggle")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    remote: RemoteConfig = field(RemoteConfig(), "how to ask the servers among the models")

    def __post_init__(self):
        if unknown := sorted(set(self.asked) - set(self.models)):
            raise ValueError(f"asked: expected names among models, got {unknown[0]!r}")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Returns {"models": {name: row}, "commonest_answer_share": {family: share}, "comparisons": [...]}; also
    `tasks_<name>.jsonl`, one prompt a line, and `conversations.jsonl`; with `long_context.lengths` also
    `long_context_<name>.jsonl`, one question a line, and `long_context_<name>_<task>.svg`, recall by length
    and depth.

    A row: num_params, num_block_params, kv_elements_per_token, heldout (nats a token), tasks
    ({"on"|"off": {family: pass@1 ...}}), long_context (of `long_context.summarise`), by_position (of
    `long_context.position_loss`), latency; of a server only tasks and long_context. Comparisons are of each
    asked model with the one before.
    """
    if not cfg.models:
        raise ValueError("models: expected at least one artifact, got none; set --config.models.NAME=DIR")
    inputs = [*_artifacts(cfg).values(), *input_files((*cfg.data.sources, *cfg.data.heldout))]
    if cfg.long_context.lengths:
        inputs += long_context.inputs(cfg.long_context)
    return run_stage(
        "evaluate", cfg, workdir, inputs, lambda path: _evaluate(cfg, path),
        many_processes=True,
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Recall (or what forced reading finds right) on long texts for people; "" if it was not measured."""
    rows = {name: row["long_context"] for name, row in result["models"].items() if row.get("long_context")}
    if not rows:
        return ""
    lengths = list(dict.fromkeys(n for tasks in rows.values() for cells in tasks.values() for n in cells))
    lines = [("model", "task", *(f"{int(n):,}" for n in lengths))]
    for name, tasks in rows.items():
        for task, cells in tasks.items():
            shares = (cells[n].get("recall", cells[n].get("forced")) for n in lengths)
            lines.append((name, task, *(f"{100 * share:.1f}%" for share in shares)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(["right answers by tokens of the text", *texts])


def _artifacts(cfg: Config) -> dict[str, str]:
    return {name: artifact for name, artifact in cfg.models.items() if not is_address(artifact)}


def _evaluate(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh, rows="shared")
    if cfg.long_context.lengths:
        _check_long_context(cfg)
    rows: dict[str, Any] = {}
    answers: dict[str, list[Record]] = {}
    conversations: list[dict[str, Any]] = []
    for name, artifact in cfg.models.items():
        asked = not cfg.asked or name in cfg.asked
        if is_address(artifact):
            rows[name], records, found = on_primary(partial(_server, cfg, artifact, asked))
        else:
            rows[name], records, found = _one(cfg, artifact, mesh, asked)
        if records:
            answers[name] = records
            conversations += [{"model": name, **c} for c in _samples(records, cfg.conversations)]
        on_primary(partial(_write, workdir, name, rows[name], records, found))
    on_primary(lambda: save_records(workdir / "conversations.jsonl", conversations))
    pairs = pairwise(name for name in cfg.asked or answers if name in answers)
    return {
        "models": rows,
        "commonest_answer_share": _commonest(next(iter(answers.values()), [])),
        "comparisons": [c for before, after in pairs for c in _compare(cfg, answers, before, after)],
    }


def _write(workdir: Path, name: str, row: dict[str, Any], records: list[Record], found: list[Record]) -> None:
    if records:
        save_records(workdir / f"tasks_{name}.jsonl", records)
    if found:
        save_records(workdir / f"long_context_{name}.jsonl", found)
        _draw(row["long_context"], workdir, name)


def _one(
    cfg: Config, artifact: str, mesh: jax.sharding.Mesh, asked: bool
) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """(row, answers to the problems, answers to the long questions)."""
    tokenizer = load_tokenizer(artifact)
    arch, params = load_model(artifact, mesh)
    check_vocab(tokenizer, arch)
    with use_mesh(mesh):
        heldout = heldout_loss(params, arch, heldout_batches(cfg.data, tokenizer), compute=cfg.compute)
    row: dict[str, Any] = {
        "artifact": artifact,
        "num_params": arch.num_params(),
        "num_block_params": arch.num_block_params(),
        "kv_elements_per_token": arch.kv_elements_per_token(),
        "heldout": heldout,
    }
    if cfg.long_context.lengths:
        row["by_position"] = _by_position(cfg, params, arch, tokenizer, mesh)
    records: list[Record] = []
    found: list[Record] = []
    model = Model(arch, tokenizer, params, cfg.compute, mesh)
    ready = prepared(model) if asked or cfg.latency.batch else model
    if cfg.latency.batch:
        row["latency"] = on_primary(
            lambda: measure(ready.params, arch, cfg.latency, compute=cfg.compute, mesh=ready.mesh)
        )
    if asked:
        records = ask_all(ready, cfg.tasks)
        row["tasks"] = summarise(records)
    if cfg.long_context.lengths and asked:
        found = long_context.ask_all(model, cfg.long_context, ready)
        row["long_context"] = long_context.summarise(found)
    return row, records, found


def _by_position(
    cfg: Config, params: Params, arch: ArchSpec, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Loss by position in rows of the greatest length, as many tokens at once as `data` has."""
    longest = max(cfg.long_context.lengths)
    with use_mesh(mesh):
        ways = ways_of("batch")
    rows = max(1, cfg.data.batch_size * cfg.data.length // longest)
    data = dataclasses.replace(cfg.data, length=longest, batch_size=-(-rows // ways) * ways)
    batches = heldout_batches(data, tokenizer)
    return long_context.position_loss(params, arch, batches, compute=cfg.compute, mesh=mesh)


def _server(cfg: Config, address: str, asked: bool) -> tuple[dict[str, Any], list[Record], list[Record]]:
    """A model that somebody else serves: its answers are all that is known of it."""
    if not asked:
        return {"artifact": address}, [], []
    found: list[Record] = []
    with RemoteGenerator(dataclasses.replace(cfg.remote, base_url=address)) as generator:
        records = ask(generator, cfg.tasks)
        row: dict[str, Any] = {"artifact": address, "tasks": summarise(records)}
        if cfg.long_context.lengths:
            found = long_context.ask_server(generator, _server_tokenizer(cfg), cfg.long_context)
            row["long_context"] = long_context.summarise(found)
    return row, records, found


def _check_long_context(cfg: Config) -> None:
    """Says before anything is measured what could not be."""
    for name, artifact in _artifacts(cfg).items():
        long_context.check_lengths(cfg.long_context, Reader.open(artifact).arch, name)
    if any(
        is_address(artifact) for name, artifact in cfg.models.items() if not cfg.asked or name in cfg.asked
    ):
        _server_tokenizer(cfg)


def _server_tokenizer(cfg: Config) -> Tokenizer:
    """Whose tokens a server's questions are counted in: it does not tell its own."""
    path = cfg.long_context.tokenizer or next(iter(_artifacts(cfg).values()), None)
    if path is None:
        raise ValueError(
            "long_context.tokenizer: expected a directory where all models are servers, got none"
        )
    return load_tokenizer(path)


def _draw(tasks: dict[str, Any], workdir: Path, name: str) -> None:
    """A picture of each task whose questions have a depth."""
    for task, cells in tasks.items():
        depths = next(iter(cells.values())).get("depths")
        if depths:
            picture = plots.shares(
                [[cell["depths"][depth] for cell in cells.values()] for depth in depths],
                [f"{int(length):,}" for length in cells],
                [f"{100 * float(depth):g}%" for depth in depths],
                title=f"{name}, {task}: right answers by length and depth",
                xlabel="tokens",
                ylabel="depth in the text",
            )
            write_text(workdir / f"long_context_{name}_{task}.svg", plots.standalone(picture))


def _commonest(records: list[Record]) -> dict[str, float]:
    """For each family, how often always giving its commonest answer would be right."""
    golds: dict[str, Counter[str]] = {}
    for record in records:
        golds.setdefault(record["family"], Counter())[record["reference"]] += 1
    return {name: count.most_common(1)[0][1] / count.total() for name, count in golds.items()}


def _samples(records: list[Record], count: int) -> list[dict[str, Any]]:
    """The first `count` prompts of each family and setting, with the first answer."""
    seen: dict[tuple[str, bool], int] = {}
    out = []
    for record in records:
        group = (record["family"], record["thinking"])
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= count:
            out.append(
                {k: record[k] for k in ("family", "thinking", "prompt", "reference")}
                | {"text": record["text"][0], "accuracy": record["accuracy"][0]}
            )
    return out


def _compare(cfg: Config, answers: dict[str, list[Record]], before: str, after: str) -> list[dict[str, Any]]:
    out = []
    for mode in sorted({"on" if r["thinking"] else "off" for r in answers[after]}):
        a, b = (per_prompt(answers[name], mode == "on") for name in (before, after))
        gain, low, high = paired_bootstrap(a, b, seed=cfg.tasks.seed)
        out.append(
            {"before": before, "after": after, "thinking": mode, "pass@1": gain, "low": low, "high": high}
        )
    return out
