"""Where files are: folders of this machine and, by the same methods, buckets (gs://, s3://).

A bucket has no rename and no append: an object is there whole or not at all, a directory is what its objects
have in common, and so the object that is written last (DONE, Orbax's commit_success.txt) says that the
others are there; what cannot be said so holds UNFINISHED until it is whole. Credentials and endpoints are
those of gcsfs and s3fs, and of tensorstore, from the environment of Google Cloud and AWS.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

UNFINISHED = "UNFINISHED"  # in a directory of a bucket while it is written or removed: later on, of no use
MADE = "nemojax makes this directory, or did not finish: the same command makes it anew\n"  # what it says
MOVED = "nemojax moves this directory, or did not finish: what is left here is removed\n"
# say that what was written before is there
_LAST = ("commit_success.txt", "index.json", "cache.json", "DONE")
_AT_ONCE = 64  # requests
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> (what opens it, our extra)


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path names a place in a bucket, or another address."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike) -> Path:
    """A folder or file here, or in a bucket by etils' epath, whose methods are those of pathlib but for
    `rglob` (see `files_below`).

    ValueError for another address, or without the package that reads it.
    """
    text = os.fspath(path)
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text)
    if scheme not in _PACKAGES:
        raise ValueError(f"{text}: expected a path, gs:// or s3://, got {scheme}://")
    if not all(rest.partition("/")[::2]):  # what empties a place must not be able to empty a bucket
        raise ValueError(f"{text}: expected {scheme}://BUCKET/PATH, got no {'path' if rest else 'bucket'}")
    _prepare(scheme)
    from etils import epath

    return cast(Path, epath.Path(text))


def absolute(path: str | os.PathLike) -> Path:
    """`place` of a path, from the root if it is here."""
    there = place(path)
    return there if is_bucket(there) else there.absolute()


def normal(path: str | os.PathLike) -> Path:
    """`absolute`, and on this machine without `..`."""
    there = place(path)
    return there if is_bucket(there) else Path(os.path.abspath(there))


def directory(path: str | os.PathLike) -> Path:
    """A directory or file of this machine; ValueError for a bucket, for what cannot work in one."""
    if is_bucket(path):
        raise ValueError(
            f"{os.fspath(path)}: expected a path on this machine; what does not work in a bucket "
            "works where one is mounted (gcsfuse, mountpoint-s3): name the directory there"
        )
    return Path(path)


@functools.cache
def _prepare(scheme: str) -> None:
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{scheme}://: expected the package {package}, got none; pip install 'nemojax[{extra}]'"
        )
    os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is installed epath would take that
    from fsspec.config import conf

    # other processes write too, so what was listed once is not what is there now
    for name in {"gs": ("gs", "gcs"), "s3": ("s3",)}[scheme]:
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def check_bucket(path: str | os.PathLike) -> None:
    """ValueError when the bucket of a place cannot be listed; nothing for a place on this machine."""
    if not is_bucket(path):
        return
    place(path)
    scheme, _, rest = os.fspath(path).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    system = _system(bucket)
    try:
        try:
            system.ls(os.fspath(path))
        except FileNotFoundError:  # nothing there yet, or no bucket
            system.ls(bucket)
    except Exception as error:  # gcsfs, botocore and aiohttp have each their own
        line = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(
            f"{os.fspath(path)}: cannot list the bucket {bucket} ({line[:200]}); check its name and the "
            "credentials of this machine"
        ) from error


def _system(url: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(url)[0]


def names_in(directory: Path) -> set[str]:
    """The names of what is in a directory; none where there is no directory."""
    try:
        return {entry.name for entry in directory.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def files_below(directory: Path) -> Iterator[Path]:
    """All files of a directory and of those in it, in no order."""
    if is_bucket(directory):
        system = _system(str(directory))
        yield from (place(system.unstrip_protocol(name)) for name in system.find(str(directory)))
    else:
        yield from (path for path in directory.rglob("*") if path.is_file())


def version(path: Path) -> Any:
    """What changes when a file does, without reading it: its size, and time of change or checksum."""
    if is_bucket(path):
        about = _system(str(path)).info(str(path))
        tags = (about.get(name) for name in ("etag", "ETag", "md5Hash", "generation"))
        return [about["size"], next((tag for tag in tags if tag), None)]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing: an object of a bucket, or a temporary name on disk, then renamed."""
    if is_bucket(path):
        path.write_bytes(data)
        return
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that has its name only once all of it is on disk; one for a bucket lies among this
    machine's temporary files until then."""
    if is_bucket(path):
        with tempfile.NamedTemporaryFile() as held:
            yield cast(BinaryIO, held)
            held.flush()
            copy_file(Path(held.name), path)
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, of which either may be in a bucket; does nothing where both are the same file."""
    if is_bucket(target) and not is_bucket(source):
        _system(str(target)).put_file(os.fspath(source), str(target))
    elif is_bucket(source):
        if source != target:
            with source.open("rb") as read, whole_file(target) as written:
                shutil.copyfileobj(read, written, 1 << 20)
    elif source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def sizes_in(directory: Path) -> dict[str, int]:
    """The bytes of the files in a directory, by name; none where there is no directory."""
    try:
        if is_bucket(directory):
            found = _system(str(directory)).ls(str(directory), detail=True)
            return {os.path.basename(one["name"]): one["size"] for one in found if one["type"] == "file"}
        return {one.name: one.stat().st_size for one in directory.iterdir() if one.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def read_ranges(ranges: Sequence[tuple[Path, int, int]]) -> list[bytes]:
    """The bytes from a first to before a last of each file, all of one bucket; many are asked for at once."""
    if not ranges:
        return []
    paths, firsts, lasts = zip(*ranges, strict=True)
    names = [str(path) for path in paths]
    found = _system(names[0]).cat_ranges(
        names, list(firsts), list(lasts), batch_size=_AT_ONCE, on_error="raise"
    )
    for one in found:
        if isinstance(one, BaseException):  # older clients return it all the same
            raise one
    return found


def remove_tree(directory: Path, ignore_errors: bool = False) -> None:
    """Removes a directory and all that is in it; does nothing when there is none."""
    try:
        if is_bucket(directory):
            cast(Any, directory).rmtree(missing_ok=True)
        else:
            shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except Exception:
        if not ignore_errors:
            raise


def is_unfinished(directory: Path, *why: str) -> bool:
    """Whether a directory of a bucket was being written or removed, and has to be made anew. A file of that
    name which is not ours says nothing. why: MADE, MOVED; either, unless said."""
    if not is_bucket(directory) or not (mark := directory / UNFINISHED).is_file():
        return False
    return mark.read_text() in (why or (MADE, MOVED))


def clear_unfinished(directory: Path, *why: str) -> None:
    """Removes a directory that `is_unfinished`, what says so last; does nothing to another."""
    if is_unfinished(directory, *why):
        for entry in directory.iterdir():
            if entry.name != UNFINISHED:
                entry.unlink() if entry.is_file() else remove_tree(entry)
        remove_tree(directory)


def move_tree(source: Path, target: Path) -> None:
    """Gives a directory of a bucket another place in it, which holds nothing yet: copies, then removes.

    A kill leaves `source` whole beside a `target` that is unfinished, or the other way round, or both whole,
    of which `source` has lost its DONE at most.
    """
    system, files = _system(str(source)), list(files_below(source))
    write_text(target / UNFINISHED, MOVED)
    for last in ("", *_LAST):
        some = [file for file in files if last == (file.name if file.name in _LAST else "")]
        there = [str(target / file.relative_to(source)) for file in some]
        system.copy([*map(str, some)], there, batch_size=_AT_ONCE)
    (target / UNFINISHED).unlink()
    if source / "DONE" in files:
        (source / "DONE").unlink()
    write_text(source / UNFINISHED, MOVED)
    clear_unfinished(source)


def kvstore_spec(url: str) -> dict[str, Any]:
    """Tensorstore's name for a folder: a local path, file://, gs://bucket/path, s3://bucket/path, memory://."""
    scheme, found, rest = url.partition("://")
    if not found:
        return {"driver": "file", "path": f"{Path(url).expanduser().absolute()}/"}
    rest = rest.rstrip("/") + "/"
    match scheme:
        case "file":
            return {"driver": "file", "path": f"{Path('/' + rest.lstrip('/'))}/"}
        case "memory":
            return {"driver": "memory", "path": rest}
        case "gs" | "s3":
            bucket, _, path = rest.partition("/")
            if not bucket:
                raise ValueError(f"{url}: expected {scheme}://BUCKET/PATH, got no bucket")
            spec = {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": path}
            return spec | (_endpoint() if scheme == "s3" else {})
    raise ValueError(f"{url}: expected a path, gs:// or s3://, got {scheme}://")


def _endpoint() -> dict[str, str]:
    """Where S3 is when it is not Amazon's: tensorstore does not look into the environment for it."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"endpoint": url, "aws_region": region} if url else {}


@functools.cache
def teach_orbax_s3() -> None:
    """Has Orbax write to s3:// as it does to gs://.

    It opens s3:// paths (epath), but of its two questions, which tensorstore driver a path means and whether
    it can be renamed, it answers both as for a folder. Called before a checkpoint in S3 is read or written.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for module, name in (
        (gcs_utils, "is_gcs_path"),
        (gcs_utils, "get_kvstore_for_gcs"),
        (tensorstore_utils, "_use_gcs_driver"),
        (tensorstore_utils, "_normalize_path"),
    ):
        if not hasattr(module, name):
            raise ValueError(
                f"s3://: expected {name} in {module.__name__}, got none; install orbax-checkpoint 0.12"
            )

    def is_object_store(path: Any) -> bool:
        return os.fspath(path).startswith(("gs://", "s3://"))

    def normalized(path: str) -> str:
        scheme, found, rest = path.partition("://")
        return f"{scheme}://{os.path.normpath(rest)}" if found else os.path.normpath(path)

    google = gcs_utils.get_kvstore_for_gcs

    def kvstore(path: str) -> dict[str, Any]:
        if path.startswith("gs://"):
            return google(path)
        spec = kvstore_spec(path)
        return spec | {"path": spec["path"].removesuffix("/")}

    gcs_utils.is_gcs_path = is_object_store
    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils._use_gcs_driver = is_object_store
    tensorstore_utils._normalize_path = normalized
