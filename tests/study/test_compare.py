"""The comparison of finished stages: numbers, claims, table, and what it refuses."""

import pytest

from nemojax.stage import run_stage
from nemojax.study.claims import spread
from nemojax.study.compare import Claim, Config, run


@pytest.fixture
def world(tmp_path):
    """{way: work directories of two seeds}; each a real stage with a result."""
    ways = {}
    for way, losses in {"kl": (1.0, 1.2), "lm": (1.5, 1.1)}.items():
        for seed, loss in enumerate(losses):
            result = {"heldout": {"loss": loss}, "gap_closed": 2 - loss}
            run_stage("made", Claim("a", "b", way), tmp_path / f"{way}-{seed}", [], lambda _, r=result: r)
        ways[way] = tuple(str(tmp_path / f"{way}-{seed}") for seed in range(2))
    return ways


NUMBERS = {"loss": "heldout.loss", "gap closed": "gap_closed"}


def test_numbers_and_claims_side_by_side(world, tmp_path):
    claims = (Claim("kl", "lm", "loss"), Claim("lm", "kl", "gap closed", higher=True))
    result = run(Config(world, NUMBERS, claims), tmp_path / "out")
    assert result["ways"]["kl"] == {"loss": [1.0, 1.2], "gap closed": [1.0, 0.8]}
    first, second = result["claims"]
    assert first["gain"] == pytest.approx(0.2) and first["holds"] == "1/2"
    assert (first["low"], first["high"]) == (pytest.approx(-0.1), pytest.approx(0.5))
    assert second["gain"] == pytest.approx(-0.2) and second["holds"] == "1/2"
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"| kl | {spread([1.0, 1.2], '{:.3f}')} | 0.900 ± 0.141 |" in text
    assert "| kl beats lm | loss | +0.200 [-0.100, +0.500] | 1/2 |" in text


def test_what_it_refuses(world, tmp_path):
    with pytest.raises(ValueError, match="claims: expected ways among kl, lm, got 'x'"):
        Config(world, NUMBERS, (Claim("x", "lm", "loss"),))
    with pytest.raises(ValueError, match="claims: expected a number among loss, gap closed, got 'kl'"):
        Config(world, NUMBERS, (Claim("kl", "lm", "kl"),))
    with pytest.raises(ValueError, match="ways, numbers: expected at least one of each"):
        Config()
    with pytest.raises(ValueError, match=r"kl-0: result.json: expected a number at 'heldout', got \{'loss'"):
        run(Config(world, {"loss": "heldout"}), tmp_path / "a")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ValueError, match="unfinished: expected a stage that is done"):
        run(Config({"kl": (str(tmp_path / "unfinished"),)}, NUMBERS), tmp_path / "b")
    lopsided = {"kl": world["kl"], "lm": world["lm"][:1]}
    with pytest.raises(ValueError, match="expected as many seeds of kl as of lm, got 2 and 1"):
        run(Config(lopsided, NUMBERS, (Claim("kl", "lm", "loss"),)), tmp_path / "c")
