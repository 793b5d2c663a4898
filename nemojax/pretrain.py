"""Pre-training: a parent from scratch, or more training of an artifact, on a mixture of texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nemojax.arch import ArchSpec, Rope, load_arch, uniform
from nemojax.checkpoints.artifact import load_model
from nemojax.config import field
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model import llama
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig
from nemojax.sharding import MeshConfig, make_mesh
from nemojax.stage import run_stage, start_artifact
from nemojax.train import FitConfig, fit, lm_loss


@dataclass(frozen=True)
class Shape:
    """A new architecture of equal layers; the vocabulary is the tokenizer's."""

    dim: int = field(256, "residual width")
    num_layers: int = field(6, "layers")
    num_heads: int = field(8, "query heads; each has dim / num_heads channels")
    num_kv_heads: int = field(4, "key and value heads")
    ffn_width: int = field(768, "feed-forward channels")
    context: int = field(2048, "longest sequence in tokens")
    rope_theta: float = field(10000.0, "base of the rotary embedding")
    tie_embeddings: bool = field(False, "one matrix for embedding and head")


@dataclass(frozen=True)
class Config:
    tokenizer: str = field("", "artifact or work directory whose tokenizer is used; empty: the model's own")
    model: str = field("", "artifact to continue from; empty: fresh weights")
    arch: str = field("", "architecture file or shipped name for fresh weights; empty: `shape`")
    shape: Shape = field(Shape(), "architecture for fresh weights")
    data: TextData = field(TextData(), "texts")
    optim: OptimConfig = field(OptimConfig(), "optimiser")
    fit: FitConfig = field(FitConfig(), "loop")
    compute: Compute = field(Compute(), "precision and rematerialisation")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")
    z_loss: float = field(0.0, "weight of log(Z)^2")
    seed: int = field(0, "initial weights")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains in `workdir`, which becomes an artifact; returns held-out losses (nats a token) and sizes."""
    if not (cfg.tokenizer or cfg.model):
        raise ValueError("tokenizer: expected an artifact with a tokenizer, got none; train one first")
    inputs: list[str | Path] = [path for path in (cfg.tokenizer, cfg.model) if path]
    inputs += input_files((*cfg.data.sources, *cfg.data.heldout))
    return run_stage("pretrain", cfg, workdir, inputs, lambda path: _train(cfg, path), many_processes=True)


def _train(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.model)
    arch, params = _start(cfg, tokenizer, mesh)
    check_vocab(tokenizer, arch)
    if cfg.data.length > arch.context:
        raise ValueError(
            f"data.length: expected at most the model's context {arch.context}, got {cfg.data.length}"
        )
    heldout = heldout_batches(cfg.data, tokenizer)
    batches = train_batches(cfg.data, tokenizer, jax.process_index(), jax.process_count())
    start_artifact(workdir, arch, tokenizer.path)  # nothing is written before the data are known to be good
    params = fit(
        params,
        lm_loss(arch, cfg.compute, chunk=cfg.loss_chunk, z_loss=cfg.z_loss),
        batches,
        arch=arch,
        optim=cfg.optim,
        cfg=cfg.fit,
        workdir=workdir,
        mesh=mesh,
        evaluate=(lambda p: heldout_loss(p, arch, heldout, compute=cfg.compute)) if heldout else None,
        seed=cfg.seed,
    )
    losses = heldout_loss(params, arch, heldout, compute=cfg.compute)
    return {"heldout": losses, "num_params": arch.num_params(), "steps": cfg.fit.steps}


def _start(cfg: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> tuple[ArchSpec, llama.Params]:
    if cfg.model:
        return load_model(cfg.model, mesh)
    arch = load_arch(cfg.arch) if cfg.arch else _from_shape(cfg.shape, tokenizer)
    shardings = llama.param_shardings(arch, mesh)
    init = jax.jit(lambda key: llama.init_params(arch, key), out_shardings=shardings)
    return arch, init(jax.random.key(cfg.seed))


def _from_shape(shape: Shape, tokenizer: Tokenizer) -> ArchSpec:
    return uniform(
        vocab_size=tokenizer.vocab_size,
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        ffn_width=shape.ffn_width,
        context=shape.context,
        rope=Rope(shape.rope_theta),
        tie_embeddings=shape.tie_embeddings,
    )
