"""Rows of sampled tokens line up with what the trainer scores; a rollout's state survives a restart."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.data.tokenizer import train_tokenizer
from nemojax.generate.engine import EngineConfig
from nemojax.generate.local import LocalGenerator, Model
from nemojax.losses.policy import PolicyLossConfig
from nemojax.model.llama import init_params
from nemojax.rewards.problems import ProblemSet, ask, grade, load_problems
from nemojax.rl.grpo import Config, Rollouts
from nemojax.rl.loss import policy_logps
from nemojax.rl.rollout import RolloutConfig, pack, roll_out
from nemojax.train import FitConfig

ROLLOUT = RolloutConfig(num_prompts_per_step=4, max_new_tokens=16, format_weight=1.0, updates=2, max_batch=16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["1 + 2 = 3"] * 8, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tokenizer):
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=64,
        context=128,
    )
    return arch, init_params(arch, jax.random.key(0))


def make_batches(model, tokenizer, workdir, **changes):
    arch, params = model
    values = {
        "model": "unused",
        "problems": ProblemSet(("sum2x1",), 16, "train"),
        "rollout": ROLLOUT,
        "fit": FitConfig(steps=8),
        "loss": PolicyLossConfig(reference_policy_kl_penalty=0.1),
    }
    return Rollouts(Config(**(values | changes)), arch, tokenizer, params, None, workdir)


def test_somebody_else_may_answer(model, tokenizer):
    """An engine of its own tells what the trainer agrees with; text alone is refused."""
    arch, params = model
    problems = load_problems(ProblemSet(("sum2x1",), 4, "train"))
    questions = [ask(p, i % 2 == 0, tokenizer, arch) for i, p in enumerate(problems)]
    generator = LocalGenerator(Model(arch, tokenizer, params), EngineConfig(slots=8))
    samples, metrics = roll_out(
        {}, arch, tokenizer, questions, jax.random.key(0), ROLLOUT, generator=generator
    )
    assert len(samples) == 32 and len({tuple(s.completion.tokens) for s in samples}) > 16
    assert 0 < metrics["mean_gen_tokens_per_sample"] <= 16
    rows = [dataclasses.replace(s, used=True, advantage=1.0) for s in samples]
    batch = pack(rows, 128, min_rows=0, row_multiple=8, pad_id=tokenizer.pad_id)
    logps = np.asarray(policy_logps(params, arch, {k: jax.numpy.asarray(v) for k, v in batch.items()}))
    drawn = batch["weights"] > 0
    np.testing.assert_allclose(logps[drawn], batch["sampler_logps"][drawn], atol=1e-4)

    class Text:
        def answer(self, requests):
            return [
                [dataclasses.replace(a, tokens=None, logprobs=None) for a in answers]
                for answers in generator.answer(requests)
            ]

    with pytest.raises(ValueError, match="ids and log-probabilities"):
        roll_out({}, arch, tokenizer, questions, jax.random.key(0), ROLLOUT, generator=Text())  # pyright: ignore[reportArgumentType]


def test_sampler_logps_stand_where_the_trainer_scores_them(model, tokenizer):
    arch, params = model
    problems = load_problems(ProblemSet(("sum2x1",), 4, "train"))
    questions = [ask(p, i % 2 == 0, tokenizer, arch) for i, p in enumerate(problems)]
    samples, metrics = roll_out(params, arch, tokenizer, questions, jax.random.key(0), ROLLOUT)
    assert len(samples) == 32 and 0 <= metrics["reward"] <= 1
    batch = pack(samples, 128, min_rows=0, row_multiple=8, pad_id=tokenizer.pad_id)
    used = [s for s in samples if s.used]
    assert batch["weights"].sum() == sum(len(s.completion.tokens) for s in used)
    assert batch["segments"].max() > 1, "the rows are packed"
    logps = np.asarray(jax.jit(lambda p, b: policy_logps(p, arch, b))(params, batch))
    np.testing.assert_allclose(logps * batch["weights"], batch["sampler_logps"], atol=1e-4)
    expected = sum(s.advantage * len(s.completion.tokens) for s in used)
    assert batch["advantages"].sum() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_restored_iterator_continues_with_the_same_numbers(model, tokenizer, tmp_path):
    a = make_batches(model, tokenizer, tmp_path)
    first = next(a)  # half a rollout: the other half is still waiting
    state = json.loads(json.dumps(a.state()))
    b = make_batches(model, tokenizer, tmp_path)
    b.restore(state)
    for _ in range(2):
        want, got = next(a), next(b)
        for name, value in want.items():
            np.testing.assert_array_equal(value, got[name], strict=True)
    np.testing.assert_allclose(first["old_logps"] * first["weights"], first["sampler_logps"], atol=1e-4)
    np.testing.assert_array_equal(first["old_logps"], first["ref_logps"])
    assert (tmp_path / "samples").is_dir()


def test_no_signal_is_an_error(model, tokenizer, tmp_path):
    rollout = RolloutConfig(num_prompts_per_step=2, max_new_tokens=2, format_weight=0.0, max_batch=16)
    with pytest.raises(ValueError, match="without a group of mixed rewards"):
        next(make_batches(model, tokenizer, tmp_path, rollout=rollout))


def test_grade(model, tokenizer):
    arch, _ = model
    (problem,) = load_problems(ProblemSet(("sum2x1",), 1))
    on, off = ask(problem, True, tokenizer, arch), ask(problem, False, tokenizer, arch)
    right = grade(on, f"<think>x</think>{problem.answer}")
    assert (right.accuracy, right.form, right.reward(0.1)) == (1.0, 1.0, 1.0)
    assert grade(off, f"<think>x</think>{problem.answer}").form == 0.0
    assert grade(off, problem.answer).reward(0.0) == 1.0
    assert grade(on, "<think>x").accuracy == 0.0


def test_a_verifier_that_raises_is_never_a_zero(model, tokenizer, monkeypatch):
    arch, _ = model
    (problem,) = load_problems(ProblemSet(("sum2x1",), 1))

    def broken(problem, text):
        raise RuntimeError("scorer")

    monkeypatch.setattr("nemojax.data.problems.verify", broken)
    verdict = grade(ask(problem, False, tokenizer, arch), "1")
    assert verdict.accuracy is None and np.isnan(verdict.reward(0.1))
