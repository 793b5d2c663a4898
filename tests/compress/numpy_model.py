"""A whole model in numpy: what others are compared with, and nothing to compile."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nemojax.arch import ArchSpec, Attention, Linear, SwiGLU
from nemojax.model.layout import layer_params


def forward(params: Mapping[str, Any], arch: ArchSpec, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """(normed final hidden states [B, T, D], log-probabilities [B, T, V]), f32."""
    tokens = np.asarray(batch["tokens"])
    positions = np.asarray(batch.get("positions", np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)))
    segments = np.asarray(batch.get("segments", np.ones_like(tokens)))
    params = {name: _numpy(tree) for name, tree in params.items()}
    h = params["embed"]["weight"][tokens]
    for layer, block in enumerate(arch.blocks):
        p = layer_params(params, arch, layer)
        match block.attn:
            case Attention():
                h = h + _attention(p["attn"], arch, block.attn, h, positions, segments)
            case Linear():
                h = h + _norm(h, p["attn"]["norm"], arch) @ p["attn"]["linear"]
        match block.ffn:
            case SwiGLU():
                x = _norm(h, p["ffn"]["norm"], arch)
                gate = x @ p["ffn"]["gate"]
                h = h + (gate / (1 + np.exp(-gate)) * (x @ p["ffn"]["up"])) @ p["ffn"]["down"]
            case Linear():
                h = h + _norm(h, p["ffn"]["norm"], arch) @ p["ffn"]["linear"]
    x = _norm(h, params["norm"]["scale"], arch)
    logits = x @ params["embed" if arch.tie_embeddings else "head"]["weight"].T
    logits -= logits.max(-1, keepdims=True)
    return x, logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _numpy(tree: Any) -> Any:
    return {k: _numpy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)


def _norm(x: np.ndarray, scale: np.ndarray, arch: ArchSpec) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + arch.norm_eps) * scale


def _attention(p: Any, arch: ArchSpec, spec: Attention, h: Any, positions: Any, segments: Any) -> np.ndarray:
    x, group = _norm(h, p["norm"], arch), arch.num_heads // spec.num_kv_heads
    q, k, v = (np.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
    angles = positions[..., None] / arch.rope.theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)
    q, k = _rotate(q, angles), np.repeat(_rotate(k, angles), group, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(arch.head_dim)
    back = np.arange(h.shape[1])[:, None] - np.arange(h.shape[1])
    seen = (back >= 0) & (back < (spec.window or len(back)))
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    scores = np.where(seen[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, group, axis=2))
    return np.einsum("btnh,nhd->btd", heads, p["o"])


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
