"""Variants on disk: every sub-block or block that a layer may become, with how it was made.

A kind of variant is one OCDBT database of tensorstore, `<kind>/`, with an entry for each layer that is
written by one transaction and read without the rest: `<layer>/<part>/<weight>` and `<layer>/curve` are zarr
arrays with checksums, `<layer>/entry.json` says how the variant was made. `library.json` names the parent
that all of them belong to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from nemojax.arch import ArchSpec, BlockSpec, NoOp
from nemojax.buckets import absolute, kvstore_spec
from nemojax.compress.bld import Weights
from nemojax.compress.subblock import PARTS, Kind, Part, Place, Sub, kind_name, sub_of
from nemojax.stage import read_json, write_json

FORMAT_VERSION = 1
ABOUT = "library.json"
CHUNK_BYTES = 256 << 20  # a larger weight is cut along its first axis


class Library:
    """Variants on disk, each whole or absent. Reading one touches nothing of the others."""

    def __init__(self, dir: str | os.PathLike):
        self.dir = absolute(dir)
        self._stores: dict[str, Any] = {}

    def claim(self, parent: str, arch: ArchSpec) -> None:
        """Makes this the library of the parent with this fingerprint; ValueError when it is another's."""
        path = self.dir / ABOUT
        about = read_json(path)
        if about is None:
            if self.dir.is_dir() and (old := next(self.dir.glob("*-*/*"), None)):
                raise ValueError(
                    f"{path}: expected the parent's fingerprint, got none beside {old.parent.name}; this is "
                    "not a library of this version, so choose another folder or delete it"
                )
            self.dir.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format_version": FORMAT_VERSION, "parent": parent, "arch": arch.to_json()})
            return
        version = about.get("format_version") if isinstance(about, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}; "
                "use the nemojax that wrote it, or choose another folder"
            )
        if about.get("parent") != parent:
            raise ValueError(
                f"{path}: expected a library of this parent ({parent}), got one of another "
                f"({about.get('parent')}); choose another folder for the library, or the parent that it is of"
            )

    def layers(self, name: str) -> tuple[int, ...]:
        """The layers that have a variant of a kind, ascending."""
        keys = self._ask(name, lambda store: store.list().result()) if self._there(name) else []
        return tuple(sorted(int(key[:-11]) for key in keys if key.endswith(b"/entry.json")))

    def has(self, kind: Kind) -> bool:
        """Whether every layer of the kind has its variant."""
        return set(kind.layers) <= set(self.layers(kind.name))

    def names(self) -> tuple[str, ...]:
        """All kinds that have a folder."""
        folders = self.dir.iterdir() if self.dir.is_dir() else ()
        return tuple(sorted(d.name for d in folders if (d / "manifest.ocdbt").is_file()))

    def save(
        self,
        part: Place,
        child: Sub | BlockSpec,
        layer: int,
        weights: Mapping[Part, Mapping[str, np.ndarray]],
        curve: np.ndarray,
        about: Mapping[str, Any],
    ) -> None:
        """Writes one variant, its entry last: one whose writing was cut off is not there.

        about: what JSON can say of how it was made.
        """
        import tensorstore as ts

        name, prefix = kind_name(part, child), f"{layer:03d}/"
        (self.dir / name).mkdir(parents=True, exist_ok=True)
        arrays = {f"{p}/{w}": array for p, group in weights.items() for w, array in group.items()}

        def write(store: Any) -> None:
            transaction = ts.Transaction(atomic=True)
            writes = []
            for path, array in {**arrays, "curve": curve}.items():
                metadata = _array_metadata(np.asarray(array))
                spec = {"driver": "zarr3", "kvstore": self._spec(name, prefix + path), "metadata": metadata}
                target = ts.open(spec, create=True, delete_existing=True, transaction=transaction).result()
                writes.append(target.write(array))
            for one in writes:
                one.result()
            transaction.commit_async().result()
            entry = {**about, "weights": sorted(arrays)}
            store.write(f"{prefix}entry.json", json.dumps(entry).encode()).result()

        self._ask(name, write)

    def load(self, part: Part, sub: Sub, layer: int) -> dict[str, np.ndarray]:
        """Weights of one variant, f32; {} for a no-op. ValueError when it is missing or damaged."""
        return {} if isinstance(sub, NoOp) else self._weights(part, sub, layer)[part]

    def load_block(self, parent: BlockSpec, child: BlockSpec, layer: int) -> Weights:
        """The weights that a layer needs beside the parent's to become `child`, by part.

        A coupled variant of the block wins and then holds all its parts; else a part that differs from the
        parent's comes from its own variant. What is absent is the parent's own, or has no weights.
        """
        if child == parent:
            return {}
        if layer in self.layers(kind_name("block", child)):
            return self._weights("block", child, layer)
        weights: Weights = {}
        for part in PARTS:
            sub = sub_of(child, part)
            if sub != sub_of(parent, part) and not isinstance(sub, NoOp):
                weights[part] = self.load(part, sub, layer)
        return weights

    def curve(self, part: Place, child: Sub | BlockSpec, layer: int) -> np.ndarray:
        """Normalised MSE of one variant by training step."""
        name = kind_name(part, child)
        self.about(part, child, layer)
        return self._ask(name, lambda _: self._open(name, layer, "curve").result().read().result())

    def about(self, part: Place, child: Sub | BlockSpec, layer: int) -> dict[str, Any]:
        """How one variant was made: `recipe`, `start`, and the names of its `weights`."""
        name = kind_name(part, child)
        key = f"{layer:03d}/entry.json"
        found = self._ask(name, lambda store: store.read(key).result()) if self._there(name) else None
        if found is None or found.state != "value":
            raise ValueError(
                f"{self.dir / name}: layer {layer}: no such variant; build the library for this space first"
            )
        return self._ask(name, lambda _: json.loads(found.value))

    def _weights(self, part: Place, child: Sub | BlockSpec, layer: int) -> Weights:
        name, paths = kind_name(part, child), self.about(part, child, layer)["weights"]

        def read(_: Any) -> list[np.ndarray]:
            opened = [self._open(name, layer, path) for path in paths]
            reads = [one.result().read() for one in opened]
            return [one.result() for one in reads]

        out: Weights = {}
        for path, array in zip(paths, self._ask(name, read), strict=True):
            group, _, weight = path.partition("/")
            out.setdefault(group, {})[weight] = array
        return out

    def _there(self, name: str) -> bool:
        return (self.dir / name / "manifest.ocdbt").is_file()

    def _open(self, name: str, layer: int, path: str) -> Any:
        import tensorstore as ts

        kvstore = self._spec(name, f"{layer:03d}/{path}")
        return ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True)

    def _spec(self, name: str, path: str) -> dict[str, Any]:
        return {"driver": "ocdbt", "base": kvstore_spec(str(self.dir / name)), "path": f"{path}/"}

    def _ask(self, name: str, what: Any) -> Any:
        """What `what(key-value store of the kind)` returns; one line where tensorstore fails."""
        import tensorstore as ts

        try:
            if name not in self._stores:
                base = self._spec(name, "")["base"]
                self._stores[name] = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
            return what(self._stores[name])
        except (ValueError, OSError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0].split(" [tensorstore_spec")[0]
            if "RESOURCE_EXHAUSTED" in line or "No space left" in line:
                raise ValueError(f"{self.dir / name}: no space left; free some and run again") from error
            raise ValueError(
                f"{self.dir / name}: damaged or unreadable ({line[:200]}); delete the folder and run again "
                "to rebuild it"
            ) from error


def _array_metadata(array: np.ndarray) -> dict[str, Any]:
    shape = list(array.shape)
    chunk = list(shape)
    if shape and array.nbytes > CHUNK_BYTES:
        chunk[0] = max(1, shape[0] * CHUNK_BYTES // array.nbytes)
    return {
        "shape": shape,
        "data_type": array.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [max(1, size) for size in chunk]},
        },
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
