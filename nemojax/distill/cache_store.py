"""A teacher's likeliest next tokens for the rows of some training data, on disk or in a bucket.

Row number r of the data stands at [r // B, r % B] of zarr3 arrays with checksums: `ids` and `logps`
[steps, B, T, K], likeliest first, and `tail` [steps, B, T], the log-probability of all others together. A
file holds one place of the batch over `steps_per_file` steps, so processes that share out the rows of a batch
share no file. `hash` [steps, B] is written last: a row whose hash is there is there. `cache.json` says of
which teacher, tokenizer and data all this is.

Legend: B rows of a step, T positions, K tokens kept, N rows asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from nemojax.buckets import kvstore_spec, place
from nemojax.stage import read_done, read_result

FORMAT_VERSION = 1
ABOUT, FOLDER = "cache.json", "rows"
CACHED_BYTES = 64 << 20  # of what tensorstore has read
Value = TypeVar("Value")
Reading = Callable[[], dict[str, np.ndarray]]  # waits for ids, logps [N, T, K] and tail [N, T] of N rows


@dataclass(frozen=True)
class About:
    """All that decides what a cache holds; `teacher` is a digest of weights, `artifact` of the files."""

    teacher: str
    artifact: str
    tokenizer: str
    data: str
    vocab_size: int
    temperature: float
    top_k: int
    dtype: str
    length: int
    batch_size: int
    steps: int
    steps_per_file: int


def location(path: str) -> str:
    """Where a cache is that is named by its place, or by the work directory of the stage that wrote it."""
    if not _is_place(path) or (place(path) / ABOUT).is_file():
        return path
    if (place(path) / FOLDER / ABOUT).is_file():
        return str(place(path) / FOLDER)
    return read_result(path).get("cache", path)


def is_input(path: str) -> bool:
    """Whether a stage that reads a cache notices when that changes: in a folder of this machine, or in the
    work directory of the stage that wrote it."""
    return os.path.isdir(path) or (_is_place(path) and read_done(path) is not None)


def _is_place(path: str) -> bool:
    scheme, found, rest = path.partition("://")
    return not found or (scheme in ("gs", "s3") and "/" in rest.rstrip("/"))


def row_hashes(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[B] u64 of what a teacher reads of each row, never 0."""
    rows = zip(batch["tokens"], batch["segments"], strict=True)
    digests = [hashlib.blake2b(t.tobytes() + s.tobytes(), digest_size=8).digest() for t, s in rows]
    return np.maximum(np.frombuffer(b"".join(digests), np.uint64), 1)


class TeacherCache:
    """A cache at `url`. `context`: tensorstore's, which memory:// needs to be found again."""

    def __init__(self, url: str, context: Any = None):
        import tensorstore as ts

        self.url = url
        self._spec = kvstore_spec(url)
        self._context = context or ts.Context({"cache_pool": {"total_bytes_limit": CACHED_BYTES}})
        self._store = self._ask(lambda: ts.KvStore.open(self._spec, context=self._context).result())
        found = self._ask(lambda: self._store.read(ABOUT).result())
        self.about: About | None = self._parse(found.value) if found.state == "value" else None
        self._hashes = np.zeros((0, 0), np.uint64)
        if self.about is not None:
            self._open_all(self.about)

    def claim(self, about: About) -> None:
        """Makes this the cache that `about` describes; ValueError where another is."""
        if self.about is not None:
            old, new = dataclasses.asdict(self.about), dataclasses.asdict(about)
            if old["teacher"] == new["teacher"]:
                new["artifact"] = old["artifact"]  # the same weights in other files
            if differ := [key for key in new if old[key] != new[key]]:
                raise ValueError(
                    f"{self.url}: expected no cache or this one, got one with {differ[0]} {old[differ[0]]}, "
                    f"not {new[differ[0]]}; choose another place, or delete it"
                )
            return
        self._open_all(about, create=True)
        text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(about)}, indent=2)
        self._ask(lambda: self._store.write(ABOUT, text.encode()).result())
        self.about = about

    @property
    def told(self) -> About:
        """`about` of a cache that exists; ValueError when there is none."""
        if self.about is None:
            raise ValueError(f"{self.url}: expected a teacher's cache ({ABOUT}), got none; write one first")
        return self.about

    @property
    def num_rows(self) -> int:
        """Rows that are there, from the first on without a gap."""
        missing = np.flatnonzero(self._hashes.ravel() == 0)
        return int(missing[0]) if missing.size else self._hashes.size

    def write(self, step: int, places: slice, arrays: Mapping[str, np.ndarray]) -> list[Any]:
        """Begins to write whole files: ids, logps [steps, n, T, K] and tail [steps, n, T] from `step` on, of
        the n `places` of a batch. Returns what `wait` waits for."""
        import tensorstore as ts

        transaction = ts.Transaction()
        steps = slice(step, step + len(arrays["tail"]))
        places = slice(places.start, self.told.batch_size, places.step)
        copies = [
            self._arrays[name].with_transaction(transaction)[steps, places].write(array)
            for name, array in arrays.items()
        ]
        self._ask(lambda: [one.copy.result() for one in copies])
        return [transaction.commit_async()]

    def wait(self, writes: list[Any]) -> None:
        """Returns when everything that `write` began is stored; ValueError when it cannot be."""
        self._ask(lambda: [one.result() for one in writes])

    def commit(self, step: int, hashes: np.ndarray) -> None:
        """Marks whole steps [steps, B] as there; by one process, when all have written theirs."""
        self._ask(lambda: self._arrays["hash"][step : step + len(hashes)].write(hashes).result())
        self._hashes[step : step + len(hashes)] = hashes

    def check(self, rows_N: np.ndarray, hashes_N: np.ndarray) -> None:
        """ValueError naming the first row that the teacher has not read, or not as it is here."""
        about = self.told
        if (last := int(rows_N.max(initial=-1))) >= self.num_rows:
            raise ValueError(
                f"{self.url}: expected row {last}, got a cache of {self.num_rows} rows ({self.num_rows} / "
                f"{about.batch_size} = {self.num_rows // about.batch_size} steps); write a longer one, or "
                "train for fewer steps"
            )
        other = self._hashes[np.divmod(rows_N, about.batch_size)] != hashes_N
        if other.any():
            raise ValueError(
                f"{self.url}: row {int(rows_N[other.argmax()])}: expected the tokens that the teacher read, "
                "got others; use the data and the tokenizer of the cache, or write it again"
            )

    def read(self, rows_N: np.ndarray) -> Reading:
        """Begins to read these rows; what is returned waits. ValueError, then, for one that is damaged."""
        step_N, place_N = np.divmod(rows_N, self.told.batch_size)
        reads = {
            name: self._ask(lambda name=name: self._arrays[name][step_N, place_N].read())
            for name in ("ids", "logps", "tail")
        }

        def result() -> dict[str, np.ndarray]:
            found = self._ask(lambda: {name: one.result() for name, one in reads.items()})
            firsts = np.stack([found["logps"][:, 0, 0].astype(np.float32), found["tail"][:, 0]])
            there_N = np.isfinite(firsts).all(0) & (found["ids"][:, 0, 0] < self.told.vocab_size)
            if not there_N.all():  # what a file that is gone reads as
                row = rows_N[there_N.argmin()]
                raise ValueError(f"{self.url}: row {row}: damaged, a file is missing; write the cache again")
            return {**found, "ids": found["ids"].astype(np.int32)}

        return result

    def _parse(self, text: bytes) -> About:
        try:
            values = json.loads(text)
            version = values.pop("format_version")
            if version == FORMAT_VERSION:
                return About(**values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{self.url}/{ABOUT}: expected what a cache holds, got something else ({error}); it is "
                "damaged, so write the cache again"
            ) from error
        raise ValueError(
            f"{self.url}/{ABOUT}: expected format_version {FORMAT_VERSION}, got {version!r}; use the nemojax "
            "that wrote it, or write the cache again"
        )

    def _open_all(self, about: About, create: bool = False) -> None:
        import tensorstore as ts

        def one(name: str) -> Any:
            kvstore = {**self._spec, "path": f"{self._spec['path']}{name}/"}
            spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore, "metadata": _metadata(about)[name]}
            return ts.open(spec, context=self._context, open=True, create=create)

        opening = {name: one(name) for name in _metadata(about)}
        self._arrays = {name: self._ask(opened.result) for name, opened in opening.items()}
        self._hashes = np.array(self._ask(lambda: self._arrays["hash"].read().result()))

    def _ask(self, what: Callable[[], Value]) -> Value:
        """What `what()` returns; one line where tensorstore fails."""
        try:
            return what()
        except (ValueError, OSError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0].split(" [tensorstore_spec")[0]
            if "RESOURCE_EXHAUSTED" in line or "No space left" in line:
                raise ValueError(f"{self.url}: no space left; free some and run again") from error
            if any(code in line for code in ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION")):
                line = f"damaged; write the cache again ({line[:200]})"
            raise ValueError(f"{self.url}: {line[:300]}") from error


def _metadata(about: About) -> dict[str, dict[str, Any]]:
    """The zarr3 metadata of each array. What was never written reads as NaN, or as an id that is none."""
    small = about.vocab_size < 1 << 16
    places = [about.steps, about.batch_size]
    positions, kept = [about.length], [about.length, about.top_k]
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    packed = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle"}

    def of(kind: str, fill: Any, shape: list[int], chunk: list[int], codecs: list[dict]) -> dict[str, Any]:
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        about_it = {"data_type": kind, "fill_value": fill, "chunk_grid": grid, "codecs": codecs}
        return {"shape": shape, **about_it}

    def rows(kind: str, fill: Any, rest: list[int]) -> dict[str, Any]:
        inside = {
            "chunk_shape": [1, 1, *rest],
            "codecs": [endian, {"name": "blosc", "configuration": packed}, {"name": "crc32c"}],
            "index_codecs": [endian, {"name": "crc32c"}],
        }
        sharded = {"name": "sharding_indexed", "configuration": inside}
        return of(kind, fill, [*places, *rest], [about.steps_per_file, 1, *rest], [sharded])

    groups = [about.steps_per_file, about.batch_size]
    return {
        "ids": rows("uint16" if small else "uint32", (1 << (16 if small else 32)) - 1, kept),
        "logps": rows(about.dtype, "NaN", kept),
        "tail": rows("float32", "NaN", positions),
        "hash": of("uint64", 0, places, groups, [endian, {"name": "crc32c"}]),
    }
