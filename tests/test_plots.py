"""Drawings: one <svg> element each, with text as text and no foreign addresses."""

import math
import xml.etree.ElementTree as ET

import pytest

from nemojax import plots
from nemojax.arch import Attention, BlockSpec, Linear, NoOp, SwiGLU, load_arch, uniform

PARENT = uniform(vocab_size=64, dim=32, num_layers=3, num_heads=4, num_kv_heads=4, ffn_width=512, context=64)
CHILD = PARENT.replace(
    blocks=(BlockSpec(Attention(2, 16), SwiGLU(256)), BlockSpec(NoOp(), Linear()), PARENT.blocks[2])
)


def words(svg: str) -> str:
    """All text of a drawing, which must be well-formed and without addresses."""
    root = ET.fromstring(svg)
    assert root.tag == "svg" and root.get("role") == "img" and root.get("viewBox")
    assert "http" not in svg and "<metadata" not in svg
    assert plots._INK not in svg and "currentColor" in svg
    return " ".join(filter(None, (t.text for t in root.iter("text"))))


def test_curves():
    series = {"training <loss>": [(1, 4.0), (2, math.nan), (3, 2.0)], "_held-out $x$": [(3, 2.5)]}
    text = words(plots.curves(series, title='loss of "a" & <b>', ylabel="nats a token"))
    assert "training <loss>" in text and "_held-out $x$" in text and "nats a token" in text


def test_block_map():
    text = words(plots.block_map({"parent": PARENT, "child": CHILD}, title="map"))
    for cell in ("kv4", "ffn512", "kv2/w16", "ffn256", "linear", "parent", "child"):
        assert cell in text


def test_block_map_of_a_deep_model():
    assert words(plots.block_map({"ultra": load_arch("nemotron_ultra_253b")}, title="map"))


def test_tradeoff_and_bars():
    assert "b$" in words(
        plots.tradeoff({"a": (1, 2), "b$": (1, 2), "c": (math.nan, 1)}, title="t", xlabel="x", ylabel="y")
    )
    bars = {"parent": {"on": (0.5, 0.4, 0.6)}, "rl": {"on": (0.7, 0.6, 0.8), "off": (0.2, 0.1, 0.3)}}
    assert "off" in words(plots.grouped_bars(bars, title="t", ylabel="pass@1", top=1.0))


def test_labels_of_equal_dots_are_apart():
    places = plots._label_places([(1, 1), (1, 1), (5, 3)])
    assert places[0] != places[1] and places[2] == (True, 0)


@pytest.mark.parametrize("draw", [plots.block_map, plots.curves])
def test_nothing_to_draw(draw):
    words(draw({}, title="empty", **({"ylabel": "y"} if draw is plots.curves else {})))
