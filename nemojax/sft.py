"""Supervised fine-tuning on conversations, with the reasoning toggle.

`detailed thinking on` trains `<think>...</think>` traces, `off` trains direct answers, mixed in every
batch (Llama-Nemotron, section 4). The loss counts assistant tokens only, the end of the turn included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemojax.checkpoints.artifact import load_model
from nemojax.config import field, required
from nemojax.data.chat import Conversation, chat_examples, load_conversations
from nemojax.data.examples import LongPolicy, StoredExamples
from nemojax.data.heldout import HELDOUT_SHARE, check_share, heldout_side, too_small, training_side
from nemojax.data.loader import make_loader
from nemojax.data.mixture import check_names, rows_of_process
from nemojax.data.packing import Batch, packed_batches
from nemojax.data.problems import conversations, make_problems
from nemojax.data.sources import local_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model.llama import Compute
from nemojax.optim import OptimConfig
from nemojax.sharding import MeshConfig, make_mesh, readers
from nemojax.stage import run_stage, start_artifact
from nemojax.train import FitConfig, fit, lm_loss


@dataclass(frozen=True)
class ChatSource:
    """Conversations from JSONL files, or made from a family of procedural problems."""

    name: str = field("", "how reports call it, by default its path; without a path: the family of problems")
    path: str = field("", "JSONL of {messages, thinking} or {input, output, reasoning} rows; patterns too")
    num: int = field(1000, "problems to make; each gives one conversation with thinking and one without")
    seed: int = field(0, "seed of the problems")
    weight: float = field(1.0, "share of the tokens, relative to the other sources")
    heldout_share: float = field(
        HELDOUT_SHARE,
        "files: part of the conversations, chosen by hash of what the user says, that is validated on and "
        "never trained on; not taken out where data.heldout names others",
    )

    @property
    def label(self) -> str:
        return self.name or self.path


@dataclass(frozen=True)
class ChatData:
    sources: tuple[ChatSource, ...] = field((), "conversations to train on")
    heldout: tuple[ChatSource, ...] = field(
        (), "what is validated on; empty: the part of `sources` that is held out"
    )
    heldout_num: int = field(64, "held-out problems, or chats of a file, to validate on a source; 0: none")
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
    named = [source.path for source in (*cfg.data.sources, *cfg.data.heldout) if source.path]
    files = [file for path in named for file in local_files(path)]
    return run_stage(
        "sft", cfg, workdir, [cfg.model, *files], lambda path: _train(cfg, path),
        many_processes=True,
    )  # fmt: skip


def _train(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(cfg.mesh, rows="shared")
    tokenizer = load_tokenizer(cfg.model)
    arch, params = load_model(cfg.model, mesh)
    check_vocab(tokenizer, arch)
    if not cfg.data.sources:
        raise ValueError("data.sources: expected at least one source of conversations, got none")
    check_names([source.label for source in cfg.data.sources], "data.sources")
    check_names([source.label for source in cfg.data.heldout], "data.heldout")
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    index, count = readers(mesh)
    made = {source.label: _examples(source, cfg.data, tokenizer) for source in cfg.data.sources}
    batches = make_loader(
        [examples for examples, _ in made.values()],
        [source.weight for source in cfg.data.sources],
        batch_size=rows_of_process(cfg.data.batch_size, count),
        length=cfg.data.length,
        pad_id=tokenizer.pad_id,
        seed=cfg.data.seed,
        long=cfg.data.long,
        process_index=index,
        process_count=count,
    )
    heldout = _heldout(cfg.data, tokenizer)
    start_artifact(workdir, arch, tokenizer.path)  # nothing is written before the data are known to be good
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


def _training_chats(source: ChatSource, data: ChatData) -> list[Conversation]:
    if not source.path:
        return conversations(make_problems(source.name, source.num, source.seed, "train"))
    check_share(source.heldout_share, f"source {source.label}")
    chats = load_conversations(source.path)
    share = 0.0 if data.heldout else source.heldout_share
    kept = [chats[i] for i in training_side((chat.question for chat in chats), share)]
    if not kept:
        raise ValueError(
            f"source {source.label}: expected conversations to train on, got {len(chats)}, all of them held "
            "out; add more, or lower heldout_share"
        )
    return kept


def _heldout_chats(source: ChatSource, data: ChatData) -> list[Conversation]:
    """Up to `heldout_num` problems or conversations; none where the source holds nothing out."""
    if not source.path:
        return conversations(make_problems(source.name, data.heldout_num, source.seed, "heldout"))
    if data.heldout:
        return load_conversations(source.path)[: data.heldout_num]
    if not source.heldout_share:
        return []
    chats = load_conversations(source.path)
    found = heldout_side((chat.question for chat in chats), source.heldout_share)
    if not found:
        raise too_small(f"source {source.label}", len(chats), source.heldout_share)
    return [chats[i] for i in found[: data.heldout_num]]


def _examples(source: ChatSource, data: ChatData, tokenizer: Tokenizer) -> tuple[StoredExamples, int]:
    return chat_examples(_training_chats(source, data), tokenizer, data.length, data.long, where=source.label)


def _heldout(data: ChatData, tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    """{source: packed held-out conversations}, those that are too long for a row left out."""
    batches = {}
    for source in (data.heldout or data.sources) if data.heldout_num else ():
        chats = _heldout_chats(source, data)
        if not chats:
            continue
        examples, dropped = chat_examples(chats, tokenizer, data.length, "drop")
        if not len(examples):
            raise ValueError(
                f"source {source.label}: expected held-out conversations of at most {data.length} tokens, "
                f"got {dropped} longer ones; raise data.length"
            )
        batches[source.label] = packed_batches(examples, data.batch_size, data.length, tokenizer.pad_id)
    return batches
