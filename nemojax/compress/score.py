"""Replace-one-block scores: how much the whole parent changes when one block becomes another.

The layers are walked once and the parent's residual stream before each is kept; a replacement then costs its
own block and the layers behind it. One program for each sub-block shape, one for each of the parent's runs
(its layers indexed dynamically), one for the loss: their number does not grow with layers.
Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, BlockSpec
from nemojax.compress.library import Library
from nemojax.compress.subblock import PARTS, Part, Sub, run_part, sub_of
from nemojax.config import field
from nemojax.losses.tokens import kl_divergence, token_logps
from nemojax.model.attention import make_context
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, embed, final_norm, head_weight

Metric = Literal["kl", "lm_loss"]


@dataclass(frozen=True)
class Scoring:
    """Replace-one-block scores."""

    metric: Metric = field("kl", "mean-token KL(parent || changed) or rise of the LM loss, nats")
    batches: int = field(2, "calibration batches to score on")
    chunk: int = field(0, "positions whose logits exist at once, a divisor of the length; 0: all")


def score(
    params: dict,
    arch: ArchSpec,
    choices: Sequence[Sequence[BlockSpec]],
    library: Library,
    batches: Sequence[dict],
    scoring: Scoring = Scoring(),
    *,
    compute: Compute = Compute(),
    done: dict[int, list[float]] | None = None,
    on_layer: Callable[[int, list[float]], None] | None = None,
) -> list[list[float]]:
    """scores[layer][choice], nats per token; the parent's own block scores exactly 0.

    `done` holds layers scored before; `on_layer` is told each new one. ValueError for a non-finite score.
    """
    walk = Walk(params, arch, batches, scoring, compute)
    results: list[list[float]] = []
    for layer, options in enumerate(choices):
        scores = (done or {}).get(layer)
        if scores is None:
            scores = walk.score_layer(layer, options, library)
            if bad := [option for option, s in zip(options, scores, strict=True) if not np.isfinite(s)]:
                raise ValueError(f"layer {layer}: the score of {bad[0]} is not finite; lower bld.optim.lr")
            if on_layer:
                on_layer(layer, scores)
        results.append(scores)
        walk.advance(layer)
    return results


class Walk:
    """The parent's residual stream before the layer reached so far, for every calibration batch."""

    def __init__(
        self, params: dict, arch: ArchSpec, batches: Sequence[dict], scoring: Scoring, compute: Compute
    ):
        if not batches or not sum(float(np.sum(b["weights"])) for b in batches):
            raise ValueError("scoring: expected calibration batches with target tokens, got none; add data")
        self.params, self.arch, self.scoring = params, arch, scoring
        self.batches = [{k: jnp.asarray(v) for k, v in batch.items()} for batch in batches]
        self.total = sum(float(np.sum(batch["weights"])) for batch in batches)
        self.streams = [embed(params, batch["tokens"], compute) for batch in self.batches]
        self.parents = [
            self._behind(h, 0, batch) for h, batch in zip(self.streams, self.batches, strict=True)
        ]
        self.base = 0.0
        if scoring.metric == "lm_loss":
            self.base = sum(
                float(self._loss(h, h, b)) for h, b in zip(self.parents, self.batches, strict=True)
            )

    def advance(self, layer: int) -> None:
        """Moves every stream through the parent's own block."""
        for part in PARTS:
            p = self._parent_weights(layer).get(part, {})
            sub = sub_of(self.arch.blocks[layer], part)
            self.streams = [
                self._run(part, sub, p, h, b) for h, b in zip(self.streams, self.batches, strict=True)
            ]

    def score_layer(self, layer: int, options: Sequence[BlockSpec], library: Library) -> list[float]:
        own = self._parent_weights(layer)
        block = self.arch.blocks[layer]

        def weights(part: Part, sub: Sub) -> dict:
            return own.get(part, {}) if sub == sub_of(block, part) else library.load(part, sub, layer)

        sums: dict[BlockSpec, Any] = {option: -self.base for option in options}
        for attn in dict.fromkeys(option.attn for option in options):
            attn_weights = weights("attn", attn)
            middles = [self._run("attn", attn, attn_weights, h, b) for h, b in self._pairs()]
            for option in options:
                if option.attn != attn or option == block:
                    continue
                ffn_weights = weights("ffn", option.ffn)
                for mid, parent, batch in zip(middles, self.parents, self.batches, strict=True):
                    out = self._run("ffn", option.ffn, ffn_weights, mid, batch)
                    sums[option] += self._loss(self._behind(out, layer + 1, batch), parent, batch)
        return [0.0 if option == block else float(sums[option]) / self.total for option in options]

    def _pairs(self) -> list[tuple[jax.Array, dict]]:
        return list(zip(self.streams, self.batches, strict=True))

    def _parent_weights(self, layer: int) -> dict:
        for index, run in enumerate(self.arch.runs()):
            if layer in run.layers:
                return _take(self.params["runs"][run_name(index)], run.layers.index(layer))
        return {}

    def _run(self, part: Part, sub: Sub, p: dict, h_BTD: jax.Array, batch: dict) -> jax.Array:
        return run_part(self.arch, part, sub, p, h_BTD, batch["positions"], batch["segments"])

    def _behind(self, h_BTD: jax.Array, start: int, batch: dict) -> jax.Array:
        """The stream after the parent's layers start, start + 1, ..."""
        for index, run in enumerate(self.arch.runs()):
            first = sum(layer < start for layer in run.layers)
            if first < len(run.layers):
                stacked = self.params["runs"][run_name(index)]
                h_BTD = _suffix(
                    self.arch, run.spec, stacked, h_BTD, first, batch["positions"], batch["segments"]
                )
        return h_BTD

    def _loss(self, h_BTD: jax.Array, parent_BTD: jax.Array, batch: dict) -> jax.Array:
        outer = {k: v for k, v in self.params.items() if k != "runs"}
        return _loss(self.arch, self.scoring, outer, h_BTD, parent_BTD, batch["targets"], batch["weights"])


@jax.jit
def _take(stacked: dict, index: int) -> dict:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)


@partial(jax.jit, static_argnames=("arch", "spec"))
def _suffix(
    arch: ArchSpec,
    spec: BlockSpec,
    stacked: dict,
    h_BTD: jax.Array,
    first: int,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """Layers first, first + 1, ... of one run; `first` is data, so one program serves every layer."""
    ctx = make_context(arch, positions_BT, segments_BT)

    def body(i: jax.Array, h: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), stacked)
        return apply_block(arch, spec, p, h, ctx)

    return jax.lax.fori_loop(first, jax.tree.leaves(stacked)[0].shape[0], body, h_BTD)


@partial(jax.jit, static_argnames=("arch", "scoring"))
def _loss(
    arch: ArchSpec,
    scoring: Scoring,
    outer: dict,
    h_BTD: jax.Array,
    parent_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> jax.Array:
    """Sum over weighted tokens of the metric."""
    w_VD = head_weight(outer)
    x_BTD = final_norm(outer, arch, h_BTD)
    match scoring.metric:
        case "kl":
            teacher_BTD = final_norm(outer, arch, parent_BTD)
            per_token = kl_divergence(x_BTD, w_VD, teacher_BTD, w_VD, chunk=scoring.chunk)
        case "lm_loss":
            per_token = -token_logps(x_BTD, w_VD, targets_BT, chunk=scoring.chunk)[0]
    return jnp.sum(per_token * weights_BT)
