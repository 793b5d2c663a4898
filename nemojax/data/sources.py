"""Where texts come from: the hub, local files, the Python language reference, procedural problems."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemojax import config

Kind = Literal["pydoc", "hf", "jsonl", "text", "parquet", "problems"]
Split = Literal["train", "heldout"]
HELDOUT_BUCKETS, BUCKETS = 10, 100
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A collection of texts.

    `pydoc` (the language reference that ships with Python) and `problems` need no path and split
    themselves by hash; `hf` takes a data set's name, the others a file or a pattern such as `*.jsonl`.
    """

    name: str = config.field("pydoc", "how reports call it; problems: the family")
    kind: Kind = config.field("pydoc", "pydoc, hf, jsonl, text, parquet or problems")
    path: str = config.field("", "file, pattern or data set name; hf: `name` or `name:configuration`")
    split: str = config.field("train", "pydoc, problems: train or heldout; hf: the data set's own split")
    field: str = config.field("text", "column that holds the text; problems: answer, trace or both")
    weight: float = config.field(1.0, "share of the tokens in a mixture, relative to the other sources")
    limit: int = config.field(0, "at most this many documents, 0 for all; problems: how many to make")
    seed: int = config.field(0, "problems: seed of the generator")


def is_heldout(key: str, heldout: int = HELDOUT_BUCKETS) -> bool:
    """Whether a key falls among the first `heldout` of 100 hash buckets; the same everywhere, forever."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS < heldout


def load_texts(source: Source) -> Sequence[str]:
    """The texts of a source, empty ones left out; ValueError if none are left."""
    match source.kind:
        case "pydoc":
            texts = _pydoc(_own_split(source))
        case "problems":
            return _problems(source)
        case "jsonl":
            texts = [_column(row, source, where) for where, row in _jsonl_rows(_files(source))]
        case "text" | "parquet":
            texts = _with_datasets(source)
        case "hf":
            texts = _from_hub(source)
    texts = texts if source.kind == "hf" else [text for text in texts if text.strip()]
    if not len(texts):
        raise ValueError(f"source {source.name}: expected texts, got none in {source.path or source.split}")
    return texts[: source.limit] if source.limit and source.limit < len(texts) else texts


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file or pattern; ValueError with file and line for a malformed one.

    Blank lines are skipped and their number is logged.
    """
    return [row for _, row in read_jsonl_rows(path)]


def read_jsonl_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """As `read_jsonl`, each row with its `file:line`."""
    return _jsonl_rows(_files(Source(name=str(path), kind="jsonl", path=str(path))))


def input_files(sources: Sequence[Source]) -> list[Path]:
    """The local files that sources read, so that a stage notices when one changes."""
    return [
        path for source in sources if source.kind in ("jsonl", "text", "parquet") for path in _files(source)
    ]


def report(source: Source) -> dict[str, int]:
    """Documents and characters of a source, for a stage's result."""
    texts = load_texts(source)
    return {"documents": len(texts), "characters": sum(map(len, texts))}


def _own_split(source: Source) -> Split:
    if source.split not in ("train", "heldout"):
        raise ValueError(f"source {source.name}: expected split train or heldout, got {source.split!r}")
    return source.split


def _pydoc(split: Split) -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if is_heldout(name) == (split == "heldout")]


def _problems(source: Source) -> list[str]:
    from nemojax.data import problems

    if source.field not in ("text", "answer", "trace", "both"):
        raise ValueError(f"source {source.name}: expected field answer, trace or both, got {source.field!r}")
    family = problems.family(source.path or source.name)
    made = problems.make_problems(family, source.limit or 1000, source.seed, _own_split(source))
    return [text for problem in made for text in problems.lines(problem, source.field)]


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    found = [path] if path.is_file() else sorted(path.parent.glob(path.name)) if source.path else []
    if path.is_dir():
        ending = {"text": "*.txt"}.get(source.kind, f"*.{source.kind}")
        found = sorted(path.glob(ending))
    if not found:
        raise ValueError(f"source {source.name}: expected files at {source.path!r}, got none")
    return found


def _jsonl_rows(files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for path in files:
        blank = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    blank += 1
                    continue
                rows.append((f"{path}:{number}", _json_object(line, f"{path}:{number}")))
        if blank:
            log.warning("%s: skipped %d blank lines", path, blank)
    return rows


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected one JSON object a line, got {error}; repair the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}; repair the line")
    return row


def _column(row: dict[str, Any], source: Source, where: str) -> str:
    value = row.get(source.field)
    if not isinstance(value, str):
        known = ", ".join(sorted(row)) or "no fields"
        raise ValueError(f"{where}: expected text in field {source.field!r}, got {known}; set the field")
    return value


def _with_datasets(source: Source) -> list[str]:
    import datasets

    files = [str(path) for path in _files(source)]
    extra: dict[str, Any] = {"sample_by": "document"} if source.kind == "text" else {}
    try:
        table = datasets.load_dataset(source.kind, data_files=files, split="train", **extra)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"source {source.name}: cannot read {source.path} as {source.kind} ({reason})"
        ) from error
    return list(_named_column(table, source))


def _from_hub(source: Source) -> Sequence[str]:
    import datasets

    name, _, configuration = source.path.partition(":")
    try:
        table = datasets.load_dataset(name, configuration or None, split=source.split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"source {source.name}: cannot load data set {source.path!r} ({reason})") from error
    return _named_column(table, source)


def _named_column(table: Any, source: Source) -> Any:
    name = "text" if source.kind == "text" else source.field
    if name not in table.column_names:
        known = ", ".join(table.column_names)
        raise ValueError(
            f"source {source.name}: expected column {name!r}, got {known}; set the source's field"
        )
    return table[name]
