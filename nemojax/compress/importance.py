"""How much each part of a parent matters: FFN channels and KV groups by layer, embedding channels, layers.

One interface, `measure`, over methods in files of their own: `magnitude` (structures.py), `activation`,
`taylor` (gradients.py), `iterative`, and for layers also block influence and perplexity drop (depth.py).
Calibration batches are read one at a time; what is added up stays on the devices where the parameters are.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as plain_field
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.buckets import place, write_bytes
from nemojax.compress.activation import ActivationMeter
from nemojax.compress.depth import InfluenceMeter, PerplexityMeter, check_span
from nemojax.compress.gradients import Order, TaylorMeter, TaylorSum
from nemojax.compress.iterative import IterativeMeter, Scaling
from nemojax.compress.structures import Structure, magnitude
from nemojax.config import field
from nemojax.model.llama import Compute
from nemojax.sharding import place_batch, use_mesh

Method = Literal["activation", "magnitude", "taylor", "iterative"]
Depth = Literal["influence", "perplexity", "taylor", "magnitude"]
VERSION = 2  # of the file; files without a version hold ffn/ and kv/ alone
BATCH_KEYS = ("tokens", "targets", "positions", "segments", "weights")


@dataclass(frozen=True)
class ImportanceConfig:
    """How parts are ranked before anything is cut."""

    method: Method = field("activation", "activation, magnitude (needs no data), taylor or iterative")
    batches: int = field(4, "calibration batches")
    parts: tuple[Structure, ...] = field(("ffn", "kv"), "what is ranked, of ffn, kv, embed, depth")
    depth: Depth = field(
        "influence", "layers: influence (1 - cos), perplexity (LM loss), taylor or magnitude"
    )
    depth_span: int = field(1, "neighbouring layers judged together (influence, perplexity)")
    order: Order = field(1, "taylor: 1, or 2 with the diagonal Fisher (a backward pass for each row)")
    taylor_sum: TaylorSum = field("elements", "taylor: sum of |.| over weights, or |sum| over outputs")
    removals: int = field(8, "iterative: steps on each batch, each removing an equal share of the channels")
    scaling: Scaling = field(
        "none", "iterative: scale the full output to the current one's norm by magnitude"
    )
    chunk: int = field(0, "positions whose logits exist at once, a divisor of the length; 0: all")

    def __post_init__(self):
        for name in ("batches", "depth_span", "removals"):
            if getattr(self, name) < 1:
                raise ValueError(f"importance.{name}: expected at least 1, got {getattr(self, name)}")
        if not self.parts:
            raise ValueError("importance.parts: expected some of ffn, kv, embed, depth, got none")
        if self.depth_span > 1 and self.depth in ("taylor", "magnitude"):
            raise ValueError(
                f"importance.depth_span: expected 1 with depth {self.depth}, got {self.depth_span}; "
                "its scores of single layers add up"
            )


@dataclass(frozen=True)
class Importance:
    """Scores, larger matters more; a part that was not asked for is empty.

    `ffn[layer]` [F] and `kv[layer]` [K] where a layer has such a part, `embed` [D] over the whole model,
    `depth[layer]` of each layer that is not empty (of the first, where several are judged together).
    """

    ffn: dict[int, np.ndarray]
    kv: dict[int, np.ndarray]
    embed: np.ndarray | None = None
    depth: dict[int, float] = plain_field(default_factory=dict)


class Meter(Protocol):
    """Reads calibration batches, then tells the scores of some parts as `Importance` holds them."""

    def update(self, batch: Mapping[str, jax.Array]) -> None: ...
    def result(self) -> dict[str, Any]: ...


def measure(
    params: dict,
    arch: ArchSpec,
    batches: Iterable[Mapping[str, Any]],
    cfg: ImportanceConfig | Method = "activation",
    compute: Compute = Compute(),
) -> Importance:
    """Importance of the parts of `params`, which may lie on a mesh: batches then are split like training's.

    cfg: a configuration, which reads exactly `cfg.batches` of `batches` (none where no data are needed), or a
    method alone, which ranks channels and KV groups on all of them. ValueError when data are too short or a
    score is not finite.
    """
    if isinstance(cfg, str):
        batches = list(batches) if cfg != "magnitude" else []
        cfg = ImportanceConfig(cfg, batches=max(len(batches), 1))
    parts: set[Structure] = set(cfg.parts)
    if "depth" in parts:
        check_span(arch, cfg.depth_span)
    by_weights = (parts - {"depth"}) if cfg.method == "magnitude" else set()
    if "depth" in parts and cfg.depth == "magnitude":
        by_weights.add("depth")
    mesh = _mesh_of(params)
    found: dict[str, Any] = {"ffn": {}, "kv": {}}
    with use_mesh(mesh):
        meters = _meters(params, arch, parts - by_weights, cfg, compute)
        for batch in _take(batches, cfg.batches) if meters else ():
            placed = place_batch(batch, mesh)
            for meter in meters:
                meter.update(placed)
        for meter in meters:
            found |= meter.result()
        if by_weights:
            found |= magnitude(params, arch, by_weights)
    importance = Importance(**found)
    _check_finite(importance, cfg, compute)
    return importance


def save(importance: Importance, path: str | Path) -> None:
    """One .npz with arrays `version`, `ffn/3`, `kv/3`, `embed`, `depth/3`, written whole or not at all."""
    arrays: dict[str, Any] = {
        f"{part}/{layer}": scores
        for part in ("ffn", "kv", "depth")
        for layer, scores in getattr(importance, part).items()
    }
    if importance.embed is not None:
        arrays["embed"] = importance.embed
    buffer = io.BytesIO()
    np.savez(buffer, version=np.asarray(VERSION), **arrays)
    write_bytes(place(path), buffer.getvalue())


def load(path: str | Path) -> Importance:
    """The scores in a file of `save`, or of a version before; ValueError when it is damaged or newer."""
    try:
        with np.load(io.BytesIO(place(path).read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and run again to measure it") from error
    version = int(arrays.pop("version", 1))
    if version > VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION} or lower, got {version}; delete it and run again, or "
            "use the nemojax that wrote it"
        )
    importance = Importance({}, {}, arrays.pop("embed", None))
    for name, scores in arrays.items():
        part, _, layer = name.partition("/")
        if part not in ("ffn", "kv", "depth") or not layer.isdigit():
            raise ValueError(f"{path}: expected scores, got an array {name!r}; delete it and run again")
        getattr(importance, part)[int(layer)] = float(scores) if part == "depth" else scores
    return importance


def _meters(
    params: dict, arch: ArchSpec, parts: set[Structure], cfg: ImportanceConfig, compute: Compute
) -> list[Meter]:
    """What reads the calibration data for `parts`."""
    meters: list[Meter] = []
    by_taylor: set[Structure] = set()
    if "depth" in parts:
        match cfg.depth:
            case "influence":
                meters.append(InfluenceMeter(params, arch, cfg.depth_span, compute))
            case "perplexity":
                meters.append(PerplexityMeter(params, arch, cfg.depth_span, cfg.chunk, compute))
            case "taylor":
                by_taylor.add("depth")
    width = parts - {"depth"}
    if cfg.method == "taylor":
        by_taylor |= width
    elif cfg.method == "iterative" and "ffn" in width:
        meters.append(IterativeMeter(params, arch, cfg.batches, cfg.removals, cfg.scaling, compute))
        width -= {"ffn"}  # KV groups and embedding channels have no iterative form
    if width - by_taylor:
        meters.append(ActivationMeter(params, arch, width, compute))
    if by_taylor:
        meters.append(TaylorMeter(params, arch, by_taylor, cfg.order, cfg.taylor_sum, cfg.chunk, compute))
    return meters


def _mesh_of(params: dict) -> jax.sharding.Mesh | None:
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None


def _take(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    iterator = iter(batches)
    for number in range(count):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(
                f"importance.batches: expected {count} calibration batches, got {number}; give more data"
                if number
                else "importance: expected at least one calibration batch with tokens, got none"
            )
        if jax.process_count() == 1 and not np.any(np.asarray(batch["segments"]) > 0):
            raise ValueError(
                f"importance: expected tokens in calibration batch {number + 1}, got padding alone"
            )
        yield {name: batch[name] for name in BATCH_KEYS if name in batch}


def _check_finite(importance: Importance, cfg: ImportanceConfig, compute: Compute) -> None:
    scores = [(f"layer {layer}: ffn", s) for layer, s in importance.ffn.items()]
    scores += [(f"layer {layer}: kv", s) for layer, s in importance.kv.items()]
    scores += [(f"layer {layer}: depth", s) for layer, s in importance.depth.items()]
    scores += [("embed", importance.embed)] if importance.embed is not None else []
    for where, values in scores:
        bad = int(np.sum(~np.isfinite(values)))
        if bad:
            raise ValueError(
                f"importance: {where}: expected finite scores, got {bad} of {np.size(values)} that are not "
                f"(method {cfg.method}, {compute.dtype}); check the parent's weights, or compute in float32"
            )
