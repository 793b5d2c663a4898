"""The file that a batch of prompts is answered into: whose it is, how far it is, and some rows more.

Rows stand in the order of the prompts, in groups that are written whole; what a kill leaves of a group is
cut off and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from nemojax.buckets import check_bucket, copy_file, is_bucket
from nemojax.log import TOKENS_PER_SECOND, describe_progress

SIDECAR = ".config.json"  # beside the output: what it was made of
AHEAD = ".ahead.jsonl"  # beside it: answers that came before those of earlier prompts

_SEND_SECONDS = 30

Row = dict[str, Any]
Key = tuple[str | int, int]  # a prompt's id and the number of a sample


def check_paths(prompts: Path, out: Path) -> None:
    """ValueError unless there are prompts to read and something else to write."""
    if not prompts.is_file():
        raise ValueError(f"{prompts}: expected a JSONL file of prompts, got no such file; check the path")
    if out.exists() and not out.is_file():
        raise _no_file(out)
    ours = [path.resolve() for path in (out, sidecar(out), ahead(out))]
    if prompts.resolve() in ours or out.exists() and out.samefile(prompts):
        raise ValueError(f"{out}: expected another file than the prompts, got the same; choose another --out")


def _no_file(path: Path) -> ValueError:
    return ValueError(f"{path}: expected a file, got something else; choose another path")


@contextlib.contextmanager
def at_hand(prompts: Path, out: Path) -> Iterator[tuple[Path, Path, Sender]]:
    """Prompts and output as files of this machine, and what is told when rows have been written.

    A bucket, to which nothing is appended, gets a copy of the output every 30 seconds and at the end.
    """
    with tempfile.TemporaryDirectory() as held:
        folders = {
            path.parent: Path(held) / f"{i}" for i, path in enumerate((out, prompts)) if is_bucket(path)
        }
        here = [folders.get(path.parent, path.parent) / path.name for path in (prompts, out)]
        for path in (prompts, out, sidecar(out), ahead(out)):
            if (folder := folders.get(path.parent)) is not None:
                check_bucket(path)
                folder.mkdir(exist_ok=True)
                if path.is_dir():
                    raise _no_file(path)
                if path.is_file():
                    copy_file(path, folder / path.name)
        sender = Sender(here[1], out)
        try:
            yield here[0], here[1], sender
        except BaseException as error:
            with contextlib.suppress(Exception):  # what is failing already is what to tell
                sender.send()
            if not folders or not isinstance(error, ValueError):
                raise
            text = str(error)  # it may name a copy
            for there, folder in folders.items():
                text = text.replace(str(folder), str(there))
            raise ValueError(text) from error
        sender.send()


class Sender:
    """Copies what has been written here to where it belongs; does nothing where that is here."""

    def __init__(self, here: Path, there: Path):
        self._here, self._there = here, there
        self._sent, self._again_at = self._versions(), time.monotonic() + _SEND_SECONDS

    def maybe(self) -> None:
        """Every 30 seconds, or less often where it takes long. A bucket that does not take it is told in a
        warning, and asked again: it is no reason to end the run."""
        start = time.monotonic()
        if start < self._again_at:
            return
        try:
            self.send()
        except Exception as error:
            logging.getLogger(__name__).warning("%s: answers are not there yet (%s)", self._there, error)
        now = time.monotonic()
        self._again_at = now + max(_SEND_SECONDS, 10 * (now - start))

    def send(self) -> None:
        if self._here == self._there:
            return
        versions = self._versions()
        for name, version in versions.items():  # the output last: what says whose it is stands beside it
            if version != self._sent.get(name):
                copy_file(self._here.with_name(name), self._there.with_name(name))
        for name in self._sent.keys() - versions.keys():
            self._there.with_name(name).unlink(missing_ok=True)
        self._sent = versions

    def _versions(self) -> dict[str, tuple[int, int]]:
        files = (sidecar(self._here), ahead(self._here), self._here)
        stats = {path.name: path.stat() for path in files if path.is_file()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def sidecar(out: Path) -> Path:
    return out.with_name(out.name + SIDECAR)


def ahead(out: Path) -> Path:
    return out.with_name(out.name + AHEAD)


def check_owner(out: Path, record: Mapping[str, Any]) -> None:
    """ValueError unless `out` is free, empty, or of this very record."""
    if not out.is_file() or not out.stat().st_size:
        return
    beside = sidecar(out)
    if not beside.is_file():
        raise ValueError(f"{out}: expected {beside.name} beside it, got none: not ours; choose another --out")
    there, here = _flat(_read_record(beside)), _flat(record)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if differing:
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ValueError(
            f"{out}: the output of another run, which differs in {', '.join(differing[:6])}{more}; choose "
            "another --out"
        )


def _read_record(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else; choose another --out") from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}."""
    if not isinstance(value, Mapping) or not value:
        return {prefix or "it": value}
    children = [_flat(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in value.items()]
    return {key: leaf for child in children for key, leaf in child.items()}


@contextlib.contextmanager
def opened(out: Path, record: Mapping[str, Any]) -> Iterator[FileIO]:
    """The output, held for this process (the system lets go of it however the process ends)."""
    with out.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another process writes it; wait or choose another --out") from None
        check_owner(out, record)  # now that nobody else can change it
        if not out.stat().st_size:
            if not sidecar(out).is_file() or _flat(_read_record(sidecar(out))) != _flat(record):
                ahead(out).unlink(missing_ok=True)  # of a run whose output is gone
            _write_whole(sidecar(out), json.dumps(record, indent=2) + "\n")
        yield file


def whole_groups(out: Path, groups: Sequence[Sequence[Key]]) -> tuple[int, int]:
    """(how many groups are there whole, the bytes that they take); ValueError for a row of another place."""
    lines = out.read_bytes().splitlines(keepends=True) if out.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    wanted = [key for group in groups for key in group]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found = (row["id"], row["sample"])
        except (ValueError, KeyError, TypeError):
            found = None
        if number > len(wanted) or found != wanted[number - 1]:
            raise ValueError(f"{out}:{number}: not the row that belongs there; delete the file to start anew")
    done, end = 0, 0
    while done < len(groups) and end + len(groups[done]) <= len(lines):
        end += len(groups[done])
        done += 1
    return done, sum(map(len, lines[:end]))


def append(file: FileIO, rows: Sequence[Row]) -> None:
    """Writes rows and waits until the disk has them. OSError with the file's name."""
    data = memoryview("".join(_line(row) for row in rows).encode())
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


class Ahead:
    """Groups that are done before an earlier one, kept on disk so that a kill does not lose them.

    For answers that come in any order and cost to ask for again. It is emptied at the end, and belongs to
    whoever holds the output.
    """

    def __init__(self, out: Path, groups: Sequence[Sequence[Key]], done: int):
        self._path = ahead(out)
        self._rows: dict[int, list[Row]] = {}
        for line in self._path.read_bytes().splitlines() if self._path.is_file() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):  # cut short by a kill
                entry = json.loads(line)
                place, rows = entry["group"], entry["rows"]
                if place >= done and [(row["id"], row["sample"]) for row in rows] == list(groups[place]):
                    self._rows[place] = rows
        if self._path.is_file():  # one line cut short in the middle would spoil the next
            _write_whole(self._path, "".join(_line(_entry(*item)) for item in self._rows.items()))

    def __contains__(self, place: int) -> bool:
        return place in self._rows

    def put(self, place: int, rows: Sequence[Row]) -> None:
        self._rows[place] = list(rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(_entry(place, rows)))

    def pop(self, place: int) -> list[Row] | None:
        return self._rows.pop(place, None)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _entry(place: int, rows: Sequence[Row]) -> Row:
    return {"group": place, "rows": list(rows)}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Progress:
    """Prompts done, tokens/s and time left on standard error: on a terminal one line that is redrawn, else
    a line for each `advance`, but at most one in `every` seconds and one at the end."""

    def __init__(self, total: int, quiet: bool, every: float = 0.0):
        self._total, self._done, self._quiet, self._every = total, 0, quiet, every
        self._tokens, self._start = 0, time.monotonic()
        self._first: tuple[int, float] | None = None
        self._shown = float("-inf")
        self._status: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("generate")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def start(self, done: int) -> None:
        """So many prompts were done before."""
        self._done = done

    def advance(self, prompts: int, tokens: int) -> None:
        now = time.monotonic()
        self._done, self._tokens = self._done + prompts, self._tokens + tokens
        left = None
        if self._first is None:  # the first chunk has waited for the compiler
            self._first = (self._done, now)
        else:
            done, start = self._first
            left = (now - start) / (self._done - done) * (self._total - self._done)
        speed = {TOKENS_PER_SECOND: self._tokens / max(now - self._start, 1e-9)}
        text = describe_progress("generate", self._done, self._total, speed, left)
        if self._status is not None:
            self._status.update(text)
        elif not self._quiet and (now - self._shown >= self._every or self._done == self._total):
            self._shown = now
            print(text, file=sys.stderr, flush=True)
