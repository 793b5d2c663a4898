"""Which blocks each layer may become, and their first weights, cut out of the parent's.

Attention: fewer KV heads (Puzzle, arXiv 2411.19146, App. A: mean-pooled, query heads kept), one matrix, or
nothing. Feed-forward: fewer channels, one matrix, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from nemojax.arch import ArchSpec, Attention, AttnSpec, BlockSpec, FfnSpec, Linear, NoOp, SwiGLU, describe
from nemojax.compress.importance import Importance
from nemojax.compress.subblock import Part, Sub, kind_name
from nemojax.config import field

KvInit = Literal["mean", "first", "prune"]


@dataclass(frozen=True)
class Space:
    """The search space; the parent's own sub-blocks always belong to it."""

    kv_heads: tuple[int, ...] = field((), "KV heads a layer may keep, each a divisor of the parent's")
    attn_linear: bool = field(False, "attention may become one matrix")
    attn_noop: bool = field(True, "attention may be removed")
    ffn_ratios: tuple[float, ...] = field((0.75, 0.5, 0.25), "feed-forward widths, fractions of the parent's")
    ffn_linear: bool = field(False, "the feed-forward may become one matrix")
    ffn_noop: bool = field(True, "the feed-forward may be removed")
    multiple: int = field(256, "widths are rounded to this many channels (256: DeciLM export is exact)")
    kv_init: KvInit = field("mean", "KV heads: mean of each pool, first of it, or prune by importance")

    def __post_init__(self):
        if self.multiple < 1:
            raise ValueError(f"space.multiple: expected a positive number of channels, got {self.multiple}")
        for ratio in self.ffn_ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"space.ffn_ratios: expected fractions between 0 and 1, got {ratio}")


def attn_choices(space: Space, arch: ArchSpec, layer: int) -> tuple[AttnSpec, ...]:
    """What a layer's attention may become, the parent's first."""
    parent = arch.blocks[layer].attn
    choices: list[AttnSpec] = [parent]
    if isinstance(parent, Attention):
        for kept in sorted(set(space.kv_heads), reverse=True):
            if kept >= parent.num_kv_heads:
                continue
            if kept < 1 or parent.num_kv_heads % kept:
                raise ValueError(
                    f"space.kv_heads: layer {layer}: expected a divisor of its "
                    f"{parent.num_kv_heads} KV heads, got {kept}"
                )
            choices.append(Attention(kept, parent.window))
        if space.attn_linear:
            choices.append(Linear())
    if space.attn_noop and not isinstance(parent, NoOp):
        choices.append(NoOp())
    return tuple(choices)


def ffn_choices(space: Space, arch: ArchSpec, layer: int) -> tuple[FfnSpec, ...]:
    """What a layer's feed-forward may become, the parent's first, widths rounded and never repeated."""
    parent = arch.blocks[layer].ffn
    choices: list[FfnSpec] = [parent]
    if isinstance(parent, SwiGLU):
        for ratio in sorted(space.ffn_ratios, reverse=True):
            width = max(1, round(parent.width * ratio / space.multiple)) * space.multiple
            if width < parent.width and SwiGLU(width) not in choices:
                choices.append(SwiGLU(width))
        if space.ffn_linear:
            choices.append(Linear())
    if space.ffn_noop and not isinstance(parent, NoOp):
        choices.append(NoOp())
    return tuple(choices)


def choices(space: Space, arch: ArchSpec) -> tuple[tuple[BlockSpec, ...], ...]:
    """For each layer every block it may become; the first one is the parent's own."""
    return tuple(
        tuple(BlockSpec(a, f) for a, f in product(attn_choices(space, arch, i), ffn_choices(space, arch, i)))
        for i in range(arch.num_layers)
    )


def init_sub(
    part: Part, parent: Sub, child: Sub, p: dict, importance: Importance, layer: int, kv_init: KvInit = "mean"
) -> dict:
    """First weights (numpy) of `child` in place of `parent`, whose own weights are `p`; {} for a no-op."""
    if child == parent:
        return dict(p)
    match parent, child:
        case _, NoOp():
            return {}
        case SwiGLU(), SwiGLU(width=width):
            keep = np.sort(np.argsort(-importance.ffn[layer], kind="stable")[:width])
            return {
                "norm": p["norm"],
                "gate": p["gate"][:, keep],
                "up": p["up"][:, keep],
                "down": p["down"][keep],
            }
        case SwiGLU(), Linear():
            return {"norm": p["norm"], "linear": _product("df,fe->de", p["up"], p["down"])}
        case Attention(), Linear():
            v_DNH = np.repeat(p["v"], p["o"].shape[0] // p["v"].shape[1], axis=1)
            return {"norm": p["norm"], "linear": _product("dnh,nhe->de", v_DNH, p["o"])}
        case Attention(), Attention(num_kv_heads=kept):
            return _fewer_kv_heads(p, kept, kv_init, importance.kv[layer])
    raise ValueError(f"layer {layer}: cannot make {kind_name(part, child)} out of {describe(parent)}")


def _product(subscripts: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    out = np.einsum(subscripts, left.astype(np.float32), right.astype(np.float32), optimize=True)
    return out.astype(left.dtype)


def _fewer_kv_heads(p: dict, kept: int, kv_init: KvInit, importance_K: np.ndarray) -> dict:
    if kv_init == "prune":
        return _prune_kv_heads(p, kept, importance_K)

    def pool(w_DKH: np.ndarray) -> np.ndarray:
        dim, heads, head_dim = w_DKH.shape
        pools = w_DKH.reshape(dim, kept, heads // kept, head_dim)
        if kv_init == "first":
            return pools[:, :, 0]
        return pools.astype(np.float32).mean(axis=2).astype(w_DKH.dtype)

    return {**p, "k": pool(p["k"]), "v": pool(p["v"])}


def _prune_kv_heads(p: dict, kept: int, importance_K: np.ndarray) -> dict:
    """Keeps the most important KV heads. The query heads of a removed one move under a kept one, with
    their rows of the output projection zeroed, so that they say nothing until trained."""
    num_kv, group = p["k"].shape[1], p["q"].shape[1] // p["k"].shape[1]
    order = np.argsort(-importance_K, kind="stable")
    stay, leave = np.sort(order[:kept]), np.sort(order[kept:])
    share = num_kv // kept - 1
    groups = [g for i, s in enumerate(stay) for g in (s, *leave[i * share : (i + 1) * share])]
    heads = np.concatenate([np.arange(g * group, (g + 1) * group) for g in groups])
    silent = np.isin(heads // group, leave)
    return {
        "norm": p["norm"],
        "q": p["q"][:, heads],
        "k": p["k"][:, stay],
        "v": p["v"][:, stay],
        "o": np.where(silent[:, None, None], np.zeros((), p["o"].dtype), p["o"][heads]),
    }
