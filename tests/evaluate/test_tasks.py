"""Statistics of pass@1, against numbers worked by hand."""

import numpy as np
import pytest

from nemojax.evaluate.tasks import (
    flat_scores,
    load_records,
    paired_bootstrap,
    pass_at_k,
    per_prompt,
    save_records,
    summarise,
)


def record(thinking, *accuracy, family="sum2"):
    n = len(accuracy)
    return {
        "family": family,
        "thinking": thinking,
        "accuracy": list(accuracy),
        "form": [1.0] * n,
        "text": ["é"] * n,
        "tokens": [4] * n,
        "finished": [True] * n,
    }


@pytest.mark.parametrize("n, c, k, value", [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 3, 2, 1.0), (5, 0, 5, 0.0)])
def test_pass_at_k(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value)


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="1..2"):
        pass_at_k(2, 1, 3)


def test_a_failed_verifier_is_left_out_and_counted():
    records = [record(True, 1.0, None), record(True, None, None), record(True, 0.0, 1.0)]
    np.testing.assert_equal(per_prompt(records), [1.0, np.nan, 0.5])
    summary = summarise(records)["on"]["all"]
    assert summary["pass@1"] == 0.75 and summary["verifier_error_rate"] == 0.5
    assert summary["pass@2"] == 1.0 and summary["prompts"] == 3


def test_families_and_modes_are_told_apart():
    records = [record(True, 1.0), record(False, 0.0), record(False, 1.0, family="sort3")]
    table = summarise(records)
    assert table["on"]["sum2"]["pass@1"] == 1.0
    assert table["off"]["all"]["pass@1"] == 0.5 and table["off"]["sort3"]["pass@1"] == 1.0
    assert flat_scores(records)["accuracy/off"] == 0.5


def test_bootstrap_interval_matches_the_normal_one():
    rng = np.random.default_rng(0)
    a = (rng.random(2000) < 0.5).astype(float)
    b = np.where(rng.random(2000) < 0.2, 1.0, a)
    mean, low, high = paired_bootstrap(a, b)
    d = b - a
    half = 1.96 * d.std() / np.sqrt(d.size)
    assert mean == pytest.approx(d.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=2e-3), pytest.approx(mean + half, abs=2e-3))
    assert paired_bootstrap(a, b) == (mean, low, high)


def test_bootstrap_is_paired_and_drops_failures():
    assert paired_bootstrap([0, 1, np.nan], [1, 1, 1])[0] == 0.5
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0, 0, 0)
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap([1, 0], [1])


def test_records_round_trip(tmp_path):
    records = [record(True, 1.0, None)]
    save_records(tmp_path / "r.jsonl", records)
    assert load_records(tmp_path / "r.jsonl") == records
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]
