"""Two layouts of the same parameters: stacked by run in memory, canonical per layer on disk.

In memory, equal neighbouring blocks share arrays with a leading layer axis, under
`runs/<run number>`; on disk every layer stands alone, under `layers/<global index>`. Nothing that a
run's boundaries decide ever reaches a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec


def run_name(index: int) -> str:
    return f"{index:03d}"


def stack(canonical: Mapping[str, Any], arch: ArchSpec) -> dict[str, Any]:
    """Per-layer tree to the in-memory tree; leaves are numpy, jax arrays or ShapeDtypeStructs."""
    out = {k: v for k, v in canonical.items() if k != "layers"}
    layers = canonical.get("layers", {})
    out["runs"] = {
        run_name(i): jax.tree.map(
            lambda *leaves: _stack_leaves(leaves), *(layers[str(n)] for n in run.layers)
        )
        for i, run in enumerate(arch.runs())
    }
    return out


def unstack(params: Mapping[str, Any], arch: ArchSpec) -> dict[str, Any]:
    """In-memory tree to the per-layer tree; on numpy leaves the result is views, nothing is copied."""
    out = {k: v for k, v in params.items() if k != "runs"}
    out["layers"] = {
        str(layer): jax.tree.map(lambda leaf, j=j: _index_leaf(leaf, j), params["runs"][run_name(i)])
        for i, run in enumerate(arch.runs())
        for j, layer in enumerate(run.layers)
    }
    return out


def split_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The in-memory tree with a tuple of layers for each run, for programs that do not scan over them.

    A copy of the weights. On a CPU, a step that decodes would else copy each layer out of its stack anew.
    """
    stacked = {name: run for name, run in params["runs"].items() if not isinstance(run, tuple)}
    return {**params, "runs": {**params["runs"], **_split_runs(stacked)}}


@jax.jit
def _split_runs(runs: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    def layers(run: Any) -> tuple[Any, ...]:
        count = jax.tree.leaves(run)[0].shape[0]
        return tuple(jax.tree.map(lambda leaf, j=j: leaf[j], run) for j in range(count))

    return {name: layers(run) for name, run in runs.items()}


def layer_params(params: Mapping[str, Any], arch: ArchSpec, layer: int) -> dict[str, Any]:
    """One block's weights without the layer axis; {} for an empty layer."""
    for i, run in enumerate(arch.runs()):
        if layer in run.layers:
            position = run.layers.index(layer)
            return jax.tree.map(lambda leaf, j=position: _index_leaf(leaf, j), params["runs"][run_name(i)])
    return {}


def _stack_leaves(leaves: tuple[Any, ...]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    if isinstance(leaves[0], np.ndarray):
        return np.stack(leaves)
    return jnp.stack(leaves)


def _index_leaf(leaf: Any, position: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[position]
