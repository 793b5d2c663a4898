"""A Hugging Face config.json as an ArchSpec, and an ArchSpec as a config.json.

Every dialect of RoPE spelling is read (`rope_theta` with `rope_scaling`, or `rope_parameters`); what is
written is the older one, which every known loader reads. What we do not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nemojax.arch import ArchSpec, Attention, BlockSpec, Llama3Scaling, Rope, SwiGLU, describe
from nemojax.checkpoints import anymodel, decilm, hf_fp8

Format = Literal["llama", "decilm", "anymodel"]
FORMATS: tuple[Format, ...] = ("llama", "decilm", "anymodel")

_RELATIVES = {
    "mistral": "its attention slides over a window given once for the whole model",
    "mixtral": "its feed-forward is a mixture of experts",
    "ministral": "its layers alternate sliding and full attention",
    "qwen2": "its query, key and value projections have biases",
    "qwen2_moe": "its feed-forward is a mixture of experts and its projections have biases",
    "qwen3": "its queries and keys are normalised per head",
    "qwen3_moe": "its feed-forward is a mixture of experts and its queries and keys are normalised",
    "gemma": "its norms scale by 1 + weight, its feed-forward uses GELU and its embeddings are scaled",
    "gemma2": "its norms scale by 1 + weight, its logits are capped and its layers alternate windows",
    "gemma3_text": "its norms scale by 1 + weight, its queries and keys are normalised",
    "phi3": "its projections are fused and its RoPE scaling is longrope",
    "olmo2": "its norms follow the sub-blocks and its queries and keys are normalised",
    "granite": "its embeddings, residuals, attention and logits carry multipliers",
    "cohere": "its attention and feed-forward run in parallel",
    "smollm3": "some of its layers have no RoPE",
    "llama4_text": "its feed-forward is a mixture of experts and some layers have no RoPE",
    "nemotron": "its feed-forward is squared ReLU and its norm is a LayerNorm",
    "nemotron_h": "some of its layers are Mamba layers",
    "gpt2": "its positions are learned and its norms are LayerNorms",
    "gpt_neox": "its attention and feed-forward run in parallel and its norms are LayerNorms",
    "deepseek_v3": "its attention is latent and its feed-forward is a mixture of experts",
}
_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_ARCH_KEYS = {
    "architectures",
    "auto_map",
    "model_type",
    "block_configs",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "quantization_config",  # an import makes ordinary numbers of quantised weights
}


def arch_from_config(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The architecture that a config.json describes; ValueError names the key that is not supported."""
    kind = format_of(config, where)
    _refuse_variations(config, where)
    dim, heads = _integer(config, "hidden_size", where), _integer(config, "num_attention_heads", where)
    head_dim = config.get("head_dim") or dim // heads
    layers = _integer(config, "num_hidden_layers", where)
    if kind == "decilm":
        if head_dim * heads != dim:
            raise ValueError(f"{where}: head_dim: expected hidden_size / num_attention_heads, got {head_dim}")
        blocks = decilm.blocks_from_configs(config.get("block_configs"), dim, heads, where)
    elif kind == "anymodel":
        blocks = anymodel.blocks_from_configs(config["block_configs"], where)
    else:
        kv_heads = config.get("num_key_value_heads") or heads
        blocks = (
            BlockSpec(Attention(kv_heads), SwiGLU(_integer(config, "intermediate_size", where))),
        ) * layers
    if len(blocks) != layers:
        raise ValueError(
            f"{where}: num_hidden_layers is {layers}, but block_configs has {len(blocks)} entries"
        )
    try:
        return ArchSpec(
            vocab_size=_integer(config, "vocab_size", where),
            dim=dim,
            num_heads=heads,
            head_dim=head_dim,
            blocks=blocks,
            context=config.get("max_position_embeddings") or _LLAMA_DEFAULTS["max_position_embeddings"],
            rope=_rope(config, where),
            norm_eps=config.get("rms_norm_eps", _LLAMA_DEFAULTS["rms_norm_eps"]),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def format_of(config: Mapping[str, Any], where: str) -> Format:
    """Which of the three formats a config.json is in; other architectures are refused by name."""
    model_type = config.get("model_type")
    names = config.get("architectures") or []
    if model_type in ("nemotron-nas", "deci") or "DeciLMForCausalLM" in names:
        return "decilm"
    if model_type == "llama":
        if names and "LlamaForCausalLM" not in names:
            raise ValueError(f"{where}: architectures: expected LlamaForCausalLM, got {names[0]}")
        return "anymodel" if config.get("block_configs") else "llama"
    if model_type in _RELATIVES:
        raise ValueError(
            f"{where}: {model_type} is not supported: {_RELATIVES[model_type]}; "
            "supported are llama and nemotron-nas"
        )
    raise ValueError(f"{where}: model_type: expected llama or nemotron-nas (DeciLM), got {model_type!r}")


def config_from_arch(
    arch: ArchSpec, kind: Format, original: Mapping[str, Any] | None, dtype: str, tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of `arch` in format `kind`.

    `original`: the config.json it was imported from, if any. When it still describes `arch` it is
    returned key by key; otherwise its keys that are not about shape are kept. `tokens`: special token
    ids such as {"eos_token_id": 2}. ValueError names the layer that the format cannot say.
    """
    if original and _still_describes(original, arch, kind):
        same = {k: v for k, v in original.items() if k != "quantization_config"}
        for key in ("torch_dtype", "dtype"):
            if key in same:
                same[key] = dtype
        return same
    config: dict[str, Any] = dict(tokens)
    if original:
        config |= {k: v for k, v in original.items() if k not in _ARCH_KEYS}
    config |= _head(arch, kind, original)
    defaults = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    config = defaults | config
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    return dict(sorted(config.items()))


def choose_format(arch: ArchSpec) -> Format:
    """llama when all layers are the same plain block, else decilm."""
    return "decilm" if _why_not_llama(arch) else "llama"


def _head(arch: ArchSpec, kind: Format, original: Mapping[str, Any] | None) -> dict[str, Any]:
    head = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.dim,
        "num_attention_heads": arch.num_heads,
        "num_hidden_layers": arch.num_layers,
        "max_position_embeddings": arch.context,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "rope_theta": arch.rope.theta,
        "rope_scaling": _scaling_dict(arch.rope.scaling),
    }
    if kind == "decilm":
        old = (
            original.get("block_configs")
            if original and original.get("model_type") == "nemotron-nas"
            else None
        )
        return head | {
            "architectures": ["DeciLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_decilm.DeciLMConfig",
                "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
                # `transformers serve` asks for this class first, and finds no other of a model's own code
                "AutoModelForDecision": "modeling_decilm.DeciLMForCausalLM",
            },
            "model_type": "nemotron-nas",
            "block_configs": decilm.configs_from_blocks(arch, old),
            "intermediate_size": None,
            "num_key_value_heads": None,
        }
    if arch.dim % arch.num_heads:
        raise ValueError(
            f"{kind}: dim {arch.dim} is not a multiple of {arch.num_heads} heads, as transformers demands"
        )
    head |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": arch.head_dim}
    if kind == "llama":
        if reason := _why_not_llama(arch):
            raise ValueError(f"llama: {reason}; use --format=decilm")
    else:
        head["block_configs"] = anymodel.configs_from_blocks(arch)
    widths = [b.ffn.width for b in arch.blocks if isinstance(b.ffn, SwiGLU)]
    kv_heads = [b.attn.num_kv_heads for b in arch.blocks if isinstance(b.attn, Attention)]
    return head | {
        "intermediate_size": max(widths, default=arch.dim),
        "num_key_value_heads": max(kv_heads, default=arch.num_heads),
    }


def _why_not_llama(arch: ArchSpec) -> str | None:
    """The first layer that plain Llama cannot say, in words; None when there is none."""
    first = arch.blocks[0]
    for i, block in enumerate(arch.blocks):
        if not isinstance(block.attn, Attention) or not isinstance(block.ffn, SwiGLU):
            return f"layer {i} is {describe(block.attn)} {describe(block.ffn)}, expected attention and SwiGLU"
        if block.attn.window is not None:
            return f"layer {i} has a sliding window of {block.attn.window}, expected none"
        if block != first:
            got, want = (f"{describe(b.attn)} {describe(b.ffn)}" for b in (block, first))
            return f"layer {i} is {got}, expected {want} as in layer 0"
    return None


def _still_describes(original: Mapping[str, Any], arch: ArchSpec, kind: Format) -> bool:
    try:
        return format_of(original, "") == kind and arch_from_config(original, "") == arch
    except ValueError:
        return False


def _refuse_variations(config: Mapping[str, Any], where: str) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{where}: {key}: expected false, got true; biases are not supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{where}: hidden_act: expected silu, got {config['hidden_act']!r}")
    hf_fp8.is_fp8(config, where)
    if config.get("per_layer_config"):
        raise ValueError(f"{where}: per_layer_config: expected none; use block_configs (DeciLM)")


def _rope(config: Mapping[str, Any], where: str) -> Rope:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError(
            f"{where}: partial_rotary_factor: expected 1, got {rope.get('partial_rotary_factor')}"
        )
    if kind == "default":
        return Rope(float(theta))
    if kind != "llama3":
        raise ValueError(f"{where}: rope_type: expected default or llama3, got {kind!r}")
    try:
        return Rope(
            float(theta),
            Llama3Scaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=int(rope["original_max_position_embeddings"]),
            ),
        )
    except KeyError as error:
        raise ValueError(f"{where}: rope_scaling: expected {error.args[0]} for llama3, got none") from error


def _scaling_dict(scaling: Llama3Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "factor": scaling.factor,
        "high_freq_factor": scaling.high_freq_factor,
        "low_freq_factor": scaling.low_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
        "rope_type": "llama3",
    }


def _integer(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key}: expected a positive integer, got {value!r}")
    return value
