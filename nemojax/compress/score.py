"""Replace-one-block scores: how much the whole parent changes when one block becomes another.

The layers are walked once and the parent's residual stream before each is kept; a replacement then costs its
own block and the layers behind it (Puzzle, arXiv 2411.19146, section 3). One program for each sub-block
shape, one for each of the parent's runs (its layers indexed dynamically), one for the measures, which takes
several replacements at once and makes the parent's logits once for all of them: the number of programs does
not grow with layers. On a mesh, of one process or of many, every program runs over all of it: each device
scores its rows of the batch and the sums are reduced.
Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemojax.arch import ArchSpec, BlockSpec, NoOp
from nemojax.compress.library import Library
from nemojax.compress.measures import MEANINGS, Metric, Row, count, in_turn, sums_of
from nemojax.compress.subblock import PARTS, Part, Sub, kind_name, part_spec, run_part, sub_of
from nemojax.config import field
from nemojax.hosts import is_primary, on_primary
from nemojax.log import RunLog
from nemojax.model.attention import make_context
from nemojax.model.block import apply_block, block_axes
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, embed
from nemojax.sharding import place_batch, shardings_of, use_mesh
from nemojax.stage import read_json, write_json

TOGETHER = 8  # replacements, at most, whose final streams are kept for one pass over the vocabulary


@dataclass(frozen=True)
class Scoring:
    """Replace-one-block scores."""

    metric: Metric = field("kl", "what is searched for: kl, lm_loss, cosine, top1 or accuracy; low is good")
    also: tuple[Metric, ...] = field((), "other metrics from the same pass, as further columns of the table")
    batches: int = field(2, "calibration batches to score on")
    chunk: int = field(0, "positions whose logits exist at once, a divisor of the length; 0: all")

    def __post_init__(self):
        for metric in self.metrics:
            if metric not in MEANINGS:
                raise ValueError(f"scoring: expected metrics of {', '.join(MEANINGS)}, got {metric!r}")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All that are measured, the chosen one first."""
        return tuple(dict.fromkeys((self.metric, *self.also)))


def score(
    params: dict,
    arch: ArchSpec,
    choices: Sequence[Sequence[BlockSpec]],
    library: Library,
    batches: Sequence[Mapping[str, Any]],
    scoring: Scoring = Scoring(),
    *,
    compute: Compute = Compute(),
    mesh: Mesh | None = None,
    done: Mapping[int, Sequence[float]] | None = None,
    on_layer: Callable[[int, list[float]], None] | None = None,
) -> list[list[float]]:
    """scores[layer][choice] of `scoring.metric`; the parent's own block scores exactly 0.

    `done` and `on_layer` are as in `score_all`, of this one metric.
    """
    name = scoring.metric
    one = Scoring(name, (), scoring.batches, scoring.chunk)
    rows = score_all(
        params,
        arch,
        choices,
        library,
        batches,
        one,
        compute=compute,
        mesh=mesh,
        done={layer: [{name: value} for value in row] for layer, row in (done or {}).items()},
        on_layer=(lambda layer, row: on_layer(layer, [r[name] for r in row])) if on_layer else None,
    )
    return [[r[name] for r in row] for row in rows]


def score_all(
    params: dict,
    arch: ArchSpec,
    choices: Sequence[Sequence[BlockSpec]],
    library: Library,
    batches: Sequence[Mapping[str, Any]],
    scoring: Scoring = Scoring(),
    *,
    compute: Compute = Compute(),
    mesh: Mesh | None = None,
    done: Mapping[int, Sequence[Row]] | None = None,
    on_layer: Callable[[int, list[Row]], None] | None = None,
) -> list[list[Row]]:
    """rows[layer][choice] = {metric: score}, all metrics of `scoring` from one pass.

    batches: packed ones with weights; on a mesh this process's rows of them, and `params` placed on it.
    Means are over the weights; for `accuracy` over documents with a weight above 0: greedy decoding
    reproduces a reference answer exactly if and only if every target of it is the likeliest token given
    those before, so one pass measures it (see `measures.answer_batches`). `done` holds layers scored before;
    `on_layer` is told each new one. ValueError for a score that is not finite.
    """
    results: list[list[Row]] = []
    with use_mesh(mesh):
        walk = Walk(params, arch, batches, scoring, compute, mesh)
        for layer, options in enumerate(choices):
            if done and layer in done:
                row = [dict(r) for r in done[layer]]
                _check_row(layer, row, len(options), scoring.metrics)
            else:
                row = walk.score_layer(layer, options, library)
                _check_finite(layer, row, options)
                if on_layer:
                    on_layer(layer, row)
            results.append(row)
            if layer + 1 < len(choices):
                walk.advance(layer)
    return results


def score_into(
    path: Path,
    params: dict,
    arch: ArchSpec,
    choices: Sequence[Sequence[BlockSpec]],
    library: Library,
    batches: Sequence[Mapping[str, Any]],
    scoring: Scoring = Scoring(),
    *,
    compute: Compute = Compute(),
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> list[list[Row]]:
    """`score_all` whose layers are kept in the JSON file `path` as they come, and not scored again.

    Progress is shown, and kept in the folder that is called as the file is without its ending.
    """
    rows: dict[str, list[Row]] = on_primary(lambda: read_json(path)) or {}
    with ExitStack() as held:
        log = None
        if is_primary():
            log = held.enter_context(RunLog(path.with_suffix(""), total_steps=len(choices), quiet=quiet))
            log.truncate(len(rows))

        def keep(layer: int, row: list[Row]) -> None:
            rows[str(layer)] = row
            if log is None:
                return
            write_json(path, rows)
            values = [r[scoring.metric] for r in row]
            log.write(
                len(rows), {f"{scoring.metric}/least": min(values), f"{scoring.metric}/most": max(values)}
            )

        return score_all(
            params,
            arch,
            choices,
            library,
            batches,
            scoring,
            compute=compute,
            mesh=mesh,
            done={int(layer): row for layer, row in rows.items()},
            on_layer=keep,
        )


class Walk:
    """The parent's residual stream before the layer reached so far, for every calibration batch."""

    def __init__(
        self,
        params: dict,
        arch: ArchSpec,
        batches: Sequence[Mapping[str, Any]],
        scoring: Scoring,
        compute: Compute,
        mesh: Mesh | None = None,
    ):
        self.params, self.arch, self.scoring, self.mesh = params, arch, scoring, mesh
        self.outer = {name: tree for name, tree in params.items() if name != "runs"}
        names = ("tokens", "targets", "weights", "segments", "positions")
        self.batches = [place_batch({n: np.asarray(batch[n]) for n in names}, mesh) for batch in batches]
        counts = [count(batch["weights"], batch["segments"]) for batch in self.batches]
        self.tokens = sum(float(tokens) for tokens, _ in counts)
        self.documents = sum(float(documents) for _, documents in counts)
        if not self.tokens:
            raise ValueError("scoring: expected calibration batches with target tokens, got none; add data")
        self.streams = [embed(params, batch["tokens"], compute) for batch in self.batches]
        self.parents = [
            in_turn(self._behind(h, 0, batch), mesh)
            for h, batch in zip(self.streams, self.batches, strict=True)
        ]
        self.base: Row = dict.fromkeys(scoring.metrics, 0.0)
        if {"lm_loss", "accuracy"} & self.base.keys():
            each = [self._measure([h], h, batch) for h, batch in zip(self.parents, self.batches, strict=True)]
            [means] = self._means([each])
            self.base |= {name: means[name] for name in ("lm_loss", "accuracy") if name in means}

    def advance(self, layer: int) -> None:
        """Moves every stream through the parent's own block."""
        for part in PARTS:
            p = self._parent_weights(layer).get(part, {})
            sub = sub_of(self.arch.blocks[layer], part)
            self.streams = [
                in_turn(self._run(part, sub, p, h, b), self.mesh)
                for h, b in zip(self.streams, self.batches, strict=True)
            ]

    def score_layer(self, layer: int, options: Sequence[BlockSpec], library: Library) -> list[Row]:
        """Scores of every option, in their order; 0 for the parent's own block."""
        block = self.arch.blocks[layer]
        changed = [option for option in dict.fromkeys(options) if option != block]
        weights = self._weights(layer, changed, library)
        # what shares its attention stands together: the stream behind it is made once for all of it
        shared = list(dict.fromkeys(id(weights[option]["attn"]) for option in changed))
        changed.sort(key=lambda option: shared.index(id(weights[option]["attn"])))
        groups = -(-len(changed) // TOGETHER)
        size = -(-len(changed) // max(groups, 1))
        sums: list[list[dict]] = [[] for _ in range(groups)]
        for h, parent, batch in zip(self.streams, self.parents, self.batches, strict=True):
            finals = self._finals(layer, changed, weights, h, batch)
            for group in sums:
                some = list(islice(finals, size))
                # groups of one size, the last filled up, are one program
                group.append(self._measure(some + [some[-1]] * (size - len(some)), parent, batch))
        means = [row for group in sums for row in self._means([group])]
        rows = dict(zip(changed, means, strict=False))
        own: Row = dict.fromkeys(self.scoring.metrics, 0.0)
        return [
            own if option == block else {m: _relative(m, rows[option][m], self.base[m]) for m in own}
            for option in options
        ]

    def _finals(
        self, layer: int, options: Sequence[BlockSpec], weights: Mapping, h_BTD: jax.Array, batch: dict
    ) -> Iterator[jax.Array]:
        """The final stream with each option in place of the layer."""
        attn, mid_BTD = None, h_BTD
        for option in options:
            if weights[option]["attn"] is not attn:
                attn = weights[option]["attn"]
                mid_BTD = self._run("attn", option.attn, attn, h_BTD, batch)
            out_BTD = self._run("ffn", option.ffn, weights[option]["ffn"], mid_BTD, batch)
            yield in_turn(self._behind(out_BTD, layer + 1, batch), self.mesh)

    def _weights(
        self, layer: int, options: Sequence[BlockSpec], library: Library
    ) -> dict[BlockSpec, dict[Part, dict]]:
        """The weights of each option on the devices. Options that share a sub-block have the same dict of it,
        but for coupled ones, which were trained as a whole and have their own."""
        own, block = self._parent_weights(layer), self.arch.blocks[layer]
        alone: dict[tuple[Part, Sub], dict] = {}
        for part in PARTS:
            alone[part, sub_of(block, part)] = own.get(part, {})
        out: dict[BlockSpec, dict[Part, dict]] = {}
        for option in options:
            subs: dict[Part, Sub] = {part: sub_of(option, part) for part in PARTS}
            if layer in library.layers(kind_name("block", option)):
                whole = library.load_block(block, option, layer)
                out[option] = {
                    part: self._place(part, sub, whole.get(part, {})) for part, sub in subs.items()
                }
                continue
            for part, sub in subs.items():
                if (part, sub) not in alone:
                    alone[part, sub] = self._place(part, sub, library.load(part, sub, layer))
            out[option] = {part: alone[part, sub] for part, sub in subs.items()}
        return out

    def _place(self, part: Part, sub: Sub, weights: dict) -> dict:
        if self.mesh is None or self.mesh.size == 1 or not weights:
            return jax.tree.map(jnp.asarray, weights)
        name, axes = kind_name(part, sub), block_axes(self.arch, part_spec(part, sub))[part]
        return jax.device_put(weights, shardings_of({name: axes}, {name: weights}, self.mesh)[name])

    def _parent_weights(self, layer: int) -> dict:
        for index, run in enumerate(self.arch.runs()):
            if layer in run.layers:
                return _take(self.params["runs"][run_name(index)], run.layers.index(layer))
        return {}

    def _run(self, part: Part, sub: Sub, p: dict, h_BTD: jax.Array, batch: dict) -> jax.Array:
        if isinstance(sub, NoOp):
            return h_BTD
        return run_part(self.arch, part, sub, p, h_BTD, batch["positions"], batch["segments"])

    def _behind(self, h_BTD: jax.Array, start: int, batch: dict) -> jax.Array:
        """The stream after the parent's layers start, start + 1, ..."""
        for index, run in enumerate(self.arch.runs()):
            first = sum(layer < start for layer in run.layers)
            if first < len(run.layers):
                stacked = self.params["runs"][run_name(index)]
                h_BTD = suffix(
                    self.arch, run.spec, stacked, h_BTD, first, batch["positions"], batch["segments"]
                )
        return h_BTD

    def _measure(self, finals: Sequence[jax.Array], parent_BTD: jax.Array, batch: dict) -> dict:
        answers = {name: batch[name] for name in ("targets", "weights", "segments")}
        metrics, chunk = self.scoring.metrics, self.scoring.chunk
        sums = sums_of(self.arch, metrics, chunk, self.outer, tuple(finals), parent_BTD, answers)
        return in_turn(sums, self.mesh)

    def _means(self, groups: Sequence[Sequence[dict]]) -> list[Row]:
        """Means over all batches, by replacement; the only place that waits for the devices."""
        rows = []
        for each in jax.device_get(groups):
            totals = {m: np.sum([sums[m].astype(np.float64) for sums in each], axis=0) for m in each[0]}
            count = {m: self.documents if m == "accuracy" else self.tokens for m in totals}
            rows += [
                {m: float(totals[m][k] / count[m]) for m in totals}
                for k in range(len(totals[self.scoring.metric]))
            ]
        return rows


def _relative(metric: str, value: float, base: float) -> float:
    """Lower is better: how much worse than the parent."""
    return base - value if metric == "accuracy" else value - base


def _check_finite(layer: int, row: Sequence[Row], options: Sequence[BlockSpec]) -> None:
    for option, scores in zip(options, row, strict=True):
        if bad := [metric for metric, value in scores.items() if not np.isfinite(value)]:
            raise ValueError(
                f"layer {layer}: the {bad[0]} score of {option} is not finite; lower bld.optim.lr"
            )


def _check_row(layer: int, row: Sequence[Row], count: int, metrics: Sequence[str]) -> None:
    got = sorted(row[0]) if row else []
    if len(row) != count or any(set(metrics) - set(r) for r in row):
        raise ValueError(
            f"scores: layer {layer}: expected {', '.join(metrics)} of {count} choices, got "
            f"{', '.join(got) or 'nothing'} of {len(row)}; delete the stored scores and run again"
        )


@jax.jit
def _take(stacked: dict, index: int) -> dict:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)


@partial(jax.jit, static_argnames=("arch", "spec"))
def suffix(
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
