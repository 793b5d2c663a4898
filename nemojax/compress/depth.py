"""How much each layer matters: block influence, and the rise of the LM loss when it is removed.

`span` layers next to each other (empty ones not counted) may be judged together, as when a contiguous piece
of the model is cut out; the scores then carry the index of the first. Minitron, arXiv 2407.14679, section 2.
Legend: B batch, T tokens, D model, S span, R layers that are not empty, L layers of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, BlockSpec
from nemojax.compress.activation import add, token_mask
from nemojax.compress.structures import replicated
from nemojax.losses.hidden import cosine_distance
from nemojax.losses.tokens import token_logps
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, batch_context, embed, final_norm, head_weight


def real_layers(arch: ArchSpec) -> tuple[int, ...]:
    """Indices of the layers that are not empty, ascending."""
    return tuple(i for i, block in enumerate(arch.blocks) if not block.is_empty)


class InfluenceMeter:
    """Block influence, 1 - E[cos(X_i, X_(i+span))] over tokens, X_i the stream before layer i."""

    def __init__(self, params: dict, arch: ArchSpec, span: int, compute: Compute):
        self.params, self.arch, self.span, self.compute = params, arch, span, compute
        self.sums: Any = None

    def update(self, batch: Mapping[str, jax.Array]) -> None:
        sums = _influence(self.params, batch, arch=self.arch, span=self.span, compute=self.compute)
        self.sums = sums if self.sums is None else add(self.sums, sums)

    def result(self) -> dict[str, Any]:
        sums = jax.device_get(self.sums)
        distances = np.concatenate(sums["runs"]) / sums["tokens"]
        return {"depth": _by_first(self.arch, self.span, distances[self.span - 1 :])}


class PerplexityMeter:
    """Rise of the mean LM loss, nats a token, when `span` layers are removed; below 0 where that helps.

    The stream before each layer is kept once and the layers behind the removed ones run on it. One program a
    run of the parent, its layers indexed dynamically, and one for the loss: none more for more layers.
    """

    def __init__(self, params: dict, arch: ArchSpec, span: int, chunk: int, compute: Compute):
        self.params, self.arch, self.span, self.compute = params, arch, span, compute
        self.chunk = chunk
        self.sums: Any = None

    def update(self, batch: Mapping[str, jax.Array]) -> None:
        count = len(real_layers(self.arch))
        h_BTD = _embedded(self.params, batch["tokens"], compute=self.compute)
        base = self._loss(self._run(h_BTD, 0, count, batch), batch)
        losses = []
        for first in range(count - self.span + 1):
            losses.append(self._loss(self._run(h_BTD, first + self.span, count, batch), batch))
            h_BTD = self._run(h_BTD, first, first + 1, batch)
        sums = {"weight": _weight(batch["weights"]), "base": base, "without": losses}
        self.sums = sums if self.sums is None else add(self.sums, sums)

    def result(self) -> dict[str, Any]:
        sums = jax.device_get(self.sums)
        if not sums["weight"]:
            raise ValueError("importance: expected calibration data with target tokens, got none; add data")
        rises = (np.asarray(sums["without"]) - sums["base"]) / sums["weight"]
        return {"depth": _by_first(self.arch, self.span, rises)}

    def _run(self, h_BTD: jax.Array, first: int, stop: int, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The stream after the real layers first, ..., stop - 1, counted without the empty ones."""
        seen = 0
        for index, run in enumerate(self.arch.runs()):
            begin, end = max(first - seen, 0), min(stop - seen, len(run.layers))
            seen += len(run.layers)
            if begin < end:
                stacked = self.params["runs"][run_name(index)]
                h_BTD = _layers(stacked, h_BTD, begin, end, batch, arch=self.arch, spec=run.spec)
        return h_BTD

    def _loss(self, h_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        outer = {k: v for k, v in self.params.items() if k != "runs"}
        return _loss_sum(outer, h_BTD, batch, arch=self.arch, chunk=self.chunk)


def check_span(arch: ArchSpec, span: int) -> None:
    count = len(real_layers(arch))
    if span > count:
        raise ValueError(f"importance.depth_span: expected at most the {count} layers, got {span}")


def _by_first(arch: ArchSpec, span: int, values: np.ndarray) -> dict[int, float]:
    first = real_layers(arch)[: len(real_layers(arch)) - span + 1]
    return {layer: float(value) for layer, value in zip(first, values, strict=True)}


@partial(jax.jit, static_argnames=("arch", "span", "compute"))
def _influence(
    params: dict, batch: Mapping[str, jax.Array], *, arch: ArchSpec, span: int, compute: Compute
) -> dict[str, Any]:
    """Summed cosine distances between the stream after each layer and that before the last `span`, by run."""
    ctx, mask_BT = batch_context(arch, batch), token_mask(batch)
    h_BTD = embed(params, batch["tokens"], compute)
    past_SBTD = jnp.zeros((span, *h_BTD.shape), h_BTD.dtype)  # the first span - 1 distances mean nothing

    def body(spec: BlockSpec, carry: tuple, p: dict) -> tuple[tuple, jax.Array]:
        h_BTD, past_SBTD = carry
        past_SBTD = jnp.concatenate([past_SBTD[1:], h_BTD[None]])
        h_BTD = apply_block(arch, spec, p, h_BTD, ctx)
        return (h_BTD, past_SBTD), jnp.sum(cosine_distance(h_BTD, past_SBTD[0]) * mask_BT)

    carry, runs = (h_BTD, past_SBTD), []
    for index, run in enumerate(arch.runs()):
        carry, distances_L = jax.lax.scan(partial(body, run.spec), carry, params["runs"][run_name(index)])
        runs.append(distances_L)
    return replicated({"tokens": mask_BT.sum(), "runs": runs})


@partial(jax.jit, static_argnames="compute")
def _embedded(params: dict, tokens_BT: jax.Array, *, compute: Compute) -> jax.Array:
    return embed(params, tokens_BT, compute)


@partial(jax.jit, static_argnames=("arch", "spec"))
def _layers(
    stacked: dict,
    h_BTD: jax.Array,
    first: int,
    stop: int,
    batch: Mapping[str, jax.Array],
    *,
    arch: ArchSpec,
    spec: BlockSpec,
) -> jax.Array:
    """Layers first, ..., stop - 1 of one run; both are data, so one program serves every layer."""
    ctx = batch_context(arch, batch)

    def body(i: jax.Array, h_BTD: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), stacked)
        return apply_block(arch, spec, p, h_BTD, ctx)

    return jax.lax.fori_loop(first, stop, body, h_BTD)


@partial(jax.jit, static_argnames=("arch", "chunk"))
def _loss_sum(
    outer: dict, h_BTD: jax.Array, batch: Mapping[str, jax.Array], *, arch: ArchSpec, chunk: int
) -> jax.Array:
    x_BTD = final_norm(outer, arch, h_BTD)
    logps_BT, _ = token_logps(x_BTD, head_weight(outer), batch["targets"], chunk=chunk)
    return replicated(-jnp.sum(logps_BT * batch["weights"]))


@jax.jit
def _weight(weights_BT: jax.Array) -> jax.Array:
    return replicated(weights_BT.sum())
