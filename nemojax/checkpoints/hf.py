"""Hugging Face directories in and out: a tensor or a shard at a time, bitwise, all or nothing.

Import streams: Orbax is handed arrays that read their tensor when they are written, so host memory holds
a bounded batch (`store.LAZY_BYTES`, or the largest tensor). Export reads one output shard at a time. Several
processes share out the tensors of an import and the files of an export. The original config.json and
generation_config.json stay beside the architecture, in `ARTIFACT/hf/`, so that an unchanged model is exported
key by key as it came. Both write under a temporary name and rename; in a bucket, which cannot, under the name
itself, with a file UNFINISHED until all is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nemojax.arch import ArchSpec, load_arch
from nemojax.buckets import (
    MADE,
    UNFINISHED,
    absolute,
    check_bucket,
    clear_unfinished,
    copy_file,
    is_bucket,
    place,
    remove_tree,
    write_text,
)
from nemojax.checkpoints import decilm, hf_fp8, hf_weights, side_files
from nemojax.checkpoints.artifact import Checkpoints, params_reader
from nemojax.checkpoints.hf_config import FORMATS, Format, arch_from_config, choose_format, config_from_arch
from nemojax.checkpoints.store import Reader, nested
from nemojax.hosts import failing_together, is_primary, of_all, on_primary

MAX_SHARD_BYTES = 5_000_000_000
_WANTED = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote. `size` in bytes of weights; `warnings` name loaders that will not take it."""

    path: Path
    format: Format
    num_tensors: int
    size: int
    warnings: tuple[str, ...]


@failing_together()
def import_hf(src: str | os.PathLike, artifact: str | os.PathLike, revision: str | None = None) -> ArchSpec:
    """Makes an artifact of a Llama or DeciLM checkpoint: a directory, here or in a bucket, or a hub name
    (with `revision`).

    dtypes are kept; FP8 weights become numbers of the dtype of the embedding. ValueError names the key,
    tensor or file that is not as expected; nothing is left then. What a killed process leaves in a bucket, an
    artifact without a checkpoint, is replaced by the next import.
    """
    source = _find_source(src, revision)
    target = absolute(artifact)
    config_path = source / "config.json"
    config = side_files.read_json(config_path)
    arch = arch_from_config(config, str(config_path))
    kind = hf_fp8.Dequantized if hf_fp8.is_fp8(config, str(config_path)) else hf_weights.SafetensorsDir
    tensors = kind(source)
    weights = hf_weights.match_weights(tensors, arch)

    def write_small_files(partial: Path) -> None:
        (partial / "arch.json").write_text(arch.dumps())
        (partial / "hf").mkdir(exist_ok=True)
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                copy_file(source / name, partial / "hf" / name)
        side_files.copy_tokenizer(source, partial / "tokenizer", arch.vocab_size)

    with _new_directory(target) as partial:
        on_primary(lambda: write_small_files(partial))
        checkpoints = Checkpoints(partial, keep_last=1, arch=arch)
        checkpoints.save(0, nested(hf_weights.lazy_params(tensors, weights)))
        checkpoints.close()
    return arch


@failing_together()
def export_hf(
    artifact: str | os.PathLike,
    out: str | os.PathLike,
    format: Format | Literal["auto"] = "auto",
    step: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: hf_fp8.Dtype = "stored",
    finish: Callable[[Path, Exported], None] = lambda written, exported: None,
) -> Exported:
    """Writes a directory for transformers, vLLM, TensorRT-LLM or llama.cpp (`llama`, `decilm`) or NVIDIA
    Model Optimizer (`anymodel`); `auto` is llama when all layers are equal, else decilm.

    `step` defaults to the newest. `dtype` fp8 rounds block matrices to e4m3, with what else there is in bf16
    (`hf_fp8`). finish: adds to the directory before that has its name. ValueError names layer and value of
    what the format cannot say.
    """
    artifact, target = absolute(artifact), absolute(out)
    check_bucket(artifact)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format: expected auto, {', '.join(FORMATS)}, got {format!r}")
    if not (artifact / "arch.json").is_file():
        raise ValueError(
            f"{artifact}: expected an artifact with arch.json, got none; run `nemojax import` first"
        )
    arch = load_arch(artifact / "arch.json")
    reader = params_reader(artifact, step)
    original_path = artifact / "hf" / "config.json"
    original = side_files.read_json(original_path) if original_path.is_file() else None
    kind = _choose(arch, original) if format == "auto" else format
    ids = side_files.special_tokens(artifact / "tokenizer")
    config = config_from_arch(
        arch, kind, original, _dtype_name(reader) if dtype == "stored" else "bfloat16", ids
    )
    if dtype == "fp8":
        config["quantization_config"] = hf_fp8.QUANTIZATION_CONFIG
    side_files.check_vocabulary(artifact / "tokenizer", arch.vocab_size)
    weights = hf_weights.weights_of(arch)

    def write_small_files(partial: Path) -> None:
        if generation := side_files.generation_config(artifact, ids):
            side_files.write_json(partial / "generation_config.json", generation)
        side_files.export_tokenizer(artifact / "tokenizer", partial)
        if kind == "decilm":
            _copy_model_code(partial)

    warnings = tuple(decilm.loader_warnings(arch)) if kind == "decilm" else ()
    with _new_directory(target) as partial:
        on_primary(lambda: write_small_files(partial))
        count, size = _write_weights(partial, reader, weights, max_shard_bytes, dtype)
        done = Exported(target, kind, count, size, warnings)
        on_primary(lambda: finish(partial, done))
        # last, as nothing reads weights without it
        on_primary(lambda: side_files.write_json(partial / "config.json", config))
    return done


def _choose(arch: ArchSpec, original: dict[str, Any] | None) -> Format:
    """As it came in when it still is that; otherwise by the layers."""
    if original is not None:
        with contextlib.suppress(ValueError):
            if original.get("model_type") == "nemotron-nas" and arch_from_config(original, "") == arch:
                return "decilm"
    return choose_format(arch)


def _write_weights(
    out: Path, reader: Reader, weights: list[hf_weights.Weight], max_shard_bytes: int, dtype: hf_fp8.Dtype
) -> tuple[int, int]:
    """(tensors, bytes) written."""
    by_name = {w.name: w for w in weights}
    if missing := [w.path for w in weights if w.path not in reader.leaves]:
        raise ValueError(f"{reader.path}: expected {missing[0]}, got none; arch and checkpoint disagree")
    sizes = {}
    for w in weights:
        leaf = reader.leaves[w.path]
        if tuple(leaf.shape) != w.shape:
            raise ValueError(
                f"{reader.path}: {w.path}: expected {w.shape}, got {tuple(leaf.shape)}; arch.json disagrees"
            )
        sizes[w.name] = hf_fp8.written_size(w, leaf.dtype, dtype)
    count = 0

    def read(names: list[str]) -> dict[str, np.ndarray]:
        nonlocal count
        arrays = reader.read(by_name[n].path for n in names)
        tensors: dict[str, np.ndarray] = {}
        for weight in (by_name[n] for n in names):
            tensors |= hf_fp8.as_written(weight, weight.to_hf(arrays.pop(weight.path)), dtype)
        count += len(tensors)
        return tensors

    size = hf_weights.write_shards(out, hf_weights.plan_shards(sizes, max_shard_bytes), read)
    return sum(of_all(count)), size


def _copy_model_code(out: Path) -> None:
    code = Path(__file__).parent / "hf_files"
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        copy_file(code / name, out / name)


def _dtype_name(reader: Reader) -> str:
    """Of the embedding: what transformers calls torch_dtype."""
    return str(np.dtype(reader.leaves["embed/weight"].dtype).name)


def _find_source(src: str | os.PathLike, revision: str | None) -> Path:
    check_bucket(src)
    path = absolute(src)
    if path.is_dir():
        return path
    if path.exists() or is_bucket(src) or str(src).startswith((".", "/", "~")) or str(src).count("/") != 1:
        raise ValueError(f"{src}: expected a model directory or a hub name such as org/model, got neither")
    from huggingface_hub import snapshot_download

    try:  # token, endpoint and cache come from huggingface_hub's own environment and login
        return Path(snapshot_download(str(src), revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{src}: no such directory, and the hub does not give it ({line[:200]})") from error


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the body succeeds and vanishes when it does not.

    A bucket has no names to change: there it is `target`, which is `UNFINISHED` until then; what a killed
    process left so is removed. Several processes have the same one.
    """

    def begin() -> str:
        check_bucket(target)
        clear_unfinished(target)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target}: already exists; remove it or choose another name")
        if is_bucket(target):
            write_text(target / UNFINISHED, MADE)
            return str(target)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        remove_tree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{target}: could not write ({error.strerror or error})") from error
        return str(partial)

    def end() -> None:
        (partial / UNFINISHED).unlink() if partial == target else partial.rename(target)

    partial = place(on_primary(begin))
    try:
        yield partial
        on_primary(end)
    except BaseException as error:
        if is_primary():
            _remove(partial)
        match error:
            case OSError():
                raise ValueError(f"{target}: could not write ({error.strerror or error})") from error
            case ValueError():  # it may name the directory that is gone by now
                raise ValueError(str(error).replace(str(partial), str(target))) from error
        raise


def _remove(failed: Path) -> None:
    """Removes the directory of a failed save, and what Orbax's other writers still make in it meanwhile."""
    gone = 0
    for _ in range(100):
        with contextlib.suppress(Exception):
            clear_unfinished(failed)
        remove_tree(failed, ignore_errors=True)
        gone = 0 if failed.exists() else gone + 1
        if gone == 6:
            return
        time.sleep(0.05)
