"""Jobs that come and go: what an engine serves does not depend on how, and nothing is done twice."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.data.examples import Example
from nemojax.data.packing import make_batch
from nemojax.generate.completions import complete
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Job, ThinkingBudget, job_key
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import Compute, init_params
from nemojax.rl.loss import policy_logps
from nemojax.sharding import MeshConfig, make_mesh

ARCH = ArchSpec(
    vocab_size=64,
    dim=32,
    num_heads=4,
    head_dim=8,
    context=192,
    blocks=(
        BlockSpec(Attention(2), SwiGLU(48)),
        BlockSpec(Attention(2), SwiGLU(48)),
        BlockSpec(NoOp(), SwiGLU(32)),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Linear(), NoOp()),
        BlockSpec(Attention(1, window=6), Linear()),
    ),
)
EOS = 3
SMALL = EngineConfig(slots=4, prefill_chunk=16, prefill_tokens=32, decode_steps=4, elastic=False)


@pytest.fixture(scope="module")
def params():
    # a sharper model than a fresh one: logits of several nats, so that errors would show
    return jax.tree.map(lambda w: w * 1.5, init_params(ARCH, jax.random.key(0)))


def prompt(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(4, 64, size=length).tolist())


def job(prompt, sample=0, new=12, **kwargs):
    sampling = kwargs.pop("sampling", SamplingConfig(max_new_tokens=new))
    return Job(prompt, sampling, job_key(7, sample), kwargs.pop("stop_ids", (EOS,)), **kwargs)


def run(engine, numbers):
    """{job: (tokens, finish)} of the jobs, stepping until all are done."""
    out = {number: ([], None) for number in numbers}
    while engine.has_work:
        for event in engine.step():
            assert out[event.job][1] is None and len(event.tokens) == len(event.logprobs)
            out[event.job] = (out[event.job][0] + event.tokens, event.finish)
    return out


def alone(params, job, cfg=SMALL):
    return complete(Engine(params, ARCH, cfg), [job])[0]


@pytest.fixture(scope="module")
def jobs():
    """Prompts of one to three chunks, some the same, some beginning the same."""
    start = prompt(40, seed=9)
    prompts = [prompt(n, seed=n) for n in (3, 16, 17, 45)] + [start, start, (*start, 5, 6), prompt(33, 1)]
    return [job(p, sample=i) for i, p in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(params, jobs):
    return [alone(params, j) for j in jobs]


def test_jobs_that_arrive_while_others_run(params, jobs, expected):
    """Chunked prompts, refilled slots, shared beginnings: each job is as if it were alone."""
    engine = Engine(params, ARCH, SMALL)
    numbers, events, waiting = [], [], list(jobs)
    while waiting or engine.has_work:
        if waiting:
            numbers.append(engine.submit(waiting.pop(0)))
        events += engine.step()
    for number, want in zip(numbers, expected, strict=True):
        mine = [e for e in events if e.job == number]
        assert [t for e in mine for t in e.tokens] == want.tokens
        got = [p for e in mine for p in e.logprobs]
        np.testing.assert_allclose(got, want.logprobs, atol=1e-4)
        assert [e.finish for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish == ("stop" if want.finished else "length")
    stats = engine.stats
    assert stats.finished == len(jobs) and not engine.num_running and not engine.num_waiting
    assert stats.prompt_tokens + stats.cached_tokens == sum(len(j.prompt) for j in jobs)
    assert stats.cached_tokens >= 40 + 39  # one prompt and the beginning of another were there already
    assert stats.generated_tokens == sum(len(c.tokens) for c in expected)


@pytest.mark.parametrize(
    "change",
    [
        {"elastic": True, "slots": 16},
        {"interleave": False, "decode_steps": 7},
        {"prefill_chunk": 64, "min_keys": 16},
        {"reuse": 0},
        {"reuse": 1},
    ],
    ids=lambda c: "-".join(c),
)
def test_how_it_is_served_changes_nothing(params, jobs, expected, change):
    cfg = dataclasses.replace(SMALL, **change)
    engine = Engine(params, ARCH, cfg)
    out = complete(engine, jobs)
    assert [c.tokens for c in out] == [c.tokens for c in expected]
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    assert engine.stats.cached_tokens > 0  # without reuse, equal prompts are still read once


def test_a_mesh_serves_the_same(params, jobs, expected):
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    engine = Engine(params, ARCH, SMALL, mesh=mesh)
    cache = engine._state.cache["000"]["k"]
    assert cache.sharding.shard_shape(cache.shape) == (2, 2, 1, ARCH.context, 8)  # of 4 slots, 2 heads
    assert [c.tokens for c in complete(engine, jobs)] == [c.tokens for c in expected]


def test_a_conversation_goes_on_where_it_ended(params):
    """What was generated is reused too; two conversations in turn do not drive each other out."""
    engine = Engine(params, ARCH, SMALL)
    histories = [prompt(30, seed=1), prompt(30, seed=2)]
    for turn in range(3):
        for i, history in enumerate(histories):
            before = engine.stats.cached_tokens
            ask = job((*history, 4 + i, 5, 6), new=10, stop_ids=())
            fresh = alone(params, ask)
            got = run(engine, [engine.submit(ask)])
            [(tokens, finish)] = got.values()
            assert tokens == fresh.tokens and finish == "length"
            shared = engine.stats.cached_tokens - before
            assert shared == (0 if not turn else len(history) - 1)
            histories[i] = (*ask.prompt, *tokens)


def test_a_cancelled_job_frees_its_slot(params):
    engine = Engine(params, ARCH, dataclasses.replace(SMALL, slots=1))
    first = engine.submit(job(prompt(20), new=100, stop_ids=()))
    second = engine.submit(job(prompt(8, 3), new=5, stop_ids=()))
    third = engine.submit(job(prompt(9, 3), new=5, stop_ids=()))
    assert engine.num_waiting == 3
    engine.step()
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    engine.cancel(first)
    engine.cancel(third)
    engine.cancel(12345)
    out = run(engine, [second])
    assert out[second] == (alone(params, job(prompt(8, 3), new=5, stop_ids=())).tokens, "length")
    assert engine.stats.cancelled == 2 and engine.stats.finished == 1 and not engine.has_work


def test_the_reader_of_a_shared_prompt_is_cancelled(params):
    """Others wait for it to read; one of them reads on."""
    engine = Engine(params, ARCH, SMALL)
    shared = prompt(60, seed=4)
    numbers = [engine.submit(job(shared, sample=i)) for i in range(3)]
    engine.step()
    assert engine.num_running == 3
    engine.cancel(numbers[0])
    out = run(engine, numbers[1:])
    for i in (1, 2):
        assert out[numbers[i]][0] == alone(params, job(shared, sample=i)).tokens
    assert engine.stats.prompt_tokens == 60


@functools.partial(jax.jit, static_argnums=(2, 3))
def trainer_logps(params, batch, temperature=1.0, dtype="float32"):
    compute = Compute(dtype=dtype)  # pyright: ignore[reportArgumentType]
    return policy_logps(params, ARCH, batch, temperature=temperature, compute=compute)


def drift(params, jobs, completions, dtype="float32"):
    """Largest and mean |difference| of log-probabilities: the engine's, the trainer's on packed rows."""
    examples = [
        Example(np.array([*j.prompt, *c.tokens]), np.array([0.0] * len(j.prompt) + [1.0] * len(c.tokens)))
        for j, c in zip(jobs, completions, strict=True)
    ]
    rows = [examples[i : i + 2] for i in range(0, len(examples), 2)]
    batch = make_batch(rows, 128, 0)
    logps = np.asarray(trainer_logps(params, batch, 1.0, dtype))
    out = []
    for b, row in enumerate(rows):
        start = 0
        for k, _ in enumerate(row):
            j, c = jobs[2 * b + k], completions[2 * b + k]
            at = start + len(j.prompt) - 1
            out += np.abs(logps[b, at : at + len(c.tokens)] - np.array(c.logprobs)).tolist()
            start += len(j.prompt) + len(c.tokens) - 1
    return max(out), float(np.mean(out))


def test_the_trainer_gives_what_the_engine_said(params, jobs):
    """Chunked prompts and cache hits here, packed rows with padding there: within 1e-4 nats in f32."""
    engine = Engine(params, ARCH, SMALL)
    out = complete(engine, jobs)
    assert engine.stats.cached_tokens > 0
    assert drift(params, jobs, out)[0] <= 1e-4


def test_bf16_drifts_no_more_than_bf16_rounds(params, jobs):
    """Engine and trainer, both in bf16, lie no further apart than the engine lies from f32."""
    compute = Compute(dtype="bfloat16")
    out = complete(Engine(params, ARCH, SMALL, compute=compute), jobs)
    largest, mean = drift(params, jobs, out, "bfloat16")
    _, rounding = drift(params, jobs, out)
    assert 0 < mean < rounding and largest < 0.5


def test_a_smaller_cache_says_nearly_the_same(params, jobs):
    """The fewer bits, the further from the trainer; all far nearer than another model would be."""
    mean = {}
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        engine = Engine(params, ARCH, dataclasses.replace(SMALL, cache_dtype=dtype))
        out = complete(engine, jobs)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(engine._state.cache)} >= {dtype}
        mean[dtype] = drift(params, jobs, out)[1]
    other = drift(jax.tree.map(lambda w: w / 1.5, params), jobs, out)[1]
    assert 1e-4 < mean["bfloat16"] < mean["int8"] < mean["float8_e4m3fn"] < other / 4


def test_top_logprobs_are_those_of_the_distribution(params):
    sampling = SamplingConfig(0.7, top_k=5, max_new_tokens=6)
    ask = job(prompt(12), sampling=sampling, stop_ids=(), top_logprobs=8)
    engine = Engine(params, ARCH, SMALL)
    engine.submit(job(prompt(20, 2), new=6, stop_ids=()))  # asks for none
    number = engine.submit(ask)
    events = []
    while engine.has_work:
        events += engine.step()
    mine = [e for e in events if e.job == number]
    top = [step for e in mine for step in e.top]
    tokens, logprobs = ([x for e in mine for x in getattr(e, name)] for name in ("tokens", "logprobs"))
    assert len(top) == 6 and not any(e.top for e in events if e.job != number)
    for step, token, logprob in zip(top, tokens, logprobs, strict=True):
        values = [p for _, p in step]
        assert len(step) == 8 and values == sorted(values, reverse=True)
        assert np.exp(values[:5]).sum() == pytest.approx(1, abs=1e-5) and values[5] == -np.inf
        assert dict(step)[token] == pytest.approx(logprob, abs=1e-6)
    greedy = job(prompt(12), sampling=SamplingConfig(0, max_new_tokens=3), stop_ids=(), top_logprobs=2)
    for report, least in (("sampled", 0.0), ("model", -5.0)):
        engine = Engine(params, ARCH, dataclasses.replace(SMALL, logprobs=report))
        number = engine.submit(greedy)
        [event] = [e for events in iter(engine.step, []) for e in events if e.finish]
        assert 0 >= event.logprobs[-1] >= least and (event.logprobs[-1] == 0) == (report == "sampled")
        assert event.top[-1][0] == (event.tokens[-1], event.logprobs[-1])
        assert (event.top[-1][1][1] == -np.inf) == (report == "sampled")


THINK, END = (10, 11), (12,)


@pytest.mark.parametrize("tokens", [0, 1, 5, 9])
def test_a_thinking_budget_closes_the_reasoning(params, tokens):
    """The prompt has opened the tags; after the budget the close is written, and the model goes on."""
    budget = ThinkingBudget(tokens, THINK, END, (20, 12))
    ask = job((*prompt(20), *THINK), new=24, stop_ids=(), budget=budget)
    free = alone(params, job(ask.prompt, new=24, stop_ids=())).tokens
    cut = max(1, tokens)  # one token comes with the prompt
    assert 12 not in free[:cut]
    for cfg in (SMALL, dataclasses.replace(SMALL, decode_steps=1, reuse=0)):
        engine = Engine(params, ARCH, cfg)
        others = [engine.submit(job(prompt(8, i), new=20, stop_ids=())) for i in range(2)]
        number = engine.submit(ask)
        events = []
        while engine.has_work:
            events += engine.step()
        got = [t for e in events if e.job == number for t in e.tokens]
        logps = [p for e in events if e.job == number for p in e.logprobs]
        assert got[: cut + 2] == [*free[:cut], 20, 12] and len(got) == 24
        assert logps[cut : cut + 2] == [0.0, 0.0] and all(p < 0 for p in logps[cut + 2 :])
        # it goes on from what was written: as from a prompt that ends there
        again = job((*ask.prompt, *got[: cut + 2]), new=22 - cut, stop_ids=())
        assert got[cut + 2 :] == alone(params, again).tokens
        assert all(len([t for e in events if e.job == n for t in e.tokens]) == 20 for n in others)


def test_reasoning_that_ends_in_time_is_left_alone(params):
    ask = job((*prompt(20), *THINK), new=16, stop_ids=())
    free = alone(params, ask).tokens
    budget = ThinkingBudget(9, THINK, (free[4],), (20, free[4]))
    assert alone(params, job(ask.prompt, new=16, stop_ids=(), budget=budget)).tokens == free


class Only:
    """A grammar of fixed length: at step i, token `order[i]` or the one above it; then nothing more."""

    def __init__(self, order):
        self.order, self.seen = order, []

    def allowed(self):
        mask = np.zeros(ARCH.vocab_size, bool)
        if len(self.seen) < len(self.order):
            mask[self.order[len(self.seen)] : self.order[len(self.seen)] + 2] = True
        return mask

    def advance(self, token):
        self.seen.append(token)


def test_a_grammar_decides_and_the_others_do_not_notice(params):
    order = [8, 20, 8, 30, 41]
    free = job(prompt(17), new=12, stop_ids=())
    engine = Engine(params, ARCH, SMALL)
    numbers = [engine.submit(free), engine.submit(job(prompt(9), constraint=lambda: Only(order)))]
    out = run(engine, numbers)
    assert out[numbers[0]][0] == alone(params, free).tokens
    tokens, finish = out[numbers[1]]
    assert finish == "stop" and all(t in (o, o + 1) for t, o in zip(tokens, order, strict=True))
    # of two tokens allowed, the log-probability is under the two
    [completion] = complete(
        engine, [job(prompt(9), constraint=lambda: Only(order), sampling=SamplingConfig(5.0))]
    )
    assert all(-4 < p < 0 for p in completion.logprobs)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompt": ()}, "at least one token"),
        ({"prompt": (5,) * 192}, "fewer than 192"),
        ({"prompt": (64,)}, "below 64"),
        ({"prompt": (5,), "top_logprobs": 21}, "0 to 20"),
    ],
)
def test_bad_jobs_are_refused(params, bad, message):
    engine = Engine(params, ARCH, SMALL)
    with pytest.raises(ValueError, match=message):
        engine.submit(Job(**bad))
    assert not engine.has_work and engine.step() == []


@pytest.mark.parametrize("bad", [{"slots": 0}, {"context": -1}, {"decode_steps": 0}, {"reuse": -1}])
def test_bad_configurations_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineConfig(**bad)


@pytest.mark.parametrize("seed, sample", [(0, 0), (7, 3), (2**32 - 1, 9), (2**31, 2**20)])
def test_keys_of_samples_are_those_of_jax(seed, sample):
    key = jax.random.fold_in(jax.random.key(seed), sample)
    assert job_key(seed, sample) == tuple(jax.random.key_data(key).tolist())
