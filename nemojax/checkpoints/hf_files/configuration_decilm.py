# Copyright 2026 The nemojax authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a Llama whose layers differ (DeciLM, model_type `nemotron-nas`). Ships with an export."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig


class SubBlockConfig:
    """One half of a layer; the attributes are the keys of its entry in config.json."""

    DEFAULTS: dict[str, Any] = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    no_op: bool
    replace_with_linear: bool

    def __init__(self, **values: Any):
        unknown = sorted(set(values) - set(self.DEFAULTS))
        if unknown:
            raise ValueError(f"block_configs: unknown key {unknown[0]!r} in {type(self).__name__}")
        for key, default in self.DEFAULTS.items():
            setattr(self, key, values.get(key, default))
        if self.no_op and self.replace_with_linear:
            raise ValueError("block_configs: no_op and replace_with_linear exclude each other")

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.DEFAULTS}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"


class AttentionConfig(SubBlockConfig):
    DEFAULTS = {
        **SubBlockConfig.DEFAULTS,
        "n_heads_in_group": None,
        "window_length": None,
        "num_sink_tokens": None,
        "use_prefill_window_in_sink_attention": False,
        "unshifted_sink": False,
    }


class FFNConfig(SubBlockConfig):
    DEFAULTS = {**SubBlockConfig.DEFAULTS, "ffn_mult": None}


class BlockConfig:
    """One layer: an attention and a feed-forward sub-block."""

    def __init__(self, attention: Any, ffn: Any):
        self.attention = attention if isinstance(attention, AttentionConfig) else AttentionConfig(**attention)
        self.ffn = ffn if isinstance(ffn, FFNConfig) else FFNConfig(**ffn)

    def to_dict(self) -> dict[str, Any]:
        return {"attention": self.attention.to_dict(), "ffn": self.ffn.to_dict()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"BlockConfig({self.to_dict()})"


def merged_rope(theta: Any, scaling: Any, parameters: Any) -> dict[str, Any]:
    """Either spelling (4.x: rope_theta and rope_scaling, 5.x: rope_parameters) as the second."""
    rope = {**(scaling or {}), **(parameters or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope["rope_theta"] = theta if theta is not None else rope.get("rope_theta", 10000.0)
    return rope


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        block_configs=None,
        vocab_size=128256,
        hidden_size=4096,
        num_attention_heads=32,
        num_hidden_layers=None,
        intermediate_size=None,
        num_key_value_heads=None,
        hidden_act="silu",
        max_position_embeddings=131072,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        use_cache=True,
        rope_theta=None,
        rope_scaling=None,
        rope_parameters=None,
        attention_bias=False,
        attention_dropout=0.0,
        mlp_bias=False,
        pretraining_tp=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        blocks = [b if isinstance(b, BlockConfig) else BlockConfig(**b) for b in block_configs or []]
        if num_hidden_layers not in (None, len(blocks)) and blocks:
            raise ValueError(
                f"num_hidden_layers is {num_hidden_layers}, but block_configs has {len(blocks)} entries"
            )
        self.block_configs = blocks
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = len(blocks)
        self.intermediate_size = intermediate_size
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self.pretraining_tp = pretraining_tp
        full = merged_rope(rope_theta, rope_scaling, rope_parameters)
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_theta = full["rope_theta"]
        self.rope_parameters = full
        if not isinstance(getattr(type(self), "rope_scaling", None), property):
            self.rope_scaling = (
                None
                if full["rope_type"] == "default"
                else {k: v for k, v in full.items() if k != "rope_theta"}
            )

    def to_dict(self) -> dict[str, Any]:
        blocks, self.block_configs = self.block_configs, []
        try:
            out = super().to_dict()
        finally:
            self.block_configs = blocks
        out["block_configs"] = [block.to_dict() for block in blocks]
        rope = dict(self.rope_parameters)
        out["rope_theta"] = rope.pop("rope_theta")
        out["rope_scaling"] = copy.deepcopy(rope) if rope.get("rope_type") != "default" else None
        out.pop("rope_parameters", None)
        return out
