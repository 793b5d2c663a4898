"""Weights in Hugging Face layout: names, shapes and transposes, read and written a tensor at a time.

Letters: D model, N query heads, K KV heads, H head dim, F feed-forward width, V vocabulary. torch keeps
a projection as [out, in]; we keep [in, ...out] with heads apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.buckets import is_bucket, read_ranges, version, whole_file
from nemojax.checkpoints.artifact import layer_shapes, outer_shapes
from nemojax.checkpoints.store import LazyArray
from nemojax.hosts import of_all, on_primary

INDEX = "model.safetensors.index.json"
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
_FLOATS = ("F32", "F16", "BF16", "F64")

_OUTER = {
    "embed/weight": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/weight": "lm_head.weight",
}
_INNER = {
    "attn/norm": "input_layernorm.weight",
    "attn/q": "self_attn.q_proj.weight",
    "attn/k": "self_attn.k_proj.weight",
    "attn/v": "self_attn.v_proj.weight",
    "attn/o": "self_attn.o_proj.weight",
    "attn/linear": "self_attn.linear_attn.weight",
    "ffn/norm": "post_attention_layernorm.weight",
    "ffn/gate": "mlp.gate_proj.weight",
    "ffn/up": "mlp.up_proj.weight",
    "ffn/down": "mlp.down_proj.weight",
    "ffn/linear": "mlp.linear_mlp.weight",
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor under both names. `shape` is ours, `hf_shape` torch's."""

    path: str
    name: str
    shape: tuple[int, ...]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        match self.path.rsplit("/", 1)[1]:
            case "q" | "k" | "v":
                d, n, h = self.shape
                return (n * h, d)
            case "o":
                n, h, d = self.shape
                return (d, n * h)
            case "gate" | "up" | "down" | "linear":
                return self.shape[::-1]
        return self.shape

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """torch's layout to ours: a view."""
        match self.path.rsplit("/", 1)[1]:
            case "q" | "k" | "v":
                d, n, h = self.shape
                return array.reshape(n, h, d).transpose(2, 0, 1)
            case "o":
                n, h, d = self.shape
                return array.reshape(d, n, h).transpose(1, 2, 0)
            case "gate" | "up" | "down" | "linear":
                return array.T
        return array

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our layout to torch's, contiguous."""
        match self.path.rsplit("/", 1)[1]:
            case "q" | "k" | "v":
                array = array.transpose(1, 2, 0)
            case "o":
                array = array.transpose(2, 0, 1)
            case "gate" | "up" | "down" | "linear":
                array = array.T
        return np.ascontiguousarray(array).reshape(self.hf_shape)


def weights_of(arch: ArchSpec) -> list[Weight]:
    """Every tensor of `arch`, in the order of the layers; embedding first, final norm and head last."""
    outer = {path: Weight(path, _OUTER[path], shape) for path, shape in outer_shapes(arch).items()}
    weights = [outer.pop("embed/weight")]
    for i, layer in layer_shapes(arch).items():
        for sub, shapes in layer.items():
            for name, shape in shapes.items():
                key = f"{sub}/{name}"
                weights.append(Weight(f"layers/{i}/{key}", f"model.layers.{i}.{_INNER[key]}", shape))
    return weights + list(outer.values())


class SafetensorsDir:
    """The tensors of a directory of safetensors files, opened but not read."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files = _file_of_each(directory)
        self._open: dict[str, Any] = {}
        for file in sorted(set(self.files.values())):  # a tensor that the index forgot is still there
            self.files |= {name: file for name in self._file(file).keys() if name not in self.files}
        self.headers = {name: self._header(name) for name in self.files}

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied into host memory."""
        return self._file(self.files[name]).get_tensor(name)

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        from safetensors import SafetensorError

        try:
            view = self._file(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.directory / self.files[name]}: {name}: the index promises it, the file lacks it"
            ) from error
        return tuple(view.get_shape()), view.get_dtype()

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = open_safetensors(self.directory / file)
        return self._open[file]


def open_safetensors(path: Path) -> Any:
    """A `safe_open` handle, or what is like one; ValueError when the file is missing, truncated or not
    safetensors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file; download the checkpoint again")
    try:
        if is_bucket(path):
            return _InBucket(path)
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: corrupt safetensors file ({error}); download it again") from error


class _InBucket:
    """What is used of a `safe_open` handle, of a file in a bucket: each tensor is read as a range."""

    def __init__(self, path: Path):
        self._path = path
        [length] = read_ranges([(path, 0, 8)])
        self._start = 8 + int.from_bytes(length, "little")
        if self._start > (size := version(path)[0]):
            raise ValueError(f"a header of {self._start} bytes in {size}")
        self._layout = json.loads(read_ranges([(path, 8, self._start)])[0])
        self._layout.pop("__metadata__", None)
        end = self._start + max((one["data_offsets"][1] for one in self._layout.values()), default=0)
        if end != size:
            raise ValueError(f"{end} bytes announced, {size} there")

    def keys(self) -> list[str]:
        return list(self._layout)

    def get_slice(self, name: str) -> _InBucket.Slice:
        from safetensors import SafetensorError

        if name not in self._layout:
            raise SafetensorError(f"{name}: no such tensor")
        return self.Slice(self._layout[name]["shape"], self._layout[name]["dtype"])

    def get_tensor(self, name: str) -> np.ndarray:
        one = self._layout[name]
        first, last = (self._start + offset for offset in one["data_offsets"])
        data = read_ranges([(self._path, first, last)])[0] if last > first else b""
        return np.frombuffer(data, numpy_dtype(one["dtype"])).reshape(one["shape"])

    @dataclasses.dataclass(frozen=True)
    class Slice:
        shape: list[int]
        dtype: str

        def get_shape(self) -> list[int]:
            return self.shape

        def get_dtype(self) -> str:
            return self.dtype


def match_weights(source: SafetensorsDir, arch: ArchSpec) -> list[Weight]:
    """The weights of `arch`, once `source` has been found to hold exactly them.

    ValueError lists up to five tensors that are missing, unexpected, misshapen or of another type. A tied
    model may repeat its embedding as lm_head, if it is equal.
    """
    weights = weights_of(arch)
    expected = {w.name: w for w in weights}
    extra = [n for n in source.files if n not in expected and not n.endswith(_NOT_WEIGHTS)]
    if arch.tie_embeddings and "lm_head.weight" in extra:
        _check_tied_copy(source)
        extra.remove("lm_head.weight")
    problems = [
        f"{n}: expected {list(w.hf_shape)}, got none" for n, w in expected.items() if n not in source.files
    ]
    problems += [f"{n}: not expected, got {list(source.headers[n][0])}" for n in extra]
    for name, weight in expected.items():
        shape, dtype = source.headers.get(name, (weight.hf_shape, "F32"))
        if shape != weight.hf_shape:
            problems.append(f"{name}: expected {list(weight.hf_shape)}, got {list(shape)}")
        elif dtype not in _FLOATS:
            problems.append(f"{name}: expected one of {', '.join(_FLOATS)}, got {dtype}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source.directory}: weights disagree with config.json: " + "; ".join(problems[:5]) + more
        )
    return weights


def lazy_params(source: SafetensorsDir, weights: list[Weight]) -> dict[str, LazyArray]:
    """{canonical path: array that reads its tensor when asked}."""

    def lazy(weight: Weight) -> LazyArray:
        dtype = numpy_dtype(source.headers[weight.name][1])
        return LazyArray(weight.shape, dtype, lambda: weight.from_hf(source.read(weight.name)))

    return {weight.path: lazy(weight) for weight in weights}


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `max_shard_bytes`; a larger tensor gets its own."""
    shards: list[list[str]] = []
    held = math.inf
    for name, size in sizes.items():
        if held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_shards(
    out: Path, shards: list[list[str]], read: Callable[[list[str]], dict[str, np.ndarray]]
) -> int:
    """Writes model-0000x-of-0000y.safetensors and the index, a shard at a time; returns bytes of weights.

    Of several processes each writes its share of the files, and all return the same. `read` gives the tensors
    of a shard by name, and may add others. OSError when one cannot be written.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(jax.process_index(), len(shards), jax.process_count()):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = read(shards[i])
        _save(tensors, out / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    written = of_all([weight_map, total])
    weight_map = {name: file for part, _ in written for name, file in part.items()}
    total = sum(size for _, size in written)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    on_primary(lambda: (out / INDEX).write_text(json.dumps(index, indent=2) + "\n"))
    return total


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        if is_bucket(path):
            with whole_file(path) as held:
                save_file(tensors, held.name, metadata={"format": "pt"})
        else:
            save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _file_of_each(directory: Path) -> dict[str, str]:
    """{tensor name: file name} from the index, or from the single file."""
    index = directory / INDEX
    if index.is_file():
        try:
            mapping = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: truncated or damaged index ({error}); download it again") from error
        return dict(_checked_mapping(mapping, index))
    if (directory / "model.safetensors").is_file():
        return dict.fromkeys(open_safetensors(directory / "model.safetensors").keys(), "model.safetensors")
    other = next(
        (p.name for pattern in ("*.bin", "*.pth", "*.gguf") for p in sorted(directory.glob(pattern))), None
    )
    hint = f"; {other} is not safetensors, save the model with safe_serialization first" if other else ""
    raise ValueError(f"{directory}: expected model.safetensors or {INDEX}, got neither{hint}")


def _checked_mapping(mapping: Any, index: Path) -> Iterator[tuple[str, str]]:
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: weight_map: expected names and files, got {mapping!r}")
    for name, file in mapping.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {name}: expected a safetensors file beside the index, got {file!r}")
        yield name, file


def _check_tied_copy(source: SafetensorsDir) -> None:
    embed = "model.embed_tokens.weight"
    same = embed in source.files and source.headers[embed] == source.headers["lm_head.weight"]
    if not same or source.read(embed).tobytes() != source.read("lm_head.weight").tobytes():
        raise ValueError(
            f"{source.directory}: lm_head.weight: expected the embedding (tie_word_embeddings is true), "
            "got other values; set tie_word_embeddings to false in config.json"
        )


def numpy_dtype(name: str) -> np.dtype:
    """Of a dtype as safetensors calls it."""
    import jax.numpy as jnp

    kinds: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": jnp.bfloat16}
    return np.dtype(kinds[name])
