"""The `cache` stage: a teacher reads training data once, and what it thinks comes next is kept.

For every position its `top_k` likeliest tokens with their log-probabilities, and that of all others together
(`cache_store`). Distillation with the same data then needs no teacher for its next-token terms.

Legend: B rows, T positions, D model, K tokens kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemojax.arch import ArchSpec
from nemojax.buckets import absolute
from nemojax.checkpoints.artifact import load_model
from nemojax.checkpoints.digest import weights_digest
from nemojax.config import field, required
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import check_vocab, load_tokenizer
from nemojax.data.vocabulary import tokenizer_digest
from nemojax.distill.cache_store import FOLDER, About, TeacherCache, row_hashes
from nemojax.distill.losses import DistillWeights, teacher_top_k
from nemojax.hosts import Preempted, Sigterm, is_primary, on_primary
from nemojax.log import RunLog
from nemojax.model.llama import Compute, Params
from nemojax.sharding import BATCH_AXES, MeshConfig, make_mesh, place_batch, use_mesh
from nemojax.stage import fingerprint, read_json, run_stage, write_json

PROGRESS = "progress.json"  # where the data stand after the last whole group of steps
Program = Callable[[Params, Mapping[str, jax.Array]], dict[str, jax.Array]]


@dataclass(frozen=True)
class Config:
    teacher: str = required("artifact of the teacher")
    data: TextData = field(TextData(), "texts, in the very configuration that is distilled with")
    steps: int = field(1000, "steps of data.batch_size rows to read, from the first on")
    top_k: int = field(100, "tokens kept at every position")
    temperature: float = field(1.0, "of the distributions; distillation has to use the same")
    dtype: Literal["float32", "float16", "bfloat16"] = field("float32", "of the log-probabilities kept")
    out: str = field("", "where to: a folder, gs:// or s3://BUCKET/PATH; empty: the work directory")
    steps_per_file: int = field(16, "steps that are kept in host memory and written together")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")

    def __post_init__(self):
        if min(self.steps, self.top_k, self.steps_per_file) < 1:
            raise ValueError("steps, top_k, steps_per_file: expected at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Writes the cache; killed and started again it goes on behind the last whole group of steps.

    Returns where it is, and what it holds. Raises `Preempted` (exit code 75) after SIGTERM.
    """
    inputs = [cfg.teacher, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    return run_stage("cache", cfg, workdir, inputs, lambda path: _write(cfg, path), many_processes=True)


def _write(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh, url = make_mesh(cfg.mesh), cfg.out or str(absolute(workdir) / FOLDER)
    tokenizer = load_tokenizer(cfg.teacher)
    arch, params = load_model(cfg.teacher, mesh)
    check_vocab(tokenizer, arch)
    if cfg.top_k >= arch.vocab_size:
        raise ValueError(f"top_k: expected less than the vocabulary of {arch.vocab_size}, got {cfg.top_k}")
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    batches = train_batches(cfg.data, tokenizer, jax.process_index(), jax.process_count())
    about = About(
        teacher=weights_digest(arch, params),
        artifact=on_primary(lambda: fingerprint(cfg.teacher)),
        tokenizer=tokenizer_digest(tokenizer),
        data=batches.identity,
        vocab_size=arch.vocab_size,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        dtype=cfg.dtype,
        length=cfg.data.length,
        batch_size=cfg.data.batch_size,
        steps=cfg.steps,
        steps_per_file=cfg.steps_per_file,
    )
    on_primary(lambda: TeacherCache(url).claim(about))
    _fill(TeacherCache(url), params, make_program(arch, cfg, mesh), batches, mesh, workdir)
    rows = cfg.steps * cfg.data.batch_size
    return {"cache": url, "rows": rows, "tokens": rows * cfg.data.length, "top_k": cfg.top_k}


def make_program(arch: ArchSpec, cfg: Config, mesh: Mesh) -> Program:
    """(params, batch) -> ids and logps [B, T, K], tail [B, T], as they are stored, and the batch's `column`.

    Every process gets all positions of its rows.
    """
    kind = jnp.uint16 if arch.vocab_size < 1 << 16 else jnp.uint32
    loss = DistillWeights(top_k=cfg.top_k, temperature=cfg.temperature)
    tell = teacher_top_k(arch, loss, cfg.compute, cfg.loss_chunk)

    def program(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        told = tell(params, batch)
        return {
            "ids": told["teacher_ids"].astype(kind),
            "logps": told["teacher_logps"].astype(cfg.dtype),
            "tail": told["teacher_tail"],
            "column": batch["column"],
        }

    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES)) if mesh.size > 1 else None
    return jax.jit(program, out_shardings=place)


def _fill(
    cache: TeacherCache, params: Params, program: Program, batches: Any, mesh: Mesh, workdir: Path
) -> None:
    """Writes every group of steps that is not there; one is written while the teacher reads the next."""
    about = cache.told
    places = slice(jax.process_index(), None, jax.process_count())
    first = on_primary(lambda: cache.num_rows // about.batch_size)
    _go_to(first, batches, workdir)
    log: Any = RunLog(workdir, about.steps) if is_primary() else contextlib.nullcontext()
    commit: Callable[[], None] | None = None
    with Sigterm() as sigterm, log:
        if is_primary():
            log.truncate(first)
        for step in range(first, about.steps, about.steps_per_file):
            stop = min(step + about.steps_per_file, about.steps)
            hashes, arrays = _read_group(stop - step, params, program, batches, mesh)
            if commit:
                commit()
            writes = cache.write(step, places, arrays)
            commit = _committer(cache, step, hashes, writes, batches.state(), workdir)
            if is_primary():
                log.write(stop, {"cache/tail": float(np.exp(arrays["tail"]).mean())})
            if sigterm.stops_here():
                commit()
                raise Preempted(stop)
        if commit:
            commit()


def _read_group(
    steps: int, params: Params, program: Program, batches: Any, mesh: Mesh
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Hashes [steps, B] and arrays [steps, B, ...] of this process's rows; copied while the next are read."""
    hashes, found, reading = [], [], []
    with use_mesh(mesh):
        for _ in range(steps):
            batch = next(batches)
            hashes.append(row_hashes(batch))
            column_BT = np.zeros_like(batch["tokens"]) + np.arange(batch["tokens"].shape[1], dtype=np.int32)
            reading.append(program(params, place_batch({**batch, "column": column_BT}, mesh)))
            if len(reading) > 1:
                found.append(_rows_here(reading.pop(0)))
    found += map(_rows_here, reading)
    return np.stack(hashes), {name: np.stack([one[name] for one in found]) for name in found[0]}


def _rows_here(out: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """This process's rows, positions in the order of the text whatever the order on the devices."""
    host = {}
    for name, array in out.items():
        parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        host[name] = np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])
    order_T = np.argsort(host.pop("column")[0])
    return {name: array[:, order_T] for name, array in host.items()}


def _committer(
    cache: TeacherCache, step: int, hashes: np.ndarray, writes: list, state: dict[str, Any], workdir: Path
) -> Callable[[], None]:
    """What marks a group as there, once every process has written its files of it."""

    def commit() -> None:
        cache.wait(writes)
        every = hashes if jax.process_count() == 1 else _interleaved(hashes)

        def write() -> None:
            cache.commit(step, every)
            write_json(workdir / PROGRESS, {"step": step + len(every), "data": state})

        on_primary(write)

    return commit


def _interleaved(mine: np.ndarray) -> np.ndarray:
    """[steps, B] of all processes from [steps, B / n] of each, which has every n-th place of a batch."""
    halves = process_allgather(mine.view(np.uint32))  # [n, steps, 2 B / n]: JAX has no 64 bits by default
    every = np.ascontiguousarray(halves).view(np.uint64)
    return np.moveaxis(every, 0, -1).reshape(len(mine), -1)


def _go_to(step: int, batches: Any, workdir: Path) -> None:
    """The data behind `step` steps: as they were saved there, else by walking."""
    saved = on_primary(lambda: read_json(workdir / PROGRESS)) or {}
    if saved.get("step") == step:
        batches.restore(saved["data"])
        return
    for _ in range(step):
        next(batches)
