"""Claims and tables from rows alone."""

from __future__ import annotations

import pytest

from nemojax.study.claims import claims, tables, values


def rows():
    parent = {"group": "parent", "name": "parent", "kl": 0.0, "loss": 1.0, "accuracy": 0.9, "params": 100.0}
    found = [parent]
    for seed in (0, 1):
        for name, kl in (("mip", 0.1 + 0.1 * seed), ("greedy", 0.16), ("uniform", 0.4)):
            key = {"group": "search", "seed": seed, "name": name, "ratio": 0.5, "draw": 0}
            found.append({**key, "kl": kl, "loss": 1 + kl, "accuracy": 0.9 - kl, "params": 50.0})
        for draw in (0, 1):
            key = {"group": "search", "seed": seed, "name": "random", "ratio": 0.5, "draw": draw}
            found.append({**key, "kl": 0.5 + draw, "loss": 2.0, "accuracy": 0.0, "params": 50.0})
    return found


def test_a_seed_counts_once_however_many_draws_it_has():
    assert values(rows(), "search", "random", "kl", 0.5) == {0: 1.0, 1: 1.0}


def test_a_claim_holds_seed_by_seed():
    by_claim = {(c["claim"], c["measure"]): c for c in claims(rows(), 0.5)}
    greedy = by_claim["MIP beats greedy", "kl"]
    assert greedy["holds"] == "1/2" and greedy["low"] == pytest.approx(-0.04)
    assert greedy["high"] == pytest.approx(0.06) and greedy["gain"] == pytest.approx(0.01)
    assert by_claim["MIP beats random", "kl"]["gain"] == pytest.approx(0.85)
    accuracy = by_claim["MIP beats one choice for all layers", "accuracy"]
    assert accuracy["holds"] == "2/2" and accuracy["gain"] == pytest.approx(0.25)
    assert not [claim for claim, _ in by_claim if "no-ops" in claim]  # nothing was measured for it


def test_the_table_names_every_way_with_mean_and_spread():
    text = tables(rows(), claims(rows(), 0.5))
    assert "| mip | 0.150 ± 0.071 | 75.0 ± 7.1% |" in text
    assert "| random | 1.000 ± 0.000 | 0.0 ± 0.0% |" in text
    assert "| MIP beats greedy | 50% | kl | +0.0100 [-0.0400, +0.0600] | 1/2 |" in text
