"""Artifacts and work directories: arch.json, config.json, tokenizer/, checkpoints/<step>/{params,state}.

Parameters and optimiser states are canonical per layer on disk (see `store`), whatever the memory
layout was. A step becomes visible by one rename, in a bucket by its last file, so an unfinished save is
never read.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec, block_shapes, load_arch
from nemojax.buckets import (
    absolute,
    check_bucket,
    copy_file,
    directory,
    is_bucket,
    place,
    remove_tree,
    write_text,
)
from nemojax.checkpoints import store
from nemojax.hosts import is_primary, on_primary
from nemojax.model.llama import param_shardings

FORMAT_VERSION = 1


class Checkpoints:
    """The checkpoints of one work directory: asynchronous saves, the last `keep_last` and the best kept.

    `best` is "metric:min" or "metric:max" over the metrics given to `save`. Trees go in and come out in
    the memory layout of `arch` (read from `dir/arch.json` when not given); canonical ones pass unchanged.
    """

    def __init__(
        self,
        dir: str | os.PathLike,
        keep_last: int = 2,
        best: str | None = None,
        arch: ArchSpec | None = None,
    ):
        import orbax.checkpoint as ocp

        self.dir = absolute(dir)
        self.arch = arch if arch is not None else _read_arch(self.dir)
        self._best = _parse_best(best)
        self._saving: int | None = None
        root = self.dir / "checkpoints"
        _check_format(root)
        root.mkdir(parents=True, exist_ok=True)
        if is_primary():
            write_text(root / "format.json", json.dumps({"format_version": FORMAT_VERSION}, indent=2) + "\n")
        name, mode = self._best or ("", "max")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policy(keep_last, self._best),
            best_fn=(lambda metrics: metrics[name]) if self._best else None,
            best_mode=mode,
            cleanup_tmp_directories=is_primary(),
            enable_async_checkpointing=True,
        )
        handlers = {
            "params": store.handler(root),
            "state": store.handler(root),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(root, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        params: Any,
        state: Any = None,
        data_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies to the host, then writes in the background; `state` is any pytree (optimiser, keys, ...).

        Raises ValueError when this or the previous save could not be written (a full disk, say).
        """
        import orbax.checkpoint as ocp

        self.wait()  # one save in flight: a failure belongs to its step, and the host holds one copy
        items: dict[str, Any] = {
            "params": ocp.args.PyTreeSave(store.nested(store.canonical(params, self.arch)))
        }
        flat_state = store.canonical(state, self.arch) if state is not None else {}
        if flat_state:
            items["state"] = ocp.args.PyTreeSave(store.nested(flat_state))
        if data_state is not None:
            items["data"] = ocp.args.JsonSave(dict(data_state))
        values = {k: float(v) for k, v in metrics.items()} if metrics else None
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=values, force=True)
        except Exception as error:
            raise _write_error(self.dir, step, error) from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; ValueError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise _write_error(self.dir, self._saving, error) from error

    def latest(self) -> int | None:
        """The newest finished step; with several processes, as the primary sees it."""
        return on_primary(self._manager.latest_step)

    def steps(self) -> list[int]:
        """All finished steps, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the best metric; None without `best` or before a save that had it."""
        if self._best is None:
            return None
        name, mode = self._best
        scored = {s: self.metrics(s).get(name) for s in self.steps()}
        known = {s: v for s, v in scored.items() if v is not None}
        return (min if mode == "min" else max)(known, key=lambda s: known[s]) if known else None

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics given when `step` was saved."""
        path = self.dir / "checkpoints" / str(step) / "metrics" / "metrics"
        return json.loads(path.read_text()) if path.is_file() else {}

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Parameters of `step` in the structure, dtypes and shardings of `abstract`."""
        return store.Reader(self._item(step, "params")).like(abstract, self.arch)

    def restore_state(self, step: int, abstract: Any) -> Any:
        """The `state` of `step` in the structure of `abstract` (arrays or ShapeDtypeStructs).

        ValueError names the first leaf that is missing or of another shape.
        """
        return store.Reader(self._item(step, "state")).like(abstract, self.arch)

    def restore_data(self, step: int) -> dict[str, Any] | None:
        """The data iterator's state saved with `step`; None when there was none."""
        path = self.dir / "checkpoints" / str(step) / "data"
        files = sorted(p for p in path.glob("*") if p.is_file()) if path.is_dir() else []
        for file in files:
            if file.name == "metadata":
                try:
                    return json.loads(file.read_text())
                except ValueError as error:
                    raise ValueError(f"{file}: expected JSON, got something else ({error})") from error
        return None

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def _item(self, step: int, name: str) -> Path:
        path = self.dir / "checkpoints" / str(step) / name
        if not path.is_dir():
            raise ValueError(f"{path}: no such checkpoint; finished steps are {self.steps()}")
        return path


def load_params(
    artifact: str | os.PathLike,
    arch: ArchSpec | None = None,
    step: int | None = None,
    dtype: Any = None,
    shardings: Any = None,
    finish: Callable[[str, Any], Any] | None = None,
) -> tuple[ArchSpec, dict[str, Any]]:
    """(arch, params in the memory layout) of an artifact, read one weight at a time.

    `step` defaults to the newest; `dtype` to the stored one; `shardings` is a tree like the params. finish:
    what becomes of each weight before the next is read, as in `store.Reader.like`.
    """
    artifact = absolute(artifact)
    arch = arch if arch is not None else _read_arch(artifact)
    if arch is None:
        raise ValueError(
            f"{artifact}: expected an artifact with arch.json, got none; run `nemojax import` first"
        )
    reader = params_reader(artifact, step)
    names = [
        (f"layers/{i}/{sub}/{w}")
        for i, layer in layer_shapes(arch).items()
        for sub in layer
        for w in layer[sub]
    ]
    names += list(outer_shapes(arch))
    if extra := sorted(set(reader.leaves) - set(names)):
        raise ValueError(
            f"{reader.path}: {extra[0]}: not in arch.json ({len(extra)} such); arch and checkpoint disagree"
        )
    wanted: dict[str, Any] = {}
    for path, shape in memory_shapes(arch).items():
        first = path if (where := store.split_run(path, arch)) is None else f"layers/{where[2][0]}{where[1]}"
        stored = reader.leaves.get(first)
        wanted[path] = jax.ShapeDtypeStruct(shape, dtype or (stored.dtype if stored else np.float32))
    if shardings is not None:
        flat = store.flat_paths(shardings)
        wanted = {p: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=flat[p]) for p, w in wanted.items()}
    return arch, reader.like(store.nested(wanted), arch, finish)


def load_model(
    artifact: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    finish: Callable[[str, Any], Any] | None = None,
) -> tuple[ArchSpec, dict[str, Any]]:
    """(arch, params) of an artifact's newest step, placed on the mesh; `finish` as in `load_params`."""
    artifact = absolute(artifact)
    arch = _read_arch(artifact)
    places = None if mesh is None or mesh.size == 1 or arch is None else param_shardings(arch, mesh)
    return load_params(artifact, arch, dtype=dtype, shardings=places, finish=finish)


def save_params(
    artifact: str | os.PathLike,
    arch: ArchSpec,
    params: Any,
    step: int = 0,
    tokenizer_dir: str | os.PathLike | None = None,
) -> Path:
    """Writes a final artifact: arch.json, checkpoints/<step>/params, and a copy of the tokenizer."""
    artifact = absolute(artifact)
    artifact.mkdir(parents=True, exist_ok=True)
    write_text(artifact / "arch.json", arch.dumps())
    if tokenizer_dir is not None:
        (artifact / "tokenizer").mkdir(parents=True, exist_ok=True)
        for file in (entry for entry in place(tokenizer_dir).iterdir() if entry.is_file()):
            copy_file(file, artifact / "tokenizer" / file.name)
    remove_tree(artifact / "checkpoints" / str(step))  # whole, or what a kill left of it
    checkpoints = Checkpoints(artifact, keep_last=1, arch=arch)
    checkpoints.save(step, params)
    checkpoints.close()
    return artifact


def final_step(artifact: str | os.PathLike) -> int:
    """The newest finished step of an artifact; ValueError when it has none."""
    check_bucket(artifact)
    steps = finished_steps(artifact)
    if not steps and not place(artifact).exists():
        raise ValueError(f"{artifact}: expected an artifact, got nothing there; check the path")
    if not steps and (place(artifact) / "pipeline.json").is_file():  # what `stage` marks one with
        raise ValueError(f"{artifact}: expected an artifact, got a pipeline; name one of the stages in it")
    if not steps:
        raise ValueError(f"{artifact}: expected checkpoints/<step>, got none; is this a finished artifact?")
    return steps[-1]


def finished_steps(artifact: str | os.PathLike) -> list[int]:
    """Steps on disk, ascending; saves in progress do not count (see `_is_finished`)."""
    root = place(artifact) / "checkpoints"
    if not root.is_dir():
        return []
    _check_format(root)
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and _is_finished(p))


def _is_finished(step: Path) -> bool:
    """Whether all of a checkpoint is there: until then its name is a temporary one, in a bucket, which cannot
    rename, a file is missing."""
    if is_bucket(step) and not (step / "commit_success.txt").is_file():
        return False
    return (step / "params").is_dir()


def load_tokenizer(artifact: str | os.PathLike) -> Any:
    """The fast tokenizer that travels with an artifact (a `PreTrainedTokenizerFast`)."""
    from transformers import PreTrainedTokenizerFast

    path = directory(artifact) / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path}: expected tokenizer.json, got none; make one with `nemojax tokenizer`")
    return PreTrainedTokenizerFast.from_pretrained(str(path))


def params_reader(artifact: str | os.PathLike, step: int | None = None) -> store.Reader:
    """Reads single canonical weights of an artifact; `step` defaults to the newest."""
    artifact = absolute(artifact)
    step = final_step(artifact) if step is None else step
    if step not in finished_steps(artifact):
        raise ValueError(
            f"{artifact}: no checkpoint of step {step}; finished steps are {finished_steps(artifact)}"
        )
    return store.Reader(artifact / "checkpoints" / str(step) / "params")


def outer_shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Canonical paths and shapes of what is outside the blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed/weight": (arch.vocab_size, arch.dim),
        "norm/scale": (arch.dim,),
    }
    if not arch.tie_embeddings:
        shapes["head/weight"] = (arch.vocab_size, arch.dim)
    return shapes


def layer_shapes(arch: ArchSpec) -> dict[int, dict[str, dict[str, tuple[int, ...]]]]:
    """{layer: {"attn": {name: shape}, "ffn": ...}} of every layer that has weights."""
    return {i: arch.block_shapes(i) for i, block in enumerate(arch.blocks) if not block.is_empty}


def memory_shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Flat paths and shapes of the parameters in memory: layers of a run stacked."""
    shapes = outer_shapes(arch)
    for r, run in enumerate(arch.runs()):
        for sub, weights in block_shapes(arch, run.spec).items():
            shapes |= {f"runs/{r:03d}/{sub}/{w}": (len(run.layers), *s) for w, s in weights.items()}
    return shapes


def _read_arch(artifact: Path) -> ArchSpec | None:
    path = artifact / "arch.json"
    return load_arch(path) if path.is_file() else None


def _check_format(root: Path) -> None:
    path = root / "format.json"
    if not path.is_file():
        return
    try:
        version = json.loads(path.read_text()).get("format_version")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a format version, got unreadable text; the directory is damaged"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}; "
            "use the nemojax that wrote it, or export it there and import it here"
        )


def _parse_best(best: str | None) -> tuple[str, str] | None:
    if best is None:
        return None
    name, _, mode = best.rpartition(":")
    if not name or mode not in ("min", "max"):
        raise ValueError(f"best: expected 'metric:min' or 'metric:max', got {best!r}")
    return name, mode


def _policy(keep_last: int, best: tuple[str, str] | None) -> Any:
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

    if keep_last < 1:
        raise ValueError(f"keep_last: expected at least 1, got {keep_last}")
    policies: list[Any] = [LatestN(keep_last)]
    if best is not None:
        name, mode = best

        def metric(values: Mapping[str, float]) -> float:
            return values.get(name, float("inf") if mode == "min" else float("-inf"))

        policies.append(
            BestN(get_metric_fn=metric, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False)
        )
    return AnyPreservationPolicy(policies)


def _write_error(dir: Path, step: int | None, error: Exception) -> Exception:
    text = str(error)
    full = (
        getattr(error, "errno", None) == errno.ENOSPC
        or "No space left" in text
        or "RESOURCE_EXHAUSTED" in text
    )
    if full:
        return ValueError(f"{dir}: no space left while saving step {step}; free some and run again")
    if isinstance(error, OSError | ValueError):
        return ValueError(
            f"{dir}: could not save step {step} ({' '.join(text.split())[:400] if text else repr(error)})"
        )
    return error
