"""Prompts and the current policy -> graded samples -> rows of tokens with advantages.

Shape letters: P prompts, G answers to each, B rows, T length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.data.examples import Example
from nemojax.data.packing import make_batch
from nemojax.data.tokenizer import Tokenizer
from nemojax.evaluate.tasks import save_records
from nemojax.generate.completions import Completion
from nemojax.generate.protocol import Generator, Request
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.shares import generate_together
from nemojax.model.llama import Compute, Params
from nemojax.rewards.problems import Grade, Question, Thinking, grade, text_of
from nemojax.rl.advantages import group_advantages


@dataclass(frozen=True)
class RolloutConfig:
    """Names follow NeMo-RL's `grpo` section. Sampling is never truncated: the ratio would be biased."""

    num_prompts_per_step: int = field(16, "prompts a rollout")
    num_generations_per_prompt: int = field(8, "answers to each prompt")
    thinking: Thinking = field("both", "setting of the toggle; both: every other prompt thinks")
    temperature: float = field(1.0, "of the sampler, and of the trainer's log-probabilities")
    max_new_tokens: int = field(64, "tokens generated at most")
    max_batch: int = field(128, "answers generated together")
    format_weight: float = field(0.1, "weight of obeying the toggle beside 1 for a right answer")
    normalize_rewards: bool = field(True, "divide advantages by the group's standard deviation")
    use_leave_one_out_baseline: bool = field(False, "compare with the mean of the others")
    overlong_filtering: bool = field(False, "mask answers that the length limit cut")
    updates: int = field(1, "optimiser steps a rollout, each on its share of the prompts")
    dump_every: int = field(10, "rollouts between dumps of all samples to samples/; 0 never")

    def __post_init__(self):
        if self.num_generations_per_prompt < 2:
            raise ValueError("num_generations_per_prompt: expected 2 or more, for a group to compare in")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature: expected a positive number, got {self.temperature}; greedy cannot learn"
            )
        if self.updates < 1 or self.num_prompts_per_step % self.updates:
            raise ValueError(
                f"updates: expected a divisor of num_prompts_per_step = {self.num_prompts_per_step}, "
                f"got {self.updates}"
            )


@dataclass(frozen=True)
class Sample:
    """One answer. `used` is False when it takes no part in the loss (no signal, or no verdict)."""

    question: Question
    completion: Completion
    text: str
    grade: Grade
    reward: float
    advantage: float
    used: bool


def roll_out(
    params: Params,
    arch: ArchSpec,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    key: jax.Array,
    cfg: RolloutConfig,
    *,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
    generator: Generator | None = None,
) -> tuple[list[Sample], dict[str, float]]:
    """G graded answers to each question, group by group, and the rollout's metrics.

    `generator`: who answers instead of these parameters, such as a server that holds the same weights; it
    has to tell the ids and log-probabilities of what it drew (ValueError if it does not).
    """
    group = cfg.num_generations_per_prompt
    sampling = SamplingConfig(temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens)
    if generator is not None:
        completions = _ask(generator, questions, key, sampling, group)
    else:
        prompts = [q.tokens for q in questions for _ in range(group)]
        completions = generate_together(
            params, arch, prompts, key, sampling, tokenizer.eos_ids,
            group=group, max_batch=cfg.max_batch, compute=compute, mesh=mesh,
        )  # fmt: skip
    texts = [text_of(c.tokens, tokenizer) for c in completions]
    grades = [grade(questions[i // group], text) for i, text in enumerate(texts)]
    rewards = np.array([g.reward(cfg.format_weight) for g in grades])
    if cfg.overlong_filtering:
        rewards = np.where([c.finished for c in completions], rewards, np.nan)
    advantages = group_advantages(
        rewards.reshape(-1, group), cfg.normalize_rewards, cfg.use_leave_one_out_baseline
    )
    values, used = advantages.values_PG.ravel(), advantages.used_PG.ravel()
    samples = [
        Sample(
            questions[i // group], c, texts[i], grades[i], float(rewards[i]), float(values[i]), bool(used[i])
        )
        for i, c in enumerate(completions)
    ]
    # masked for length is not a failure of the verifier: its rate is counted from the grades
    return samples, advantages.metrics | _metrics(samples)


def _ask(
    generator: Generator, questions: Sequence[Question], key: jax.Array, sampling: SamplingConfig, n: int
) -> list[Completion]:
    """n completions of each question's ids by somebody else."""
    seeds = np.asarray(jax.random.bits(key, (len(questions),), jax.numpy.uint32)).tolist()
    requests = [
        Request(tokens=question.tokens, sampling=sampling, n=n, seed=seed)
        for question, seed in zip(questions, seeds, strict=True)
    ]
    completions = []
    for answer in (answer for answers in generator.answer(requests) for answer in answers):
        if answer.tokens is None or answer.logprobs is None:
            raise ValueError(
                "rollouts: expected the ids and log-probabilities of what was drawn, got text alone; use a "
                "server that tells them (return_token_ids and logprobs)"
            )
        finished = answer.finish_reason != "length"
        completions.append(Completion(list(answer.tokens), list(answer.logprobs), finished))
    return completions


def _metrics(samples: Sequence[Sample]) -> dict[str, float]:
    rewards = np.array([s.reward for s in samples])
    lengths = np.array([len(s.completion.tokens) for s in samples])
    finished = float(np.mean([s.completion.finished for s in samples]))
    out = {
        "reward": float(np.nanmean(rewards)) if np.isfinite(rewards).any() else 0.0,
        "mean_gen_tokens_per_sample": float(lengths.mean()),
        "truncation_rate": 1 - finished,
        "natural_termination_rate": finished,
        "format": float(np.mean([s.grade.form for s in samples])),
        "verifier_error_rate": float(np.mean([s.grade.accuracy is None for s in samples])),
    }
    for name, thinking in (("on", True), ("off", False)):
        mine = [s for s in samples if s.question.thinking == thinking]
        right = [s.grade.accuracy for s in mine if s.grade.accuracy is not None]
        if right:
            out[f"accuracy/{name}"] = float(np.mean(right))
            out[f"mean_gen_tokens_per_sample/{name}"] = float(
                np.mean([len(s.completion.tokens) for s in mine])
            )
    return out


def pack(samples: Sequence[Sample], length: int, min_rows: int, row_multiple: int, pad_id: int) -> dict:
    """The used samples in rows of `length` tokens: the usual keys, `advantages` and `sampler_logps` [B, T].

    Rows are filled first-fit, longest first; their number is at least `min_rows` and a multiple of
    `row_multiple`, so that few shapes are compiled.
    """
    used = sorted(
        (s for s in samples if s.used), key=lambda s: -len(s.question.tokens) - len(s.completion.tokens)
    )
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in used:
        size = len(sample.question.tokens) + len(sample.completion.tokens) - 1
        at = next((i for i, free in enumerate(room) if free >= size), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(length)
        rows[at].append(sample)
        room[at] -= size
    num_rows = -(-max(len(rows), min_rows, 1) // row_multiple) * row_multiple
    rows += [[] for _ in range(num_rows - len(rows))]
    batch = make_batch([[_example(s) for s in row] for row in rows], length, pad_id)
    advantages_BT = np.zeros((num_rows, length), np.float32)
    logps_BT = np.zeros((num_rows, length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            first = start + len(sample.question.tokens) - 1  # this position predicts the first new token
            stop = first + len(sample.completion.tokens)
            advantages_BT[b, first:stop] = sample.advantage
            logps_BT[b, first:stop] = sample.completion.logprobs
            start = stop
    return {**batch, "advantages": advantages_BT, "sampler_logps": logps_BT}


def _example(sample: Sample) -> Example:
    prompt, answer = sample.question.tokens, sample.completion.tokens
    weights = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)])
    return Example(np.asarray([*prompt, *answer], np.int32), weights)


def dump(path: Path, samples: Sequence[Sample]) -> None:
    """All samples of a rollout, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_records(path, [_as_json(s) for s in samples])


def _as_json(sample: Sample) -> Mapping[str, Any]:
    return {
        "family": sample.question.problem.family,
        "prompt": sample.question.problem.prompt,
        "reference": sample.question.problem.answer,
        "thinking": sample.question.thinking,
        "text": sample.text,
        "accuracy": sample.grade.accuracy,
        "format": sample.grade.form,
        "reward": None if np.isnan(sample.reward) else sample.reward,
        "advantage": sample.advantage,
        "used": sample.used,
        "finished": sample.completion.finished,
        "prompt_token_ids": list(sample.question.tokens),
        "token_ids": sample.completion.tokens,
        "generation_logprobs": sample.completion.logprobs,
    }
