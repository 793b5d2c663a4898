"""Token shards: documents tokenised once, kept on disk or in a bucket, read through memory maps or by ranges.

A directory of shards holds

- `shard-00000.bin`, ...: the ids of a shard's documents one after the other, uint16 or uint32, little-endian;
  beside it `shard-00000.weights`, f32, where some loss weight is not one;
- `documents.bin`: for every document its first token's place in its shard, the positions that it takes in a
  row, and the CRC-32 of its tokens (`DOCUMENT`, 16 bytes);
- `index.json`, written last: counts, SHA-256 of every file, the tokenizer's fingerprint, where it came from.

While they are being made, `shard-00000.npz` says that a shard is complete. Opening costs a look at every
file's size and one reading of documents.bin. Tokens are checked by their document's CRC when it is first
read: hashing whole shards at the first touch would read the entire collection in the first steps of a
shuffled run. `TokenShards.verify` hashes everything. Nothing of a bucket is copied to this machine's disk:
documents.bin is held in memory, and every document is one request, with others at once.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nemojax.buckets import check_bucket, is_bucket, names_in, place, read_ranges, sizes_in, whole_file
from nemojax.data.examples import Example, Examples
from nemojax.data.tokenizer import Tokenizer
from nemojax.data.vocabulary import tokenizer_digest

FORMAT_VERSION = 1
INDEX, DOCUMENTS = "index.json", "documents.bin"
HELDOUT = "heldout"  # the folder, in a directory of shards, of those that are never trained on
DOCUMENT = np.dtype([("start", "<i8"), ("size", "<i4"), ("crc", "<u4")])
SHARD_DOCUMENTS = 8192
_PART = 256  # documents held in memory while examples are written
_POSITIONS = 1 << 18  # of documents that are read from a bucket at once, about
_KINDS = {
    "documents": int,
    "tokens": int,
    "dtype": str,
    "weighted": bool,
    "tokenizer": str,
    "shards": list,
    "sha256": str,
}


class Encoded(NamedTuple):
    """Some documents on their way to a shard; `documents` [n] of `DOCUMENT`, starts counted from 0."""

    ids: np.ndarray
    weights: np.ndarray | None
    documents: np.ndarray


def encode_examples(examples: Sequence[Example], dtype: np.dtype, weighted: bool = False) -> Encoded:
    """Examples as a shard holds them; their weights are dropped unless `weighted`."""
    documents = np.zeros(len(examples), DOCUMENT)
    ids = [np.asarray(example.ids, dtype) for example in examples]
    weights = [np.asarray(example.weights, "<f4") for example in examples] if weighted else None
    lengths = np.asarray([len(x) for x in ids], np.int64)
    assert lengths.min(initial=1) >= 1, "a document has at least one token"
    documents["start"] = np.cumsum(lengths) - lengths
    documents["size"] = lengths - 1
    documents["crc"] = [_crc(x, None if weights is None else weights[i]) for i, x in enumerate(ids)]
    joined = None if weights is None else np.concatenate(weights)
    return Encoded(np.concatenate(ids), joined, documents)


def _crc(ids: np.ndarray, weights: np.ndarray | None) -> int:
    crc = zlib.crc32(ids.data)
    return crc if weights is None else zlib.crc32(weights.data, crc)


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type of the format that holds every id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


@functools.lru_cache(maxsize=4)
def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hex digest of what decides the ids of a document, its first and last one among them."""
    return _digest([tokenizer_digest(tokenizer), tokenizer.bos_id, tokenizer.eos_id])


def num_shards(documents: int, shard_documents: int) -> int:
    """How many shards a collection has; all but the last hold `shard_documents`."""
    return -(-documents // shard_documents)


def write_shard(folder: Path, number: int, parts: Iterable[Encoded], total: int) -> None:
    """Writes shard `number` of a collection of `total` documents; it counts once its .npz is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, tokens = [], 0
    with contextlib.ExitStack() as files:
        ids = files.enter_context(_whole(folder / f"{_name(number)}.bin"))
        weights: _Hashed | None = None
        for part in parts:
            ids.write(part.ids.data)
            if part.weights is not None:
                weights = weights or files.enter_context(_whole(folder / f"{_name(number)}.weights"))
                weights.write(part.weights.data)
            table = part.documents.copy()
            table["start"] += tokens
            tables.append(table)
            tokens += len(part.ids)
    hashes = [f.digest.hexdigest() for f in (ids, weights) if f is not None]
    mark = io.BytesIO()
    np.savez(mark, documents=np.concatenate(tables), tokens=tokens, total=total, hashes=hashes)
    with _whole(folder / f"{_name(number)}.npz") as file:
        file.write(mark.getbuffer())


def missing_shards(folder: Path, count: int) -> list[int]:
    """Which of `count` shards are not complete."""
    there = names_in(folder)
    return [n for n in range(count) if f"{_name(n)}.npz" not in there]


def is_complete(folder: Path) -> bool:
    """Whether a directory of shards is finished."""
    return (folder / INDEX).is_file()


def write_index(
    folder: Path, count: int, tokenizer: Tokenizer, source: Mapping[str, Any], weighted: bool = False
) -> None:
    """Completes a directory whose `count` shards are all there.

    source: what the tokens were made from, as JSON says it, for readers. ValueError if the shards are not
    of one collection.
    """
    shards, totals, last = [], set(), 0
    with _whole(folder / DOCUMENTS) as file:
        for number in range(count):
            with (folder / f"{_name(number)}.npz").open("rb") as mark, np.load(mark) as part:
                file.write(part["documents"].tobytes())
                last = len(part["documents"])
                hashes = [str(digest) for digest in part["hashes"]]
                shards.append({"documents": last, "tokens": int(part["tokens"]), "sha256": hashes})
                totals.add(int(part["total"]))
    documents = sum(shard["documents"] for shard in shards)
    if totals != {documents}:
        raise ValueError(
            f"{folder}: expected shards of one collection of {documents} documents, got shards of "
            f"{sorted(totals)}; every process must read the same texts, so delete {folder} and run again"
        )
    index = {
        "format_version": FORMAT_VERSION,
        "documents": documents,
        "tokens": sum(shard["tokens"] for shard in shards),
        "dtype": dtype_for(tokenizer).str,
        "weighted": weighted,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "source": source,
        "sha256": file.digest.hexdigest(),
        "shards": shards,
    }
    with _whole(folder / INDEX) as file:
        file.write((json.dumps(index, indent=1) + "\n").encode())
    clear_marks(folder)


def clear_marks(folder: Path) -> None:
    """Removes what only an unfinished directory needs."""
    for mark in folder.glob("shard-*.npz"):
        mark.unlink()


def write_shards(
    folder: str | Path,
    examples: Examples,
    tokenizer: Tokenizer,
    source: Mapping[str, Any],
    shard_documents: int = SHARD_DOCUMENTS,
) -> None:
    """Any examples (conversations, say) as a directory of shards, written by this process."""
    folder, total = place(folder), len(examples)
    if not total:
        raise ValueError(f"{folder}: expected examples to write, got none")
    weighted = not all(np.all(examples[i].weights == 1) for i in range(total))
    dtype, count = dtype_for(tokenizer), num_shards(total, shard_documents)
    (folder / INDEX).unlink(missing_ok=True)
    for number in range(count):
        first = number * shard_documents
        places = iter(range(first, min(total, first + shard_documents)))
        parts = iter(lambda places=places: list(itertools.islice(places, _PART)), [])
        encoded = (encode_examples([examples[i] for i in part], dtype, weighted) for part in parts)
        write_shard(folder, number, encoded, total)
    write_index(folder, count, tokenizer, source, weighted)


class TokenShards:
    """The `Examples` of a directory of shards. Memory: one byte a document; everything else is mapped, but of
    a bucket 17 bytes a document.

    `sizes` [documents] i32 are the positions that each takes in a row, `fingerprint` is a hex digest of all
    contents. Made by `open_shards`.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]):
        self.path, self.index = path, index
        self.num_tokens: int = index["tokens"]
        self._kinds = (np.dtype(index["dtype"]), np.dtype("<f4"))
        shards = index["shards"]
        self._files = [
            [path / f"{_name(n)}{end}" for end in (".bin", ".weights")[: 1 + index["weighted"]]]
            for n in range(len(shards))
        ]
        self._lasts = list(itertools.accumulate(shard["documents"] for shard in shards))
        self._check_sizes()
        documents = _documents(path / DOCUMENTS, index["sha256"])
        self.sizes: np.ndarray = documents["size"]
        self._starts, self._crcs = documents["start"], documents["crc"]
        self._checked = np.zeros(len(documents), np.bool_)
        self._maps: list[list[np.ndarray] | None] = [None] * len(shards)
        hashes = [index["sha256"], [shard["sha256"] for shard in shards]]
        self.fingerprint = _digest([FORMAT_VERSION, index["tokenizer"], index["dtype"], hashes])

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Example:
        return self.piece(index, 0, None)

    def __iter__(self) -> Iterator[Example]:
        first = 0
        while first < len(self):
            last, positions = first + 1, int(self.sizes[first])
            while is_bucket(self.path) and last < len(self) and positions < _POSITIONS:
                positions += int(self.sizes[last])
                last += 1
            yield from self.pieces([(i, 0, None) for i in range(first, last)])
            first = last

    def piece(self, index: int, start: int, size: int | None) -> Example:
        """`size` positions of a document from position `start` on (None: all that are left).

        ValueError if the document is not what was written.
        """
        return self.pieces([(index, start, size)])[0]

    def pieces(self, wanted: Sequence[tuple[int, int, int | None]]) -> list[Example]:
        """`piece` of every (index, start, size); of a bucket all are asked for at once."""
        spans, cuts = [], []
        for index, start, size in wanted:
            if not 0 <= index < len(self):
                raise IndexError(index)
            first, last = int(self._starts[index]), int(self.sizes[index]) + 1
            stop = last if size is None else min(last, start + size + 1)
            # what has not been checked yet is read whole
            begin, end = (start, stop) if self._checked[index] else (0, last)
            spans.append((bisect.bisect_right(self._lasts, index), first + begin, first + end))
            cuts.append(slice(start - begin, stop - begin))
        found = []
        different = list(dict.fromkeys(spans))  # pieces of one document are often asked for together
        read = dict(zip(different, self._read(different), strict=True))
        for (index, _, _), span, cut in zip(wanted, spans, cuts, strict=True):
            parts = read[span]
            if not self._checked[index]:
                if _crc(parts[0], parts[1] if len(parts) > 1 else None) != int(self._crcs[index]):
                    raise _altered(self._files[span[0]][0], f"document {index}")
                self._checked[index] = True
            ids = parts[0][cut].astype(np.int32)
            weights = parts[1][cut].astype(np.float32) if len(parts) > 1 else np.ones(len(ids), np.float32)
            found.append(Example(ids, weights))
        return found

    def verify(self) -> None:
        """Reads and hashes every file; ValueError naming the first one that is not what was written."""
        for files, shard in zip(self._files, self.index["shards"], strict=True):
            for file, expected in zip(files, shard["sha256"], strict=True):
                if _hash_of(file) != expected:
                    raise _altered(file)

    def _read(self, spans: Sequence[tuple[int, int, int]]) -> list[list[np.ndarray]]:
        """The tokens, and the weights if there are any, from `first` to before `last` of every shard."""
        if not is_bucket(self.path):
            return [[part[first:last] for part in self._mapped(shard)] for shard, first, last in spans]
        ranges = [
            (file, first * kind.itemsize, last * kind.itemsize)
            for shard, first, last in spans
            for file, kind in zip(self._files[shard], self._kinds, strict=False)
        ]
        found = iter(read_ranges(ranges))
        return [
            [
                np.frombuffer(next(found), kind)
                for _, kind in zip(self._files[shard], self._kinds, strict=False)
            ]
            for shard, _, _ in spans
        ]

    def _mapped(self, shard: int) -> list[np.ndarray]:
        found = self._maps[shard]
        if found is None:
            found = [
                np.memmap(f, t, "r").view(np.ndarray)
                for f, t in zip(self._files[shard], self._kinds, strict=False)
            ]
            self._maps[shard] = found
        return found

    def _check_sizes(self) -> None:
        expected = [(self.path / DOCUMENTS, self.index["documents"] * DOCUMENT.itemsize)]
        for files, shard in zip(self._files, self.index["shards"], strict=True):
            sizes = (shard["tokens"] * kind.itemsize for kind in self._kinds)
            expected += zip(files, sizes, strict=False)
        there = sizes_in(self.path)
        for file, size in expected:
            found = there.get(file.name)
            if found != size:
                got = "no file" if found is None else f"{found}"
                raise ValueError(
                    f"{file}: expected {size} bytes, got {got}; restore it, or tokenise into a new directory"
                )


def open_shards(path: str | Path, tokenizer: Tokenizer) -> TokenShards:
    """The documents of a directory that `nemojax tokenize` or `write_shards` has made.

    ValueError if it is none, is unfinished, was made by another tokenizer, or has a file that is missing,
    truncated or altered.
    """
    path = place(path)
    index = _read_index(path)
    ours = tokenizer_fingerprint(tokenizer)
    if index["tokenizer"] != ours:
        raise ValueError(
            f"{path}: expected tokens of the tokenizer in {tokenizer.path} ({ours[:8]}), got another's "
            f"({index['tokenizer'][:8]}); train with the one that made them, or tokenise again"
        )
    return TokenShards(path, index)


def open_heldout(path: str | Path, tokenizer: Tokenizer) -> TokenShards | None:
    """The part of a directory of shards that is never trained on; None if nothing was held out."""
    heldout = place(path) / HELDOUT
    return open_shards(heldout, tokenizer) if heldout.is_dir() else None


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    if not file.is_file():
        check_bucket(path)
        raise ValueError(_why_none(path))
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error}); restore it") from error
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file}: expected format_version {FORMAT_VERSION}, got {version}; tokenise again, or use the "
            "nemojax that wrote it"
        )
    for key, kind in _KINDS.items():
        if not isinstance(index.get(key), kind):
            raise ValueError(f"{file}: expected {key}, got {index.get(key)!r:.40}; restore the file")
    return index


def _why_none(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: expected a directory of tokens, got nothing there; make it with nemojax tokenize"
    if any(path.glob("shard-*")):
        return (
            f"{path}: expected a finished directory of tokens, got one without {INDEX}; nemojax tokenize was "
            "stopped, so run it again with the same --workdir: it goes on where it was"
        )
    below = sorted(str(file.parent) for depth in ("*", "*/*") for file in path.glob(f"{depth}/{INDEX}"))
    hint = f"choose {' or '.join(below[:3])}" if below else "make one with nemojax tokenize"
    return f"{path}: expected a directory of tokens, got one without {INDEX}; {hint}"


def _altered(file: Path, what: str = "contents") -> ValueError:
    return ValueError(
        f"{file}: expected the {what} as written, got another checksum; restore the file, or tokenise into a "
        "new directory"
    )


class _Hashed:
    """A binary file that keeps the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> None:
        self.digest.update(data)
        self._file.write(data)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[_Hashed]:
    """`whole_file`, hashed."""
    with whole_file(path) as file:
        yield _Hashed(file)


def _name(number: int) -> str:
    return f"shard-{number:05}"


def _documents(file: Path, sha256: str) -> np.ndarray:
    """What documents.bin holds; ValueError if it is not what was written."""
    if is_bucket(file):
        held = file.read_bytes()
        documents, found = np.frombuffer(held, DOCUMENT), hashlib.sha256(held).hexdigest()
    else:
        documents, found = np.memmap(file, DOCUMENT, "r").view(np.ndarray), _hash_of(file)
    if found != sha256:
        raise _altered(file)
    return documents


def _hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
