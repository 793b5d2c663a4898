"""AnyModel configurations (NVIDIA Model Optimizer): LlamaForCausalLM with explicit widths per layer.

Unlike DeciLM any width and head_dim can be said; unlike plain Llama only Model Optimizer's patched
loader reads it. Source: modelopt.torch.puzzletron, block_config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU


def configs_from_blocks(arch: ArchSpec) -> list[dict[str, Any]]:
    """The AnyModel `block_configs` of `arch`; ValueError for a sliding window, which it cannot say."""
    out = []
    for i, block in enumerate(arch.blocks):
        if isinstance(block.attn, Attention) and block.attn.window is not None:
            raise ValueError(
                f"anymodel: layer {i}: window: expected none, got {block.attn.window}; use --format=decilm"
            )
        attention = {
            **_flags(block.attn),
            "weights_precision": None,
            "num_key_value_heads": block.attn.num_kv_heads if isinstance(block.attn, Attention) else None,
            "llama4": None,
            "mamba": None,
        }
        ffn = {
            **_flags(block.ffn),
            "weights_precision": None,
            "intermediate_size": block.ffn.width if isinstance(block.ffn, SwiGLU) else None,
            "moe": None,
        }
        out.append({"attention": attention, "ffn": ffn, "parallel_blocks": None})
    return out


def blocks_from_configs(configs: Any, where: str) -> tuple[BlockSpec, ...]:
    """ArchSpec blocks of an AnyModel `block_configs` list."""
    if not isinstance(configs, list) or not configs:
        raise ValueError(f"{where}: block_configs: expected a list of layers, got {type(configs).__name__}")
    blocks = []
    for i, config in enumerate(configs):
        attention, ffn = config.get("attention"), config.get("ffn")
        if not isinstance(attention, Mapping) or not isinstance(ffn, Mapping):
            raise ValueError(
                f"{where}: layer {i}: expected a block config with attention and ffn, got {config!r}"
            )
        for key in ("llama4", "mamba", "moe"):
            if attention.get(key) or ffn.get(key):
                raise ValueError(f"{where}: layer {i}: {key}: expected null; only Llama blocks are supported")
        if config.get("parallel_blocks"):
            raise ValueError(f"{where}: layer {i}: parallel_blocks: expected null; they are unsupported")
        attn = _special(attention) or Attention(attention.get("num_key_value_heads"))  # pyright: ignore[reportArgumentType]
        blocks.append(BlockSpec(attn, _special(ffn) or SwiGLU(ffn.get("intermediate_size"))))  # pyright: ignore[reportArgumentType]
    return tuple(blocks)


def _flags(sub: Any) -> dict[str, Any]:
    return {"no_op": isinstance(sub, NoOp), "replace_with_linear": isinstance(sub, Linear), "sparsify": None}


def _special(entry: Mapping[str, Any]) -> NoOp | Linear | None:
    if entry.get("no_op"):
        return NoOp()
    return Linear() if entry.get("replace_with_linear") else None
