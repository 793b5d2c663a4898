"""The `rl` stage: group relative policy optimisation on problems whose answers can be checked.

It is the same loop as every other stage; only its batches are sampled from the current weights. Several
processes each generate for their share of the prompts, and train together.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.checkpoints.artifact import load_model
from nemojax.checkpoints.store import to_host
from nemojax.config import field, required
from nemojax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from nemojax.evaluate.tasks import (
    Record,
    TasksConfig,
    ask_all,
    flat_scores,
    load_records,
    paired_bootstrap,
    per_prompt,
    save_records,
    summarise,
)
from nemojax.generate.local import Model
from nemojax.hosts import is_primary, on_primary
from nemojax.losses.policy import PolicyLossConfig
from nemojax.model.llama import Compute, Params
from nemojax.optim import OptimConfig
from nemojax.rewards.problems import MODES, ProblemSet, Question, ask, load_problems
from nemojax.rl.curriculum import CurriculumConfig, Gaussian, Uniform
from nemojax.rl.loss import grpo_loss, policy_logps
from nemojax.rl.rollout import RolloutConfig, dump, pack, roll_out
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh, ways_of, whole_rows
from nemojax.stage import run_stage, start_artifact, write_json
from nemojax.train import FitConfig, fit

_BUCKET = 32  # row lengths are a multiple of this, and row numbers of _ROWS and of devices
_ROWS = 8
_MAX_TRIES = 10  # rollouts in a row without any signal before giving up


@dataclass(frozen=True)
class Config:
    model: str = required("artifact to start from; it is also the reference of the KL penalty")
    problems: ProblemSet = field(ProblemSet(count=2000, split="train"), "problems to practise")
    rollout: RolloutConfig = field(RolloutConfig(), "sampling and rewards")
    loss: PolicyLossConfig = field(PolicyLossConfig(), "clipping, KL and corrections")
    curriculum: CurriculumConfig = field(CurriculumConfig(), "order of the problems by pass rate")
    validation: TasksConfig = field(TasksConfig(), "held-out problems, asked at the start and at the end")
    optim: OptimConfig = field(
        OptimConfig(lr=1e-4, schedule="constant", weight_decay=0.0, warmup_steps=5), "optimiser"
    )
    fit: FitConfig = field(FitConfig(steps=50, log_every=1), "loop; steps are optimiser steps")
    compute: Compute = field(Compute(), "precision and rematerialisation, of sampler and trainer")
    mesh: MeshConfig = field(MeshConfig(), "devices")
    loss_chunk: int = field(0, "positions of a row whose logits exist at once; 0: all")
    seed: int = field(0, "order of the problems, and the sampler")


def run(cfg: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains in `workdir`, which becomes an artifact.

    Returns pass@1 on held-out problems before and after, and for each setting of the toggle and overall the
    paired difference with its 95% bootstrap interval.
    """
    return run_stage(
        "rl", cfg, workdir, [cfg.model], lambda path: _train(cfg, path),
        many_processes=True,
    )  # fmt: skip


def _train(cfg: Config, workdir: Path) -> dict[str, Any]:
    mesh = make_mesh(whole_rows(cfg.mesh, "rl"))
    tokenizer = load_tokenizer(cfg.model)
    arch, params = load_model(cfg.model, mesh)
    check_vocab(tokenizer, arch)
    batches = Rollouts(cfg, arch, tokenizer, params, mesh, workdir)
    start_artifact(workdir, arch, tokenizer.path)  # nothing is written before the problems are known to fit

    def validate(weights: Params) -> list[Record]:
        return ask_all(Model(arch, tokenizer, weights, cfg.compute, mesh), cfg.validation)

    before = _kept(workdir / "validation_start.jsonl", lambda: validate(params))
    params = fit(
        params,
        grpo_loss(
            arch, cfg.loss, temperature=cfg.rollout.temperature, compute=cfg.compute, chunk=cfg.loss_chunk
        ),
        batches,
        arch=arch,
        optim=cfg.optim,
        cfg=cfg.fit,
        workdir=workdir,
        mesh=mesh,
        # the end is measured below, with every prompt's result
        evaluate=(lambda p: flat_scores(validate(p))) if cfg.fit.eval_every else None,
        seed=cfg.seed,
    )
    after = validate(params)
    on_primary(lambda: save_records(workdir / "validation_end.jsonl", after))
    return {
        "before": summarise(before),
        "after": summarise(after),
        "gain": _gains(before, after),
        "steps": cfg.fit.steps,
        "num_params": arch.num_params(),
    }


def _gains(before: list[Record], after: list[Record]) -> dict[str, dict[str, float]]:
    """Paired pass@1 differences with their 95% intervals: "all", and "on", "off" where they were asked."""
    asked = {
        name: MODES[name][0] for name in ("on", "off") if any(r["thinking"] == MODES[name][0] for r in after)
    }
    out = {}
    for name, thinking in {"all": None, **asked}.items():
        gain, low, high = paired_bootstrap(per_prompt(before, thinking), per_prompt(after, thinking))
        out[name] = {"pass@1": gain, "low": low, "high": high}
    return out


def _kept(path: Path, make: Callable[[], list[Record]]) -> list[Record]:
    """Records made once and read again by a resumed run."""
    if not on_primary(path.is_file):
        records = make()  # by all processes
        on_primary(lambda: save_records(path, records))
    return on_primary(lambda: load_records(path))


class Rollouts:
    """The batches of `fit`: sampled from the weights that `bind` gives access to, by all processes together.

    `state()` holds the place in the problems and what is left of the last rollout, so that a resumed run
    continues with the same numbers.
    """

    def __init__(
        self,
        cfg: Config,
        arch: ArchSpec,
        tokenizer: Tokenizer,
        reference: Params,
        mesh: jax.sharding.Mesh | None,
        workdir: Path,
    ):
        self._cfg, self._arch, self._tokenizer, self._mesh, self._workdir = (
            cfg,
            arch,
            tokenizer,
            mesh,
            workdir,
        )
        # a copy: `fit` donates the parameters it was given
        copied = cfg.loss.reference_policy_kl_penalty > 0
        self._reference = jax.tree.map(lambda w: w.copy(), reference) if copied else None
        self._params: Callable[[], Params] = lambda: reference
        self._problems = load_problems(cfg.problems)
        self._questions = {
            (i, mode): ask(problem, mode, tokenizer, arch)
            for i, problem in enumerate(self._problems)
            for mode in MODES[cfg.rollout.thinking]
        }
        self._length = self._row_length()
        self._score = jax.jit(
            lambda params, batch: policy_logps(
                params,
                arch,
                batch,
                temperature=cfg.rollout.temperature,
                compute=cfg.compute,
                chunk=cfg.loss_chunk,
            )
        )
        with use_mesh(mesh):
            self._multiple = math.lcm(_ROWS, ways_of("batch"))
        self._order = self._make_order()
        self._rollout, self._rows = 0, 0
        self._pending: list[dict[str, np.ndarray]] = []
        self.metrics: dict[str, float] = {}
        self.ids: list[str] = []

    def bind(self, params: Callable[[], Params]) -> None:
        """Gives access to the weights that the next rollout samples from."""
        self._params = params

    def __iter__(self) -> Rollouts:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._pending:
            self._sample()
        batch = self._pending.pop(0)
        share = len(batch["tokens"]) // jax.process_count()
        first = jax.process_index() * share  # its devices follow each other in the mesh
        return {name: value[first : first + share] for name, value in batch.items()}

    def state(self) -> dict[str, Any]:
        return {
            "rollout": self._rollout,
            "rows": self._rows,
            "order": self._order.state(),
            "pending": [_to_text(batch) for batch in self._pending],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._rollout, self._rows = int(state["rollout"]), int(state["rows"])
        self._order.restore(state["order"])
        self._pending = [_from_text(text) for text in state["pending"]]

    def _sample(self) -> None:
        cfg, group = self._cfg.rollout, self._cfg.rollout.num_generations_per_prompt
        reward = 0.0
        for _ in range(_MAX_TRIES):
            questions = self._draw()
            key = jax.random.fold_in(jax.random.key(self._cfg.seed), self._rollout)
            samples, metrics = roll_out(
                self._params(), self._arch, self._tokenizer, questions, key, cfg,
                compute=self._cfg.compute, mesh=self._mesh,
            )  # fmt: skip
            self._rollout, reward = self._rollout + 1, metrics["reward"]
            self.metrics = {f"train/{name}": value for name, value in metrics.items()}
            self.ids = [f"{q.problem.family}: {q.problem.prompt}" for q in questions]
            if is_primary() and cfg.dump_every and (self._rollout - 1) % cfg.dump_every == 0:
                dump(self._workdir / "samples" / f"train_data_rollout{self._rollout}.jsonl", samples)
            share = len(questions) // cfg.updates * group
            parts = [samples[i : i + share] for i in range(0, len(samples), share)]
            parts = [part for part in parts if any(s.used for s in part)]
            if parts:
                self._pending = [self._batch(part) for part in parts]
                return
        raise ValueError(
            f"rl: {_MAX_TRIES} rollouts in a row without a group of mixed rewards (mean reward "
            f"{reward:.3f}); take easier or harder problems, or more generations per prompt"
        )

    def _draw(self) -> list[Question]:
        steps = self._cfg.fit.steps / self._cfg.rollout.updates
        modes = MODES[self._cfg.rollout.thinking]
        chosen = self._order.draw(self._cfg.rollout.num_prompts_per_step, self._rollout / steps)
        # the toggle alternates over the run, not only inside a batch of odd size
        first = self._rollout * len(chosen)
        return [self._questions[index, modes[(first + n) % len(modes)]] for n, index in enumerate(chosen)]

    def _batch(self, samples: list) -> dict[str, np.ndarray]:
        multiple = self._multiple * self._cfg.fit.accumulate
        batch = pack(samples, self._length, self._rows, multiple, self._tokenizer.pad_id)
        self._rows = len(batch["tokens"])
        with use_mesh(self._mesh):
            placed = place_batch(batch, self._mesh, shared=True)
            if self._cfg.rollout.updates > 1:
                batch["old_logps"] = to_host(self._score(self._params(), placed))
            if self._reference is not None:
                batch["ref_logps"] = to_host(self._score(self._reference, placed))
        return batch

    def _row_length(self) -> int:
        longest = max(len(q.tokens) for q in self._questions.values()) + self._cfg.rollout.max_new_tokens
        return min(-(-longest // _BUCKET) * _BUCKET, self._arch.context)

    def _make_order(self) -> Uniform | Gaussian:
        cfg = self._cfg.curriculum
        if not cfg.samples:
            return Uniform(len(self._problems), self._cfg.seed)
        path = self._workdir / "pass_rates.json"
        if not on_primary(path.is_file):
            rates = self._pass_rates(cfg.samples)  # by all processes
            on_primary(lambda: write_json(path, rates))
        rates = on_primary(lambda: json.loads(path.read_text()))
        return Gaussian(np.array(rates), cfg, self._cfg.seed)

    def _pass_rates(self, samples: int) -> list[float]:
        """Each problem's pass rate under the starting policy, over the settings of the toggle."""
        cfg = RolloutConfig(
            num_generations_per_prompt=max(samples, 2),
            temperature=self._cfg.rollout.temperature,
            max_new_tokens=self._cfg.rollout.max_new_tokens,
            max_batch=self._cfg.rollout.max_batch,
        )
        answers, _ = roll_out(
            self._params(), self._arch, self._tokenizer, list(self._questions.values()),
            jax.random.fold_in(jax.random.key(self._cfg.seed), 2**31 - 1), cfg,
            compute=self._cfg.compute, mesh=self._mesh,
        )  # fmt: skip
        scores = np.array([np.nan if s.grade.accuracy is None else s.grade.accuracy for s in answers])
        table = scores.reshape(len(self._problems), -1)
        # NaN, and so left out of the curriculum, where no answer could be graded
        valid = np.isfinite(table)
        rates = np.where(valid, table, 0).sum(1) / np.maximum(valid.sum(1), 1)
        return np.where(valid.any(1), rates, np.nan).tolist()


def _to_text(batch: dict[str, np.ndarray]) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **batch)  # pyright: ignore[reportArgumentType]
    return base64.b64encode(buffer.getvalue()).decode()


def _from_text(text: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return dict(arrays)
