"""The `evaluate` stage: several models side by side, on the same texts and the same problems."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax

from nemojax.checkpoints.artifact import load_model
from nemojax.config import field
from nemojax.data.mixture import TextData, heldout_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import check_vocab, load_tokenizer
from nemojax.evaluate.latency import LatencyConfig, measure
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
from nemojax.generate.remote import RemoteConfig, RemoteGenerator
from nemojax.generate.sources import is_address
from nemojax.model.llama import Compute
from nemojax.sharding import MeshConfig, make_mesh, use_mesh
from nemojax.stage import run_stage


@dataclass(frozen=True)
class Config:
    models: dict[str, str] = field(
        {}, "artifacts, or servers' addresses (up to and with /v1), by the name they have in the report"
    )
    data: TextData = field(TextData(), "texts whose held-out part gives the loss")
    tasks: TasksConfig = field(TasksConfig(), "problems")
    asked: tuple[str, ...] = field(
        (), "models that are asked the problems, each compared with the one before; empty: all"
    )
    latency: LatencyConfig = field(LatencyConfig(), "stopwatch")
    conversations: int = field(4, "sample conversations a model, family and setting of the toggle")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    remote: RemoteConfig = field(RemoteConfig(), "how to ask the servers among the models")

    def __post_init__(self):
        if unknown := sorted(set(self.asked) - set(self.models)):
            raise ValueError(f"asked: expected names among models, got {unknown[0]!r}")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Returns {"models": {name: row}, "commonest_answer_share": {family: share}, "comparisons": [...]}; also
    `tasks_<name>.jsonl`, one prompt a line, and `conversations.jsonl`.

    A row: num_params, num_block_params, kv_elements_per_token, heldout (nats a token), tasks
    ({"on"|"off": {family: pass@1 ...}}), latency; of a server only tasks. Comparisons are of each asked
    model with the one before.
    """
    if not cfg.models:
        raise ValueError("models: expected at least one artifact, got none; set --config.models.NAME=DIR")
    artifacts = [artifact for artifact in cfg.models.values() if not is_address(artifact)]
    inputs = [*artifacts, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    return run_stage("evaluate", cfg, workdir, inputs, lambda path: _evaluate(cfg, path))


def _evaluate(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh)
    rows: dict[str, Any] = {}
    answers: dict[str, list[Record]] = {}
    conversations: list[dict[str, Any]] = []
    for name, artifact in cfg.models.items():
        asked = not cfg.asked or name in cfg.asked
        if is_address(artifact):
            rows[name], records = _server(cfg, artifact, asked)
        else:
            rows[name], records = _one(cfg, artifact, mesh, asked)
        if records:
            answers[name] = records
            save_records(workdir / f"tasks_{name}.jsonl", records)
            conversations += [{"model": name, **c} for c in _samples(records, cfg.conversations)]
    save_records(workdir / "conversations.jsonl", conversations)
    pairs = pairwise(name for name in cfg.asked or answers if name in answers)
    return {
        "models": rows,
        "commonest_answer_share": _commonest(next(iter(answers.values()), [])),
        "comparisons": [c for before, after in pairs for c in _compare(cfg, answers, before, after)],
    }


def _one(
    cfg: Config, artifact: str, mesh: jax.sharding.Mesh, asked: bool
) -> tuple[dict[str, Any], list[Record]]:
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
    if cfg.latency.batch:
        row["latency"] = measure(params, arch, cfg.latency, compute=cfg.compute, mesh=mesh)
    records: list[Record] = []
    if asked:
        records = ask_all(params, arch, tokenizer, cfg.tasks, compute=cfg.compute, mesh=mesh)
        row["tasks"] = summarise(records)
    return row, records


def _server(cfg: Config, address: str, asked: bool) -> tuple[dict[str, Any], list[Record]]:
    """A model that somebody else serves: its answers are all that is known of it."""
    if not asked:
        return {"artifact": address}, []
    with RemoteGenerator(dataclasses.replace(cfg.remote, base_url=address)) as generator:
        records = ask(generator, cfg.tasks)
    return {"artifact": address, "tasks": summarise(records)}, records


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
