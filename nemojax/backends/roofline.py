"""How long a part of the model takes at least, by its multiplications and the bytes that it moves: whichever
the chip needs longer for, the other being hidden behind it (Williams et al., 2009, doi
10.1145/1498765.1498785).

A lower bound. Kernels reach some part of it, which differs less between shapes than the bound does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from nemojax.arch import ArchSpec, Attention, AttnSpec, FfnSpec, Linear, NoOp, SwiGLU


@dataclass(frozen=True)
class Load:
    """What a pass does: FLOPs (a multiplication and an addition are two), bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Load:
        return Load(self.flops * times, self.bytes * times)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """At `peak` FLOP/s and `bandwidth` bytes/s."""
        return max(self.flops / peak, self.bytes / bandwidth)


def sub_load(
    arch: ArchSpec,
    sub: AttnSpec | FfnSpec,
    *,
    batch: float,
    tokens: float,
    cached: float = 0,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
    act_bytes: float = 2,
) -> Load:
    """A sub-block's forward pass over `tokens` new tokens of each of `batch` sequences, behind `cached` ones.

    Bytes: weights once; the stream in and out; what lies between products of different shapes, written and
    read; keys and values that are cached, read, and new ones written. weight_bytes and so on: of one number.
    """
    d, rows = arch.dim, batch * tokens
    stream = 2 * rows * d * act_bytes
    match sub:
        case Attention(num_kv_heads=k, window=window):
            heads, kv = arch.num_heads * arch.head_dim, k * arch.head_dim
            weights = d * (2 * heads + 2 * kv) + d
            flops = (
                2 * rows * (weights - d)
                + scores_load(arch, sub, batch=batch, tokens=tokens, cached=cached).flops
            )
            keys = min(cached, window) if window else cached
            cache = 2 * batch * (keys + tokens) * kv * cache_bytes
            between = 2 * rows * (2 * heads + (2 * kv if not cached else 0)) * act_bytes
            return Load(flops, weights * weight_bytes + stream + cache + between)
        case SwiGLU(width=f):
            weights = 3 * d * f + d
            between = 2 * rows * 3 * f * act_bytes
            return Load(6 * rows * d * f, weights * weight_bytes + stream + between)
        case Linear():
            return Load(2 * rows * d * d, (d * d + d) * weight_bytes + stream)
        case NoOp():
            return Load()


def scores_load(
    arch: ArchSpec, attn: Attention, *, batch: float, tokens: float, cached: float = 0, act_bytes: float = 2
) -> Load:
    """What an attention kernel does: queries times keys, and weights times values; scores stay on the chip.

    A query sees what is cached and, causally, half of the new tokens and itself.
    """
    rows, heads, kv = batch * tokens, arch.num_heads * arch.head_dim, attn.num_kv_heads * arch.head_dim
    seen = cached + (tokens + 1) / 2
    seen = min(seen, attn.window) if attn.window else seen
    keys = tokens + (min(cached, attn.window) if attn.window else cached)
    moved = 2 * rows * heads + 2 * batch * keys * kv
    return Load(4 * rows * heads * seen, moved * act_bytes)


def outer_load(
    arch: ArchSpec, *, batch: float, tokens: float, weight_bytes: float = 2, act_bytes: float = 2
) -> Load:
    """Embedding of all tokens, and final norm and head at each sequence's last, as generation has them."""
    d, v = arch.dim, arch.vocab_size
    moved = batch * tokens * d * (weight_bytes + act_bytes) + v * d * weight_bytes
    return Load(2 * batch * d * v, moved + batch * v * 4)


def blocks_load(arch: ArchSpec, **how: Any) -> Load:
    """All blocks' forward pass: see `sub_load`."""
    total, kinds = Load(), Counter(sub for block in arch.blocks for sub in (block.attn, block.ffn))
    for sub, count in kinds.items():
        total += sub_load(arch, sub, **how) * count
    return total


def training_load(
    arch: ArchSpec, rows: float, length: float, *, remat: bool, weight_bytes: float = 2
) -> Load:
    """A step's forward and backward passes over packed rows, the head at every position; `remat`: the blocks'
    forward pass twice. The optimiser is not in it."""
    blocks = blocks_load(arch, batch=rows, tokens=length, weight_bytes=weight_bytes)
    return blocks * (4 if remat else 3) + head_load(arch, rows * length, weight_bytes=weight_bytes) * 3


def head_load(arch: ArchSpec, positions: float, *, weight_bytes: float = 2) -> Load:
    """Logits at some positions, which do not leave the chip."""
    d, v = arch.dim, arch.vocab_size
    return Load(2 * positions * d * v, v * d * weight_bytes + positions * d * 2)
