# Copyright 2026 The nemojax authors. Licensed under the Apache License, Version 2.0.
"""A Llama whose layers differ, for `AutoModelForCausalLM.from_pretrained(dir, trust_remote_code=True)`.

Self-contained on torch and transformers (4.57 and 5.x). Sub-blocks: attention | linear | nothing, then
feed-forward | linear | nothing. The KV cache has a slot for each real attention layer, so that slot 0
always exists. Shapes: B batch, T new tokens, S cached and new, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_decilm import DeciLMConfig


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    raw = int(2 * round(ffn_mult, 6) * hidden_size / 3)
    return -(-raw // 256) * 256


def inverse_frequencies(config, device: torch.device) -> torch.Tensor:
    """[H/2] in f32, llama3 scaling included; computed on demand, so no buffer can go stale."""
    head_dim = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    steps = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(torch.float32)
    freq = 1.0 / (rope["rope_theta"] ** (steps / head_dim))
    if rope["rope_type"] == "default":
        return freq
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope_type: expected default or llama3, got {rope['rope_type']!r}")
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / freq
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    scaled = (1 - smooth) * freq / factor + smooth * freq
    scaled = torch.where(wavelength > context / low, freq / factor, scaled)
    return torch.where(wavelength < context / high, freq, scaled)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class DeciLMRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = x.to(torch.float32)
        f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * f.to(x.dtype)


class DeciLMAttention(nn.Module):
    def __init__(self, config: DeciLMConfig, block, slot: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = self.num_heads // block.n_heads_in_group
        self.head_dim = config.hidden_size // self.num_heads
        self.window = block.window_length
        self.slot = slot
        if block.num_sink_tokens:
            raise ValueError("num_sink_tokens: attention sinks are not supported")
        kv = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x, cos, sin, allowed_BTS, cache):
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.slot)
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if self.window is not None:
            S = k.shape[2]
            age = (torch.arange(T, device=x.device)[:, None] + S - T) - torch.arange(S, device=x.device)[
                None, :
            ]
            allowed_BTS = allowed_BTS & (age < self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_BTS[:, None])
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class DeciLMLinearAttention(nn.Module):
    def __init__(self, config: DeciLMConfig):
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, allowed_BTS, cache):
        return self.linear_attn(x)


class DeciLMMLP(nn.Module):
    def __init__(self, config: DeciLMConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeciLMLinearMLP(nn.Module):
    def __init__(self, config: DeciLMConfig):
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.linear_mlp(x)


class DeciLMDecoderLayer(nn.Module):
    """A removed sub-block has no norm, no weights and no residual add."""

    def __init__(self, config: DeciLMConfig, block, slot: int):
        super().__init__()
        attention, ffn = block.attention, block.ffn
        if not attention.no_op:
            self.input_layernorm = DeciLMRMSNorm(config.hidden_size, config.rms_norm_eps)
            linear = attention.replace_with_linear
            self.self_attn = (
                DeciLMLinearAttention(config) if linear else DeciLMAttention(config, attention, slot)
            )
        if not ffn.no_op:
            self.post_attention_layernorm = DeciLMRMSNorm(config.hidden_size, config.rms_norm_eps)
            width = None if ffn.replace_with_linear else ffn_width(ffn.ffn_mult, config.hidden_size)
            self.mlp = DeciLMLinearMLP(config) if width is None else DeciLMMLP(config, width)
        self.has_attention = not attention.no_op
        self.has_ffn = not ffn.no_op

    def forward(self, h, cos, sin, allowed_BTS, cache):
        if self.has_attention:
            h = h + self.self_attn(self.input_layernorm(h), cos, sin, allowed_BTS, cache)
        if self.has_ffn:
            h = h + self.mlp(self.post_attention_layernorm(h))
        return h


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["DeciLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = False

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, DeciLMRMSNorm):
            nn.init.ones_(module.weight)


class DeciLMModel(DeciLMPreTrainedModel):
    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers, slot = [], 0
        for block in config.block_configs:
            layers.append(DeciLMDecoderLayer(config, block, slot))
            slot += not (block.attention.no_op or block.attention.replace_with_linear)
        self.layers = nn.ModuleList(layers)
        self.norm = DeciLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = h.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        allowed_BTS = causal_mask(B, T, past, attention_mask, h.device)
        if position_ids is None:
            position_ids = default_positions(B, T, past, attention_mask, h.device)
        angles = position_ids[:, None, :, None].to(torch.float32) * inverse_frequencies(self.config, h.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        hidden = [h]
        for layer in self.layers:
            h = layer(h, cos, sin, allowed_BTS, past_key_values)
            hidden.append(h)
        h = self.norm(h)
        hidden[-1] = h
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )


def causal_mask(B: int, T: int, past: int, attention_mask, device) -> torch.Tensor:
    """bool [B, T, S]. A query always sees itself, so that rows of padding stay finite."""
    S = past + T
    query, key = torch.arange(past, S, device=device)[:, None], torch.arange(S, device=device)[None, :]
    allowed = (key <= query)[None].expand(B, T, S)
    if attention_mask is None:
        return allowed
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [batch, length], got {tuple(attention_mask.shape)}")
    return (allowed & attention_mask[:, None, -S:].to(torch.bool)) | (key == query)[None]


def default_positions(B: int, T: int, past: int, attention_mask, device) -> torch.Tensor:
    """int [B, T]: counted over real tokens, so that left padding does not shift them."""
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)[None].expand(B, T)
    return (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)[:, -T:]


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    # 5.x wants a mapping, 4.x a list
    _tied_weights_keys = (  # type: ignore[assignment]
        {"lm_head.weight": "model.embed_tokens.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].reshape(-1).to(logits.device)
            loss = F.cross_entropy(
                logits[:, :-1].float().reshape(-1, self.vocab_size), shifted, ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
