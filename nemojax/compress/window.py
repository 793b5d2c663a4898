"""A parent that does not fit at once: a window of its layers at a time, and the stream that enters each.

The weights of a window are cut out of parameters at hand, or read from an artifact when their turn comes. The
parent's residual stream before a window is written for every batch to a file of this process, so that a
window needs none of the layers before it. Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemojax.arch import ArchSpec, BlockSpec, NoOp
from nemojax.checkpoints import store
from nemojax.checkpoints.artifact import memory_shapes, outer_shapes, params_reader
from nemojax.checkpoints.digest import bit_sums, digest_of_sums
from nemojax.compress.bld import batch_inputs, enter, take
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, apply_blocks, logical_axes
from nemojax.sharding import constrain, shardings_of

EMPTY = BlockSpec(NoOp(), NoOp())
Source = Mapping[str, Any] | str | os.PathLike


@dataclass(frozen=True)
class Parent:
    """A parent's weights, `window` layers at a time (0: all). `source`: parameters, or an artifact's path."""

    source: Source
    arch: ArchSpec
    window: int = 0
    mesh: Mesh | None = None

    def __post_init__(self):
        if not 0 <= self.window <= self.arch.num_layers:
            raise ValueError(
                f"bld.window: expected 0 (all layers) to {self.arch.num_layers}, got {self.window}"
            )

    def windows(self) -> list[range]:
        """The layers of each window."""
        count, size = self.arch.num_layers, self.window or max(self.arch.num_layers, 1)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def arch_of(self, window: range) -> ArchSpec:
        """The architecture of these layers alone, numbered from 0: equal windows are one program."""
        return self.arch.replace(blocks=self.arch.blocks[window.start : window.stop])

    def params_of(self, window: range) -> dict[str, Any]:
        """Parameters of `arch_of` on the devices: `runs`, and `embed` where the first layer is among them."""
        blocks = self.arch.blocks
        # empty layers belong to no run, and the other ones keep the numbers that they have on disk
        padded = self.arch.replace(blocks=tuple(b if i in window else EMPTY for i, b in enumerate(blocks)))
        wanted = {path: s for path, s in memory_shapes(padded).items() if path.startswith("runs/")}
        if not window.start:
            wanted["embed/weight"] = (self.arch.vocab_size, self.arch.dim)
        return {"runs": {}, **store.nested(self._weights(wanted, padded))}

    def fingerprint(self) -> str:
        """A digest of the architecture and of every bit of the weights, the same on any mesh."""
        sums: dict[str, list[int]] = {}
        for window in self.windows():
            params = self.params_of(window)
            for index, run in enumerate(self.arch_of(window).runs()):
                for path, leaf in store.flat_paths(params["runs"][run_name(index)]).items():
                    layers = [window.start + layer for layer in run.layers]
                    sums |= zip((f"layers/{i}/{path}" for i in layers), bit_sums(leaf), strict=True)
        for path, leaf in self._weights(outer_shapes(self.arch), self.arch).items():
            [sums[path]] = bit_sums(leaf[None])
        return digest_of_sums(self.arch, sums)

    def _weights(self, wanted: Mapping[str, tuple[int, ...]], padded: ArchSpec) -> dict[str, Any]:
        """Flat {path: array on the devices} of the `wanted` shapes, paths as `padded` has them in memory."""
        places = self._places(wanted, padded)
        if isinstance(self.source, Mapping):
            found = {path: _cut(self.source, self.arch, padded, path) for path in wanted}
            return {path: jax.device_put(leaf, places.get(path)) for path, leaf in found.items()}
        reader = params_reader(self.source)
        abstract = {}
        for path, shape in wanted.items():
            where = store.split_run(path, padded)
            stored = reader.leaves.get(path if where is None else f"layers/{where[2][0]}{where[1]}")
            dtype = stored.dtype if stored else np.float32  # a missing weight is named by the reader
            abstract[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=places.get(path))
        return store.flat_paths(reader.like(store.nested(abstract), padded))

    def _places(self, wanted: Mapping[str, tuple[int, ...]], padded: ArchSpec) -> dict[str, Any]:
        if self.mesh is None or self.mesh.size == 1:
            return {}
        axes = dict(
            zip(
                store.flat_paths(jax.tree.map(lambda _: 0, logical_axes(padded), is_leaf=_is_axes)),
                jax.tree.leaves(logical_axes(padded), is_leaf=_is_axes),
                strict=True,
            )
        )
        shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in wanted.items()}
        return shardings_of({path: axes[path] for path in wanted}, shapes, self.mesh)


@dataclass(frozen=True)
class Carry:
    """The stream before a window [steps, B, T, D], B this process's rows, in local files under `dir`."""

    dir: Path
    parent: Parent
    batches: Callable[[], Iterator[dict]]
    steps: int
    rows: tuple[int, int]  # B, T of a batch of this process
    compute: Compute = Compute()

    def before(self, number: int) -> np.ndarray | None:
        """The stream that enters window `number`; None for the first, where embeddings do."""
        if not number:
            return None
        path, dtype = self._path(number), jnp.dtype(self.compute.dtype)
        shape = (self.steps, *self.rows, self.parent.arch.dim)
        size = math.prod(shape) * dtype.itemsize
        if not _everywhere(path.is_file() and path.stat().st_size == size):
            self._write(number, path, np.memmap, dtype, shape)
        return np.memmap(path, dtype, "r", shape=shape)

    def _write(self, number: int, path: Path, memmap: Any, dtype: Any, shape: tuple[int, ...]) -> None:
        window, before = self.parent.windows()[number - 1], self.before(number - 1)
        arch, params, mesh = self.parent.arch_of(window), self.parent.params_of(window), self.parent.mesh
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        out = memmap(partial_path, dtype, "w+", shape=shape)
        for i, batch in enumerate(take(self.batches(), self.steps, "bld: a window's data")):
            out[i] = rows_here(_through(arch, self.compute, params, batch_inputs(batch, before, i, mesh)))
        out.flush()
        os.replace(partial_path, path)
        if number > 1:
            self._path(number - 1).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.dir / f"stream-{number:03d}-{jax.process_index()}.bin"


@partial(jax.jit, static_argnames=("arch", "compute"))
def _through(arch: ArchSpec, compute: Compute, params: dict, batch: dict) -> jax.Array:
    """The stream behind all layers of a window, in whole rows."""
    h_BTD, ctx = enter(arch, params, batch, compute)
    h_BTD = apply_blocks(params, arch, h_BTD, ctx, compute=compute)[0]
    return constrain(h_BTD, "batch", "length", None)


def rows_here(h_BTD: jax.Array) -> np.ndarray:
    """This process's rows of an array whose rows are dealt out to processes in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in h_BTD.addressable_shards}
    return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])


def _everywhere(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.all(process_allgather(np.asarray(flag))))


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)


def _cut(params: Mapping[str, Any], arch: ArchSpec, padded: ArchSpec, path: str) -> Any:
    """A weight of the parameters of `arch` under its path in `padded`, which has some of the layers."""
    if (where := store.split_run(path, padded)) is None:
        return store.flat_paths({k: v for k, v in params.items() if k != "runs"})[path]
    first, last = where[2][0], where[2][-1]
    for index, run in enumerate(arch.runs()):
        if first in run.layers:
            whole = store.flat_paths(params["runs"][run_name(index)])[where[1].lstrip("/")]
            start, stop = run.layers.index(first), run.layers.index(last) + 1
            return whole if stop - start == len(run.layers) else whole[start:stop]
    raise AssertionError(f"{path}: layer {first} is in no run")
