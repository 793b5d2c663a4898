"""Prices of chips that are not at hand: by their facts, with their provenance, and refused where unknown."""

import importlib.util
import os

import pytest

from nemojax.arch import Attention, BlockSpec, Linear, NoOp, SwiGLU, load_arch, uniform
from nemojax.backends.chips import load_chip
from nemojax.backends.roofline import scores_load
from nemojax.compress.cost import CostConfig, Scenario, Step, block_costs, fixed_costs, provenance
from nemojax.compress.prices import prices_of
from nemojax.compress.subblock import Part
from nemojax.config import from_dict

ARCH = load_arch("llama_3_1_8b")
FULL, NARROW, EMPTY = ARCH.blocks[0], BlockSpec(Attention(2), SwiGLU(3584)), BlockSpec(NoOp(), NoOp())


def config(chip: str) -> CostConfig:
    scenario = Scenario("chat", batch=8, input=1024, output=128)
    return CostConfig(timings=(), timing_dtype="bfloat16", scenarios=(scenario,), prices=f"roofline:{chip}")


def test_a_roofline_prices_what_is_not_here():
    costs = {chip: block_costs(ARCH, [[FULL, NARROW, EMPTY]], config(chip)) for chip in ("v5e", "h100")}
    for found in costs.values():
        assert found[FULL]["chat_ms"] > found[NARROW]["chat_ms"] > found[EMPTY]["chat_ms"] == 0
    assert costs["v5e"][FULL]["chat_ms"] > 3 * costs["h100"][FULL]["chat_ms"]
    # decoding reads the weights at every step, at the chip's bandwidth or slower
    weights = 2 * costs["h100"][FULL]["params"]
    assert costs["h100"][FULL]["chat_ms"] > 127e3 * weights / load_chip("h100").hbm_bandwidth
    assert fixed_costs(ARCH, config("h100"))["chat_ms"] > 0
    assert "roofline of h100 (989 TFLOP/s, 3352 GB/s)" in provenance(config("h100"))["chat_ms"]


needs_libtpu = pytest.mark.skipif(
    not (os.environ.get("NEMOJAX_LIBTPU") or importlib.util.find_spec("libtpu")),
    reason="libtpu is not installed (200 MB; the extra `tpu`)",
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("step", [Step(4, 512), Step(8, 1, 1023)], ids=["prefill", "decode"])
def test_a_tpu_compiler_expects_more_than_the_roofline(step):
    """Never less than the chip's peaks allow, not much more for large matmuls, and less for less work."""
    arch = uniform(
        vocab_size=32000, dim=2048, num_layers=1, num_heads=16, num_kv_heads=16, ffn_width=8192, context=2048
    )
    compiled, bound = (prices_of(f"{kind}:v5e", "bfloat16", 1) for kind in ("compiled", "roofline"))
    kinds: dict[Part, tuple] = {
        "ffn": (SwiGLU(8192), SwiGLU(2048), Linear()),
        "attn": (Attention(16), Attention(2), Linear()),
    }
    for part, subs in kinds.items():
        expected = [compiled.sub_ms(arch, part, sub, step) for sub in subs]
        least = [bound.sub_ms(arch, part, sub, step) for sub in subs]
        assert expected == sorted(expected, reverse=True)
        assert all(e >= 0.95 * b for e, b in zip(expected, least, strict=True)), (expected, least)
        assert expected[0] < 3 * least[0]
    assert compiled.outer_ms(arch, step) > 0.95 * bound.outer_ms(arch, step)
    assert "compiler for v5e" in compiled.source


@pytest.mark.slow
@needs_libtpu
def test_a_kernel_of_which_a_tpu_compiler_says_nothing_has_its_price():
    """As many tokens in longer rows cost what attention between them does, which splash computes."""
    arch = uniform(
        vocab_size=512, dim=512, num_layers=1, num_heads=4, num_kv_heads=4, ffn_width=512, context=8192
    )
    prices, steps = prices_of("compiled:v5e", "bfloat16", 1), (Step(4, 2048), Step(1, 8192))
    short, long = (prices.sub_ms(arch, "attn", Attention(4), step) for step in steps)
    less, more = (
        scores_load(arch, Attention(4), batch=step.batch, tokens=step.tokens).flops for step in steps
    )
    assert long - short > 900 * (more - less) / load_chip("v5e").peak("bfloat16") > 0.1 * short


@pytest.mark.parametrize("prices", ["roofline:v9", "roofline", "compiled:h100", "guessed", "measured:v5e"])
def test_other_sources_are_refused(prices):
    with pytest.raises(ValueError, match="prices: expected measured, roofline:CHIP of .*h100.*got"):
        from_dict(CostConfig, {"prices": prices})
