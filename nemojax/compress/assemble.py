"""Puts a child together: chosen blocks from the library, everything unchanged bitwise from the parent."""

from __future__ import annotations

import jax

from nemojax.arch import ArchSpec, BlockSpec, NoOp, describe
from nemojax.checkpoints.store import to_host
from nemojax.compress.library import Library
from nemojax.compress.subblock import PARTS, layers_of, sub_of
from nemojax.model.layout import stack


def child_arch(parent: ArchSpec, blocks: tuple[BlockSpec, ...]) -> ArchSpec:
    """The parent's architecture with other blocks."""
    return parent.replace(blocks=blocks)


def assemble(params: dict, parent: ArchSpec, child: ArchSpec, library: Library) -> dict:
    """Child parameters (numpy, stacked by the child's runs) in the parent's dtypes, in every process.

    A block that was trained as a whole (coupled) is taken whole; else its changed parts alone are.
    """
    outer = jax.tree.map(to_host, {name: tree for name, tree in params.items() if name != "runs"})
    parents, layers = dict(layers_of(params, parent)), {}
    for i, (old, new) in enumerate(zip(parent.blocks, child.blocks, strict=True)):
        own = parents.get(i, {})
        changed = library.load_block(old, new, i)
        block = {}
        for part in PARTS:
            if isinstance(sub_of(new, part), NoOp):
                continue
            block[part] = own[part]
            if part in changed:
                dtype = next(iter(own[part].values())).dtype
                block[part] = {k: w.astype(dtype) for k, w in changed[part].items()}
        if block:
            layers[str(i)] = block
    return stack({**outer, "layers": layers}, child)


def block_map(parent: ArchSpec, child: ArchSpec) -> str:
    """A line for each layer: attention, feed-forward, and a mark where it differs from the parent."""
    lines = ["layer  attention  feed-forward"]
    for i, (old, new) in enumerate(zip(parent.blocks, child.blocks, strict=True)):
        mark = "" if old == new else f"   was {describe(old.attn)} {describe(old.ffn)}"
        lines.append(f"{i:>5}  {describe(new.attn):<9}  {describe(new.ffn):<12}{mark}".rstrip())
    return "\n".join(lines)
