"""Proposals change how many passes it takes, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.generate.completions import complete
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Job, job_key
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.speculate import NgramIndex, Speculation
from nemojax.model.llama import apply, init_params

VOCAB = 24
ARCH = uniform(vocab_size=VOCAB, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=32, context=96)
DRAFT_ARCH = uniform(
    vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_width=16, context=96
)
CFG = EngineConfig(slots=8, prefill_chunk=16, elastic=False)
KINDS = {
    "ngram": Speculation("ngram", tokens=3),
    "draft": Speculation("draft", tokens=4),
}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda w: w * 1.5, init_params(ARCH, jax.random.key(0)))


@pytest.fixture(scope="module")
def draft():
    """The first layer of the model: right often, not always."""
    params = init_params(ARCH, jax.random.key(0))
    first = jax.tree.map(lambda w: w[:1], params["runs"]["000"])
    one = uniform(
        vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32, context=96
    )
    return jax.tree.map(lambda w: w * 1.5, {**params, "runs": {"000": first}}), one


def make_jobs(count, sampling, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(2, VOCAB, size=n).tolist()) for n in rng.integers(2, 30, size=count)]
    prompts = [p * 2 for p in prompts]  # something to look up
    return [Job(p, sampling, job_key(3, i), (1,)) for i, p in enumerate(prompts)]


def engine(params, kind=None, draft=None):
    cfg = dataclasses.replace(CFG, speculation=KINDS[kind]) if kind else CFG
    return Engine(params, ARCH, cfg, draft=draft if kind == "draft" else None)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(0, max_new_tokens=30),
        SamplingConfig(1.0, max_new_tokens=30),
        SamplingConfig(0.6, top_k=5, top_p=0.9, max_new_tokens=30),
        SamplingConfig(0.8, repetition_penalty=1.3, max_new_tokens=30),
    ],
    ids=["greedy", "sampled", "cut", "penalised"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_in_fewer_steps(params, draft, kind, sampling):
    """More jobs than slots, shared prompts, stop ids and limits in the middle of what was proposed."""
    jobs = make_jobs(12, sampling)
    plain, fast = engine(params), engine(params, kind, draft)
    want, got = complete(plain, jobs), complete(fast, jobs)
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens and a.finished == b.finished
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    stats = fast.stats
    assert 0 < stats.accepted_tokens < stats.proposed_tokens
    assert stats.generated_tokens == plain.stats.generated_tokens == sum(len(c.tokens) for c in want)


def test_a_perfect_draft_is_always_right(params):
    jobs = make_jobs(6, SamplingConfig(0, max_new_tokens=21))
    jobs = [Job(j.prompt, j.sampling, j.key) for j in jobs]
    fast = engine(params, "draft", (params, ARCH))
    assert [c.tokens for c in complete(fast, jobs)] == [c.tokens for c in complete(engine(params), jobs)]
    assert fast.stats.accepted_tokens == fast.stats.proposed_tokens > 0


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_distribution(params, draft, kind):
    """The second new token of 3,000 samples, given the first, against the model's own probabilities.

    The prompt ends with what the model finds likeliest, twice over: there is something to look up.
    """
    likely = complete(engine(params), [Job((5, 6, 7), SamplingConfig(0, max_new_tokens=24))])[0].tokens
    prompt = (5, 6, 7, *likely, 5, 6, 7, *likely[:8])
    count, sampling = 3000, SamplingConfig(0.8, max_new_tokens=3)
    cfg = EngineConfig(slots=64, prefill_chunk=16, elastic=False, speculation=KINDS[kind])
    fast = Engine(params, ARCH, cfg, draft=draft if kind == "draft" else None)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(11), count))).tolist()
    out = complete(fast, [Job(prompt, sampling, (high, low)) for high, low in keys])
    assert fast.stats.proposed_tokens > 200 and fast.stats.accepted_tokens > 40
    firsts = np.array([c.tokens[0] for c in out])
    common = int(np.bincount(firsts).argmax())
    seconds = np.array([c.tokens[1] for c in out if c.tokens[0] == common])
    logits, _ = apply(params, ARCH, {"tokens": jnp.array([[*prompt, common]])})
    want = np.asarray(jax.nn.softmax(logits[0, -1] / 0.8))
    got = np.bincount(seconds, minlength=VOCAB)
    expected = want * len(seconds)
    counted = expected >= 5
    chi2 = ((got - expected)[counted] ** 2 / expected[counted]).sum()
    freedom = counted.sum() - 1
    # the 99.99th percentile of chi-squared, by Wilson and Hilferty's approximation
    assert chi2 < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert len(seconds) > 200


def test_lookup_proposes_what_followed_the_longest_run():
    index = NgramIndex(Speculation("ngram", longest=3), [1, 2, 3, 4, 9, 3, 4, 5, 2, 3])
    assert index.propose(3) == [4, 9, 3]  # after 2, 3; what followed 3 alone came later
    index.extend([4])
    assert index.propose(2) == [9, 3]  # after 2, 3, 4
    index.extend([7])
    assert index.propose(2) == []
    assert NgramIndex(Speculation("ngram", shortest=2), [5, 6, 5]).propose(2) == []


def test_drafts_that_do_not_fit_are_refused(params):
    with pytest.raises(ValueError, match="expected a draft model"):
        engine(params, "draft")
    other = DRAFT_ARCH.replace(vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB}, got {VOCAB + 1}"):
        engine(params, "draft", (init_params(other, jax.random.key(0)), other))
    with pytest.raises(ValueError, match="tokens"):
        Speculation(tokens=0)
    with pytest.raises(ValueError, match="shortest"):
        Speculation(shortest=4)
