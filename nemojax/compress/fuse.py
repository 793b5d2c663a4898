"""The `fuse` stage: feed-forwards that follow each other without attention become one wide one.

FFN Fusion (arXiv 2503.18908): where block after block has no attention, each reads a residual stream that the
ones before it have hardly turned, so all may read the same and be one SwiGLU, whose channels are theirs side
by side. How much one block leans on another is the cosine distance between what it adds to the stream, and
what it adds when the other is left out.
Legend: B batch, T tokens, D model, F ffn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax import plots
from nemojax.arch import ArchSpec, BlockSpec, NoOp, SwiGLU, describe
from nemojax.checkpoints.artifact import load_model, save_params
from nemojax.compress.measures import in_turn
from nemojax.config import field, required
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, copy_tokenizer, load_tokenizer
from nemojax.evaluate.latency import LatencyConfig, measure
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.losses.hidden import cosine_distance
from nemojax.model.attention import make_context
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name, stack, unstack
from nemojax.model.llama import Compute, embed, exact_matmuls
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh
from nemojax.stage import read_json, run_stage, write_json, write_text

log = logging.getLogger(__name__)

EMPTY = BlockSpec(NoOp(), NoOp())
Norm = Literal["own", "last"]
Group = tuple[int, ...]


@dataclass(frozen=True)
class Fusion:
    """Which feed-forwards become one."""

    runs: tuple[tuple[int, int], ...] = field(
        (), "first and last layer of each run to fuse whole; empty: what the dependencies allow"
    )
    skip_last: int = field(1, "feed-forwards that stay alone at the end of a found run: they are sensitive")
    max_width: int = field(0, "most channels of a fused layer, else it becomes several; 0: no bound")
    max_dependency: float = field(
        0.3, "largest dependency (cosine distance, 0 to 2) between two that are fused"
    )
    norm: Norm = field(
        "own", "each block's own norm scale, folded into its weights; or last: all read the last block's norm"
    )

    def __post_init__(self):
        if self.skip_last < 0 or self.max_width < 0 or self.max_dependency < 0:
            raise ValueError("fusion: expected skip_last, max_width and max_dependency of at least 0")


@dataclass(frozen=True)
class Config:
    model: str = required("artifact with layers that have no attention")
    data: TextData = field(TextData(), "calibration texts, and held-out ones for the loss")
    batches: int = field(4, "calibration batches for the dependencies")
    everywhere: bool = field(False, "dependencies between all layers, for the picture: their number squared")
    fusion: Fusion = field(Fusion(), "what is fused")
    latency: LatencyConfig = field(LatencyConfig(), "stopwatch before and after")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Fuses in `workdir`, which becomes the artifact; returns what was fused, and before and after: blocks
    one after the other, held-out loss (nats a token) and latency. Also dependency.json and dependency.svg."""
    exact_matmuls(cfg.compute, "fuse")
    inputs = [cfg.model, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    return run_stage("fuse", cfg, workdir, inputs, lambda path: _fuse(cfg, path))


def _fuse(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh)
    tokenizer = load_tokenizer(cfg.model)
    arch, params = load_model(cfg.model, mesh)
    check_vocab(tokenizer, arch)
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    for first, last in cfg.fusion.runs:
        named_run(arch, first, last)  # refused before anything is measured
    layers, matrix = _dependency(cfg, arch, params, tokenizer, mesh, workdir / "dependency.json")
    groups = choose(arch, layers, matrix, cfg.fusion)
    if not groups:
        log.warning("fuse: nothing to fuse among the runs %s; the model stays as it is", ffn_runs(arch))
    words = [f"{i}" for i in layers]
    picture = plots.heat_map(
        matrix.tolist(), words, title="Dependency of each block on an earlier one", ylabel="left out",
        xlabel="layer", scale="cosine distance",
    )  # fmt: skip
    write_text(workdir / "dependency.svg", picture)
    before = _measured(cfg, arch, params, tokenizer, mesh)
    fused, weights = fuse(params, arch, groups, cfg.fusion.norm)
    del params
    save_params(workdir, fused, weights)
    copy_tokenizer(tokenizer.path, workdir / "tokenizer")
    after = _measured(cfg, *load_model(workdir, mesh), tokenizer, mesh)
    return {
        "fused": [list(group) for group in groups],
        "widths": [_width(fused, group[-1]) for group in groups],
        "runs": [list(found) for found in ffn_runs(arch)],
        "num_params": fused.num_params(),
        "before": before,
        "after": after,
    }


def _measured(
    cfg: Config, arch: ArchSpec, params: dict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    with use_mesh(mesh):
        loss = heldout_loss(params, arch, heldout_batches(cfg.data, tokenizer), compute=cfg.compute)
    row: dict[str, Any] = {"blocks": sum(not b.is_empty for b in arch.blocks), "heldout": loss}
    if cfg.latency.batch:
        row["latency"] = measure(params, arch, cfg.latency, compute=cfg.compute, mesh=mesh)
    return row


def _dependency(
    cfg: Config, arch: ArchSpec, params: dict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, path: Path
) -> tuple[Group, np.ndarray]:
    """The layers measured and their dependencies, kept in `path` for a restart."""
    stored = read_json(path)
    if stored is None:
        everything = tuple(i for i, block in enumerate(arch.blocks) if not block.is_empty)
        runs = [everything] if cfg.everywhere else ffn_runs(arch)
        batches = islice(train_batches(cfg.data, tokenizer), cfg.batches) if runs else ()
        layers, matrix = dependency(params, arch, runs, batches, compute=cfg.compute, mesh=mesh)
        rows = [[value if math.isfinite(value) else None for value in row] for row in matrix.tolist()]
        stored = {"layers": list(layers), "dependency": rows}
        write_json(path, stored)
    matrix = np.array([[math.nan if v is None else v for v in row] for row in stored["dependency"]])
    return tuple(stored["layers"]), matrix


def ffn_runs(arch: ArchSpec) -> list[Group]:
    """Layers that are a SwiGLU without attention and follow each other, two at least; empty layers between
    do not count."""
    runs: list[list[int]] = [[]]
    for layer, block in enumerate(arch.blocks):
        if is_ffn(block):
            runs[-1].append(layer)
        elif not block.is_empty:
            runs.append([])
    return [tuple(found) for found in runs if len(found) > 1]


def is_ffn(block: BlockSpec) -> bool:
    return isinstance(block.attn, NoOp) and isinstance(block.ffn, SwiGLU)


def named_run(arch: ArchSpec, first: int, last: int) -> Group:
    """The feed-forwards from layer `first` to `last`; ValueError for a layer that cannot be fused."""
    if not 0 <= first < last < arch.num_layers:
        raise ValueError(
            f"fusion.runs: expected first < last of the {arch.num_layers} layers, got {first} and {last}"
        )
    for layer in range(first, last + 1):
        block = arch.blocks[layer]
        if not is_ffn(block) and not block.is_empty:
            raise ValueError(
                f"fusion.runs: layer {layer}: expected a feed-forward without attention, got "
                f"{describe(block.attn)} {describe(block.ffn)}; name a run without it"
            )
    found = tuple(i for i in range(first, last + 1) if is_ffn(arch.blocks[i]))
    if len(found) < 2:
        raise ValueError(
            f"fusion.runs: expected two feed-forwards in layers {first} to {last}, got {len(found)}"
        )
    return found


def dependency(
    params: dict,
    arch: ArchSpec,
    runs: Sequence[Group],
    batches: Iterable[Mapping[str, Any]],
    *,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Group, np.ndarray]:
    """(layers of all runs, matrix [n, n]): how much each block leans on an earlier one of its run.

    matrix[i, j] is the mean over real tokens of the cosine distance between what block j adds to the stream,
    and what it adds when block i is left out (FFN Fusion, section 3); NaN where j does not follow i in one
    run. A run may be any layers with only empty ones between them. ValueError for data without tokens.
    """
    layers = tuple(sorted(layer for found in runs for layer in found))
    place = {layer: n for n, layer in enumerate(layers)}
    pairs = [pair for found in runs for pair in combinations(sorted(found), 2)]
    sums, tokens = np.zeros(len(pairs)), 0.0
    with use_mesh(mesh):
        for batch in batches if pairs else ():
            names = ("tokens", "positions", "segments")
            placed = place_batch({name: np.asarray(batch[name]) for name in names}, mesh)
            distances = dict(_distances(params, arch, runs, placed, compute, mesh))
            sums += np.array(jax.device_get([distances[pair] for pair in pairs]), np.float64)
            tokens += float(np.sum(np.asarray(batch["segments"]) > 0))
    if pairs and not tokens:
        raise ValueError("dependency: expected calibration batches with tokens, got none; give more data")
    if not np.isfinite(sums).all():
        raise ValueError("dependency: expected finite activations, got others; is the model trained?")
    matrix = np.full((len(layers), len(layers)), np.nan)
    for (i, j), total in zip(pairs, sums, strict=True):
        matrix[place[i], place[j]] = total / tokens
    return layers, matrix


def _distances(
    params: dict,
    arch: ArchSpec,
    runs: Sequence[Group],
    batch: dict,
    compute: Compute,
    mesh: jax.sharding.Mesh | None,
) -> Iterator[tuple[tuple[int, int], jax.Array]]:
    """((i, j), distance summed over the batch's tokens). One stream for each block left out goes along with
    the model's own to the end of the run."""
    run_of = {layer: found for found in runs for layer in found}
    where = {layer: (n, run) for n, run in enumerate(arch.runs()) for layer in run.layers}
    h_BTD = embed(params, batch["tokens"], compute)
    without: dict[int, jax.Array] = {}
    for layer in range(max(run_of, default=-1) + 1):
        if layer not in where:
            continue
        number, run = where[layer]
        block = partial(_block, arch, run.spec, params["runs"][run_name(number)], run.layers.index(layer))
        after_BTD = in_turn(block(h_BTD, batch), mesh)
        without = {i: h for i, h in without.items() if run_of[i] is run_of.get(layer)}
        for i, other_BTD in without.items():
            without[i], distance = in_turn(block(other_BTD, batch, h_BTD, after_BTD), mesh)
            yield (i, layer), distance
        if layer in run_of and layer != run_of[layer][-1]:
            without[layer] = h_BTD
        h_BTD = after_BTD


@partial(jax.jit, static_argnames=("arch", "spec"))
def _block(
    arch: ArchSpec,
    spec: BlockSpec,
    stacked: dict,
    index: int,
    h_BTD: jax.Array,
    batch: dict,
    own_BTD: jax.Array | None = None,
    own_after_BTD: jax.Array | None = None,
) -> Any:
    """The stream after one layer of a run; with the model's own stream around it also the distance between
    what the layer adds to that and to this one. `index` is data: one program serves every layer."""
    p = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)
    ctx = make_context(arch, batch["positions"], batch["segments"])
    after_BTD = apply_block(arch, spec, p, h_BTD, ctx)
    if own_BTD is None or own_after_BTD is None:
        return after_BTD
    distance_BT = cosine_distance(after_BTD - h_BTD, own_after_BTD - own_BTD)
    return after_BTD, jnp.sum(distance_BT * (batch["segments"] > 0))


def choose(arch: ArchSpec, layers: Group, matrix: np.ndarray, fusion: Fusion) -> list[Group]:
    """Groups of feed-forwards to fuse, each of two or more that follow each other.

    As few and as little dependent ones as the bounds allow. ValueError for a named run that cannot be fused.
    """
    place = {layer: n for n, layer in enumerate(layers)}

    def within(i: int, j: int) -> float:
        return float(matrix[place[i], place[j]])

    groups: list[Group] = []
    if fusion.runs:
        for first, last in fusion.runs:
            whole = named_run(arch, first, last)
            if taken := set(whole) & {layer for group in groups for layer in group}:
                raise ValueError(f"fusion.runs: expected runs apart, got layer {min(taken)} twice")
            parts = partition(whole, lambda i: _width(arch, i), lambda i, j: 0.0, fusion.max_width, math.inf)
            if not parts:
                raise ValueError(
                    f"fusion.max_width: expected room for two layers of the run {first} to {last}, "
                    f"got {fusion.max_width} channels; raise it"
                )
            groups += parts
        return sorted(groups)
    for found in ffn_runs(arch):
        kept = found[: len(found) - fusion.skip_last]
        groups += partition(kept, lambda i: _width(arch, i), within, fusion.max_width, fusion.max_dependency)
    return groups


def partition(
    layers: Sequence[int], width: Any, within: Any, max_width: int, max_dependency: float
) -> list[Group]:
    """Cuts a run into the fewest pieces whose widths add up to at most `max_width` (0: any) and whose pairs
    depend at most `max_dependency` on each other; among those the least dependent. Pieces of one drop out.
    """
    best: list[tuple[int, float, list[Group]]] = [(0, 0.0, [])]
    for stop in range(1, len(layers) + 1):
        options = []
        worst, total = 0.0, 0
        for start in reversed(range(stop)):
            piece = tuple(layers[start:stop])
            worst = max([worst, *(within(piece[0], j) for j in piece[1:])])
            total += width(piece[0])
            if len(piece) > 1 and ((max_width and total > max_width) or worst > max_dependency):
                break
            count, sum_of_worst, pieces = best[start]
            options.append((count + 1, sum_of_worst + worst, [*pieces, piece]))
        best.append(min(options, key=lambda option: option[:2]))
    return [piece for piece in best[-1][2] if len(piece) > 1]


def fuse(
    params: dict, arch: ArchSpec, groups: Sequence[Sequence[int]], norm: Norm = "own"
) -> tuple[ArchSpec, dict]:
    """The model with each group as one feed-forward in its last layer, the other layers empty; numpy.

    f(x) = x + the sum of the group's feed-forwards of the same x. `own` folds each block's norm scale into
    its gate and up, and the fused norm scale is one: exact to rounding. `last` reads the last block's norm
    for all (the paper's eta), which equals it only where the scales are equal.
    """
    canonical = unstack(jax.tree.map(np.asarray, params), arch)
    layers, blocks = dict(canonical["layers"]), list(arch.blocks)
    for group in groups:
        assert len(group) > 1 and all(is_ffn(blocks[i]) for i in group), group
        between = set(range(group[0], group[-1])) - set(group)
        assert list(group) == sorted(group) and all(blocks[i].is_empty for i in between), group
        parts = [layers.pop(str(i))["ffn"] for i in group]
        layers[str(group[-1])] = {"ffn": _side_by_side(parts, norm)}
        for i in group[:-1]:
            blocks[i] = EMPTY
        blocks[group[-1]] = BlockSpec(NoOp(), SwiGLU(layers[str(group[-1])]["ffn"]["gate"].shape[1]))
    fused = arch.replace(blocks=tuple(blocks))
    return fused, stack({**canonical, "layers": layers}, fused)


def _side_by_side(parts: Sequence[Mapping[str, np.ndarray]], norm: Norm) -> dict[str, np.ndarray]:
    def read(p: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        if norm == "last":
            return p[name]
        scaled_DF = p[name].astype(np.float32) * p["norm"].astype(np.float32)[:, None]
        return scaled_DF.astype(p[name].dtype)

    last = parts[-1]["norm"]
    return {
        "norm": last if norm == "last" else np.ones_like(last),
        "gate": np.concatenate([read(p, "gate") for p in parts], axis=1),
        "up": np.concatenate([read(p, "up") for p in parts], axis=1),
        "down": np.concatenate([p["down"] for p in parts], axis=0),
    }


def _width(arch: ArchSpec, layer: int) -> int:
    ffn = arch.blocks[layer].ffn
    assert isinstance(ffn, SwiGLU), layer
    return ffn.width
