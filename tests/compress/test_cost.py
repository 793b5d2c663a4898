"""Costs: Model Optimizer's memory to the last bit, times that add up, and rates that follow from them."""

from __future__ import annotations

import dataclasses

import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, load_arch, uniform
from nemojax.compress.cost import (
    CostConfig,
    Prices,
    Scenario,
    Step,
    block_costs,
    counted,
    fixed_costs,
    provenance,
    times,
    tokens_of,
)
from nemojax.compress.search import solve
from nemojax.compress.space import Space, choice_name, choices
from nemojax.compress.table import Table
from nemojax.config import from_dict, to_dict
from tests.compress.tiny import ARCH

COUNTED = CostConfig(batch=96, context=8192, dtype="bfloat16", timings=())
CHAT = Scenario("chat", batch=2, input=6, output=5)
LONG = Scenario("long", batch=1, input=4, output=1, counted="output")


def totals(arch: ArchSpec, config: CostConfig) -> tuple[float, float]:
    """(parameters, MiB) of a model: its blocks and what is outside them."""
    costs = block_costs(arch, [[block] for block in arch.blocks], config)
    fixed = fixed_costs(arch, config)
    params, mib = (sum(costs[b][n] for b in arch.blocks) + fixed[n] for n in ("params", "memory_mib"))
    return params, mib


@pytest.mark.parametrize(
    "removed, params, mib",
    [
        ((), 8_030_261_248, 113_620.5078125),
        ((18, 19, 20, 22, 23, 24), 7_778_578_432, 94_708.4609375),
        (tuple(range(17, 29)), 7_526_895_616, 75_796.4140625),
    ],
)
def test_model_optimizers_memory(removed, params, mib):
    """Its README's rows for Llama-3.1-8B at batch 96, 4096 + 4096 tokens, bf16: the teacher and the children
    that lost these layers' attention."""
    parent = load_arch("llama_3_1_8b")
    blocks = tuple(BlockSpec(NoOp(), b.ffn) if i in removed else b for i, b in enumerate(parent.blocks))
    assert totals(parent.replace(blocks=blocks), COUNTED) == (params, mib)
    served = CostConfig(timings=(), scenarios=())
    config = dataclasses.replace(served, scenarios=(Scenario("chat", batch=96, input=4096, output=4096),))
    chat = counted(parent, parent.blocks[0], config)["chat_memory_mib"]
    assert chat == counted(parent, parent.blocks[0], COUNTED)["memory_mib"]


def test_what_a_cache_holds():
    """A window keeps no more than itself, linear attention nothing; there is one embedding when tied."""
    config = CostConfig(batch=3, context=40, dtype="float32", timings=())

    def kv(attn) -> float:
        return counted(ARCH, BlockSpec(attn, NoOp()), config)["kv_mib"] * 2**20 / 4

    assert kv(Attention(2)) == 2 * 2 * 8 * 40 * 3
    assert kv(Attention(2, 16)) == 2 * 2 * 8 * 16 * 3 and kv(Attention(2, 64)) == kv(Attention(2))
    assert kv(Linear()) == kv(NoOp()) == 0
    tied = ARCH.replace(tie_embeddings=True)
    assert fixed_costs(tied, config)["params"] == 61 * 32 + 32
    assert fixed_costs(ARCH, config)["params"] == 2 * 61 * 32 + 32


def counting() -> tuple[Prices, list]:
    """Prices by a formula: a sub-block's number of new tokens, and of cached ones for attention."""
    asked = []

    def sub(arch, part, sub, step):
        asked.append((part, sub, step))
        cached = step.cached if isinstance(sub, Attention) else 0
        return {"attn": 1.0, "ffn": 10.0}[part] * step.batch * (step.tokens + cached)

    return Prices(sub, lambda arch, step: 1000.0 * step.batch, "counted by a formula"), asked


def test_times_come_from_any_prices():
    config = CostConfig(
        timings=("prefill", "decode"), timing_batch=4, timing_length=8, scenarios=(CHAT, LONG)
    )
    prices, asked = counting()
    full, lean = ARCH.blocks[0], BlockSpec(NoOp(), Linear())
    costs = block_costs(ARCH, [[full, lean], [full]], config, prices)
    assert costs[full]["prefill_ms"] == 4 * 8 * 11 and costs[full]["decode_ms"] == 4 * (1 + 7) + 40
    # a prefill of 6, and 4 more tokens, each over 6 + 5 / 2 keys
    assert costs[full]["chat_ms"] == 2 * 6 * 11 + 4 * (2 * (1 + 7) + 2 * 10)
    assert costs[full]["long_ms"] == 4 * 11
    assert costs[lean]["chat_ms"] == 2 * 6 * 10 + 4 * 2 * 10
    assert len(asked) == len(set(asked)) and not any(isinstance(sub, NoOp) for _, sub, _ in asked)
    fixed = fixed_costs(ARCH, config, prices)
    assert fixed["prefill_ms"] == 4000.0 and fixed["chat_ms"] == 5 * 2000.0 and "kv_mib" not in fixed
    assert tokens_of(config) == {"prefill_ms": 32, "decode_ms": 4, "chat_ms": 2 * 11, "long_ms": 1}
    words = provenance(config, prices)
    assert set(words) == set(costs[full]) and all(words.values())
    assert words["chat_ms"].startswith("counted by a formula, batch 2, 6 tokens in, 5 out")


def test_a_rate_bounds_the_search():
    """From costs to a child that is fast enough, what is outside the blocks taken off first."""
    config = CostConfig(timings=(), scenarios=(CHAT,))
    prices, _ = counting()
    options = choices(Space(ffn_ratios=(0.5,), multiple=8), ARCH)
    costs = block_costs(ARCH, options, config, prices)
    rows = tuple(
        tuple({"name": choice_name(o), "score": float(j), **costs[o]} for j, o in enumerate(row))
        for row in options
    )
    table = Table(rows, fixed_costs(ARCH, config, prices), tokens_of(config), provenance(config, prices))
    assert Table.from_json(table.to_json()) == table
    parent = 3 * costs[ARCH.blocks[0]]["chat_ms"] + 10_000
    assert table.total("chat_tokens_per_s", (0, 0, 0)) == pytest.approx(22_000 / parent)
    found = solve(table, minimum={"chat_tokens_per_s": 22_000 / (parent - 1)})[0]
    assert 0 < found.objective and found.totals["chat_tokens_per_s"] > 22_000 / (parent - 1)
    assert solve(table, minimum={"chat_tokens_per_s": 22_000 / parent})[0].objective == 0


def test_scenarios_as_steps():
    config = CostConfig(timings=("decode",), timing_batch=4, timing_length=8, scenarios=(CHAT, LONG))
    assert times(config) == {
        "decode_ms": [(Step(4, 1, 7), 1.0)],
        "chat_ms": [(Step(2, 6), 1.0), (Step(2, 1, 7), 4.0)],
        "long_ms": [(Step(1, 4), 1.0)],
    }
    assert from_dict(CostConfig, to_dict(config)) == config
    assert times(config.without_times()) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stopwatch(dtype):
    """Every kind of sub-block, of a mixed parent with tied embeddings, is measured and adds up."""
    arch = uniform(
        vocab_size=61, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=48, context=64,
        head_dim=8, tie_embeddings=dtype == "float32",
    )  # fmt: skip
    full, window = BlockSpec(Attention(2), SwiGLU(48)), BlockSpec(Attention(1, 4), Linear())
    empty, linear = BlockSpec(NoOp(), NoOp()), BlockSpec(Linear(), NoOp())
    config = CostConfig(
        timings=("prefill", "decode"), timing_batch=2, timing_length=8, timing_dtype=dtype, repeats=1,
        scenarios=(CHAT,),
    )  # fmt: skip
    costs, fixed = block_costs(arch, [[full, window, empty, linear]], config), fixed_costs(arch, config)
    for name in ("prefill_ms", "decode_ms", "chat_ms"):
        assert costs[empty][name] == 0 and min(costs[b][name] for b in (full, window, linear)) > 0
        assert fixed[name] > 0
        assert dtype in provenance(config)[name] and "measured on" in provenance(config)[name]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scenarios": [{"name": "a b"}]}, "scenarios.0.name: expected a word other than prefill.*got 'a b'"),
        ({"scenarios": [{"name": "decode"}]}, "scenarios.0.name: expected a word"),
        ({"scenarios": [{"name": "x", "output": 0}]}, "scenarios.0.output: expected at least 1, got 0"),
        ({"scenarios": [{"name": "x"}, {"name": "x"}]}, "scenarios: expected different names, got x, x"),
        ({"scenarios": [{}]}, "scenarios.0.name: expected a value"),
        ({"context": 0}, "context: expected at least 1, got 0"),
    ],
)
def test_bad_situations(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(CostConfig, values)
