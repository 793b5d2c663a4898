"""The `distill` stage: heal a child against its parent.

The teacher runs in the student's program (online), has said before what it thinks of every row (offline,
`teaching.cache`), or is asked about what the student writes (`on_policy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nemojax.arch import ArchSpec
from nemojax.checkpoints.artifact import load_model
from nemojax.config import field, required
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import input_files, local_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.distill.batches import OfflineBatches
from nemojax.distill.cache_store import TeacherCache, is_input, location
from nemojax.distill.losses import DistillWeights
from nemojax.distill.measure import Heldout, gap_closed
from nemojax.distill.on_policy import OnPolicy, OnPolicyBatches
from nemojax.distill.teachers import Teaching, check_cache, find_teachers
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig
from nemojax.sharding import MeshConfig, make_mesh, readers
from nemojax.stage import run_stage, start_artifact
from nemojax.train import FitConfig, fit


@dataclass(frozen=True)
class Config:
    student: str = required("artifact of the child")
    teacher: str = required("artifact of the parent; its weights stay as they are")
    teaching: Teaching = field(Teaching(), "more teachers, where they are and how they compute, or a cache")
    on_policy: OnPolicy = field(OnPolicy(), "learning on the student's own samples")
    loss: DistillWeights = field(DistillWeights(), "terms of the loss")
    data: TextData = field(TextData(), "texts")
    optim: OptimConfig = field(OptimConfig(), "optimiser")
    fit: FitConfig = field(FitConfig(), "loop")
    compute: Compute = field(Compute(), "precision and rematerialisation")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")
    seed: int = field(0, "seed of the loop's random numbers, and of the student's samples")

    def __post_init__(self):
        if self.teaching.cache and self.on_policy.share:
            raise ValueError("on_policy.share: expected 0 beside teaching.cache, which knows no own samples")
        if self.teaching.cache and self.loss.tokens.shared:
            raise ValueError("loss.tokens.shared: expected 0 beside teaching.cache, which has all ids")
        if self.on_policy.share and "lm" in self.loss.terms:
            raise ValueError("loss.lm: expected 0 beside on_policy.share, as own samples are no data")

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher, *(other.teacher for other in self.teaching.more))


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Distils in `workdir`, which becomes an artifact.

    Returns, for each source and over all (`loss`): held-out losses in nats a token before and after, and the
    first teacher's; KL(teachers || student) on the same texts before and after; the part of the loss that
    the child had lost and got back; and the tokens seen.
    """
    inputs = [cfg.student, *cfg.teachers, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    if cfg.teaching.cache and is_input(cfg.teaching.cache):
        inputs.append(cfg.teaching.cache)
    if cfg.on_policy.chats:
        inputs += local_files(cfg.on_policy.chats)
    return run_stage(
        "distill", cfg, workdir, inputs, lambda path: _distill(cfg, path),
        many_processes=True,
    )  # fmt: skip


def _distill(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh, rows="shared")
    tokenizer = load_tokenizer(cfg.student)
    arch, params = load_model(cfg.student, mesh)
    check_vocab(tokenizer, arch)
    teachers = find_teachers(cfg.teachers, cfg.teaching, arch, tokenizer, cfg.loss.tokens.shared)
    for context in (arch.context, *(teacher.context for teacher in teachers.archs)):
        if cfg.data.length > context:
            raise ValueError(f"data.length: expected at most the context {context}, got {cfg.data.length}")
    loss_fn = teachers.loss(arch, cfg.loss, cfg.compute, cfg.loss_chunk)
    heldout = heldout_batches(cfg.data, tokenizer)
    if not heldout:
        raise ValueError(
            "data.heldout: expected held-out texts, got none as every heldout_share is 0; name files in "
            "data.heldout, or set a heldout_share"
        )
    batches = _batches(cfg, arch, tokenizer, mesh)
    start_artifact(workdir, arch, tokenizer.path)  # nothing is written before the data are known to be good
    measured = Heldout(teachers, arch, heldout, cfg.compute, cfg.loss_chunk)
    frozen = teachers.load(mesh)
    before, of_teacher = measured.loss(params), measured.teacher(frozen)
    kl_before = measured.kl(params, frozen)
    if not cfg.loss.hidden and (cfg.teaching.cache or not cfg.loss.divergences):
        frozen = None  # no step runs a teacher: its memory is free while the student trains
    params = fit(
        params,
        loss_fn,
        batches,
        arch=arch,
        optim=cfg.optim,
        cfg=cfg.fit,
        workdir=workdir,
        frozen=frozen,
        mesh=mesh,
        evaluate=lambda p: measured.loss(p) | ({"kl": measured.kl(p, frozen)["loss"]} if frozen else {}),
        seed=cfg.seed,
    )
    after, kl = measured.loss(params), measured.kl(params, frozen or teachers.load(mesh))
    closed = gap_closed(before, after, of_teacher)
    return {
        "heldout_before": before,
        "heldout": after,
        "heldout_teacher": of_teacher,
        "gap_nats": before["loss"] - of_teacher["loss"],
        "gap_closed": closed.pop("loss"),
        "gap_closed_by_source": closed,
        "heldout_kl_before": kl_before,
        "heldout_kl": kl,
        "tokens": cfg.fit.steps * cfg.data.batch_size * cfg.data.length,
    }


def _batches(cfg: Config, arch: ArchSpec, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Any:
    """What the student sees: the texts, with what a cache says of them, or in part its own samples."""
    data = cfg.data
    batches = train_batches(data, tokenizer, *readers(mesh))
    if cfg.teaching.cache:
        cache = TeacherCache(location(cfg.teaching.cache))
        check_cache(
            cache,
            cfg.teacher,
            tokenizer,
            data=batches.identity,
            length=data.length,
            rows=cfg.fit.steps * data.batch_size,
            temperature=cfg.loss.temperature,
            mesh=mesh,
        )
        return OfflineBatches(batches, cache, cfg.loss.top_k, shares=readers(mesh)[1])
    if cfg.on_policy.share:
        return OnPolicyBatches(
            batches,
            cfg.on_policy,
            arch,
            tokenizer,
            batch_size=data.batch_size,
            length=data.length,
            compute=cfg.compute,
            mesh=mesh,
            seed=cfg.seed,
        )
    return batches
