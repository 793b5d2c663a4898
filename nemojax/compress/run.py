"""The `compress` stage: importance, library, scores, costs, search, child.

The work directory becomes the child's artifact and keeps every step's outcome: importance.npz, library/,
scores.json, table.json (the input of the search), solution.json and map.txt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemojax.arch import ArchSpec, BlockSpec, describe
from nemojax.checkpoints.artifact import load_model, save_params
from nemojax.compress import importance
from nemojax.compress.assemble import assemble, block_map, child_arch
from nemojax.compress.cost import CostConfig, block_costs, fixed_costs, provenance
from nemojax.compress.importance import Importance, ImportanceConfig
from nemojax.compress.library import Bld, Library, build, curve_summary, kinds_of, take
from nemojax.compress.score import Scoring, score
from nemojax.compress.search import Solution, Table, solve
from nemojax.compress.space import Space, choices
from nemojax.config import field, required
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import check_vocab, copy_tokenizer, load_tokenizer
from nemojax.model.llama import Compute
from nemojax.stage import read_json, run_stage, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What the child may cost; keys are params, memory_mib, kv_mib, prefill_ms, decode_ms."""

    ratio: dict[str, float] = field({"params": 0.65}, "most of each cost, as a share of the parent's blocks")
    maximum: dict[str, float] = field({}, "most of each cost, embedding and head included")
    minimum: dict[str, float] = field({}, "least of each cost, embedding and head included")


@dataclass(frozen=True)
class Config:
    parent: str = required("artifact of the parent")
    data: TextData = field(TextData(), "calibration texts")
    importance: ImportanceConfig = field(ImportanceConfig(), "ranking of channels and KV groups")
    space: Space = field(Space(), "blocks that a layer may become")
    bld: Bld = field(Bld(), "blockwise local distillation of the library")
    scoring: Scoring = field(Scoring(), "replace-one-block scores")
    cost: CostConfig = field(CostConfig(), "costs of a block")
    budget: Budget = field(Budget(), "bounds on the child")
    max_seconds: float = field(60.0, "time limit of the search, seconds")
    compute: Compute = field(Compute(), "precision")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Compresses in `workdir`, which becomes the child's artifact; returns sizes, score and timings (s)."""
    return run_stage(
        "compress",
        cfg,
        workdir,
        [cfg.parent, *input_files(cfg.data.sources)],
        lambda path: _compress(cfg, path),
    )


def _compress(cfg: Config, workdir: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(cfg.parent)
    arch, params = load_model(cfg.parent)
    check_vocab(tokenizer, arch)
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    options = choices(cfg.space, arch)
    _check_budget(cfg, arch, options)
    clock = Clock()
    with clock("data"):
        loader = train_batches(cfg.data, tokenizer)
        ranking = list(take(loader, cfg.importance.batches, "importance.batches"))
        scoring = list(take(loader, cfg.scoring.batches, "scoring.batches"))
        start = loader.state()

    def training() -> Iterator[dict]:
        loader.restore(start)
        return loader

    with clock("importance"):
        ranks = _importance(cfg, params, arch, ranking, workdir / "importance.npz")
    kinds = kinds_of(options, arch)
    with clock("library"):
        at, kv_init = workdir / "library", cfg.space.kv_init
        library = build(
            params, arch, kinds, ranks, training, cfg.bld, at, kv_init=kv_init, compute=cfg.compute
        )
    with clock("scores"):
        scores = _scores(cfg, params, arch, options, library, scoring, workdir / "scores.json")
    with clock("costs"):
        table = _table(cfg, arch, options, scores, workdir / "table.json")
    with clock("search"):
        solution = search(table, cfg.budget, cfg.max_seconds)
    blocks = tuple(options[i][j] for i, j in enumerate(solution.chosen))
    child = child_arch(arch, blocks)
    with clock("assembly"):
        save_params(workdir, child, assemble(params, arch, child, library))
        copy_tokenizer(tokenizer.path, workdir / "tokenizer")
    _write_solution(workdir, table, solution, block_map(arch, child))
    return {
        **_summary(arch, child, table, solution),
        "bld": curve_summary(library, kinds),
        "seconds": clock.seconds,
    }


class Clock:
    """Wall seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)
        log.info("compress: %s took %.1f s", phase, self.seconds[phase])


def search(table: Table, budget: Budget, max_seconds: float = 60.0) -> Solution:
    """The best child within the budget. Choice 0 of each layer must be the parent's own block."""
    bounds = dict(budget.maximum)
    for name, share in budget.ratio.items():
        blocks = sum(float(column[0]) for column in table.column(name))
        most = blocks * share + float(table.fixed.get(name, 0.0))
        bounds[name] = min(bounds.get(name, most), most)
    return solve(table, maximum=bounds, minimum=budget.minimum, max_seconds=max_seconds)[0]


def _check_budget(cfg: Config, arch: ArchSpec, options: Sequence[Sequence[BlockSpec]]) -> None:
    """Refuses at once, before hours of training, bounds on counted costs that no child can keep."""
    unscored = [[0.0] * len(row) for row in options]
    table = _costed(arch, options, unscored, replace(cfg.cost, timings=()))
    known = table.layers[0][0].keys() if table.layers else ()

    def counted(bounds: Mapping[str, float]) -> dict[str, float]:
        return {name: bound for name, bound in bounds.items() if name in known}

    budget = cfg.budget
    search(
        table,
        Budget(counted(budget.ratio), counted(budget.maximum), counted(budget.minimum)),
        cfg.max_seconds,
    )


def _importance(cfg: Config, params: dict, arch: ArchSpec, batches: list[dict], path: Path) -> Importance:
    if path.is_file():
        return importance.load(path)
    ranks = importance.measure(params, arch, batches, cfg.importance.method, cfg.compute)
    importance.save(ranks, path)
    return ranks


def _scores(
    cfg: Config,
    params: dict,
    arch: ArchSpec,
    options: Sequence[Sequence[BlockSpec]],
    library: Library,
    batches: list[dict],
    path: Path,
) -> list[list[float]]:
    """Scores by layer and choice; the layers already in `path` are not scored again."""
    rows = read_json(path) or {}
    done = {int(layer): row for layer, row in rows.items()}

    def keep(layer: int, row: list[float]) -> None:
        rows[str(layer)] = row
        write_json(path, rows)

    return score(
        params, arch, options, library, batches, cfg.scoring, compute=cfg.compute, done=done, on_layer=keep
    )


def _table(
    cfg: Config, arch: ArchSpec, options: Sequence[Sequence[BlockSpec]], scores: list[list[float]], path: Path
) -> Table:
    """Scores and costs of every choice, kept so that a restart searches the very same numbers."""
    stored = read_json(path)
    if stored:
        return Table.from_json(stored)
    table = _costed(arch, options, scores, cfg.cost)
    sources = {"score": f"{cfg.scoring.metric}, nats a token, replace one block", **provenance(cfg.cost)}
    write_json(path, {**table.to_json(), "provenance": sources})
    return table


def _costed(
    arch: ArchSpec, options: Sequence[Sequence[BlockSpec]], scores: list[list[float]], cost: CostConfig
) -> Table:
    costs = block_costs(arch, options, cost)
    layers = tuple(
        tuple(
            {"name": f"{describe(o.attn)}+{describe(o.ffn)}", "score": s, **costs[o]}
            for o, s in zip(row, values, strict=True)
        )
        for row, values in zip(options, scores, strict=True)
    )
    return Table(layers, fixed_costs(arch, cost))


def _write_solution(workdir: Path, table: Table, solution: Solution, text: str) -> None:
    layers: list[Mapping[str, Any]] = [
        {"layer": i, **row[j]} for i, (row, j) in enumerate(zip(table.layers, solution.chosen, strict=True))
    ]
    write_json(
        workdir / "solution.json",
        {
            "objective": solution.objective,
            "totals": dict(solution.totals),
            "gap": solution.gap,
            "layers": layers,
        },
    )
    (workdir / "map.txt").write_text(text + "\n")


def _summary(arch: ArchSpec, child: ArchSpec, table: Table, solution: Solution) -> dict[str, Any]:
    names = [n for n in table.layers[0][0] if n not in ("name", "score")] if table.layers else []

    def totals(chosen: Sequence[int]) -> dict[str, float]:
        columns = {name: table.column(name) for name in names}
        return {n: sum(float(c[j]) for c, j in zip(columns[n], chosen, strict=True)) for n in names}

    return {
        "block_params_ratio": child.num_block_params() / max(arch.num_block_params(), 1),
        "num_params": child.num_params(),
        "parent_num_params": arch.num_params(),
        "predicted_score": solution.objective,
        "search_gap": solution.gap,
        "changed_layers": sum(a != b for a, b in zip(arch.blocks, child.blocks, strict=True)),
        "costs": {"parent": totals([0] * arch.num_layers), "child": totals(solution.chosen)},
    }
