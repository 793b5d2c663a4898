"""Which blocks each layer may become, and their first weights, cut out of the parent's.

Attention: fewer KV heads (Puzzle, arXiv 2411.19146, App. A: mean-pooled, query heads kept), one matrix, or
nothing. Feed-forward: fewer channels, one matrix, or nothing. The parent may be a child of an earlier search:
each of its layers becomes only what it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from nemojax.arch import ArchSpec, Attention, AttnSpec, BlockSpec, FfnSpec, Linear, NoOp, SwiGLU, describe
from nemojax.compress.importance import Importance
from nemojax.compress.pattern import excluded, layers_in
from nemojax.compress.subblock import Part, Sub, kind_name
from nemojax.config import field

KvInit = Literal["mean", "first", "prune"]


@dataclass(frozen=True)
class Space:
    """The search space; the parent's own sub-blocks always belong to it."""

    kv_heads: tuple[int, ...] = field((), "KV heads a layer may keep, where they divide its parent's")
    attn_linear: bool = field(False, "attention may become one matrix")
    attn_noop: bool = field(True, "attention may be removed")
    ffn_ratios: tuple[float, ...] = field(
        (0.87, 0.75, 0.5, 0.25, 0.2, 0.1), "feed-forward widths, fractions of the parent's; Puzzle's"
    )
    ffn_linear: bool = field(False, "the feed-forward may become one matrix")
    ffn_noop: bool = field(True, "the feed-forward may be removed")
    multiple: int = field(256, "widths are rounded to this many channels (256: DeciLM export is exact)")
    kv_init: KvInit = field("mean", "KV heads: mean of each pool, first of it, or prune by importance")
    attn_layers: str = field("all", "layers whose attention may change: all, none, or as 0,4-27,30-")
    ffn_layers: str = field("all", "layers whose feed-forward may change")
    exclude: tuple[str, ...] = field(
        (), "LAYERS:GLOB of names such as kv4+ffn2048: no such choice there, the parent's own apart"
    )

    def __post_init__(self):
        if self.multiple < 1:
            raise ValueError(f"multiple: expected a positive number of channels, got {self.multiple}")
        for ratio in self.ffn_ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"ffn_ratios: expected fractions between 0 and 1, got {ratio}")
        for kept in self.kv_heads:
            if kept < 1:
                raise ValueError(f"kv_heads: expected positive numbers of KV heads, got {kept}")


def choice_name(block: BlockSpec) -> str:
    """`kv4+ffn2048`, `-+linear`: a choice in a table, in the words of `arch.describe`."""
    return f"{describe(block.attn)}+{describe(block.ffn)}"


def attn_choices(space: Space, arch: ArchSpec, layer: int) -> tuple[AttnSpec, ...]:
    """What a layer's attention may become, the parent's first."""
    parent = arch.blocks[layer].attn
    choices: list[AttnSpec] = [parent]
    if layer not in layers_in(space.attn_layers, arch.num_layers):
        return (parent,)
    if isinstance(parent, Attention):
        for kept in sorted(set(space.kv_heads), reverse=True):
            if kept < parent.num_kv_heads and parent.num_kv_heads % kept == 0:
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
    if layer not in layers_in(space.ffn_layers, arch.num_layers):
        return (parent,)
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
    """For each layer every block it may become; the first one is the parent's own, which always may stay.

    A number of KV heads or a width that suits one layer of a mixed parent need not suit another. ValueError
    for one that suits none of them.
    """
    _check_kv_heads(space, arch)
    _check_widths(space, arch)
    layers = [
        [BlockSpec(a, f) for a, f in product(attn_choices(space, arch, i), ffn_choices(space, arch, i))]
        for i in range(arch.num_layers)
    ]
    gone = excluded(space.exclude, [[choice_name(block) for block in row] for row in layers])
    return tuple(
        tuple(block for j, block in enumerate(row) if not j or j not in out)
        for row, out in zip(layers, gone, strict=True)
    )


def _check_kv_heads(space: Space, arch: ArchSpec) -> None:
    """A list such as 4, 2, 1 serves parents of any size, but each that is less must divide somewhere."""
    allowed = layers_in(space.attn_layers, arch.num_layers)
    attns = [arch.blocks[i].attn for i in allowed]
    own = {attn.num_kv_heads for attn in attns if isinstance(attn, Attention)}
    for kept in space.kv_heads:
        wider = {heads for heads in own if heads > kept}
        if wider and kept not in own and all(heads % kept for heads in wider):
            heads = " or ".join(map(str, sorted(wider)))
            raise ValueError(
                f"space.kv_heads: expected a divisor of the {heads} KV heads of some layer, got {kept}"
            )


def _check_widths(space: Space, arch: ArchSpec) -> None:
    """Some width must be left when all are rounded, where any is asked for."""
    allowed = layers_in(space.ffn_layers, arch.num_layers)
    ffns = {i: arch.blocks[i].ffn for i in allowed}
    widths = [ffn.width for ffn in ffns.values() if isinstance(ffn, SwiGLU)]
    if not space.ffn_ratios or not widths:
        return
    if not any(isinstance(f, SwiGLU) and f != ffns[i] for i in allowed for f in ffn_choices(space, arch, i)):
        raise ValueError(
            f"space.multiple: expected one that leaves a width below the parent's {max(widths)} channels, "
            f"got {space.multiple}; take a smaller multiple, smaller ffn_ratios, or none of them"
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
