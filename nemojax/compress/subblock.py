"""Half a block at a time: the attention part and the feed-forward part run, and are replaced, alone.

A block is h -> h + attn(h) -> ... + ffn(...), so a choice for a layer is an attention choice followed by a
feed-forward choice, and both the library and the scores need a + f programs where whole blocks need a * f.
Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from nemojax.arch import ArchSpec, AttnSpec, BlockSpec, FfnSpec, NoOp, describe
from nemojax.model.attention import Context, make_context
from nemojax.model.block import apply_block
from nemojax.model.layout import layer_params

Part = Literal["attn", "ffn"]
Sub = AttnSpec | FfnSpec
PARTS: tuple[Part, Part] = ("attn", "ffn")


def sub_of(spec: BlockSpec, part: Part) -> Sub:
    return spec.attn if part == "attn" else spec.ffn


def part_spec(part: Part, sub: Any) -> BlockSpec:
    """The block that has only this sub-block."""
    return BlockSpec(sub, NoOp()) if part == "attn" else BlockSpec(NoOp(), sub)


def part_params(params: dict, part: Part) -> dict:
    """The parameters of `part_spec`, out of a whole block's."""
    return {part: params[part]} if part in params else {}


def kind_name(part: Part, sub: Sub) -> str:
    """`attn-kv2`, `ffn-linear`, `ffn-none`: a name that is also a good folder name."""
    word = describe(sub).replace("/", "-")
    return f"{part}-{'none' if word == '-' else word}"


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


def layers_of(params: dict, arch: ArchSpec) -> Iterator[tuple[int, dict]]:
    """(layer, its block's parameters on the host) for every layer that has any."""
    host = jax.tree.map(np.asarray, {"runs": params["runs"]})
    for run in arch.runs():
        for layer in run.layers:
            yield layer, layer_params(host, arch, layer)
