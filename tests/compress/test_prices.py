"""Prices of chips that are not at hand: by their facts, with their provenance, and refused where unknown."""

import pytest

from nemojax.arch import Attention, BlockSpec, NoOp, SwiGLU, load_arch
from nemojax.backends.chips import load_chip
from nemojax.compress.cost import CostConfig, Scenario, block_costs, fixed_costs, provenance
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


@pytest.mark.parametrize("prices", ["roofline:v9", "roofline", "compiled:h100", "guessed", "measured:v5e"])
def test_other_sources_are_refused(prices):
    with pytest.raises(ValueError, match="prices: expected measured, roofline:CHIP of .*h100.*got"):
        from_dict(CostConfig, {"prices": prices})
