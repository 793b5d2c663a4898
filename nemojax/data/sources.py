"""Where texts come from: the hub, files, the Python language reference, procedural problems."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemojax import config
from nemojax.buckets import place
from nemojax.data.heldout import (
    HELDOUT_SHARE,
    check_share,
    heldout_side,
    is_heldout,
    too_small,
    training_side,
)
from nemojax.data.reading import OPENERS, is_remote, packed_lines, remote_files

Kind = Literal["pydoc", "hf", "jsonl", "text", "parquet", "problems", "tokens"]
Split = Literal["train", "heldout"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A collection of texts.

    `pydoc` (the language reference that ships with Python) and `problems` need no path and split
    themselves by topic and by prompt; `hf` takes a data set's name, `jsonl`, `text` and `parquet` a file, a
    directory or a pattern such as `data/**/*.jsonl.gz`, and a share of their documents is held out;
    `tokens` takes a directory that `nemojax tokenize` made, here or in a bucket, in which that is decided.

    With `stream` the texts are read while they are trained on, and never all held; a path may then also be
    an address (`https://`, `hf://datasets/...`, `gs://...`).
    """

    name: str = config.field("pydoc", "how reports call it; problems: the family")
    kind: Kind = config.field("pydoc", "pydoc, hf, jsonl, text, parquet, problems or tokens")
    path: str = config.field(
        "", "file, directory, pattern or data set name; hf: `name` or `name:configuration`"
    )
    split: str = config.field("train", "pydoc, problems: train or heldout; hf: the data set's own split")
    field: str = config.field("text", "column that holds the text; problems: answer, trace or both")
    weight: float = config.field(
        1.0, "share of the tokens in a mixture, relative to the other sources; 0: not trained on"
    )
    limit: int = config.field(
        0, "train on at most this many documents, 0 for all; problems: how many to make"
    )
    seed: int = config.field(0, "problems: seed of the generator")
    heldout_share: float = config.field(
        HELDOUT_SHARE,
        "files, hf: part of the documents, chosen by hash of the text, that is validated on and never "
        "trained on; not taken out where data.heldout names other texts",
    )
    stream: bool = config.field(
        False, "hf, jsonl, text, parquet: read and tokenise while training, as data.streaming says"
    )


def load_texts(source: Source) -> Sequence[str]:
    """The texts of a source to train on, blank ones left out; ValueError if none are left."""
    check_share(source.heldout_share, f"source {source.name}")
    match source.kind:
        case "pydoc":
            texts = _pydoc(_own_split(source), source.limit)
        case "problems":
            texts = _problems(source)
        case _:
            table = _read(source)
            texts = _take(
                table, training_side(_each(table, source), source.heldout_share, source.limit), source
            )
            if not len(texts) and len(heldout_side(_each(table, source), source.heldout_share)):
                raise ValueError(
                    f"source {source.name}: expected texts to train on, got only held-out ones; add more, "
                    "or lower heldout_share"
                )
    if not len(texts):
        raise ValueError(f"source {source.name}: expected texts, got none in {source.path or source.split}")
    return texts


def load_heldout(source: Source) -> Sequence[str]:
    """The texts of a source that are never trained on, whatever its limit and the order of its files.

    Empty where `heldout_share` is 0; ValueError where the source is too small to hold one out.
    """
    if source.kind in ("pydoc", "problems"):
        limit = min(source.limit, 512) if source.kind == "problems" else 0
        return load_texts(replace(source, split="heldout", limit=limit))
    check_share(source.heldout_share, f"source {source.name}")
    if not source.heldout_share:
        return []
    table = _read(source)
    found = heldout_side(_each(table, source), source.heldout_share)
    if not found:
        raise too_small(f"source {source.name}", len(table), source.heldout_share)
    return _take(table, found, source)


def read_jsonl_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of JSONL files, each with its `file:line`; `path` is a file, a directory or a pattern.

    ValueError with file and line for a malformed row. Blank lines are skipped and their number is logged.
    """
    return _jsonl_rows(local_files(path))


def input_files(sources: Sequence[Source]) -> list[Path]:
    """The local files that sources read, so that a stage notices when one changes."""
    files: list[Path] = []
    for source in sources:
        if source.kind in ("jsonl", "text", "parquet") and not (source.stream and is_remote(source.path)):
            files += _files(source)
        elif source.kind == "hf" and Path(source.path).is_dir():
            files.append(Path(source.path))
        elif source.kind == "tokens":
            files += [
                index
                for part in ("", "heldout")
                if (index := place(source.path) / part / "index.json").is_file()
            ]
    return files


def source_files(source: Source) -> Sequence[str | Path]:
    """The files of a source as they are streamed, here or at an address; ValueError if there are none."""
    if not is_remote(source.path):
        return _files(source)
    if found := remote_files(source.path):
        return found
    raise ValueError(f"source {source.name}: expected files at {source.path!r}, got none; check the address")


def local_files(path: str | Path, kind: str = "jsonl", where: str = "") -> list[Path]:
    """The files that a path, a directory or a pattern names, sorted; ValueError if there are none."""
    path = str(path)
    found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
    if path and Path(path).is_dir():
        ending = {"text": "txt"}.get(kind, kind)
        patterns = [f"*.{ending}", *(f"*.{ending}{packed}" for packed in OPENERS)]
        found = [str(match) for pattern in patterns for match in Path(path).glob(pattern)]
    files = sorted(Path(match) for match in found if Path(match).is_file())
    if not files:
        raise ValueError(f"{where}expected files at {path!r}, got none; check the path")
    return files


def _own_split(source: Source) -> Split:
    if source.split not in ("train", "heldout"):
        raise ValueError(f"source {source.name}: expected split train or heldout, got {source.split!r}")
    return source.split


def _pydoc(split: Split, limit: int) -> list[str]:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics) if is_heldout(name) == (split == "heldout")]
    texts = [text for text in texts if text.strip()]
    return texts[:limit] if limit else texts


def _problems(source: Source) -> list[str]:
    from nemojax.data import problems

    if source.field not in ("text", "answer", "trace", "both"):
        raise ValueError(f"source {source.name}: expected field answer, trace or both, got {source.field!r}")
    family = problems.family(source.path or source.name)
    made = problems.make_problems(family, source.limit or 1000, source.seed, _own_split(source))
    return [text for problem in made for text in problems.lines(problem, source.field)]


def _files(source: Source) -> list[Path]:
    if is_remote(source.path):
        raise ValueError(
            f"source {source.name}: expected a path of this machine, got {source.path}; set stream to read it"
        )
    return local_files(source.path, source.kind, f"source {source.name}: ")


def _jsonl_rows(files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for path in files:
        blank = 0
        for number, line in enumerate(packed_lines(path), 1):
            if not line.strip():
                blank += 1
                continue
            rows.append((f"{path}:{number}", json_object(line, f"{path}:{number}")))
        if blank:
            log.warning("%s: skipped %d blank line%s", path, blank, "s"[: blank > 1])
    return rows


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """A line of JSONL; ValueError if it is not an object."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected one JSON object a line, got {error}; repair the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}; repair the line")
    return row


def text_in(row: dict[str, Any], source: Source, where: str) -> str:
    """The text of a row of JSONL; ValueError if its field holds none."""
    value = row.get(source.field)
    if not isinstance(value, str):
        known = ", ".join(sorted(row)) or "no fields"
        raise ValueError(f"{where}: expected text in field {source.field!r}, got {known}; set the field")
    return value


def _read(source: Source) -> Any:
    """All texts of a source that has files or a data set: a list, or a table that stays on disk."""
    match source.kind:
        case "jsonl":
            return [text_in(row, source, where) for where, row in _jsonl_rows(_files(source))]
        case "hf":
            return load_hub(source)
        case "tokens":
            raise ValueError(
                f"source {source.name}: expected texts, got tokens; name the source that they were made from"
            )
        case _:
            return _with_datasets(source)


def _each(table: Any, source: Source) -> Iterator[str]:
    """The texts one after another; a row without text counts as blank."""
    if isinstance(table, list):
        yield from table
        return
    name = _text_column(source)
    for batch in table.select_columns(name).iter(1024):
        for text in batch[name]:
            yield text_of(text, name, f"source {source.name}")


def text_of(value: Any, column: str, where: str) -> str:
    """The text of a row in a table, blank where there is none; ValueError for anything else."""
    if not (value is None or isinstance(value, str)):
        raise ValueError(
            f"{where}: expected text in column {column!r}, got {type(value).__name__}; set the source's field"
        )
    return value or ""


def _take(table: Any, places: list[int], source: Source) -> Sequence[str]:
    if isinstance(table, list):
        return [table[place] for place in places]
    return table.select(places)[_text_column(source)]


def _text_column(source: Source) -> str:
    return "text" if source.kind == "text" else source.field


def _with_datasets(source: Source) -> Any:
    import datasets

    files = [str(path) for path in _files(source)]
    extra: dict[str, Any] = {"sample_by": "document"} if source.kind == "text" else {}
    try:
        table = datasets.load_dataset(source.kind, data_files=files, split="train", **extra)
    except Exception as error:
        raise ValueError(
            f"source {source.name}: cannot read {source.path} as {source.kind} ({_reason(error)})"
        ) from error
    check_column(table.column_names, source)
    return table


def load_hub(source: Source, stream: bool = False) -> Any:
    """A table of texts of the hub; with `stream` one that is read bit by bit.

    ValueError where it cannot be loaded; with `stream` what a later try may mend is raised as it is.
    """
    import datasets

    name, _, configuration = source.path.partition(":")
    try:
        table = datasets.load_dataset(name, configuration or None, split=source.split, streaming=stream)
    except Exception as error:
        if stream and not isinstance(error, ValueError | FileNotFoundError):
            raise
        raise ValueError(
            f"source {source.name}: cannot load data set {source.path!r} ({_reason(error)})"
        ) from error
    if table.column_names is not None:  # a stream may not know them yet
        check_column(table.column_names, source)
    return table


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_column(names: Sequence[str], source: Source) -> None:
    """ValueError unless a table has the column that holds a source's texts."""
    name = _text_column(source)
    if name not in names:
        raise ValueError(
            f"source {source.name}: expected column {name!r}, got {', '.join(names)}; set the source's field"
        )
