"""The `prune` stage: a narrower, shallower child in one cut, without a search, as Minitron does.

Embedding channels go over the whole model, FFN channels to one width, KV groups with their query heads,
layers by depth importance, all ranked on the parent (arXiv 2407.14679; 2408.11796 cuts layers in one piece).
head_dim stays; what a narrower norm means is said in cuts.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from nemojax.arch import ArchSpec, Attention, SwiGLU
from nemojax.checkpoints.artifact import load_model, save_params
from nemojax.compress import importance
from nemojax.compress.cuts import (
    Groups,
    Leave,
    Norms,
    Pruned,
    groups_to_keep,
    host,
    layers_to_remove,
    most_groups,
    prune_embed,
    prune_ffn,
    prune_kv,
    remove_layers,
    width_for,
)
from nemojax.compress.depth import real_layers
from nemojax.compress.importance import Importance, ImportanceConfig
from nemojax.compress.structures import Structure
from nemojax.config import field, required
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import check_vocab, copy_tokenizer, load_tokenizer
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model.llama import Compute, exact_matmuls, param_shardings
from nemojax.sharding import MeshConfig, make_mesh, use_mesh
from nemojax.stage import run_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """The child's sizes; 0 is as the parent has it."""

    dim: int = field(0, "embedding channels of the whole model")
    ffn_width: int = field(0, "feed-forward channels of every layer that has more")
    ffn_ratio: float = field(0.0, "feed-forward channels of every layer, a share of its own")
    params_ratio: float = field(
        0.0, "share of all parameters to keep at most; picks the one FFN width for it"
    )
    multiple: int = field(256, "widths by a ratio are rounded to this many channels")
    kv_heads: int = field(0, "KV groups of the layers that have most; others keep the same share")
    groups: Groups = field("remove", "a removed KV group's query heads go too, or stay and are zeroed")
    layers: int = field(0, "layers that stay, empty ones not counted")
    contiguous: bool = field(False, "the removed layers are neighbours")
    leave: Leave = field("noop", "a removed layer stays as an empty one, or later layers move up")
    norms: Norms = field("keep", "norm scales after cutting the embedding: keep, or rescale")

    def __post_init__(self):
        chosen = [name for name in ("ffn_width", "ffn_ratio", "params_ratio") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"targets: expected one of {' and '.join(chosen)}, got {len(chosen)}; keep one")
        for name in ("ffn_ratio", "params_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"targets.{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.multiple < 1:
            raise ValueError(f"targets.multiple: expected at least 1 channel, got {self.multiple}")


@dataclass(frozen=True)
class Config:
    parent: str = required("artifact of the parent")
    data: TextData = field(TextData(), "calibration texts")
    importance: ImportanceConfig = field(ImportanceConfig(), "ranking; its parts are those that targets need")
    targets: Targets = field(Targets(), "sizes of the child")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Prunes in `workdir`, which becomes the child's artifact; returns sizes and held-out losses (nats)."""
    exact_matmuls(cfg.compute, "prune")
    inputs = [cfg.parent, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    return run_stage("prune", cfg, workdir, inputs, lambda path: _run(cfg, path))


def prune(params: dict, arch: ArchSpec, ranks: Importance, targets: Targets) -> Pruned:
    """The child of `targets`. Nothing to prune gives the parent's weights bitwise."""
    check(targets, arch)
    child = (arch, host(params))
    if targets.kv_heads:
        child = prune_kv(child[1], child[0], ranks, targets.kv_heads, targets.groups)
    if targets.dim:
        child = prune_embed(child[1], child[0], ranks, targets.dim, targets.norms)
    if targets.ffn_width or targets.ffn_ratio:
        child = prune_ffn(child[1], child[0], ranks, ffn_widths(child[0], targets))
    removed = layers_to_remove(arch, ranks, targets.layers, targets.contiguous) if targets.layers else ()
    if removed:
        child = remove_layers(child[1], child[0], removed, "noop")
    if targets.params_ratio:  # last: the other cuts count
        width = width_for(child[0], targets.params_ratio * arch.num_params(), targets.multiple)
        child = prune_ffn(child[1], child[0], ranks, width)
    return remove_layers(child[1], child[0], removed, targets.leave)


def check(targets: Targets, arch: ArchSpec) -> None:
    """ValueError naming the first target that this parent cannot meet."""
    widths = [b.ffn.width for b in arch.blocks if isinstance(b.ffn, SwiGLU)]
    most = {
        "dim": arch.dim,
        "ffn_width": max(widths, default=0),
        "kv_heads": most_groups(arch),
        "layers": len(real_layers(arch)),
    }
    for name, bound in most.items():
        value = getattr(targets, name)
        if not 0 <= value <= bound:
            raise ValueError(
                f"targets.{name}: expected 0 (as the parent) to the parent's {bound}, got {value}"
            )
    if targets.kv_heads:
        groups_to_keep(arch, targets.kv_heads, targets.groups)


def needed(targets: Targets, arch: ArchSpec) -> tuple[Structure, ...]:
    """The parts whose importance the targets ask for."""
    wanted: dict[Structure, bool] = {
        "ffn": bool(targets.ffn_width or targets.ffn_ratio or targets.params_ratio),
        "kv": 0 < targets.kv_heads < most_groups(arch),
        "embed": 0 < targets.dim < arch.dim,
        "depth": 0 < targets.layers < len(real_layers(arch)),
    }
    return tuple(part for part, is_wanted in wanted.items() if is_wanted)


def ffn_widths(arch: ArchSpec, targets: Targets) -> dict[int, int]:
    """The width that `ffn_width` or `ffn_ratio` gives each layer, never above its own."""
    widths = {i: b.ffn.width for i, b in enumerate(arch.blocks) if isinstance(b.ffn, SwiGLU)}
    if targets.ffn_width:
        return {i: min(width, targets.ffn_width) for i, width in widths.items()}
    step = targets.multiple
    return {i: min(w, max(1, round(w * targets.ffn_ratio / step)) * step) for i, w in widths.items()}


def _run(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh)
    tokenizer = load_tokenizer(cfg.parent)
    arch, params = load_model(cfg.parent, mesh)
    check_vocab(tokenizer, arch)
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    check(cfg.targets, arch)
    heldout = heldout_batches(cfg.data, tokenizer)
    ranks = _ranks(cfg, params, arch, workdir / "importance.npz")
    child, pruned = prune(params, arch, ranks, cfg.targets)
    save_params(workdir, child, pruned)
    copy_tokenizer(tokenizer.path, workdir / "tokenizer")
    with use_mesh(mesh):
        before = heldout_loss(params, arch, heldout, compute=cfg.compute)
    del params, pruned
    mesh = _mesh_for(child, mesh)
    child, placed = load_model(workdir, mesh)
    with use_mesh(mesh):
        after = heldout_loss(placed, child, heldout, compute=cfg.compute)
    return {**summary(arch, child), "heldout": {"parent": before, "child": after}}


def _mesh_for(child: ArchSpec, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh | None:
    """The mesh if the child divides over it as the parent did; else None, and one device holds it."""
    try:
        param_shardings(child, mesh)
    except ValueError as error:
        log.warning("prune: the child is evaluated on one device (%s)", error)
        return None
    return mesh


def _ranks(cfg: Config, params: dict, arch: ArchSpec, path: Path) -> Importance:
    """The importance that the targets need, measured once: a restart reads it."""
    parts = needed(cfg.targets, arch)
    if not parts:
        return Importance({}, {})
    if path.is_file():
        return importance.load(path)
    loader = train_batches(cfg.data, load_tokenizer(cfg.parent))
    ranks = importance.measure(params, arch, loader, importance_config(cfg, arch), cfg.compute)
    importance.save(ranks, path)
    return ranks


def importance_config(cfg: Config, arch: ArchSpec) -> ImportanceConfig:
    """The ranking that the targets need; neighbours that go together are judged together if possible."""
    ranking = cfg.importance
    together = cfg.targets.contiguous and cfg.targets.layers and ranking.depth in ("influence", "perplexity")
    span = len(real_layers(arch)) - cfg.targets.layers if together else 1
    return replace(ranking, parts=needed(cfg.targets, arch), depth_span=max(span, 1))


def summary(arch: ArchSpec, child: ArchSpec) -> dict[str, Any]:
    """Sizes of parent and child."""

    def sizes(one: ArchSpec) -> dict[str, Any]:
        return {
            "dim": one.dim,
            "num_heads": one.num_heads,
            "layers": len(real_layers(one)),
            "ffn_widths": [b.ffn.width for b in one.blocks if isinstance(b.ffn, SwiGLU)],
            "kv_heads": [b.attn.num_kv_heads for b in one.blocks if isinstance(b.attn, Attention)],
        }

    return {
        "num_params": child.num_params(),
        "parent_num_params": arch.num_params(),
        "block_params_ratio": child.num_block_params() / max(arch.num_block_params(), 1),
        "child": sizes(child),
        "parent": sizes(arch),
    }
