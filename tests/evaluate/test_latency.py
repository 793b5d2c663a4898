"""The stopwatch, on a clock whose every tick is known and on a real one."""

import jax
import pytest

from nemojax.arch import uniform
from nemojax.evaluate import latency
from nemojax.evaluate.latency import LatencyConfig, measure
from nemojax.model.llama import init_params

ARCH = uniform(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32, context=64)


def test_numbers_follow_from_the_clock(monkeypatch):
    """30 ms up to the first tokens, 2 ms for every further one; one slow repetition changes no median."""
    now, calls = [0.0], []

    def generate(params, arch, prompts, key, sampling, **options):
        slow = 1.0 if len(calls) == 4 else 0.0
        calls.append((len(prompts), len(prompts[0]), sampling.max_new_tokens, sampling.temperature))
        assert options["new_capacity"] == 11 and options["max_batch"] == 4  # one program for both limits
        now[0] += 0.030 + 0.002 * (sampling.max_new_tokens - 1) + slow

    monkeypatch.setattr(latency, "generate", generate)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    got = measure({}, ARCH, LatencyConfig(batch=4, prompt=8, new_tokens=11, repeats=3))
    assert calls[0] == (4, 8, 11, 0.0) and len(calls) == 1 + 2 * 3
    assert got["prefill_ms"] == pytest.approx(30.0)
    assert got["decode_tokens_per_second"] == pytest.approx(4 / 0.002)


def test_a_real_model():
    cfg = LatencyConfig(batch=2, prompt=8, new_tokens=32, repeats=3)
    got = measure(init_params(ARCH, jax.random.key(0)), ARCH, cfg)
    # no bounds: on a busy machine so small a model shows the machine
    assert got["prefill_ms"] > 0 and got["decode_tokens_per_second"] > 0
