"""Supervised fine-tuning on conversations, with the reasoning toggle.

`detailed thinking on` trains `<think>...</think>` traces, `off` trains direct answers, mixed in every
batch (Llama-Nemotron, section 4). The loss counts assistant tokens only, the end of the turn included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nemojax.checkpoints.artifact import load_model
from nemojax.config import field, required
from nemojax.data.chat import Conversation, chat_examples, load_conversations
from nemojax.data.examples import LongPolicy, StoredExamples
from nemojax.data.loader import make_loader
from nemojax.data.packing import Batch, packed_batches
from nemojax.data.problems import conversations, make_problems
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig
from nemojax.sharding import MeshConfig, make_mesh
from nemojax.stage import run_stage, start_artifact
from nemojax.train import FitConfig, fit, lm_loss


@dataclass(frozen=True)
class ChatSource:
    """Conversations from a JSONL file, or made from a family of procedural problems."""

    name: str = field("", "how reports call it; without a path: the family of problems")
    path: str = field("", "JSONL of {messages, thinking} or {input, output, reasoning} rows")
    num: int = field(1000, "problems to make; each gives one conversation with thinking and one without")
    seed: int = field(0, "seed of the problems")
    weight: float = field(1.0, "share of the tokens, relative to the other sources")


@dataclass(frozen=True)
class ChatData:
    sources: tuple[ChatSource, ...] = field((), "conversations to train on")
    heldout_num: int = field(64, "held-out problems of each family to validate on")
    length: int = field(2048, "tokens a row; conversations are packed")
    batch_size: int = field(8, "rows a step over all devices")
    long: LongPolicy = field("error", "conversations longer than a row: error, drop or truncate")
    seed: int = field(0, "order of conversations")


@dataclass(frozen=True)
class Config:
    model: str = required("artifact to fine-tune")
    data: ChatData = field(ChatData(), "conversations")
    optim: OptimConfig = field(OptimConfig(), "optimiser")
    fit: FitConfig = field(FitConfig(), "loop")
    compute: Compute = field(Compute(), "precision and rematerialisation")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")
    seed: int = field(0, "seed of the loop's random numbers")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Fine-tunes in `workdir`; returns held-out losses (nats a trained token) and counts by source."""
    files = [source.path for source in cfg.data.sources if source.path]
    return run_stage(
        "sft", cfg, workdir, [cfg.model, *files], lambda path: _train(cfg, path), many_processes=True
    )


def _train(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh)
    tokenizer = load_tokenizer(cfg.model)
    arch, params = load_model(cfg.model, mesh)
    check_vocab(tokenizer, arch)
    if not cfg.data.sources:
        raise ValueError("data.sources: expected at least one source of conversations, got none")
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    start_artifact(workdir, arch, tokenizer.path)
    made = {source.name: _examples(source, cfg.data, tokenizer) for source in cfg.data.sources}
    batches = make_loader(
        [examples for examples, _ in made.values()],
        [source.weight for source in cfg.data.sources],
        batch_size=cfg.data.batch_size // jax.process_count(),
        length=cfg.data.length,
        pad_id=tokenizer.pad_id,
        seed=cfg.data.seed,
        long=cfg.data.long,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    heldout = _heldout(cfg.data, tokenizer)
    params = fit(
        params,
        lm_loss(arch, cfg.compute, chunk=cfg.loss_chunk),
        batches,
        arch=arch,
        optim=cfg.optim,
        cfg=cfg.fit,
        workdir=workdir,
        mesh=mesh,
        evaluate=(lambda p: heldout_loss(p, arch, heldout, compute=cfg.compute)) if heldout else None,
        seed=cfg.seed,
    )
    return {
        "heldout": heldout_loss(params, arch, heldout, compute=cfg.compute) if heldout else {},
        "conversations": {name: len(examples) for name, (examples, _) in made.items()},
        "dropped": {name: dropped for name, (_, dropped) in made.items()},
    }


def _conversations(source: ChatSource) -> list[Conversation]:
    if source.path:
        return load_conversations(source.path)
    return conversations(make_problems(source.name, source.num, source.seed, "train"))


def _examples(source: ChatSource, data: ChatData, tokenizer: Tokenizer) -> tuple[StoredExamples, int]:
    return chat_examples(
        _conversations(source), tokenizer, data.length, data.long, where=source.path or source.name
    )


def _heldout(data: ChatData, tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    """Packed held-out conversations of every family of problems."""
    batches = {}
    for source in data.sources:
        if source.path or not data.heldout_num:
            continue
        chats = conversations(make_problems(source.name, data.heldout_num, source.seed, "heldout"))
        examples, _ = chat_examples(chats, tokenizer, data.length, "drop")
        batches[source.name] = packed_batches(examples, data.batch_size, data.length, tokenizer.pad_id)
    return batches
