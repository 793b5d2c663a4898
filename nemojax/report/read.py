"""What lies in a pipeline's directory, read into plain data. A missing stage is no error here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemojax.arch import ArchSpec, load_arch
from nemojax.buckets import check_bucket, normal
from nemojax.log import read_metrics
from nemojax.stage import CONFIG, DONE, PIPELINE, RESULT, read_json

KINDS = ("tokenizer", "pretrain", "compress", "distill", "sft", "rl", "evaluate", "export")
CONVERSATIONS, SOLUTION = "conversations.jsonl", "solution.json"


@dataclass(frozen=True)
class Stage:
    """One stage's work directory. `inputs`: the stages it reads; `depth`: how many stand in a row."""

    name: str
    kind: str
    path: Path
    inputs: tuple[str, ...]
    depth: int
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    result: Mapping[str, Any]
    wall_seconds: float | None  # None: not finished

    @property
    def state(self) -> str:
        return "not finished" if self.wall_seconds is None else "done"

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.path)

    def arch(self) -> ArchSpec | None:
        """The architecture of the artifact that the stage makes, or None."""
        file = self.path / "arch.json"
        return load_arch(file) if file.is_file() else None

    def records(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file; a broken line is left out."""
        return list(_records(self.path / name))


@dataclass(frozen=True)
class Pipeline:
    """All stages of a directory, each after those it reads."""

    path: Path
    stages: tuple[Stage, ...]

    def of(self, kind: str) -> list[Stage]:
        """Finished stages of a kind."""
        return [s for s in self.stages if s.kind == kind and s.wall_seconds is not None]

    def first(self, kind: str) -> Stage | None:
        return next(iter(self.of(kind)), None)

    def named(self, name: str) -> Stage | None:
        return next((s for s in self.stages if s.name == name), None)

    def missing(self) -> list[str]:
        """Kinds of stage that are not here at all."""
        return [kind for kind in KINDS if all(s.kind != kind for s in self.stages)]

    def stage_at(self, artifact: str) -> Stage | None:
        """The stage that a recorded path means, though the whole directory may have been moved since."""
        return self.named(Path(artifact).name)


def read_pipeline(path: str | os.PathLike) -> Pipeline:
    """ValueError when the directory is not a pipeline's."""
    check_bucket(path)
    root = normal(path)
    if not (root / PIPELINE).is_file():
        raise ValueError(f"{path}: expected a pipeline's directory, got no {PIPELINE} in it; run it first")
    found = {}
    for directory in sorted(root.iterdir()):
        record = read_json(directory / CONFIG) if directory.is_dir() else None
        if isinstance(record, dict) and "stage" in record and record["stage"] != "report":
            found[directory.name.removeprefix(".")] = (directory, record)
    inputs = {
        name: tuple(n for n in (Path(p).name for p in record.get("inputs", {})) if n in found and n != name)
        for name, (_, record) in found.items()
    }
    stages = [_stage(name, at, record, inputs) for name, (at, record) in found.items()]
    return Pipeline(root, tuple(sorted(stages, key=lambda s: (s.depth, _kind_rank(s.kind), s.name))))


def _stage(name: str, path: Path, record: Mapping[str, Any], inputs: Mapping[str, tuple[str, ...]]) -> Stage:
    done = read_json(path / DONE)
    return Stage(
        name=name,
        kind=str(record["stage"]),
        path=path,
        inputs=inputs[name],
        depth=_depth(name, inputs, ()),
        config=record.get("config", {}),
        versions=record.get("versions", {}),
        result=(read_json(path / RESULT) or {}) if done else {},
        wall_seconds=float(done.get("wall_seconds", 0.0)) if done else None,
    )


def _depth(name: str, inputs: Mapping[str, tuple[str, ...]], seen: tuple[str, ...]) -> int:
    below = [n for n in inputs[name] if n not in seen]
    return 1 + max((_depth(n, inputs, (*seen, name)) for n in below), default=0)


def _kind_rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
