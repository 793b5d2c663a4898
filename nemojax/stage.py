"""Running a stage on a work directory: lock, fingerprint, skip, resume, DONE.

A work directory belongs to one resolved configuration and one state of its inputs. Whatever stands in it
when a stage starts is either finished (skipped), half done (resumed) or another run's (left alone).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemojax.arch import ArchSpec
from nemojax.buckets import (
    MOVED,
    check_bucket,
    clear_unfinished,
    files_below,
    is_bucket,
    is_unfinished,
    move_tree,
    names_in,
    place,
    version,
    write_text,
)
from nemojax.config import to_dict
from nemojax.data.tokenizer import copy_tokenizer

FORMAT_VERSION = 1
CONFIG, RESULT, DONE, LOCK = "config.json", "result.json", "DONE", ".lock"
PIPELINE = "pipeline.json"  # marks a directory whose folders are stages
_BOOKKEEPING = {CONFIG, f"{CONFIG}.partial", LOCK}
_VERSIONS = ("nemojax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_HASHED_BYTES = 1 << 20  # larger files count by name, size and time of change


class OtherRun(ValueError):
    """The work directory holds a run of another configuration, or of other inputs."""


def run_stage(
    name: str,
    cfg: Any,
    workdir: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    body: Callable[[Path], Mapping[str, Any]],
    *,
    many_processes: bool = False,
) -> dict[str, Any]:
    """Runs `body(workdir)` unless it is done, and returns the stage's result (also in result.json).

    cfg: the stage's frozen dataclass. inputs: artifacts, directories or files that the stage reads; when
    one of them changes, the work directory no longer matches. many_processes: the body can run in several
    at once; the primary then keeps the books, decides for all, and hands its result to all. In a bucket (gs://,
    s3://) nothing keeps two runs from one place at the same time.

    ValueError when an input is missing, when another process is at work here, when there are more
    processes than the stage can use, or (`OtherRun`, nothing touched) when the directory is another run's.
    """
    from nemojax import hosts

    if many_processes:
        hosts.start_processes()
    else:
        hosts.expect_one_process(name)
    workdir = place(workdir)
    with hosts.failing_together(), contextlib.ExitStack() as held:
        hosts.on_primary(lambda: check_bucket(workdir))
        wanted = hosts.on_primary(lambda: _record(name, cfg, inputs))
        done = hosts.on_primary(lambda: _begin(workdir, wanted, held))
        if done is not None:
            return done
        start = time.perf_counter()
        result = to_dict(dict(body(workdir)))
        return hosts.on_primary(lambda: _finish(workdir, wanted, result, time.perf_counter() - start))


def _begin(workdir: Path, wanted: Mapping[str, Any], held: contextlib.ExitStack) -> dict[str, Any] | None:
    """The result of a finished stage; else None, and the directory belongs to this run and is locked."""
    clear_unfinished(workdir, MOVED)  # `move_aside` has copied it
    _check_owner(workdir, wanted)
    workdir.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(workdir))
    _check_owner(workdir, wanted)  # again: another process may have begun since
    if read_done(workdir):
        return read_result(workdir)
    if names_in(workdir) <= _BOOKKEEPING:
        write_json(workdir / CONFIG, wanted)
    return None


def _finish(
    workdir: Path, wanted: Mapping[str, Any], result: dict[str, Any], seconds: float
) -> dict[str, Any]:
    write_json(workdir / RESULT, result)
    done = {"stage": wanted["stage"], "fingerprint": wanted["fingerprint"]}
    write_json(workdir / DONE, {**done, "wall_seconds": round(seconds, 3)})
    return result


def start_artifact(workdir: Path, arch: ArchSpec, tokenizer_dir: Path) -> None:
    """arch.json and tokenizer/ of a stage's model, written by one process before any goes on."""
    from nemojax import hosts

    def write() -> None:
        write_text(workdir / "arch.json", arch.dumps())
        copy_tokenizer(tokenizer_dir, workdir / "tokenizer")

    hosts.on_primary(write)


def fingerprint(path: str | os.PathLike) -> str:
    """A hex digest that changes when what stands at `path` does.

    A finished stage answers from its DONE, a pipeline from its finished stages, but for those that read the
    pipeline as a whole (a report). An unfinished artifact, a file or any other directory answers
    from names, sizes, times of change, and the contents of small files. ValueError when nothing is there.
    """
    check_bucket(path)
    path = place(path)
    done = read_done(path) if path.is_dir() else None
    if done:
        return done["fingerprint"]
    if path.is_file():
        return _digest([_file_entry(path, path.name)])
    if not path.is_dir():
        raise ValueError(f"{path}: expected an artifact, a directory or a file, got nothing there")
    if (path / PIPELINE).is_file():
        return _digest([[d.name, fingerprint(d)] for d in finished_stages(path)])
    if (path / "arch.json").is_file():  # an imported artifact: not its logs, nor its own bookkeeping
        roots = [path / "arch.json", path / "tokenizer", path / "checkpoints"]
    else:
        roots = [path]
    files = sorted(f for root in roots for f in ([root] if root.is_file() else files_below(root)))
    return _digest([_file_entry(f, str(f.relative_to(path))) for f in files if f.name != LOCK])


def finished_stages(pipeline: Path) -> list[Path]:
    """Work directories of a pipeline that are done, without those whose input is the pipeline itself."""
    done = [d for d in sorted(pipeline.iterdir()) if d.is_dir() and read_done(d)]
    return [d for d in done if os.path.abspath(pipeline) not in map(os.path.abspath, _inputs(d))]


def _inputs(workdir: Path) -> list[str]:
    return list((_read_record(workdir) or {}).get("inputs", {}))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The keys in which two config.json records differ: `stage`, dotted configuration keys, `input PATH`."""
    if stored.get("stage") != wanted["stage"]:
        return [f"stage ({stored.get('stage')} there, {wanted['stage']} here)"]
    there, here = _neutral(stored), _neutral(wanted)
    keys = sorted(k for k in there.keys() | here.keys() if there.get(k, _MISSING) != here.get(k, _MISSING))
    if not keys and stored["fingerprint"] != wanted["fingerprint"]:
        digests = [*stored["inputs"].values()]
        keys = [
            f"input {p}" for i, (p, d) in enumerate(wanted["inputs"].items()) if [d] != digests[i : i + 1]
        ]
        keys += [f"input {p}" for p in list(stored["inputs"])[len(wanted["inputs"]) :]]
    return keys


def read_done(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What DONE says ({"stage", "fingerprint", "wall_seconds"}), or None for an unfinished stage."""
    path = place(workdir) / DONE
    done = read_json(path)
    if done is not None and not (isinstance(done, dict) and isinstance(done.get("fingerprint"), str)):
        raise ValueError(
            f"{path}: expected a fingerprint, got none; delete the file to finish the stage again"
        )
    return done


def read_result(workdir: str | os.PathLike) -> dict[str, Any]:
    """A finished stage's result.json."""
    return read_json(place(workdir) / RESULT) or {}


def read_json(path: Path) -> Any | None:
    """The parsed file, or None when there is none; ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """As `write_text`; what JSON cannot say is an error before anything is written."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the directory for this process; the system lets go of it however the process ends. A bucket has
    nothing to hold."""
    if is_bucket(workdir):
        yield
        return
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"{workdir}: in use by {owner}; wait for it or choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def move_aside(workdir: Path, replaced: Path) -> Path:
    """Moves a stage's directory to the first free `replaced/<name>-<n>` and returns where it went."""
    replaced.mkdir(parents=True, exist_ok=True)
    n = 1
    while (target := replaced / f"{workdir.name}-{n}").exists() and not is_unfinished(target):
        n += 1
    clear_unfinished(target)
    with locked(workdir):
        move_tree(workdir, target) if is_bucket(workdir) else shutil.move(workdir, target)
    return target


def _check_owner(workdir: Path, wanted: Mapping[str, Any]) -> None:
    """Raises OtherRun unless the directory is free, or half done or finished for this very record."""
    if workdir.exists() and not workdir.is_dir():
        raise OtherRun(f"{workdir}: expected a directory, got a file; choose another --workdir")
    if names_in(workdir) <= _BOOKKEEPING:
        return
    stored = _read_record(workdir)
    if stored is None:
        raise OtherRun(
            f"{workdir}: expected an empty directory or a run, got other files; choose another --workdir"
        )
    if stored.get("format_version") != FORMAT_VERSION:
        version = stored.get("format_version")
        raise OtherRun(
            f"{workdir}: expected format_version {FORMAT_VERSION}, got {version}; choose another --workdir"
        )
    if stored["fingerprint"] != wanted["fingerprint"]:
        keys = differences(stored, wanted)
        shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
        raise OtherRun(
            f"{workdir}: the work directory of another run, which differs in {shown}; choose another one"
        )


def _read_record(workdir: Path) -> dict[str, Any] | None:
    """A run's config.json; None when there is none of ours, ValueError when it has been damaged."""
    path = workdir / CONFIG
    stored = read_json(path)
    if not isinstance(stored, dict) or "stage" not in stored:
        return None
    if stored.get("format_version") != FORMAT_VERSION:
        return stored  # another version may hold other things
    kinds = {"stage": str, "config": dict, "inputs": dict, "fingerprint": str}
    for key, kind in kinds.items():
        if not isinstance(stored.get(key), kind):
            raise ValueError(
                f"{path}: expected {key}, got {stored.get(key)!r}; restore it or choose another --workdir"
            )
    return stored


def _record(name: str, cfg: Any, inputs: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """What config.json holds. The fingerprint knows inputs by content: a moved pipeline stays the same."""
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "stage": name,
        "config": to_dict(cfg),
        "inputs": {str(path): fingerprint(path) for path in inputs},
        "versions": {"python": platform.python_version(), **_versions()},
    }
    identity = [FORMAT_VERSION, name, _neutral(record), list(record["inputs"].values())]
    return {**record, "fingerprint": _digest(identity)}


_MISSING = object()


def _neutral(record: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of the configuration, with paths of inputs replaced by their position."""
    positions = {os.path.abspath(path): f"<input {i}>" for i, path in enumerate(record["inputs"])}
    return {
        key: positions.get(os.path.abspath(value), value) if isinstance(value, str) and value else value
        for key, value in _flatten(record["config"])
    }


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for i, child in enumerate(value):
            yield from _flatten(child, f"{prefix}.{i}" if prefix else str(i))
    else:
        yield prefix, value


def _file_entry(path: Path, name: str) -> list[Any]:
    size, changed = version(path)
    if size <= _HASHED_BYTES:
        return [name, hashlib.sha256(path.read_bytes()).hexdigest()]
    return [name, size, changed]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
