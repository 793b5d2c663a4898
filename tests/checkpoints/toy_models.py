"""Toy models of every kind, as artifacts and as Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, Llama3Scaling, NoOp, Rope, SwiGLU
from nemojax.checkpoints.artifact import memory_shapes
from nemojax.checkpoints.store import nested

SCALED = Rope(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 16))
MIXED = ArchSpec(
    vocab_size=64,
    dim=32,
    num_heads=4,
    head_dim=8,
    context=128,
    rope=SCALED,
    blocks=(
        BlockSpec(NoOp(), SwiGLU(256)),
        BlockSpec(Attention(2), SwiGLU(256)),
        BlockSpec(Attention(2), SwiGLU(256)),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Linear(), SwiGLU(512)),
        BlockSpec(Attention(1), Linear()),
        BlockSpec(Attention(4, window=5), NoOp()),
        BlockSpec(Attention(4), SwiGLU(256)),
    ),
)
# every dialect of a plain Llama, as keyword arguments of LlamaConfig
LLAMAS = {
    "plain": {},
    "scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "tied": {"tie_word_embeddings": True},
    "wide_heads": {"head_dim": 16},
}


def random_params(arch: ArchSpec, seed: int = 0, dtype=np.float32):
    """Parameters in the memory layout, norms near one and matrices large enough to be told apart."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in memory_shapes(arch).items():
        centre, scale = (1.0, 0.1) if "norm" in path else (0.0, 0.2)
        flat[path] = (centre + scale * rng.standard_normal(shape)).astype(dtype)
    return nested(flat)


def make_llama(directory: Path, kind: str = "plain", dtype: str = "float32", shard: str = "20KB"):
    """Saves a random torch Llama in shards and returns the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(**(values | LLAMAS[kind]))
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer as transformers 5 saves it, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<|eot_id|>", *(chr(97 + i % 26) * (1 + i // 26) for i in range(vocab_size - 2))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<|eot_id|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<s>",
        "eos_token": "<|eot_id|>",
        "extra_special_tokens": ["<s>"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    )


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors directory."""
    from safetensors.numpy import load_file

    out: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= load_file(file)
    return out


def read_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())
