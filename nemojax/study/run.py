"""The `study` stage: ways to compress one parent, side by side, over several seeds.

For each seed, which draws the calibration texts and the data of every training: a library of trained blocks
and one of first weights, replace-one-block scores, children at several budgets by every method, importance
methods at one width, healing of the children of one budget, and feed-forward fusion. Every measurement is a
row of `rows.json`, kept as soon as it is made, so that a killed study goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from nemojax.arch import ArchSpec, BlockSpec, NoOp
from nemojax.checkpoints.artifact import load_model
from nemojax.compress import fuse, importance
from nemojax.compress.assemble import assemble, child_arch
from nemojax.compress.baselines import METHODS, find
from nemojax.compress.bld import Bld
from nemojax.compress.cost import CostConfig, counted, fixed_costs, tokens_of
from nemojax.compress.cuts import prune_ffn
from nemojax.compress.importance import Importance, ImportanceConfig, Method
from nemojax.compress.library import Library, build, kinds_of, take
from nemojax.compress.pattern import layers_in
from nemojax.compress.score import Scoring, score_into
from nemojax.compress.space import Space, choice_name, choices
from nemojax.compress.table import Table
from nemojax.config import field, required
from nemojax.data.mixture import TextData, train_batches
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.distill.losses import DistillWeights, distill_loss
from nemojax.model.llama import Compute, exact_matmuls
from nemojax.optim import OptimConfig
from nemojax.rewards.problems import ProblemSet
from nemojax.stage import read_json, run_stage, write_json, write_text
from nemojax.study.claims import claims, tables
from nemojax.study.exam import Exam
from nemojax.train import FitConfig, fit

log = logging.getLogger(__name__)
Row = dict[str, Any]
FIRST = "mip first weights"  # the way that assembles the MIP's child of blocks that were not trained


@dataclass(frozen=True)
class Heal:
    """A short distillation from the parent."""

    ratio: float = field(0.5, "budget whose children are healed")
    ways: tuple[str, ...] = field(("mip", "greedy", "random"), "whose children")
    steps: int = field(150, "steps")
    optim: OptimConfig = field(OptimConfig(), "optimiser")


@dataclass(frozen=True)
class Extras:
    """What is compared beside the search."""

    importance: tuple[str, ...] = field(
        ("magnitude", "taylor", "activation", "iterative"), "importance methods, at one width of all layers"
    )
    ffn_ratio: float = field(0.5, "that width, a fraction of the parent's")
    fused: str = field("", "layers that lose their attention and are fused, as in 3-8; empty: none")
    random_draws: int = field(3, "random children a budget and seed")
    max_seconds: float = field(10.0, "time limit of a search")


@dataclass(frozen=True)
class Config:
    parent: str = required("artifact of the parent")
    data: TextData = field(TextData(), "texts: calibration, training, and the held-out part that measures")
    problems: ProblemSet = field(ProblemSet(), "held-out problems that measure")
    space: Space = field(Space(), "blocks that a layer may become")
    bld: Bld = field(Bld(), "blockwise local distillation")
    calibration: int = field(4, "batches that importance and scores are measured on")
    cost: CostConfig = field(CostConfig(timings=()), "costs of a block")
    ratios: tuple[float, ...] = field((0.75, 0.6, 0.45), "budgets: shares of the parent's block parameters")
    heal: Heal = field(Heal(), "distillation of one budget's children")
    extras: Extras = field(Extras(), "other comparisons")
    seeds: tuple[int, ...] = field((0, 1, 2), "seeds")
    compute: Compute = field(Compute(), "precision")

    def __post_init__(self):
        known = (*METHODS, FIRST)
        if unknown := sorted(set(self.heal.ways) - set(known)):
            raise ValueError(f"heal.ways: expected some of {', '.join(known)}, got {unknown[0]!r}")
        if unknown := sorted(set(self.extras.importance) - set(get_args(Method))):
            names = ", ".join(get_args(Method))
            raise ValueError(f"extras.importance: expected some of {names}, got {unknown[0]!r}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one, got none")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Returns {"parent": row, "claims": [...]}; the rows are in rows.json, tables for people in table.md."""
    exact_matmuls(cfg.compute, "study")
    inputs = [cfg.parent, *input_files((*cfg.data.sources, *cfg.data.heldout))]
    return run_stage("study", cfg, workdir, inputs, lambda path: _study(cfg, path))


def _study(cfg: Config, workdir: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(cfg.parent)
    arch, params = load_model(cfg.parent)
    check_vocab(tokenizer, arch)
    bare = layers_in(cfg.extras.fused, arch.num_layers) if cfg.extras.fused else ()
    if cfg.extras.fused and (len(bare) < 3 or bare[-1] - bare[0] >= len(bare)):
        raise ValueError(
            "extras.fused: expected 3 neighbouring layers or more, of which the last stays alone, got "
            f"{cfg.extras.fused!r}"
        )
    exam = Exam(params, arch, tokenizer, cfg.data, cfg.problems, cfg.compute)
    ledger = Ledger(workdir / "rows.json")
    parent = ledger.row({"group": "parent", "name": "parent"}, lambda: exam(params, arch))
    for seed in cfg.seeds:
        lab = Lab(cfg, seed, workdir / f"seed{seed}", tokenizer, arch, params, exam, ledger)
        lab.searches()
        lab.importances()
        if cfg.heal.steps:
            lab.healing()
            lab.fusion()
    found = claims(ledger.rows, cfg.heal.ratio)
    write_text(workdir / "table.md", tables(ledger.rows, found))
    return {"parent": parent, "claims": found}


class Ledger:
    """Rows on disk: what has a row is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = read_json(path) or []

    def row(self, key: Row, make: Callable[[], Row]) -> Row:
        """The row of `key`, made and kept if there is none."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = key | make()
        self.rows.append(row)
        write_json(self.path, self.rows)
        numbers = " ".join(f"{name}={value:.4g}" for name, value in row.items() if isinstance(value, float))
        log.info("study: %s %s %s", row.get("seed", ""), row["name"], numbers)
        return row


class Lab:
    """Everything of one seed: its calibration data, libraries, scores and children."""

    def __init__(
        self,
        cfg: Config,
        seed: int,
        dir: Path,
        tokenizer: Tokenizer,
        arch: ArchSpec,
        params: dict,
        exam: Exam,
        ledger: Ledger,
    ):
        self.cfg, self.seed, self.dir = cfg, seed, dir
        self.tokenizer, self.arch, self.params, self.exam, self.ledger = tokenizer, arch, params, exam, ledger
        dir.mkdir(exist_ok=True)
        self.options = choices(cfg.space, arch)
        loader = train_batches(replace(cfg.data, seed=seed), tokenizer)
        self.batches = list(take(loader, cfg.calibration, "calibration"))
        self.ranks = self._importance("activation")
        self.libraries = {name: self._library(name) for name in ("bld", "first")}
        self.table = self._table()

    def searches(self) -> None:
        """Children at every budget: by every method, by scores of the LM loss, with first weights."""
        for ratio in self.cfg.ratios:
            for way in ("mip", "greedy", "uniform", "noop_only", "max_params"):
                self._searched(ratio, way, self.choose(ratio, way))
            for draw in range(self.cfg.extras.random_draws):
                chosen = self.choose(ratio, "random", seed=1000 * self.seed + draw)
                self._searched(ratio, "random", chosen, draw=draw)
            self._searched(ratio, "mip lm_loss", self.choose(ratio, "mip", minimize="lm_loss"))
            self._searched(ratio, FIRST, self.choose(ratio, "mip"), library="first")

    def healing(self) -> None:
        """The same short distillation of some children of one budget."""
        ratio = self.cfg.heal.ratio
        for way in self.cfg.heal.ways:
            name, library = ("mip", "first") if way == FIRST else (way, "bld")
            chosen = self.choose(ratio, name, seed=1000 * self.seed)
            self.ledger.row(
                self._key("healed", way, ratio=ratio),
                lambda way=way, chosen=chosen, library=library: self.heal(
                    *self.child(chosen, library), f"healed-{way.replace(' ', '-')}", self.cfg.heal.steps
                )[2],
            )

    def importances(self) -> None:
        """Importance methods where all layers lose the same share of their channels; nothing is trained."""
        ratio, methods = self.cfg.extras.ffn_ratio, (*self.cfg.extras.importance, "random")
        for method in methods:

            def measured(method: str = method) -> Row:
                ranks = self._importance(method)
                widths = {i: round(len(scores) * ratio) for i, scores in ranks.ffn.items()}
                arch, params = prune_ffn(self.params, self.arch, ranks, widths)
                return self.exam(params, arch)

            self.ledger.row(self._key("importance", method), measured)

    def fusion(self) -> None:
        """A run of layers without attention, healed; then fused, and both healed on."""
        if not self.cfg.extras.fused:
            return
        bare = layers_in(self.cfg.extras.fused, self.arch.num_layers)
        blocks = tuple(BlockSpec(NoOp(), b.ffn) if i in bare else b for i, b in enumerate(self.arch.blocks))
        steps = self.cfg.heal.steps
        arch = child_arch(self.arch, blocks)
        names = ("unfused", "fused", "unfused, healed on", "fused, healed on")
        if all(self._has("fusion", name) for name in names):
            return
        params = assemble(self.params, self.arch, arch, self.libraries["bld"])
        params, _, row = self.heal(params, arch, "unfused", steps)
        self.ledger.row(self._key("fusion", "unfused"), lambda: row)
        [run] = fuse.ffn_runs(arch)
        fused_arch, fused = fuse.fuse(params, arch, [run[:-1]])
        self.ledger.row(self._key("fusion", "fused"), lambda: self.exam(fused, fused_arch))
        for name, weights, shape in (("unfused", params, arch), ("fused", fused, fused_arch)):
            self.ledger.row(
                self._key("fusion", f"{name}, healed on"),
                lambda name=name, weights=weights, shape=shape: self.heal(
                    weights, shape, f"{name}-on", steps
                )[2],
            )

    def choose(self, ratio: float, method: Any, minimize: str = "kl", seed: int = 0) -> tuple[int, ...]:
        """The choice by layer within a share of the parent's block parameters."""
        most = self.arch.num_block_params() * ratio + self.table.outside("params")
        options = {"seed": seed, "max_seconds": self.cfg.extras.max_seconds}
        [solution] = find(self.table, method, minimize=minimize, maximum={"params": most}, **options)
        return solution.chosen

    def child(self, chosen: tuple[int, ...], library: str) -> tuple[dict, ArchSpec]:
        arch = child_arch(self.arch, tuple(self.options[i][j] for i, j in enumerate(chosen)))
        return assemble(self.params, self.arch, arch, self.libraries[library]), arch

    def heal(self, params: dict, arch: ArchSpec, name: str, steps: int) -> tuple[dict, ArchSpec, Row]:
        """(parameters, architecture, row) after `steps` of distillation from the parent."""
        cfg = self.cfg
        healed = fit(
            jax.tree.map(jax.numpy.asarray, params),
            distill_loss(arch, self.arch, DistillWeights(), cfg.compute),
            train_batches(replace(cfg.data, seed=100 + self.seed), self.tokenizer),
            arch=arch,
            optim=cfg.heal.optim,
            cfg=FitConfig(steps=steps, log_every=max(1, steps // 3)),
            workdir=self.dir / name,
            frozen=self.params,
            seed=self.seed,
        )
        healed = jax.tree.map(np.asarray, healed)
        return healed, arch, self.exam(healed, arch)

    def _searched(
        self, ratio: float, name: str, chosen: tuple[int, ...], draw: int = 0, library: str = "bld"
    ) -> None:
        names = self.table.names()
        self.ledger.row(
            self._key("search", name, ratio=ratio, draw=draw),
            lambda: (
                self.exam(*self.child(chosen, library))
                | {"blocks": [names[i][j] for i, j in enumerate(chosen)]}
            ),
        )

    def _key(self, group: str, name: str, **more: Any) -> Row:
        return {"group": group, "seed": self.seed, "name": name, **more}

    def _has(self, group: str, name: str) -> bool:
        key = self._key(group, name)
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.ledger.rows)

    def _importance(self, method: str) -> Importance:
        if method == "random":
            rng = np.random.default_rng(self.seed)
            shapes = {i: self.arch.block_shapes(i)["ffn"]["down"][0] for i in self.ranks.ffn}
            return replace(self.ranks, ffn={i: rng.random(width) for i, width in shapes.items()})
        cfg = ImportanceConfig(method=method, batches=self.cfg.calibration)  # pyright: ignore[reportArgumentType]
        return importance.measure(self.params, self.arch, self.batches, cfg, self.cfg.compute)

    def _library(self, name: str) -> Library:
        cfg, kinds = self.cfg, kinds_of(self.options, self.arch)
        data = replace(cfg.data, seed=self.seed)

        def training() -> Any:
            loader = train_batches(data, self.tokenizer)
            for _ in take(loader, cfg.calibration, "calibration"):  # scores are not of what blocks learn from
                pass
            return loader

        bld = cfg.bld if name == "bld" else replace(cfg.bld, steps=0)
        at, kv_init = self.dir / f"library-{name}", cfg.space.kv_init
        return build(
            self.params, self.arch, kinds, self.ranks, training, bld, at, kv_init=kv_init, compute=cfg.compute
        )

    def _table(self) -> Table:
        """Costs and both scores of every choice of every layer."""
        path = self.dir / "table.json"
        if stored := read_json(path):
            return Table.from_json(stored)
        rows = score_into(
            self.dir / "scores.json",
            self.params,
            self.arch,
            self.options,
            self.libraries["bld"],
            self.batches,
            Scoring("kl", ("lm_loss",), self.cfg.calibration),
            compute=self.cfg.compute,
        )
        layers = tuple(
            tuple(
                {"name": choice_name(o), **counted(self.arch, o, self.cfg.cost)} | rows[i][j]
                for j, o in enumerate(options)
            )
            for i, options in enumerate(self.options)
        )
        table = Table(layers, fixed_costs(self.arch, self.cfg.cost), tokens_of(self.cfg.cost))
        write_json(path, table.to_json())
        return table
