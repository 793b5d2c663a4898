"""pass@1 on held-out problems with thinking on and off, each prompt's result kept.

Temperatures: Llama-Nemotron (arXiv:2505.00949, table 5) samples with 0.6 and top-p 0.95 when thinking and
takes the likeliest token when not; those are the defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemojax.buckets import place, write_text
from nemojax.config import field
from nemojax.data import problems
from nemojax.generate.local import LocalGenerator, Model, batch_config, encode_request, prepared
from nemojax.generate.protocol import Generator, Request
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.shares import answered, share
from nemojax.rewards.problems import MODES, ProblemSet, Question, Thinking, grade, load_problems

Record = dict[str, Any]


@dataclass(frozen=True)
class TasksConfig:
    problems: ProblemSet = field(ProblemSet(), "held-out problems")
    thinking: Thinking = field("both", "settings of the toggle that are measured")
    samples: int = field(1, "answers to each prompt; more than 1 also gives pass@k")
    max_new_tokens: int = field(64, "tokens generated at most")
    temperature_on: float = field(0.6, "temperature when thinking is on; 0 takes the likeliest token")
    top_p_on: float = field(0.95, "top-p when thinking is on; 1 is quicker, it needs no sorting")
    temperature_off: float = field(0.0, "temperature when thinking is off")
    top_p_off: float = field(1.0, "top-p when thinking is off")
    max_batch: int = field(128, "prompts generated together")
    seed: int = field(0, "seed of the sampler")

    def sampling(self, thinking: bool) -> SamplingConfig:
        temperature = self.temperature_on if thinking else self.temperature_off
        top_p = self.top_p_on if thinking else self.top_p_off
        return SamplingConfig(temperature, 0, top_p, self.max_new_tokens)


def ask_all(model: Model, cfg: TasksConfig) -> list[Record]:
    """`ask` of a model here, in one process or several. ValueError for a prompt that fills the context."""
    model = prepared(model)
    requests = [request for _, request in _make_requests(cfg)]
    room = max(len(encode_request(model, request)) for request in requests) + cfg.max_new_tokens
    engine = batch_config(model, share(len(requests)) * cfg.samples, room, cfg.max_batch)
    local = LocalGenerator(model, engine)
    return answered(len(requests), 1, lambda mine: ask(local, cfg, mine))


def ask(generator: Generator, cfg: TasksConfig, only: Sequence[int] | None = None) -> list[Record]:
    """One record for each prompt and setting of the toggle, always in the same order; what is drawn depends
    on the generator and the configuration alone. `max_batch` is a local engine's, a server has its own.
    `only`: numbers of the requests that are asked.

    {"family", "thinking", "index", "prompt", "reference", "accuracy": [a number or None for each answer],
    "form", "text", "tokens", "finished"}.
    """
    asked = _make_requests(cfg)
    num_problems = len(asked) // len(MODES[cfg.thinking])
    places = range(len(asked)) if only is None else only
    found = generator.answer([asked[place][1] for place in places])
    records: list[Record] = []
    for at, answers in zip(places, found, strict=True):
        question, _ = asked[at]
        texts = [answer.text for answer in answers]
        grades = [grade(question, text) for text in texts]
        records.append(
            {
                "family": question.problem.family,
                "thinking": question.thinking,
                "index": at % num_problems,
                "prompt": question.problem.prompt,
                "reference": question.problem.answer,
                "accuracy": [g.accuracy for g in grades],
                "form": [g.form for g in grades],
                "text": texts,
                "tokens": [answer.num_tokens for answer in answers],
                "finished": [answer.finish_reason != "length" for answer in answers],
            }
        )
    return records


def _make_requests(cfg: TasksConfig) -> list[tuple[Question, Request]]:
    """Each problem once for each setting of the toggle, with a seed of its own."""
    rng = np.random.default_rng(cfg.seed)
    return [
        (
            Question(problem, thinking, ()),
            Request(
                messages=tuple(problems.question(problem)),
                thinking=thinking,
                sampling=cfg.sampling(thinking),
                n=cfg.samples,
                seed=int(rng.integers(2**32)),
            ),
        )
        for thinking in MODES[cfg.thinking]
        for problem in load_problems(cfg.problems)
    ]


def summarise(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """{"on" | "off": {family or "all": {"pass@1", "format", "prompts", "avg_length", ...}}}."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        mode = "on" if record["thinking"] else "off"
        for family in ("all", record["family"]):
            groups.setdefault((mode, family), []).append(record)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for (mode, family), group in groups.items():
        out.setdefault(mode, {})[family] = _summary(group)
    return out


def _summary(group: Sequence[Record]) -> dict[str, float]:
    samples = len(group[0]["accuracy"])
    accuracy = per_prompt(group)
    valid = accuracy[np.isfinite(accuracy)]
    summary = {
        "pass@1": float(valid.mean()) if valid.size else float("nan"),
        "format": float(np.mean([f for r in group for f in r["form"]])),
        "prompts": len(group),
        "avg_length": float(np.mean([n for r in group for n in r["tokens"]])),
        "truncation_rate": 1 - float(np.mean([f for r in group for f in r["finished"]])),
        "verifier_error_rate": float(np.mean([a is None for r in group for a in r["accuracy"]])),
    }
    for k in (k for k in (2, 4, 8, 16, 32, 64) if k <= samples):
        solved = [
            pass_at_k(len(a), sum(x >= 1 for x in a), k)
            for r in group
            if len(a := [x for x in r["accuracy"] if x is not None]) >= k
        ]
        summary[f"pass@{k}"] = float(np.mean(solved)) if solved else float("nan")
    return summary


def per_prompt(records: Iterable[Record], thinking: bool | None = None) -> np.ndarray:
    """Mean accuracy of each prompt in order, NaN where every verification failed."""
    rows = [r["accuracy"] for r in records if thinking is None or r["thinking"] == thinking]
    means = [[x for x in row if x is not None] for row in rows]
    return np.array([np.mean(row) if row else np.nan for row in means], np.float64)


def flat_scores(records: Sequence[Record]) -> dict[str, float]:
    """{"accuracy", "accuracy/on", "accuracy/off/add", "avg_length", ...} for a training log."""
    out = {"accuracy": float(np.nanmean(per_prompt(records)))}
    for mode, families in summarise(records).items():
        out[f"accuracy/{mode}"] = families["all"]["pass@1"]
        out[f"avg_length/{mode}"] = families["all"]["avg_length"]
        if len(families) > 2:
            out |= {f"accuracy/{mode}/{f}": s["pass@1"] for f, s in families.items() if f != "all"}
    return out


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased chance that one of k answers is right (Chen et al., arXiv:2107.03374, equation 1)."""
    if not 0 < k <= num_samples:
        raise ValueError(f"pass@k: expected k in 1..{num_samples}, got {k}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, n: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of b - a, lower, upper end of its 95% interval) over prompts answered by both models.

    Prompts are resampled with replacement; pairs with a NaN (failed verifier) are left out.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"bootstrap: expected two results of the same prompts, got {a.shape} and {b.shape}")
    difference = (b - a)[np.isfinite(a) & np.isfinite(b)]
    if not difference.size:
        raise ValueError("bootstrap: expected prompts graded in both results, got none")
    # equal differences are counted, not drawn one by one: a multinomial over the few distinct values
    values, counts = np.unique(difference, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(difference.size, counts / difference.size, size=n)
    means = draws @ values / difference.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def save_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    write_text(place(path), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def load_records(path: str | Path) -> list[Record]:
    """What `save_records` wrote."""
    return [json.loads(line) for line in place(path).read_text(encoding="utf-8").splitlines()]
