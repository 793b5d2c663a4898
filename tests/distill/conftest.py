"""Tiny artifacts to distil: a parent, a second one, and a child that has a layer less and narrower ones."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax.arch import Attention, BlockSpec, NoOp, SwiGLU, uniform
from nemojax.checkpoints.artifact import save_params
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model.llama import init_params

WORDS = "red green blue one two three and or not then 1 2 3".split()
LENGTH = 32


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """parent/, other/ and child/ of one tokenizer, and texts.jsonl."""
    path = tmp_path_factory.mktemp("distill")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 50)) for _ in range(40)]
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 320, path / "tokenizer")
    parent = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        ffn_width=32,
        context=128,
    )
    # a child with an empty layer, one without attention, and one of fewer heads and channels
    blocks = (
        BlockSpec(NoOp(), parent.blocks[0].ffn),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Attention(1), SwiGLU(16)),
    )
    for seed, (name, arch) in enumerate(
        {"parent": parent, "other": parent, "child": parent.replace(blocks=blocks)}.items()
    ):
        # larger weights than fresh ones, so that distributions are far from even
        make = jax.jit(lambda key, arch=arch: jax.tree.map(lambda w: 1.5 * w, init_params(arch, key)))
        params = make(jax.random.key(seed))
        save_params(path / name, arch, params, tokenizer_dir=path / "tokenizer")
    return path


@pytest.fixture(scope="session")
def data(folder) -> dict:
    """Texts that are trained on and validated on, rows of LENGTH in batches of 8."""
    source = {"name": "words", "kind": "jsonl", "path": str(folder / "texts.jsonl")}
    return {
        "sources": [source],
        "heldout": [source],
        "length": LENGTH,
        "batch_size": 8,
        "heldout_batches": 1,
    }
