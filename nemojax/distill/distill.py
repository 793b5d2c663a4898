"""The `distill` stage: heal a child against its parent, teacher and student in one program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nemojax.checkpoints.artifact import load_model
from nemojax.config import field, required
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import check_vocab, load_tokenizer
from nemojax.distill.losses import DistillWeights, distill_loss
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig
from nemojax.sharding import MeshConfig, make_mesh
from nemojax.stage import run_stage, start_artifact
from nemojax.train import FitConfig, fit


@dataclass(frozen=True)
class Config:
    student: str = required("artifact of the child")
    teacher: str = required("artifact of the parent; its weights stay as they are")
    loss: DistillWeights = field(DistillWeights(), "terms of the loss")
    data: TextData = field(TextData(), "texts")
    optim: OptimConfig = field(OptimConfig(), "optimiser")
    fit: FitConfig = field(FitConfig(), "loop")
    compute: Compute = field(Compute(), "precision and rematerialisation")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")
    seed: int = field(0, "seed of the loop's random numbers")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Distils in `workdir`; returns held-out losses (nats a token) before and after, and the teacher's."""
    inputs = [cfg.student, cfg.teacher, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    return run_stage("distill", cfg, workdir, inputs, lambda path: _distill(cfg, path), many_processes=True)


def _distill(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh)
    tokenizer = load_tokenizer(cfg.student)
    arch, params = load_model(cfg.student, mesh)
    teacher_arch, teacher = load_model(cfg.teacher, mesh)
    check_vocab(tokenizer, arch)
    loss_fn = distill_loss(arch, teacher_arch, cfg.loss, cfg.compute, cfg.loss_chunk)
    heldout = heldout_batches(cfg.data, tokenizer)
    if not heldout:
        raise ValueError(
            "data.heldout: expected held-out texts, got none as every heldout_share is 0; name files in "
            "data.heldout, or set a heldout_share"
        )
    batches = train_batches(cfg.data, tokenizer, jax.process_index(), jax.process_count())
    start_artifact(workdir, arch, tokenizer.path)  # nothing is written before the data are known to be good
    before = heldout_loss(params, arch, heldout, compute=cfg.compute)
    of_teacher = heldout_loss(teacher, teacher_arch, heldout, compute=cfg.compute)
    needs_teacher = cfg.loss.kl or cfg.loss.cosine
    params = fit(
        params,
        loss_fn,
        batches,
        arch=arch,
        optim=cfg.optim,
        cfg=cfg.fit,
        workdir=workdir,
        frozen=teacher if needs_teacher else None,
        mesh=mesh,
        evaluate=lambda p: heldout_loss(p, arch, heldout, compute=cfg.compute),
        seed=cfg.seed,
    )
    after = heldout_loss(params, arch, heldout, compute=cfg.compute)
    gap = before["loss"] - of_teacher["loss"]
    return {
        "heldout_before": before,
        "heldout": after,
        "heldout_teacher": of_teacher,
        "gap_nats": gap,
        "gap_closed": (before["loss"] - after["loss"]) / gap if gap > 0 else None,
        "tokens": cfg.fit.steps * cfg.data.batch_size * cfg.data.length,
    }
