"""DeciLM (`nemotron-nas`) configurations: block_configs to ArchSpec and back, and what loaders cannot do.

DeciLM stores a feed-forward as a multiplier (`ffn_mult`) and an attention as a group size
(`n_heads_in_group`); here both exist only at this border, ArchSpec holds widths and KV heads.
Format: nvidia/Llama-3_1-Nemotron-Ultra-253B-v1, configuration_decilm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemojax.arch import ArchSpec, Attention, AttnSpec, BlockSpec, FfnSpec, Linear, NoOp, SwiGLU

MULTIPLE = 256  # DeciLM rounds every feed-forward width up to a multiple of this

_ATTENTION_KEYS = (
    "no_op",
    "replace_with_linear",
    "sparsify",
    "n_heads_in_group",
    "window_length",
    "num_sink_tokens",
    "use_prefill_window_in_sink_attention",
    "unshifted_sink",
)
_FFN_KEYS = ("no_op", "replace_with_linear", "sparsify", "ffn_mult")


def width_of(ffn_mult: float, dim: int) -> int:
    """Channels that a DeciLM reader gives to `ffn_mult` at residual width `dim`."""
    raw = int(2 * round(ffn_mult, 6) * dim / 3)
    return -(-raw // MULTIPLE) * MULTIPLE


def ffn_mult_of(width: int, dim: int) -> float:
    """The multiplier that means `width`, exact when MULTIPLE divides it."""
    return round(3 * width / (2 * dim), 6)


def blocks_from_configs(configs: Any, dim: int, num_heads: int, where: str) -> tuple[BlockSpec, ...]:
    """ArchSpec blocks of a `block_configs` list; ValueError by layer for what cannot be represented."""
    if not isinstance(configs, list) or not configs:
        raise ValueError(f"{where}: block_configs: expected a list of layers, got {type(configs).__name__}")
    blocks = []
    for i, config in enumerate(configs):
        if not isinstance(config, Mapping) or not isinstance(config.get("attention"), Mapping):
            raise ValueError(
                f"{where}: layer {i}: expected a block config with attention and ffn, got {config!r}"
            )
        if not isinstance(config.get("ffn"), Mapping):
            raise ValueError(
                f"{where}: layer {i}: expected a block config with attention and ffn, got {config!r}"
            )
        at = f"{where}: layer {i}"
        blocks.append(BlockSpec(_attention(config["attention"], num_heads, at), _ffn(config["ffn"], dim, at)))
    return tuple(blocks)


def configs_from_blocks(arch: ArchSpec, original: Any = None) -> list[dict[str, Any]]:
    """The `block_configs` of `arch`, every key written. `original`: the list it was imported from; a
    layer that still means the same keeps its published entry, so that unusual multipliers survive."""
    check_expressible(arch)
    kept = original if isinstance(original, list) and len(original) == arch.num_layers else None
    out = []
    for i, block in enumerate(arch.blocks):
        entry = {"attention": _attention_entry(block.attn, arch), "ffn": _ffn_entry(block.ffn, arch)}
        if (
            kept is not None
            and blocks_from_configs([kept[i]], arch.dim, arch.num_heads, "original")[0] == block
        ):
            entry = kept[i]
        out.append(entry)
    return out


def check_expressible(arch: ArchSpec) -> None:
    """Raises ValueError naming layer and value of the first thing that DeciLM cannot say."""
    if arch.head_dim * arch.num_heads != arch.dim:
        raise ValueError(
            f"decilm: head_dim: expected dim / num_heads = {arch.dim / arch.num_heads:g}, "
            f"got {arch.head_dim}; DeciLM has no head_dim of its own, use --format=anymodel"
        )
    for i, block in enumerate(arch.blocks):
        match block.ffn:
            case SwiGLU(width=width) if width % MULTIPLE:
                near = ", ".join(
                    str(w) for w in (width // MULTIPLE * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE) if w
                )
                raise ValueError(
                    f"decilm: layer {i}: ffn width: expected a multiple of {MULTIPLE}, got {width}; "
                    f"the nearest are {near}, or use --format=anymodel"
                )


def loader_warnings(arch: ArchSpec) -> list[str]:
    """One line for each thing in `arch` that a known DeciLM loader refuses or gets wrong."""
    warnings = []
    real = [(i, b.attn) for i, b in enumerate(arch.blocks) if isinstance(b.attn, Attention)]
    if not isinstance(arch.blocks[0].attn, Attention):
        warnings.append("layer 0 has no attention: vLLM, SGLang and Megatron-Bridge expect one there")
    kv_heads = sorted({attn.num_kv_heads for _, attn in real})
    if len(kv_heads) > 1:
        warnings.append(f"KV heads differ between layers ({kv_heads}): SGLang refuses this, vLLM is unproven")
    windows = [i for i, attn in real if attn.window is not None]
    if windows:
        warnings.append(
            f"layer {windows[0]} has a sliding window: vLLM, SGLang, TensorRT-LLM and llama.cpp ignore it"
        )
    linear = [i for i, b in enumerate(arch.blocks) if isinstance(b.attn, Linear) or isinstance(b.ffn, Linear)]
    if linear:
        warnings.append(
            f"layer {linear[0]} has a linear sub-block: vLLM, SGLang and Megatron-Bridge do not load it"
        )
    if any(isinstance(b.ffn, Linear) for b in arch.blocks):
        warnings.append("a linear feed-forward: llama.cpp takes it for an empty one")
    return warnings


def _attention(entry: Mapping[str, Any], num_heads: int, where: str) -> AttnSpec:
    _check_flags(entry, _ATTENTION_KEYS, f"{where}: attention")
    if entry.get("no_op"):
        return NoOp()
    if entry.get("replace_with_linear"):
        return Linear()
    group = entry.get("n_heads_in_group")
    if not isinstance(group, int) or group < 1 or num_heads % group:
        raise ValueError(f"{where}: n_heads_in_group: expected a divisor of {num_heads} heads, got {group!r}")
    if entry.get("num_sink_tokens"):
        raise ValueError(
            f"{where}: num_sink_tokens: expected null, got {entry['num_sink_tokens']}; sinks are unsupported"
        )
    return Attention(num_heads // group, entry.get("window_length"))


def _ffn(entry: Mapping[str, Any], dim: int, where: str) -> FfnSpec:
    _check_flags(entry, _FFN_KEYS, f"{where}: ffn")
    if entry.get("no_op"):
        return NoOp()
    if entry.get("replace_with_linear"):
        return Linear()
    mult = entry.get("ffn_mult")
    if not isinstance(mult, int | float) or isinstance(mult, bool) or not math.isfinite(mult) or mult <= 0:
        raise ValueError(f"{where}: ffn_mult: expected a positive number, got {mult!r}")
    return SwiGLU(width_of(mult, dim))


def _check_flags(entry: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"{where}: {unknown[0]}: unknown key; DeciLM has {', '.join(known)}")
    if entry.get("no_op") and entry.get("replace_with_linear"):
        raise ValueError(f"{where}: expected no_op or replace_with_linear, got both")
    if entry.get("sparsify"):
        raise ValueError(
            f"{where}: sparsify: expected null, got {entry['sparsify']!r}; sparse weights are unsupported"
        )


def _attention_entry(attn: AttnSpec, arch: ArchSpec) -> dict[str, Any]:
    entry: dict[str, Any] = dict.fromkeys(_ATTENTION_KEYS)
    entry |= {"no_op": isinstance(attn, NoOp), "replace_with_linear": isinstance(attn, Linear)}
    entry |= {"use_prefill_window_in_sink_attention": False, "unshifted_sink": False}
    if isinstance(attn, Attention):
        entry |= {"n_heads_in_group": arch.num_heads // attn.num_kv_heads, "window_length": attn.window}
    return entry


def _ffn_entry(ffn: FfnSpec, arch: ArchSpec) -> dict[str, Any]:
    entry: dict[str, Any] = dict.fromkeys(_FFN_KEYS)
    entry |= {"no_op": isinstance(ffn, NoOp), "replace_with_linear": isinstance(ffn, Linear)}
    if isinstance(ffn, SwiGLU):
        entry["ffn_mult"] = ffn_mult_of(ffn.width, arch.dim)  # a float: llama.cpp insists on one
    return entry
