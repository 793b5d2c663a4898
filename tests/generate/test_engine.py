"""The sampler against the cacheless model, and against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.data.examples import Example
from nemojax.data.packing import row_per_example
from nemojax.generate import programs
from nemojax.generate.completions import complete, generate
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Job, job_key
from nemojax.generate.sampling import SamplingConfig, log_distribution, make_controls, sample
from nemojax.model.llama import Compute, apply, init_params, param_shardings
from nemojax.rl.loss import policy_logps
from nemojax.sharding import MeshConfig, make_mesh

ARCH = ArchSpec(
    vocab_size=64,
    dim=32,
    num_heads=4,
    head_dim=8,
    context=96,
    blocks=(
        BlockSpec(Attention(2), SwiGLU(48)),
        BlockSpec(Attention(2), SwiGLU(48)),
        BlockSpec(NoOp(), SwiGLU(32)),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Linear(), NoOp()),
        BlockSpec(Attention(1, window=6), Linear()),
        BlockSpec(Attention(4), NoOp()),
    ),
)
EOS = 3


@pytest.fixture(scope="module")
def params():
    # a sharper model than a fresh one: logits of several nats, so that errors would show
    return jax.tree.map(lambda w: w * 1.5, init_params(ARCH, jax.random.key(0)))


def make_prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 64, size=rng.integers(2, 14)).tolist() for _ in range(count)]


@functools.partial(jax.jit, static_argnums=2)
def trainer_logps(params, batch, temperature=1.0):
    return policy_logps(params, ARCH, batch, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(params, temperature):
    prompts = make_prompts(20)
    sampling = SamplingConfig(temperature, max_new_tokens=24)
    out = generate(params, ARCH, prompts, jax.random.key(1), sampling, [EOS], max_batch=16)
    examples = [
        Example(np.array(p + c.tokens), np.array([0.0] * len(p) + [1.0] * len(c.tokens)))
        for p, c in zip(prompts, out, strict=True)
    ]
    batch = row_per_example(examples, 64, pad_id=0)
    logps = np.asarray(trainer_logps(params, batch, temperature))
    for i, (p, c) in enumerate(zip(prompts, out, strict=True)):
        got = logps[i, len(p) - 1 : len(p) - 1 + len(c.tokens)]
        np.testing.assert_allclose(got, c.logprobs, atol=1e-4)
        assert c.finished == (c.tokens[-1] == EOS)
        assert c.finished or len(c.tokens) == 24
    assert 0 < sum(c.finished for c in out)


def test_greedy_equals_a_loop_without_cache(params):
    prompts = make_prompts(3, seed=5)
    out = generate(
        params, ARCH, prompts, jax.random.key(0), SamplingConfig(temperature=0, max_new_tokens=12), []
    )
    forward = jax.jit(lambda p, tokens: apply(p, ARCH, {"tokens": tokens})[0])
    for prompt, completion in zip(prompts, out, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(forward(params, padded)[0, len(tokens) - 1])))
        assert completion.tokens == tokens[len(prompt) :]
        assert completion.logprobs == [0.0] * 12 and not completion.finished


def test_a_mesh_gives_the_same_greedy_tokens():
    """Two by four devices; one and two KV heads on four: those are replicated. More prompts than slots."""
    arch = ARCH.replace(blocks=tuple(b for b in ARCH.blocks if b != BlockSpec(Attention(4), NoOp())))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    params = jax.tree.map(lambda w: w * 1.5, init_params(arch, jax.random.key(0)))
    placed = jax.device_put(params, param_shardings(arch, mesh))
    assert placed["runs"]["000"]["ffn"]["up"].sharding.shard_shape((2, 32, 48)) == (2, 16, 12)
    prompts, sampling = make_prompts(12, seed=3), SamplingConfig(temperature=0, max_new_tokens=16)
    one = generate(params, arch, prompts, jax.random.key(0), sampling, [EOS], max_batch=8)
    other = generate(placed, arch, prompts, jax.random.key(0), sampling, [EOS], max_batch=8, mesh=mesh)
    assert one == other
    assert len({tuple(c.tokens) for c in one}) == 12


def test_weights_that_were_split_stay_so(params, monkeypatch):
    """Also where the device has no room any more for the layers a second time."""
    layers, apart = programs.prepare(params, Compute(), None)
    monkeypatch.setattr(programs, "_fits_twice", lambda _: False)
    again, still = programs.prepare(layers, Compute(), None)
    assert apart and still and jax.tree.all(jax.tree.map(lambda a, b: a is b, again, layers))
    monkeypatch.setattr(programs, "platform", lambda: "gpu")
    assert programs.prepare(layers, Compute(), None)[1] and not programs.prepare(params, Compute(), None)[1]
    assert programs.splits("gpu", True) and not programs.splits("tpu", True)


def test_rows_do_not_see_each_other(params):
    """Other prompts, other slots and a refill change nothing for request 0, bitwise."""
    sampling, key = SamplingConfig(max_new_tokens=24), jax.random.key(7)
    first = make_prompts(20)
    other = first[:1] + make_prompts(19, seed=9)
    a = generate(params, ARCH, first, key, sampling, [EOS], max_batch=16)
    b = generate(params, ARCH, other, key, sampling, [EOS], max_batch=16)
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert generate(params, ARCH, first, key, sampling, [EOS], max_batch=16) == a


def test_same_prompt_different_requests_differ(params):
    out = generate(params, ARCH, [[5, 6, 7]] * 8, jax.random.key(0), SamplingConfig(max_new_tokens=16), [])
    assert len({tuple(c.tokens) for c in out}) == 8


def test_context_limits_new_tokens(params):
    (out,) = generate(
        params, ARCH, [[5] * 90], jax.random.key(0), SamplingConfig(max_new_tokens=24, temperature=0), []
    )
    assert len(out.tokens) == 6 and not out.finished


@pytest.mark.parametrize(
    "prompt, message", [([], "at least one token"), ([5] * 96, "fewer than 96"), ([64], "below 64")]
)
def test_bad_prompts_are_refused(params, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(params, ARCH, [prompt], jax.random.key(0))


def test_truncated_distributions():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 3))
    controls = make_controls(
        [SamplingConfig(top_k=2), SamplingConfig(top_p=0.7), SamplingConfig(top_k=3, top_p=0.6)]
    )
    probs = np.exp(log_distribution(logits, controls, True))
    want = [[0.625, 0.375, 0, 0], [0.625, 0.375, 0, 0], [0.625, 0.375, 0, 0]]
    # row 2: of the three kept, 0.526 and 0.316 are needed to reach 0.6
    np.testing.assert_allclose(probs, want, atol=1e-6)


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    n = 4000
    controls = make_controls([SamplingConfig(temperature=0.5, top_k=3)] * n)
    keys = jax.random.split(jax.random.key(0), n)
    tokens, logps = sample(jnp.tile(logits, (n, 1)), keys, controls)[:2]
    want = np.array([0.25, 0.09, 0.0225, 0]) / 0.3625
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / n, want, atol=0.03)
    np.testing.assert_allclose(np.exp(logps), want[tokens], rtol=1e-5)


def test_min_p_cuts_what_is_far_less_likely_than_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 2))
    controls = make_controls([SamplingConfig(min_p=0.29), SamplingConfig(min_p=0.31)])
    probs = np.exp(log_distribution(logits, controls, True))
    np.testing.assert_allclose(probs[0], np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=1e-6)
    np.testing.assert_allclose(probs[1], [0.625, 0.375, 0, 0], atol=1e-6)


def test_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(0)
    logits, prompts = rng.normal(size=(3, 64)).astype(np.float32), make_prompts(3)
    seen = np.zeros((3, 64), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    controls = make_controls([SamplingConfig(repetition_penalty=p) for p in (1.0, 1.3, 0.8)])
    got = log_distribution(jnp.asarray(logits), controls, False, jnp.asarray(seen))
    for b, penalty in enumerate((1.0, 1.3, 0.8)):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        scores = processor(torch.tensor([prompts[b]]), torch.tensor(logits[b : b + 1]))
        np.testing.assert_allclose(got[b], torch.log_softmax(scores, -1)[0], atol=1e-5)


def test_a_heavy_penalty_repeats_nothing_of_prompt_or_answer(params):
    """Greedy, with a penalty for all but every other request: the two kinds share their batch."""
    plain, never = (
        SamplingConfig(0, max_new_tokens=20),
        SamplingConfig(0, max_new_tokens=20, repetition_penalty=1e6),
    )
    prompts = make_prompts(8, seed=2)
    mixed = generate(params, ARCH, prompts, jax.random.key(0), [plain, never] * 4)
    alone = generate(params, ARCH, prompts, jax.random.key(0), plain)
    assert [c.tokens for c in mixed[::2]] == [c.tokens for c in alone[::2]]
    for prompt, completion in zip(prompts[1::2], mixed[1::2], strict=True):
        assert len({*completion.tokens} - {*prompt}) == 20
    assert any(len(set(c.tokens)) < 20 for c in alone)


def test_every_request_has_its_own_settings(params):
    """Limits, temperatures and cuts differ within a batch, and each request is as if it were alone."""
    prompts = make_prompts(6, seed=4)
    settings = [
        SamplingConfig(0, max_new_tokens=5),
        SamplingConfig(1.0, max_new_tokens=9),
        SamplingConfig(1.0, top_k=2, max_new_tokens=12),
        SamplingConfig(0.5, top_p=0.5, max_new_tokens=7),
        SamplingConfig(1.0, min_p=0.4, max_new_tokens=3),
        SamplingConfig(0.8, top_k=5, top_p=0.9, min_p=0.1, max_new_tokens=11),
    ]
    key = jax.random.key(3)
    out = generate(params, ARCH, prompts, key, settings)
    assert [len(c.tokens) for c in out] == [5, 9, 12, 7, 3, 11]
    for i, setting in enumerate(settings):
        same = generate(params, ARCH, prompts, key, [setting] * 6)
        assert same[i].tokens == out[i].tokens
        np.testing.assert_allclose(same[i].logprobs, out[i].logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="one for each of the 6 prompts, got 5"):
        generate(params, ARCH, prompts, key, settings[:5])


def test_a_shared_prompt_is_read_once(params):
    """Answers to equal prompts are those to prompts read one by one, and each prompt is read once a wave."""
    prompts = [p for p in make_prompts(4, seed=6) for _ in range(8)]
    sampling, key = SamplingConfig(max_new_tokens=16), jax.random.key(5)
    shared = generate(params, ARCH, prompts, key, sampling, [EOS], max_batch=16)
    # in another order no prompt follows itself; request 0 has the same key in both
    mixed = [prompts[8 * (i % 4)] for i in range(32)]
    apart = generate(params, ARCH, mixed, key, sampling, [EOS], max_batch=16)
    assert apart[0] == shared[0]
    engine = Engine(params, ARCH, EngineConfig(slots=16, interleave=False, reuse=0))
    jobs = [Job(tuple(p), sampling, job_key(0, i)) for i, p in enumerate(prompts)]
    out = complete(engine, jobs)
    assert engine.stats.prompt_tokens < sum(map(len, prompts)) / 2
    assert engine.stats.prompt_tokens + engine.stats.cached_tokens == sum(map(len, prompts))
    alone = Engine(params, ARCH, EngineConfig(slots=16, elastic=False, reuse=0))
    assert [complete(alone, [job])[0].tokens for job in jobs[::5]] == [c.tokens for c in out[::5]]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 2**31},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_bad_sampling_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)
