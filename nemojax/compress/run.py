"""The `compress` stage: importance, library, scores, costs, search, child.

The work directory becomes the child's artifact and keeps every step's outcome: importance.npz, library/,
scores.json, table.json (the input of the search), solution.json and map.txt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from nemojax.arch import ArchSpec, BlockSpec
from nemojax.buckets import remove_tree
from nemojax.checkpoints.artifact import Checkpoints, finished_steps, load_model
from nemojax.compress import importance
from nemojax.compress.assemble import assemble, block_map, child_arch
from nemojax.compress.baselines import find_within
from nemojax.compress.cost import CostConfig, block_costs, fixed_costs, provenance, times, tokens_of
from nemojax.compress.importance import Importance, ImportanceConfig
from nemojax.compress.library import Bld, build, curve_summary, kinds_of, take
from nemojax.compress.measures import MEANINGS, Form, Row, answer_batches
from nemojax.compress.score import Scoring, score_into
from nemojax.compress.search import Budget, Search, Solution
from nemojax.compress.space import Space, choice_name, choices
from nemojax.compress.table import Table
from nemojax.config import field, required
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.packing import Batch
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.hosts import on_primary
from nemojax.model.llama import Compute, exact_matmuls
from nemojax.rewards.problems import ProblemSet, load_problems
from nemojax.sharding import MeshConfig, make_mesh, whole_rows
from nemojax.stage import read_json, run_stage, start_artifact, write_json, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """Problems whose reference answers a changed model still has to give."""

    problems: ProblemSet = field(ProblemSet(split="train"), "problems, of the half that models learn from")
    form: Form = field("chat", "conversations; for a parent without chat lines: text, or trace with working")


@dataclass(frozen=True)
class Config:
    parent: str = required("artifact of the parent")
    data: TextData = field(TextData(), "calibration texts")
    importance: ImportanceConfig = field(ImportanceConfig(), "ranking of channels and KV groups")
    space: Space = field(Space(), "blocks that a layer may become")
    bld: Bld = field(Bld(), "blockwise local distillation of the library")
    scoring: Scoring = field(Scoring(), "replace-one-block scores")
    answers: Answers = field(Answers(), "what accuracy is scored on, in place of texts")
    cost: CostConfig = field(CostConfig(), "costs of a block")
    budget: Budget = field(Budget(), "bounds on the child")
    search: Search = field(Search(), "how the child is searched for")
    compute: Compute = field(Compute(), "precision")
    mesh: MeshConfig = field(MeshConfig(), "devices")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Compresses in `workdir`, which becomes the child's artifact; returns sizes, score and timings (s)."""
    exact_matmuls(cfg.compute, "compress")
    inputs = [cfg.parent, *input_files(cfg.data.sources)]
    return run_stage(
        "compress", cfg, workdir, inputs, lambda path: _compress(cfg, path),
        many_processes=True,
    )  # fmt: skip


def _compress(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(whole_rows(cfg.mesh, "compress"))
    tokenizer = load_tokenizer(cfg.parent)
    arch, params = load_model(cfg.parent, mesh)
    check_vocab(tokenizer, arch)
    if cfg.data.length > arch.context:
        raise ValueError(f"data.length: expected at most the context {arch.context}, got {cfg.data.length}")
    options = choices(cfg.space, arch)
    kinds = kinds_of(options, arch, cfg.bld.coupled)
    _check_budget(cfg, arch, options)
    clock = Clock()
    with clock("data"):
        loader = train_batches(cfg.data, tokenizer, jax.process_index(), jax.process_count())
        ranking = take(loader, cfg.importance.batches, "importance.batches")
    with clock("importance"):
        ranks = _importance(cfg, params, arch, ranking, workdir / "importance.npz")
        for _ in ranking:  # what comes after starts at one place, whatever was read
            pass
    scoring = _scoring_batches(cfg, tokenizer, loader)
    start = loader.state()

    def training() -> Iterator[dict]:
        loader.restore(start)
        return loader

    with clock("library"):
        library = build(
            cfg.parent if cfg.bld.window else params,
            arch,
            kinds,
            ranks,
            training,
            cfg.bld,
            workdir / "library",
            kv_init=cfg.space.kv_init,
            compute=cfg.compute,
            mesh=mesh,
        )
    with clock("scores"):
        at = workdir / "scores.json"
        scores = score_into(
            at, params, arch, options, library, scoring, cfg.scoring, compute=cfg.compute, mesh=mesh
        )
    with clock("costs"):
        table = _table(cfg, arch, options, scores, workdir / "table.json")
    with clock("search"):
        chosen = on_primary(lambda: [asdict(s) for s in find_within(table, cfg.budget, cfg.search)])
        solutions = [Solution(**{**s, "chosen": tuple(s["chosen"])}) for s in chosen]
    child = _child(arch, options, solutions[0])
    with clock("assembly"):
        save_child(workdir, child, assemble(params, arch, child, library), tokenizer.path)
    on_primary(lambda: _write_solutions(workdir, table, solutions, arch, options))
    return {
        **_summary(arch, child, table, solutions[0]),
        "bld": curve_summary(library, kinds),
        "seconds": clock.seconds,
    }


def save_child(workdir: Path, child: ArchSpec, params: dict, tokenizer_dir: Path) -> None:
    """The work directory as the child's artifact; all processes, each with all of the weights."""
    start_artifact(workdir, child, tokenizer_dir)
    for step in on_primary(lambda: finished_steps(workdir)):
        on_primary(lambda step=step: remove_tree(workdir / "checkpoints" / str(step)))
    checkpoints = Checkpoints(workdir, keep_last=1, arch=child)
    checkpoints.save(0, params)
    checkpoints.close()


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


def _check_budget(cfg: Config, arch: ArchSpec, options: Sequence[Sequence[BlockSpec]]) -> None:
    """Refuses at once, before hours of training, bounds on counted costs that no child can keep, and rules
    that leave a layer nothing."""
    unscored: list[list[Row]] = [[{"score": 0.0}] * len(row) for row in options]
    table = _costed(arch, options, unscored, cfg.cost.without_times())
    known = table.layers[0][0].keys() if table.layers else ()

    def counted(bounds: Mapping[str, float]) -> dict[str, float]:
        return {name: bound for name, bound in bounds.items() if name in known}

    budget = cfg.budget
    rates = (name.removesuffix("_ms") + "_tokens_per_s" for name in tokens_of(cfg.cost))
    names = {*table.columns(), *times(cfg.cost), *rates}
    for name in (*budget.ratio, *budget.maximum, *budget.minimum):
        if name not in names:
            raise ValueError(f"budget: column {name!r}: expected one of {', '.join(sorted(names))}")
    bounds = Budget(counted(budget.ratio), counted(budget.maximum), counted(budget.minimum))
    find_within(
        table, bounds, replace(cfg.search, method="mip", minimize="score", maximize=None, num_solutions=1)
    )


def _importance(cfg: Config, params: dict, arch: ArchSpec, batches: Iterator[dict], path: Path) -> Importance:
    if not on_primary(path.is_file):
        wanted = replace(cfg.importance, parts=("ffn", "kv"))  # what blocks are cut by
        ranks = importance.measure(params, arch, batches, wanted, cfg.compute)
        on_primary(lambda: importance.save(ranks, path))
    return importance.load(path)


def _scoring_batches(cfg: Config, tokenizer: Tokenizer, texts: Iterator[dict]) -> list[Batch]:
    """What replacements are judged on: calibration texts, or problems where right answers are the measure."""
    if cfg.scoring.metric != "accuracy":
        return list(take(texts, cfg.scoring.batches, "scoring.batches"))
    found = answer_batches(
        load_problems(cfg.answers.problems),
        tokenizer,
        batch_size=cfg.data.batch_size,
        length=cfg.data.length,
        form=cfg.answers.form,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return found[: cfg.scoring.batches]


def _table(
    cfg: Config, arch: ArchSpec, options: Sequence[Sequence[BlockSpec]], scores: list[list[Row]], path: Path
) -> Table:
    """Scores and costs of every choice, kept so that a restart searches the very same numbers. The column
    `score` is of the metric that is searched for; every metric has one by its own name."""

    def make() -> dict[str, Any]:
        if stored := read_json(path):
            return stored
        rows = [[{"score": row[cfg.scoring.metric], **row} for row in layer] for layer in scores]
        table = _costed(arch, options, rows, cfg.cost)
        judged = {metric: f"{MEANINGS[metric]}, one block replaced" for metric in cfg.scoring.metrics}
        sources = {"score": judged[cfg.scoring.metric], **judged, **table.provenance}
        write_json(path, {**table.to_json(), "provenance": sources})
        return read_json(path) or {}

    return Table.from_json(on_primary(make))


def _costed(
    arch: ArchSpec, options: Sequence[Sequence[BlockSpec]], scores: list[list[Row]], cost: CostConfig
) -> Table:
    costs = block_costs(arch, options, cost)
    layers = tuple(
        tuple({"name": choice_name(o), **row, **costs[o]} for o, row in zip(blocks, rows, strict=True))
        for blocks, rows in zip(options, scores, strict=True)
    )
    return Table(layers, fixed_costs(arch, cost), tokens_of(cost), provenance(cost))


def _write_solutions(
    workdir: Path,
    table: Table,
    solutions: Sequence[Solution],
    arch: ArchSpec,
    options: Sequence[Sequence[BlockSpec]],
) -> None:
    """solution.json and map.txt of the child; where more were asked for, all of them under solutions/."""
    for number, solution in enumerate(solutions):
        child = _child(arch, options, solution)
        layers: list[Mapping[str, Any]] = [
            {"layer": i, **row[j]}
            for i, (row, j) in enumerate(zip(table.layers, solution.chosen, strict=True))
        ]
        numbers = {
            "objective": solution.objective,
            "totals": dict(solution.totals),
            "gap": solution.gap,
            "layers": layers,
        }
        text = block_map(arch, child) + "\n"
        if number == 0:
            write_json(workdir / "solution.json", numbers)
            write_text(workdir / "map.txt", text)
        if len(solutions) > 1:
            folder = workdir / "solutions" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "solution.json", numbers)
            write_text(folder / "map.txt", text)
            write_text(folder / "arch.json", child.dumps())


def _child(arch: ArchSpec, options: Sequence[Sequence[BlockSpec]], solution: Solution) -> ArchSpec:
    return child_arch(arch, tuple(options[i][j] for i, j in enumerate(solution.chosen)))


def _summary(arch: ArchSpec, child: ArchSpec, table: Table, solution: Solution) -> dict[str, Any]:
    names = [n for n in table.layers[0][0] if n not in ("name", "score", *MEANINGS)] if table.layers else []

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
