"""Group advantages against numbers worked by hand."""

import numpy as np
import pytest

from nemojax.rl.advantages import group_advantages


@pytest.mark.parametrize(
    "normalize, leave_one_out, size", [(True, False, 0.8660), (False, False, 0.5), (False, True, 0.6667)]
)
def test_known_numbers(normalize, leave_one_out, size):
    out = group_advantages(np.array([[1.0, 0, 0, 1]]), normalize, leave_one_out)
    np.testing.assert_allclose(out.values_PG, [[size, -size, -size, size]], atol=1e-4)
    assert out.used_PG.all() and out.baseline_P[0] == 0.5


def test_groups_without_signal_are_filtered_and_counted():
    out = group_advantages(np.array([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]))
    assert out.used_PG.sum(1).tolist() == [0, 0, 4]
    assert not out.values_PG[:2].any()
    assert out.metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert out.metrics["baseline_reward/pct_1"] == pytest.approx(1 / 3)


def test_a_lone_success_survives_leave_one_out():
    out = group_advantages(np.array([[1.0, 0, 0, 0]]), True, True)
    assert out.used_PG.all() and out.values_PG[0, 0] > 0


def test_a_failed_verifier_is_masked_never_zero():
    out = group_advantages(np.array([[1.0, np.nan, 0, 1], [np.nan, np.nan, 1, np.nan]]))
    assert out.used_PG.tolist() == [[True, False, True, True], [False] * 4]
    assert out.baseline_P[0] == pytest.approx(2 / 3)
    assert out.values_PG[0, 1] == 0
    assert out.metrics["verifier_error_rate"] == pytest.approx(0.5)
