"""One Orbax tree on disk: canonical per-layer keys, written lazily, read leaf by leaf.

In memory the weights of equal layers are stacked ("runs/003/attn/q", leading axis = position in the run);
on disk every layer stands alone ("layers/17/attn/q"). The same renaming serves parameters, optimiser
moments and averages, because it looks at paths only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.buckets import teach_orbax_s3
from nemojax.sharding import HOST_MEMORY
from nemojax.tree import from_paths

LAZY_BYTES = 2 << 30  # lazily loaded arrays held in host memory at once; a larger one goes alone


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read when it is written out: `load()` returns it with this shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def flat_paths(tree: Any) -> dict[str, Any]:
    """{"a/0/b": leaf} of any pytree: dicts, sequences, named tuples, dataclasses."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, LazyArray))[0]
    return {"/".join(_name(key) for key in path): leaf for path, leaf in leaves}


def split_run(path: str, arch: ArchSpec | None) -> tuple[str, str, tuple[int, ...]] | None:
    """("opt/mu/", "/attn/q", layers) of "opt/mu/runs/000/attn/q"; None for a path outside a run."""
    parts = path.split("/")
    if "runs" not in parts or arch is None:
        return None
    at = parts.index("runs")
    if at + 1 >= len(parts) or not parts[at + 1].isdigit():
        return None
    before, after = "/".join([*parts[:at], ""]), "/".join(["", *parts[at + 2 :]])
    return before, after, arch.runs()[int(parts[at + 1])].layers


def canonical(tree: Any, arch: ArchSpec | None) -> dict[str, Any]:
    """Flat {canonical path: array in host memory} of a pytree in the memory layout (or already canonical).

    Device arrays are copied to the host once; a layer of a run is a view of that copy, so nothing is
    added on the device and nothing twice on the host. PRNG keys become their raw data. Of an array that lies
    over several processes each has its own shards alone, as a jax.Array that Orbax writes together.
    """
    flat: dict[str, Any] = {}
    for path, leaf in flat_paths(tree).items():
        where = split_run(path, arch)
        shared = isinstance(leaf, jax.Array) and _is_shared(leaf)
        if where is None:
            flat[path] = _own_shards(leaf)[0] if shared else to_host(leaf)
            continue
        before, after, layers = where
        parts = _own_shards(leaf, len(layers)) if shared else to_host(leaf)
        for i, layer in enumerate(layers):
            flat[f"{before}layers/{layer}{after}"] = parts[i]
    return flat


def _own_shards(leaf: jax.Array, layers: int = 0) -> list[jax.Array]:
    """A copy in host memory of which each process has its own shards: of every layer of a stack, or whole."""
    shape, there = _on_hosts(leaf, stacked=bool(layers))
    copies = [(shard.device, np.array(shard.data)) for shard in leaf.addressable_shards]

    def one(layer: int | None) -> jax.Array:
        parts = [
            jax.device_put(
                host if layer is None else host[layer],
                jax.sharding.SingleDeviceSharding(device, memory_kind=HOST_MEMORY),
            )
            for device, host in copies
        ]
        return jax.make_array_from_single_device_arrays(shape, there, parts)

    return [one(layer) for layer in range(layers)] if layers else [one(None)]


def _is_shared(leaf: Any) -> bool:
    """Whether an array (or a ShapeDtypeStruct) lies over several processes, in parts."""
    place = getattr(leaf, "sharding", None)
    return isinstance(place, jax.NamedSharding) and not (
        place.is_fully_addressable or place.is_fully_replicated
    )


def _on_hosts(leaf: Any, stacked: bool) -> tuple[tuple[int, ...], jax.NamedSharding]:
    """(shape, place in host memory) of an array, or of a layer of a stack, on the hosts of its devices."""
    shape, spec = (leaf.shape[1:], leaf.sharding.spec[1:]) if stacked else (leaf.shape, leaf.sharding.spec)
    return shape, jax.NamedSharding(leaf.sharding.mesh, jax.P(*spec), memory_kind=HOST_MEMORY)


def _stacked(layers: Sequence[jax.Array], like: Any) -> jax.Array:
    """The array `like` of its layers, or of its only one where it is no stack, each shard by itself."""
    shards = [{shard.device: shard.data for shard in layer.addressable_shards} for layer in layers]
    parts = []
    for device in like.sharding.addressable_devices:
        hosts = [np.asarray(of_layer[device]) for of_layer in shards]
        whole = np.stack(hosts) if layers[0].ndim < len(like.shape) else hosts[0]
        kind = like.sharding.memory_kind
        parts.append(jax.device_put(whole, jax.sharding.SingleDeviceSharding(device, memory_kind=kind)))
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)


def to_host(leaf: Any) -> Any:
    """A numpy array that no later donation or assignment can change; lazy arrays pass through."""
    if isinstance(leaf, LazyArray):
        return leaf
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_replicated and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    if not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    if all(d.platform == "cpu" for d in leaf.devices()):
        return np.array(leaf)  # np.asarray would be a view of a buffer that the next step donates
    return np.asarray(leaf)


def to_device(host: np.ndarray, like: Any) -> Any:
    """`host` with the dtype, sharding and PRNG-key nature of `like` (an array or ShapeDtypeStruct)."""
    if not hasattr(like, "dtype"):
        return type(like)(host.item()) if isinstance(like, bool | int | float) else host
    if jax.numpy.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jax.numpy.asarray(host), impl=jax.random.key_impl(like) if _is_array(like) else None
        )
    host = host.astype(like.dtype, copy=False)
    if isinstance(like, np.ndarray):
        return host
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.numpy.asarray(host)
    if _is_array(like) and not getattr(like, "_committed", True):
        return jax.numpy.asarray(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def handler(path: Path) -> Any:
    """The Orbax tree handler for a place: no second host copy, lazy arrays in bounded batches."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    if str(path).startswith("s3://"):
        teach_orbax_s3()
    logging.getLogger("absl").addFilter(_not_from_orbax)  # adding it again changes nothing
    registry = type_handlers.create_type_handler_registry(
        (np.ndarray, _arrays_handler()(deepcopy_host_arrays=False)),
        (LazyArray, _lazy_handler()(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler(enable_write_sharding_file=False)),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


@functools.cache
def _arrays_handler() -> Any:
    from orbax.checkpoint import type_handlers

    class _Arrays(type_handlers.NumpyHandler):
        """No second host copy; when one array fails the others end before that is raised, so that
        nothing calls back into a closed event loop."""

        failures: list[Exception]

        async def _open_and_write(self, *args: Any) -> None:
            try:
                await super()._open_and_write(*args)
            except Exception as error:
                self.failures.append(error)

        async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
            self.failures = []
            await super()._background_serialize(values, infos, args)
            if self.failures:
                raise self.failures[0]

        async def deserialize(self, infos: Any, args: Any = None):
            one = super().deserialize
            kinds = args or [type_handlers.RestoreArgs()] * len(infos)
            return await _settled([one([info], [kind]) for info, kind in zip(infos, kinds, strict=True)])

        async def metadata(self, infos: Any):
            one = super().metadata
            return await _settled([one([info]) for info in infos])

    return _Arrays


@functools.cache
def _lazy_handler() -> Any:
    from orbax.checkpoint import type_handlers
    from orbax.checkpoint._src.serialization import ocdbt_utils, tensorstore_utils

    class _Lazy(_arrays_handler()):
        """Loads, writes and drops lazy arrays a batch at a time; on disk they are ordinary arrays. Of several
        processes each has its share of them."""

        async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
            args = args or [type_handlers.SaveArgs()] * len(values)
            mine = _shares([value.nbytes for value in values], jax.process_count())[jax.process_index()]
            self.failures = []
            for batch in _batches([values[i].nbytes for i in mine]):
                arrays = [values[mine[i]].load() for i in batch]
                writes = [
                    self._write(array, infos[mine[i]], args[mine[i]])
                    for i, array in zip(batch, arrays, strict=True)
                ]
                await asyncio.gather(*writes)
                if self.failures:
                    raise self.failures[0]

        async def _write(self, array: np.ndarray, info: Any, arg: Any) -> None:
            await info.await_path_creation()
            place = ocdbt_utils.get_process_index_for_subdir(use_ocdbt=info.is_ocdbt_checkpoint)
            spec = tensorstore_utils.build_array_write_spec(
                info, arg, global_shape=array.shape, local_shape=array.shape, dtype=array.dtype,
                use_ocdbt=info.is_ocdbt_checkpoint, process_index=place, metadata_key=self._metadata_key,
            )  # fmt: skip
            await self._open_and_write(array, spec.json, info.ts_context)

        async def serialize(self, values: Any, infos: Any, args: Any = None):
            from orbax.checkpoint import future

            work = self._background_serialize(values, infos, args)
            return [future.CommitFutureAwaitingContractedSignals(work, name="lazy_arrays")]

    return _Lazy


class Reader:
    """Reads chosen leaves of one saved tree (`.../checkpoints/<step>/params`), never more than asked."""

    def __init__(self, path: Path):
        self.path = path
        self._handler = handler(path)
        try:
            metadata = self._handler.metadata(path)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a readable checkpoint ({_first_line(error)})") from error
        tree = getattr(metadata, "tree", metadata)
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            for name, leaf in flat_paths(tree).items()
        }

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """{name: array} for the canonical `names`; ValueError when one is absent or damaged."""
        import orbax.checkpoint as ocp

        names = list(names)
        if missing := [name for name in names if name not in self.leaves]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.path}: expected {missing[0]}{more}, got none; arch and checkpoint disagree"
            )
        return self._restore(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)))

    def _read_shards(self, names: Sequence[str], leaf: Any, stacked: bool) -> jax.Array:
        """An array over several processes, each of which reads what its own devices have."""
        import orbax.checkpoint as ocp

        shape, there = _on_hosts(leaf, stacked)
        kind = ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=leaf.dtype, sharding=there, global_shape=shape
        )
        found = self._restore(dict.fromkeys(names, kind))
        return _stacked([found[name] for name in names], leaf)

    def _restore(self, kinds: Mapping[str, Any]) -> dict[str, Any]:
        """{name: array} of names that are there, each of its kind of Orbax's restore arguments."""
        import orbax.checkpoint as ocp

        if not kinds:
            return {}
        item = from_paths({name: self.leaves[name] for name in kinds})
        args = ocp.args.PyTreeRestore(item=item, restore_args=from_paths(kinds), partial_restore=True)
        try:
            return flat_paths(self._handler.restore(self.path, args=args))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: unreadable checkpoint data ({_first_line(error)})") from error

    def like(
        self, abstract: Any, arch: ArchSpec | None, finish: Callable[[str, Any], Any] | None = None
    ) -> Any:
        """The saved tree in the structure, dtypes and shardings of `abstract`, a bounded batch at a time. Of
        what lies over several processes each reads its own shards.

        finish: (path, array on its devices) -> what takes its place, before the next one is there.
        """
        wanted = flat_paths(abstract)
        for path, leaf in wanted.items():
            self._check(path, leaf, arch)
        paths = list(wanted)
        placed: dict[str, Any] = {}
        for batch in _batches([_nbytes(leaf) for leaf in wanted.values()]):
            names = {paths[i]: _stored_names(paths[i], arch) for i in batch}
            for path in [path for path in names if _is_shared(wanted[path])]:
                stacked = split_run(path, arch) is not None
                there = self._read_shards(names.pop(path), wanted[path], stacked)
                placed[path] = there if finish is None else finish(path, there)
            arrays = self.read([name for group in names.values() for name in group])
            for path, group in names.items():
                stacked = split_run(path, arch) is not None
                host = np.stack([arrays.pop(n) for n in group]) if stacked else arrays.pop(path)
                there = to_device(host, wanted[path])
                placed[path] = there if finish is None else finish(path, there)
        return jax.tree.structure(abstract).unflatten([placed[path] for path in paths])

    def _check(self, path: str, leaf: Any, arch: ArchSpec | None) -> None:
        shape = tuple(np.shape(leaf))
        if hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return
        want = shape if split_run(path, arch) is None else shape[1:]
        for name in _stored_names(path, arch):
            got = self.leaves.get(name)
            if got is None or tuple(got.shape) != want:
                found = "none" if got is None else tuple(got.shape)
                raise ValueError(
                    f"{self.path}: {name}: expected shape {want}, got {found}; use the same configuration"
                )


async def _settled(work: list[Any]) -> list[Any]:
    """The single result of each coroutine, or the first failure once all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result[0] for result in results if not isinstance(result, BaseException)]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback in each of its threads for a failure that we raise, once, in one line."""
    return "orbax" not in record.pathname or record.levelno < logging.ERROR


def _batches(sizes: Iterable[int]) -> list[list[int]]:
    """Consecutive positions whose sizes in bytes sum to at most LAZY_BYTES; a larger one stands alone."""
    batches: list[list[int]] = []
    held = LAZY_BYTES + 1
    for i, size in enumerate(sizes):
        if held + size > LAZY_BYTES:
            batches.append([])
            held = 0
        batches[-1].append(i)
        held += size
    return batches


def _shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Positions for each of `count` processes, largest first to the one that has least so far."""
    shares, held = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = held.index(min(held))
        shares[least].append(i)
        held[least] += sizes[i]
    return [sorted(share) for share in shares]


def _nbytes(leaf: Any) -> int:
    return int(np.prod(np.shape(leaf), dtype=np.int64)) * getattr(getattr(leaf, "dtype", None), "itemsize", 8)


def _stored_names(path: str, arch: ArchSpec | None) -> list[str]:
    where = split_run(path, arch)
    return [path] if where is None else [f"{where[0]}layers/{layer}{where[1]}" for layer in where[2]]


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that Orbax saves."""
    return from_paths(flat)
