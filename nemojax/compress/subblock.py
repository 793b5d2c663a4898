"""Half a block at a time: the attention part and the feed-forward part run, and are replaced, alone.

A block is h -> h + attn(h) -> ... + ffn(...), so a choice for a layer is an attention choice followed by a
feed-forward choice, and both the library and the scores need a + f programs where whole blocks need a * f.
Where the two are trained together (a coupled variant), the replacement is the whole block.
Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from nemojax.arch import ArchSpec, AttnSpec, BlockSpec, FfnSpec, NoOp, describe
from nemojax.checkpoints.store import to_host
from nemojax.model.attention import Context, make_context
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name

Part = Literal["attn", "ffn"]
Place = Literal["attn", "ffn", "block"]  # what a replacement replaces
Sub = AttnSpec | FfnSpec
PARTS: tuple[Part, Part] = ("attn", "ffn")


@dataclass(frozen=True)
class Kind:
    """The same replacement in several layers whose parents' blocks are equal.

    `child` is a sub-block where `part` is one, and a whole block where both are replaced together.
    """

    part: Place
    parent: BlockSpec
    child: Sub | BlockSpec
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        return kind_name(self.part, self.child)

    @property
    def block(self) -> BlockSpec:
        """The block that a layer has after the replacement."""
        child: Any = self.child
        match self.part:
            case "attn":
                return BlockSpec(child, self.parent.ffn)
            case "ffn":
                return BlockSpec(self.parent.attn, child)
            case "block":
                return child

    @property
    def trained(self) -> tuple[Part, ...]:
        """The parts whose weights the replacement owns."""
        parts = PARTS if self.part == "block" else (self.part,)
        return tuple(part for part in parts if not isinstance(sub_of(self.block, part), NoOp))


def sub_of(spec: BlockSpec, part: Part) -> Sub:
    return spec.attn if part == "attn" else spec.ffn


def part_spec(part: Part, sub: Any) -> BlockSpec:
    """The block that has only this sub-block."""
    return BlockSpec(sub, NoOp()) if part == "attn" else BlockSpec(NoOp(), sub)


def part_params(params: dict, part: Part) -> dict:
    """The parameters of `part_spec`, out of a whole block's."""
    return {part: params[part]} if part in params else {}


def kind_name(part: Place, child: Sub | BlockSpec) -> str:
    """`attn-kv2`, `ffn-linear`, `ffn-none`, `block-kv2+ffn64`: a name that is also a good folder name."""
    subs = (child.attn, child.ffn) if isinstance(child, BlockSpec) else (child,)
    words = [describe(sub).replace("/", "-") for sub in subs]
    return f"{part}-{'+'.join('none' if word == '-' else word for word in words)}"


def apply_part(arch: ArchSpec, part: Part, sub: Sub, p: dict, h_BTD: jax.Array, ctx: Context) -> jax.Array:
    """Residual stream after this sub-block alone; `p` holds the sub-block's own weights ({} for no-op)."""
    if isinstance(sub, NoOp):
        return h_BTD
    return apply_block(arch, part_spec(part, sub), {part: p}, h_BTD, ctx)


@partial(jax.jit, static_argnames=("arch", "part", "sub"))
def run_part(
    arch: ArchSpec,
    part: Part,
    sub: Sub,
    p: dict,
    h_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """`apply_part`, compiled once for a sub-block shape: the scores and the stopwatch share the program."""
    return apply_part(arch, part, sub, p, h_BTD, make_context(arch, positions_BT, segments_BT))


def layers_of(
    params: dict, arch: ArchSpec, wanted: frozenset[int] | None = None
) -> Iterator[tuple[int, dict]]:
    """(layer, its block's parameters on the host) for every layer that has any, or for those `wanted`.

    One layer at a time: the host never holds a run. With several processes all of them must walk along.
    """
    for index, run in enumerate(arch.runs()):
        for position, layer in enumerate(run.layers):
            if wanted is None or layer in wanted:
                yield layer, on_host(params["runs"][run_name(index)], position)


def on_host(stacked: Any, position: int) -> Any:
    """One entry of a stack as numpy arrays; of arrays on many hosts, the whole entry in each of them."""
    leaves = jax.tree.leaves(stacked)
    if leaves and isinstance(leaves[0], jax.Array):
        return jax.tree.map(to_host, take_entry(stacked, position))
    return jax.tree.map(lambda w: np.asarray(w[position]), stacked)


@jax.jit
def take_entry(stacked: Any, index: int) -> Any:
    """One entry of a stack; the index is data, so one program serves every layer."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)
