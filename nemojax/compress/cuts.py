"""Cuts that are the same over a whole model: embedding channels, FFN channels, KV groups, layers.

Pure functions from parameters and importance to (child architecture, child parameters on the host, stacked
by its runs). A norm takes its root mean square over the channels that are left; with its scales as they were
(`keep`, as Minitron) that is exact if what was cut was as large as what stays. `rescale` multiplies the
scales by sqrt(D / D'), which is exact (but for the norm's epsilon) if what was cut was zero.
Legend: D model, D' model after the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, NoOp, SwiGLU
from nemojax.compress.depth import real_layers
from nemojax.compress.importance import Importance
from nemojax.compress.space import init_sub
from nemojax.compress.structures import STREAM_AXES
from nemojax.model.layout import stack, unstack

Groups = Literal["remove", "zero"]
Leave = Literal["noop", "remove"]
Norms = Literal["keep", "rescale"]
Pruned = tuple[ArchSpec, dict]


def prune_embed(params: dict, arch: ArchSpec, ranks: Importance, dim: int, norms: Norms = "keep") -> Pruned:
    """Keeps the `dim` most important embedding channels in embedding, head, every norm and every matrix."""
    if dim == arch.dim:
        return arch, host(params)
    assert ranks.embed is not None, "embedding channels were not ranked"
    keep = top(ranks.embed, dim)
    scale = (arch.dim / dim) ** 0.5 if norms == "rescale" else 1.0

    def norm(w_D: np.ndarray) -> np.ndarray:
        return w_D[keep] if scale == 1.0 else (w_D[keep].astype(np.float32) * scale).astype(w_D.dtype)

    def cut(name: str, w: np.ndarray) -> np.ndarray:
        if name == "norm":
            return norm(w)
        for axis in STREAM_AXES[name]:
            w = np.take(w, keep, axis=axis)
        return w

    tree = unstack(host(params), arch)
    out: dict[str, Any] = {
        name: {"weight": tree[name]["weight"][:, keep]} for name in ("embed", "head") if name in tree
    }
    out["norm"] = {"scale": norm(tree["norm"]["scale"])}
    out["layers"] = {
        layer: {part: {name: cut(name, w) for name, w in sub.items()} for part, sub in block.items()}
        for layer, block in tree["layers"].items()
    }
    child = arch.replace(dim=dim)
    return child, stack(out, child)


def prune_ffn(params: dict, arch: ArchSpec, ranks: Importance, width: int | Mapping[int, int]) -> Pruned:
    """Keeps each layer's most important channels: `width` of them, or `width[layer]`, where it has more."""
    widths = {
        i: min(block.ffn.width, width if isinstance(width, int) else width.get(i, block.ffn.width))
        for i, block in enumerate(arch.blocks)
        if isinstance(block.ffn, SwiGLU)
    }

    def change(layer: int, block: BlockSpec, p: dict) -> tuple[BlockSpec, dict]:
        if not isinstance(block.ffn, SwiGLU) or widths[layer] == block.ffn.width:
            return block, p
        sub = SwiGLU(widths[layer])
        return replace(block, ffn=sub), {**p, "ffn": init_sub("ffn", block.ffn, sub, p["ffn"], ranks, layer)}

    return _by_layer(params, arch, change, arch.num_heads)


def prune_kv(
    params: dict, arch: ArchSpec, ranks: Importance, kv_heads: int, groups: Groups = "remove"
) -> Pruned:
    """Keeps each layer's most important KV groups, `kv_heads` in the layers that have most.

    `remove`: the query heads of a removed group go with it, so every layer keeps the same share of its
    groups, as the number of query heads is the model's. `zero`: they stay and say nothing (see
    `space.init_sub`), and only layers with more than `kv_heads` change. ValueError where they do not divide.
    """
    kept = groups_to_keep(arch, kv_heads, groups)

    def change(layer: int, block: BlockSpec, p: dict) -> tuple[BlockSpec, dict]:
        if not isinstance(block.attn, Attention) or kept[layer] == block.attn.num_kv_heads:
            return block, p
        sub = replace(block.attn, num_kv_heads=kept[layer])
        if groups == "zero":
            attn = init_sub("attn", block.attn, sub, p["attn"], ranks, layer, "prune")
        else:
            attn = _keep_groups(p["attn"], top(ranks.kv[layer], kept[layer]))
        return replace(block, attn=sub), {**p, "attn": attn}

    num_heads = arch.num_heads * kv_heads // most_groups(arch) if groups == "remove" else arch.num_heads
    return _by_layer(params, arch, change, num_heads)


def remove_layers(params: dict, arch: ArchSpec, removed: tuple[int, ...], leave: Leave = "noop") -> Pruned:
    """Without the layers `removed`: empty ones in their place, or (`remove`) later layers move up."""
    tree = unstack(host(params), arch)
    empty = BlockSpec(NoOp(), NoOp())
    blocks: list[BlockSpec] = []
    layers: dict[str, dict] = {}
    for i, block in enumerate(arch.blocks):
        if i in removed and leave == "remove":
            continue
        if i not in removed and str(i) in tree["layers"]:
            layers[str(len(blocks))] = tree["layers"][str(i)]
        blocks.append(empty if i in removed else block)
    child = arch.replace(blocks=tuple(blocks))
    return child, stack({**tree, "layers": layers}, child)


def layers_to_remove(
    arch: ArchSpec, ranks: Importance, layers: int, contiguous: bool = False
) -> tuple[int, ...]:
    """The least important layers, so that `layers` that are not empty stay; `contiguous`: neighbours.

    Scores measured for that many neighbours together (`depth_span`) are used as they are, else a piece
    counts the sum of its layers.
    """
    real = real_layers(arch)
    count = len(real) - layers
    if count <= 0:
        return ()
    firsts = [layer for layer in real if layer in ranks.depth]
    scores = np.array([ranks.depth[layer] for layer in firsts])
    if not contiguous:
        assert len(scores) == len(real), "layers were not ranked one by one"
        return tuple(sorted(firsts[i] for i in np.argsort(scores, kind="stable")[:count]))
    if len(scores) != len(real) - count + 1:
        assert len(scores) == len(real), "pieces of another size were ranked"
        scores = np.convolve(scores, np.ones(count), "valid")
    first = int(np.argmin(scores))
    return real[first : first + count]


def width_for(arch: ArchSpec, most_params: float, multiple: int = 1) -> int:
    """The largest FFN width, a multiple of `multiple` or the widest there is, at which the model has at most
    `most_params` parameters, embedding and head included. ValueError when the narrowest has more."""
    widths = [b.ffn.width for b in arch.blocks if isinstance(b.ffn, SwiGLU)]
    widest = max(widths, default=0)
    per_channel = 3 * arch.dim

    def size(width: int) -> int:
        return arch.num_params() - per_channel * sum(max(w - width, 0) for w in widths)

    for width in (widest, *range(widest // multiple * multiple, 0, -multiple)):
        if size(width) <= most_params:
            return width
    least = size(min(multiple, widest))
    raise ValueError(
        f"targets.params_ratio: expected at least {least} parameters (FFN width {min(multiple, widest)}), "
        f"got {most_params:.0f}; cut something else too, or keep more"
    )


def prune_to_ratio(
    params: dict, arch: ArchSpec, ranks: Importance, ratio: float, multiple: int = 1
) -> Pruned:
    """FFN channels cut to the one width that keeps at most `ratio` of all parameters: methods of importance
    are then compared at equal size."""
    return prune_ffn(params, arch, ranks, width_for(arch, ratio * arch.num_params(), multiple))


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest scores, ascending; of equal ones the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


def groups_to_keep(arch: ArchSpec, kv_heads: int, groups: Groups) -> dict[int, int]:
    """{layer: KV heads that it keeps} for every attention layer; ValueError where they do not divide."""
    heads = {i: b.attn.num_kv_heads for i, b in enumerate(arch.blocks) if isinstance(b.attn, Attention)}
    if not 1 <= kv_heads <= most_groups(arch):
        raise ValueError(f"targets.kv_heads: expected 1 to the parent's {most_groups(arch)}, got {kv_heads}")
    if groups == "zero":
        for layer, have in heads.items():
            if have % min(have, kv_heads):
                raise ValueError(
                    f"targets.kv_heads: layer {layer}: expected a divisor of its {have} KV heads, "
                    f"got {kv_heads}"
                )
        return {layer: min(have, kv_heads) for layer, have in heads.items()}
    most = most_groups(arch)
    for layer, have in heads.items():
        if have * kv_heads % most:
            raise ValueError(
                f"targets.kv_heads: layer {layer}: expected a whole number of KV heads in every layer, got "
                f"{kv_heads}/{most} of {have}; choose another number, or groups=zero"
            )
    return {layer: have * kv_heads // most for layer, have in heads.items()}


def most_groups(arch: ArchSpec) -> int:
    """The most KV heads that a layer has; 0 without attention."""
    return max((b.attn.num_kv_heads for b in arch.blocks if isinstance(b.attn, Attention)), default=0)


def _keep_groups(p: dict, keep: np.ndarray) -> dict:
    """Attention weights with only the KV heads `keep`, and the query heads that share them."""
    group = p["q"].shape[1] // p["k"].shape[1]
    heads = np.concatenate([np.arange(k * group, (k + 1) * group) for k in keep])
    cut = {"q": p["q"][:, heads], "k": p["k"][:, keep], "v": p["v"][:, keep], "o": p["o"][heads]}
    return {**p, **cut}


def _by_layer(
    params: dict,
    arch: ArchSpec,
    change: Callable[[int, BlockSpec, dict], tuple[BlockSpec, dict]],
    num_heads: int,
) -> Pruned:
    """Every layer's block and weights as `change(layer, block, weights)` gives them."""
    tree = unstack(host(params), arch)
    blocks: list[BlockSpec] = []
    layers: dict[str, dict] = {}
    for i, block in enumerate(arch.blocks):
        own = tree["layers"].get(str(i), {})
        block, weights = change(i, block, own)
        blocks.append(block)
        if weights:
            layers[str(i)] = weights
    child = arch.replace(blocks=tuple(blocks), num_heads=num_heads)
    return child, stack({**tree, "layers": layers}, child)


def host(params: dict) -> dict:
    return jax.tree.map(np.asarray, params)
