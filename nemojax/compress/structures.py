"""What goes together when something is removed: sums of a value per weight over channels, groups and layers.

A feed-forward channel is a column of gate and of up and a row of down; a KV group its key and value head with
their query heads; an embedding channel every row or column along the residual stream, norms included; a layer
all of its block. The outputs of a structure are the weights that write to the stream: it says nothing if
they are zero. Legend: L layers of a run, D model, N query heads, K KV heads, H head dim, F ffn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, Attention, Run, SwiGLU
from nemojax.model.layout import run_name
from nemojax.sharding import constrain

Structure = Literal["ffn", "kv", "embed", "depth"]

# The axes of one layer's weights along the residual stream, those that write to it last.
STREAM_AXES: Mapping[str, tuple[int, ...]] = {
    "norm": (0,),
    "q": (0,),
    "k": (0,),
    "v": (0,),
    "o": (2,),
    "linear": (0, 1),
    "gate": (0,),
    "up": (0,),
    "down": (1,),
}
OUTPUTS = ("o", "down", "linear")


def structure_sums(
    values: Mapping[str, Any], arch: ArchSpec, parts: Collection[Structure], *, outputs: bool = False
) -> dict[str, Any]:
    """Sums of `values`, a tree like the parameters, for `parts` alone: {"runs": [{"ffn": [L,F], "kv": [L,K],
    "depth": [L]}, ...], "embed": [D]}. `outputs`: only over the weights that write to the stream."""
    blocks = [values["runs"][run_name(i)] for i in range(len(arch.runs()))]
    found: dict[str, Any] = {
        "runs": [_of_run(run, v, parts, outputs) for run, v in zip(arch.runs(), blocks, strict=True)]
    }
    if "embed" in parts:
        total_D = values["embed"]["weight"].sum(axis=0)
        if not outputs:
            total_D += values["norm"]["scale"]
            total_D += values["head"]["weight"].sum(axis=0) if "head" in values else 0.0
        for v in blocks:
            for sub in v.values():
                total_D += sum(_along_stream(name, w, outputs) for name, w in sub.items())
        found["embed"] = total_D
    return replicated(found)


def by_layer(arch: ArchSpec, runs: list[dict[str, Any]], part: str) -> dict[int, np.ndarray]:
    """{layer: scores} of one part out of stacked results by run."""
    return {
        layer: np.asarray(stacked[part][i])
        for run, stacked in zip(arch.runs(), runs, strict=True)
        if part in stacked
        for i, layer in enumerate(run.layers)
    }


def scores_of(arch: ArchSpec, sums: Mapping[str, Any], parts: Collection[Structure]) -> dict[str, Any]:
    """Host scores of `parts`, as `Importance` holds them, of sums in the form of `structure_sums`."""
    host = jax.device_get(sums)
    scores: dict[str, Any] = {part: by_layer(arch, host["runs"], part) for part in parts if part != "embed"}
    if "depth" in scores:
        scores["depth"] = {layer: float(value) for layer, value in scores["depth"].items()}
    if "embed" in parts:
        scores["embed"] = np.asarray(host["embed"])
    return scores


def magnitude(params: dict, arch: ArchSpec, parts: Collection[Structure]) -> dict[str, Any]:
    """The norm of each structure's weights, f32, computed where the parameters are."""
    return scores_of(arch, _norms(params, arch=arch, parts=tuple(sorted(parts))), parts)


def replicated(tree: Any) -> Any:
    """Small results whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


@partial(jax.jit, static_argnames=("arch", "parts"))
def _norms(params: dict, *, arch: ArchSpec, parts: tuple[Structure, ...]) -> dict[str, Any]:
    squares = jax.tree.map(lambda w: jnp.square(w.astype(jnp.float32)), params)
    return jax.tree.map(jnp.sqrt, structure_sums(squares, arch, parts))


def _of_run(run: Run, v: Mapping[str, Any], parts: Collection[Structure], outputs: bool) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    if "ffn" in parts and isinstance(run.spec.ffn, SwiGLU):
        ffn = v["ffn"]
        sums["ffn"] = ffn["down"].sum(axis=2)
        if not outputs:
            sums["ffn"] += ffn["gate"].sum(axis=1) + ffn["up"].sum(axis=1)
    if "kv" in parts and isinstance(run.spec.attn, Attention):
        attn = v["attn"]
        per_query_LN = attn["o"].sum(axis=(2, 3))
        if not outputs:
            per_query_LN += attn["q"].sum(axis=(1, 3))
        # query heads stand next to those that share their KV head
        sums["kv"] = per_query_LN.reshape(len(run.layers), run.spec.attn.num_kv_heads, -1).sum(axis=2)
        if not outputs:
            sums["kv"] += attn["k"].sum(axis=(1, 3)) + attn["v"].sum(axis=(1, 3))
    if "depth" in parts:
        weights = [w for sub in v.values() for name, w in sub.items() if not outputs or name in OUTPUTS]
        sums["depth"] = sum(w.reshape(w.shape[0], -1).sum(axis=1) for w in weights)
    return sums


def _along_stream(name: str, w: Any, outputs: bool) -> Any:
    """Sums [D] of a stacked weight over all but its axes on the stream; a weight counts once a channel."""
    if outputs and name not in OUTPUTS:
        return 0.0
    axes = [a + 1 for a in STREAM_AXES[name]]
    sums = [w.sum(axis=tuple(a for a in range(w.ndim) if a != axis)) for axis in axes]
    if len(sums) == 1:
        return sums[0]
    if outputs:
        return sums[-1]
    return sum(sums) - jnp.diagonal(w, axis1=axes[0], axis2=axes[1]).sum(axis=0)
