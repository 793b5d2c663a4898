"""Pre-training: a parent from scratch, or more training of an artifact, on a mixture of texts.

It may have phases, one after another in one work directory, each with a budget of tokens, a row length, a
mixture and a learning rate of its own: Llama-Nemotron Ultra had 54B tokens at 8K, then 5B at 16K, 5B at 32K
and 0.8B at 128K (FFN Fusion, arXiv 2503.18908, section 4). RoPE and context may change on the way.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from nemojax.arch import ArchSpec, Llama3Scaling, Rope, load_arch, uniform
from nemojax.buckets import place
from nemojax.checkpoints.artifact import finished_steps, load_model
from nemojax.checkpoints.training import moments_reader
from nemojax.config import field, required
from nemojax.data.mixture import TextData, check_names, heldout_batches, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.hosts import on_primary
from nemojax.log import read_metrics
from nemojax.model import llama
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.sharding import BATCH_AXES, MeshConfig, make_mesh, readers
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
class Phase:
    """One of several trainings after each other; None: as `data`, `optim` and the model so far have it.

    The learning rate warms up and decays anew. The documents come in an order of the phase's own, from all of
    them: some may come again.
    """

    tokens: int = required("positions to train on, padding included; rounded up to whole steps")
    length: int | None = field(None, "tokens a row")
    batch_size: int | None = field(None, "rows a step over all devices")
    weights: dict[str, float] = field(
        {}, "share of the tokens by name of a source: 0 leaves it out, one that is not named keeps its own"
    )
    lr: float | None = field(None, "peak learning rate")
    warmup_steps: int | None = field(None, "steps of linear warm-up from zero")
    optimizer: Literal["fresh", "carry"] = field("fresh", "its moments: from zero, or as they are so far")
    context: int | None = field(None, "longest sequence in tokens from here on")
    rope_theta: float | None = field(None, "base of the rotary embedding from here on")
    rope_scaling: Llama3Scaling | None = field(None, "Llama 3.1's scaling of it from here on")

    def __post_init__(self):
        for name in ("tokens", "length", "batch_size", "lr", "context", "rope_theta"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected at least 0, got {self.warmup_steps}")
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights.{name}: expected a number of at least 0, got {weight}")
        if (scaling := self.rope_scaling) is not None and not (
            0 < scaling.low_freq_factor < scaling.high_freq_factor
            and scaling.factor > 0
            and scaling.original_context > 0
        ):
            raise ValueError(
                f"rope_scaling: expected positive numbers, low_freq_factor < high_freq_factor, got {scaling}"
            )


@dataclass(frozen=True)
class Fit(FitConfig):
    """The loop, and what it trains on one after another."""

    phases: tuple[Phase, ...] = field(
        (),
        "phases, in place of `steps`: each has tokens and may have length, batch_size, weights, lr, "
        "warmup_steps, optimizer, context, rope_theta, rope_scaling",
    )


@dataclass(frozen=True)
class Config:
    tokenizer: str = field("", "artifact or work directory whose tokenizer is used; empty: the model's own")
    model: str = field("", "artifact to continue from; empty: fresh weights")
    arch: str = field("", "architecture file or shipped name for fresh weights; empty: `shape`")
    shape: Shape = field(Shape(), "architecture for fresh weights")
    data: TextData = field(TextData(), "texts")
    optim: OptimConfig = field(OptimConfig(), "optimiser")
    fit: Fit = field(Fit(), "loop")
    compute: Compute = field(Compute(), "precision and rematerialisation")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")
    z_loss: float = field(0.0, "weight of log(Z)^2")
    seed: int = field(0, "initial weights")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains in `workdir`, which becomes an artifact; returns held-out losses (nats a token) and sizes.

    With phases also, for each of them, tokens (positions, padding included), steps and the held-out losses at
    its end, in rows of its length. Steps, metrics.jsonl and checkpoints go through all phases.
    """
    if not (cfg.tokenizer or cfg.model):
        raise ValueError("tokenizer: expected an artifact with a tokenizer, got none; train one first")
    inputs: list[str | Path] = [path for path in (cfg.tokenizer, cfg.model) if path]
    inputs += input_files((*cfg.data.sources, *cfg.data.heldout))
    return run_stage(
        "pretrain", cfg, workdir, inputs, lambda path: _train(cfg, path),
        many_processes=True,
    )  # fmt: skip


def _train(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh, rows="shared")
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.model)
    arch = _start_arch(cfg, tokenizer)
    check_vocab(tokenizer, arch)
    spans = _spans(cfg, arch)
    for span in spans:
        span.check(cfg, mesh)
    _check_moments(cfg, arch)
    params = _start(cfg, arch, mesh)
    done = on_primary(lambda: max(finished_steps(workdir), default=0))
    for span in spans:
        if done < span.last or span is spans[-1]:
            params = _train_span(cfg, span, params, tokenizer, workdir, mesh)
    found = on_primary(lambda: [_validation(workdir, span.last) for span in spans])
    result = {"heldout": found[-1], "num_params": arch.num_params(), "steps": spans[-1].last}
    if not cfg.fit.phases:
        return result
    phases = [span.summary() | {"heldout": losses} for span, losses in zip(spans, found, strict=True)]
    return result | {"phases": phases}


@dataclass(frozen=True)
class _Span:
    """A phase with what it does not say: steps first + 1 ... last; `where` errors find it."""

    phase: Phase
    where: str
    first: int
    last: int
    data: TextData
    optim: OptimConfig
    arch: ArchSpec

    def check(self, cfg: Config, mesh: jax.sharding.Mesh) -> None:
        """ValueError for what could not be trained."""
        data, steps = self.data, self.last - self.first
        if data.length > self.arch.context:
            raise ValueError(
                f"{self.where}length: expected at most the model's context {self.arch.context}, got "
                f"{data.length}" + (f"; set {self.where}context" if cfg.fit.phases else "")
            )
        ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        for count, what in ((ways, "devices of data x fsdp"), (cfg.fit.accumulate, "micro-batches")):
            if data.batch_size % count:
                raise ValueError(
                    f"{self.where}batch_size: expected a multiple of {count} {what}, got {data.batch_size}"
                )
        if cfg.fit.phases and self.optim.warmup_steps > steps:
            raise ValueError(
                f"{self.where}warmup_steps: expected at most the phase's {steps} steps, got "
                f"{self.optim.warmup_steps}"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        if not self.phase.weights:
            return
        names = [source.name for source in self.data.sources]
        check_names(names, "data.sources")
        if unknown := [name for name in self.phase.weights if name not in names]:
            raise ValueError(
                f"{self.where}weights: unknown source {unknown[0]!r}; known ones are {', '.join(names)}"
            )
        if not any(source.weight for source in self.data.sources):
            raise ValueError(f"{self.where}weights: expected a positive one, got none for {', '.join(names)}")

    def summary(self) -> dict[str, Any]:
        steps, data = self.last - self.first, self.data
        tokens = steps * data.batch_size * data.length
        return {"tokens": tokens, "steps": steps, "length": data.length, "batch_size": data.batch_size}


def _spans(cfg: Config, arch: ArchSpec) -> list[_Span]:
    """The phases, or `fit.steps` of `data` as the only one."""
    if min(cfg.data.length, cfg.data.batch_size) < 1:
        raise ValueError(
            f"data: expected length, batch_size of at least 1, got {cfg.data.length}, {cfg.data.batch_size}"
        )
    phases = cfg.fit.phases or (Phase(cfg.fit.steps * cfg.data.batch_size * cfg.data.length),)
    spans: list[_Span] = []
    for number, phase in enumerate(phases):
        scaling = phase.rope_scaling or arch.rope.scaling
        arch = arch.replace(
            rope=Rope(phase.rope_theta or arch.rope.theta, scaling), context=phase.context or arch.context
        )
        data = _changed(cfg.data, length=phase.length, batch_size=phase.batch_size)
        weighed = [replace(s, weight=phase.weights.get(s.name, s.weight)) for s in data.sources]
        data = replace(data, seed=data.seed + number, sources=tuple(weighed))
        optim = _changed(cfg.optim, lr=phase.lr, warmup_steps=phase.warmup_steps)
        first = spans[-1].last if spans else 0
        last = first + -(-phase.tokens // (data.batch_size * data.length))
        where = f"fit.phases.{number}." if cfg.fit.phases else "data."
        spans.append(_Span(phase, where, first, last, data, optim, arch))
    return spans


def _changed(section: Any, **values: Any) -> Any:
    return replace(section, **{name: value for name, value in values.items() if value is not None})


def _check_moments(cfg: Config, arch: ArchSpec) -> None:
    """ValueError where the first phase cannot carry on with the optimiser of the model's own training."""
    if not cfg.fit.phases or cfg.fit.phases[0].optimizer == "fresh":
        return
    try:
        if not cfg.model:
            raise ValueError("expected a model whose optimiser is carried on, got none; set model, or fresh")
        tx = make_optimizer(cfg.optim, 1)
        moments_reader(cfg.model, jax.eval_shape(tx.init, llama.abstract_params(arch)), arch)
    except ValueError as error:
        raise ValueError(f"fit.phases.0.optimizer: {error}") from error


def _train_span(
    cfg: Config,
    span: _Span,
    params: llama.Params,
    tokenizer: Tokenizer,
    workdir: Path,
    mesh: jax.sharding.Mesh,
) -> llama.Params:
    heldout = heldout_batches(span.data, tokenizer)
    made = train_batches(span.data, tokenizer, *readers(mesh))
    start_artifact(workdir, span.arch, tokenizer.path)  # not before the data are known to be good

    def evaluate(params: llama.Params) -> dict[str, float]:
        return heldout_loss(params, span.arch, heldout, compute=cfg.compute, chunk=cfg.loss_chunk)

    with closing(made) as batches:
        return fit(
            params,
            lm_loss(span.arch, cfg.compute, chunk=cfg.loss_chunk, z_loss=cfg.z_loss),
            batches,
            arch=span.arch,
            optim=span.optim,
            cfg=replace(cfg.fit, steps=span.last),
            workdir=workdir,
            mesh=mesh,
            evaluate=evaluate if heldout else None,
            seed=cfg.seed,
            first=span.first,
            moments=(workdir if span.first else cfg.model) if span.phase.optimizer == "carry" else None,
        )


def _validation(workdir: Path, step: int) -> dict[str, Any]:
    """The held-out losses that were logged at the end of a phase."""
    rows = [row for row in read_metrics(workdir) if row["step"] == step]
    return {
        name.removeprefix("validation/"): value
        for row in rows
        for name, value in row.items()
        if name.startswith("validation/")
    }


def _start_arch(cfg: Config, tokenizer: Tokenizer) -> ArchSpec:
    if cfg.model:
        return load_arch(place(cfg.model) / "arch.json")
    return load_arch(cfg.arch) if cfg.arch else _from_shape(cfg.shape, tokenizer)


def _start(cfg: Config, arch: ArchSpec, mesh: jax.sharding.Mesh) -> llama.Params:
    if cfg.model:
        return load_model(cfg.model, mesh)[1]
    shardings = llama.param_shardings(arch, mesh)
    init = jax.jit(lambda key: llama.init_params(arch, key), out_shardings=shardings)
    return init(jax.random.key(cfg.seed))


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
