"""Files read from the start or from where one stopped, near or far, and patience with those that fail.

A name is a path of this machine, an http(s) address, which is read by ranges of bytes, or anything that
fsspec opens (`hf://`, and with their packages `gs://` and `s3://`).
"""

from __future__ import annotations

import bz2
import gzip
import http.client
import io
import logging
import lzma
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from nemojax.config import field

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What a second try cannot mend: our own messages, bad contents, and mistakes in code.
FINAL = (ValueError, TypeError, LookupError, AttributeError, AssertionError)
BUFFER_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
Place = TypeVar("Place")
Row = TypeVar("Row")
log = logging.getLogger(__name__)


class SourceUnavailable(ValueError):
    """A source could not be read, however often it was tried; nothing is lost, and the run can be resumed."""


@dataclass(frozen=True)
class Streaming:
    """How sources with `stream` are read."""

    buffer: int = field(2048, "documents that are held and shuffled at a time, of each source")
    workers: int = field(2, "threads that tokenise on each host")
    tries: int = field(6, "how often in a row a source may fail to be read before the run stops")
    wait: float = field(1.0, "seconds between the first two tries, doubled for every further one")

    def __post_init__(self):
        for name in ("buffer", "workers", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"streaming.{name}: expected at least 1, got {getattr(self, name)}")
        if self.wait < 0:
            raise ValueError(f"streaming.wait: expected seconds from 0 on, got {self.wait}")


def is_remote(name: str | Path) -> bool:
    """Whether a name is an address rather than a path of this machine."""
    return "://" in str(name)


def remote_files(path: str) -> list[str]:
    """The files at an address: one for http(s), else those that a pattern matches, sorted."""
    if path.startswith(("http://", "https://")):
        return [path]
    import fsspec

    try:
        system, _, _ = fsspec.get_fs_token_paths(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: expected an address that fsspec reads, got an error ({error})") from error
    found = sorted(str(match) for match in system.glob(path))
    return [str(system.unstrip_protocol(match)) for match in found]


def open_file(name: str | Path) -> BinaryIO:
    """The bytes of a file, seekable."""
    if not is_remote(name):
        return Path(name).open("rb")
    if str(name).startswith(("http://", "https://")):
        return io.BufferedReader(HttpFile(str(name)), BUFFER_BYTES)
    import fsspec

    return cast(Any, fsspec.open(str(name), "rb")).open()


def packed_lines(name: str | Path, start: int = 0) -> Iterator[bytes]:
    """The lines of a file, unpacked by its ending, from byte `start` of its contents on.

    ValueError where it cannot be unpacked.
    """
    with unpacked(name) as lines:
        try:
            lines.seek(start)
            yield from lines
        except Exception as error:
            _tell_damage(name, error)


def unpacked(name: str | Path) -> BinaryIO:
    """The contents of a file, unpacked by its ending."""
    opener = OPENERS.get(Path(str(name)).suffix)
    if not opener:
        return open_file(name)
    return opener(open_file(name) if is_remote(name) else name)


def _tell_damage(name: str | Path, error: Exception) -> NoReturn:
    """ValueError if a file is damaged; what failed on the way to it (a network, a disk) goes on as it is."""
    damaged = isinstance(error, gzip.BadGzipFile | EOFError | zlib.error | lzma.LZMAError)
    if damaged or (type(error) is OSError and error.errno is None):  # the latter is how bz2 says it
        raise ValueError(f"{name}: cannot unpack it ({error}); fetch or compress the file again") from error
    raise error


class HttpFile(io.RawIOBase):
    """A file behind a URL: one request reads on from a place, `seek` asks for another range of bytes.

    Raises FileNotFoundError or PermissionError where the server says so, else ConnectionError.
    """

    def __init__(self, url: str):
        self.url, self._at = url, 0
        self._response: Any = None
        self._size: int | None = None
        self._until: int | None = None  # where the response ends, which may be less than was asked for

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        at = offset + (self._length() if start is None else start)
        if at != self._at:
            self._drop()
            self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        if not len(buffer) or self._at == self._size:
            return 0
        if self._response is None or self._at == self._until:
            self._request()
        try:
            count = self._response.readinto(buffer) if self._response else 0
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise ConnectionError(f"{self.url}: {error or type(error).__name__}") from error
        self._at += count
        if not count and self._response and self._until is not None:
            self._drop()
            raise ConnectionError(f"{self.url}: connection ended at byte {self._at} of {self._until}")
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _length(self) -> int:
        if self._size is None:
            self._request()
        if self._size is None:
            raise ConnectionError(f"{self.url}: expected a server that says how long the file is")
        return self._size

    def _request(self) -> None:
        """Opens the range from here to the end; no response where that is empty."""
        self._drop()
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self._at}-"})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # nothing from here on
                self._size = self._at
                return
            kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
            kind |= {410: FileNotFoundError}
            raise kind.get(error.code, ConnectionError)(f"{self.url}: {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"{self.url}: {getattr(error, 'reason', error)}") from error
        length = response.headers.get("Content-Length")
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status == 206:
            self._until = self._at + int(length) if length else None
            self._size = int(total) if total.isdigit() else None
        else:
            self._until = self._size = int(length) if length else None
            self._skip(response)
        self._response = response

    def _skip(self, response: Any) -> None:
        """A server without ranges sends the whole file: what lies before is thrown away."""
        left = self._at
        while left and (part := response.read(min(left, BUFFER_BYTES))):
            left -= len(part)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def patiently(
    read: Callable[[Place], Iterator[tuple[Place, Row]]],
    place: Place,
    streaming: Streaming,
    where: str,
    closed: threading.Event,
    must_exist: bool = False,
) -> Iterator[tuple[Place, Row]]:
    """`read(place)`, gone on with after a failure from the last place that it gave.

    read: gives (where to go on after it, row). Waits between tries, longer each time, unless `closed` is
    set meanwhile. `SourceUnavailable` after as many failures without a row between them as allowed; with
    `must_exist` at once where there is no such file.
    """
    failures, since = 0, time.monotonic()
    while True:
        try:
            for after, row in read(place):
                failures, place = 0, after
                yield after, row
            return
        except FINAL:
            raise
        except Exception as error:
            if not failures:
                since = time.monotonic()
            failures += 1
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            missing = must_exist and isinstance(error, FileNotFoundError | PermissionError)
            if missing or failures >= streaming.tries or closed.is_set():
                raise SourceUnavailable(
                    f"{where}: expected to read it, got {reason} ({failures} failure{'s'[: failures > 1]} in "
                    f"{time.monotonic() - since:.0f} s); the run can be resumed once it is back"
                ) from error
            pause = streaming.wait * 2 ** (failures - 1)
            log.warning("%s: %s; trying again in %g s", where, reason, pause)
            closed.wait(pause)
