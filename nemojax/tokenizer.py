"""The `tokenizer` stage: a byte-level BPE trained on text sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemojax.config import field
from nemojax.data.sources import Source, input_files, load_texts
from nemojax.data.tokenizer import Digits, train_tokenizer
from nemojax.stage import run_stage


@dataclass(frozen=True)
class Config:
    sources: tuple[Source, ...] = field(
        (Source(),), "what to train on, less what is held out; weights are ignored"
    )
    vocab_size: int = field(1024, "ids, special tokens included")
    digits: Digits = field("individual", "one token a digit, or groups of up to three as in Llama 3")
    full_reserved: bool = field(False, "all 256 special tokens of Llama 3 instead of the handful in use")
    context: int = field(8192, "tokens; model_max_length of the tokenizer's configuration")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains `workdir/tokenizer`; returns sizes and the bytes of text in one token."""
    return run_stage("tokenizer", cfg, workdir, input_files(cfg.sources), lambda path: _train(cfg, path))


def _train(cfg: Config, workdir: Path) -> dict[str, Any]:
    texts = [text for source in cfg.sources for text in load_texts(source)[:]]
    tokenizer = train_tokenizer(
        texts, cfg.vocab_size, workdir / "tokenizer", cfg.digits, cfg.full_reserved, cfg.context
    )
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return {
        "vocab_size": tokenizer.vocab_size,
        "documents": len(texts),
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": round(num_bytes / max(1, num_tokens), 4),
    }
