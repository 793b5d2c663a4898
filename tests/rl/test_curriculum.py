"""Problem order: complete epochs, a moving Gaussian, and states that restore."""

import numpy as np
import pytest

from nemojax.rl.curriculum import CurriculumConfig, Gaussian, Uniform


def test_uniform_visits_every_problem_once_an_epoch():
    order = Uniform(10, seed=0)
    drawn = order.draw(7, 0) + order.draw(7, 0) + order.draw(6, 0)
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


@pytest.mark.parametrize(
    "make", [lambda: Uniform(10, 1), lambda: Gaussian(np.linspace(0, 1, 40), CurriculumConfig(samples=8), 1)]
)
def test_state_restores(make):
    a = make()
    a.draw(8, 0.2)
    b = make()
    b.restore(a.state())
    assert [a.draw(8, 0.5) for _ in range(3)] == [b.draw(8, 0.5) for _ in range(3)]


def test_the_centre_moves_from_easy_to_hard():
    rates = np.repeat(np.linspace(0, 1, 21), 20)
    curriculum = Gaussian(rates, CurriculumConfig(samples=8), seed=0)
    early, late = curriculum.draw(64, 0.0), curriculum.draw(64, 1.0)
    assert max(rates[early]) < 0.75 and rates[early].mean() > rates[late].mean() + 0.25
    assert len(set(early)) == 64


def test_short_bins_are_filled_from_the_largest():
    rates = np.array([0.7] * 2 + [0.1] * 50)
    drawn = Gaussian(rates, CurriculumConfig(samples=8), seed=0).draw(20, 0.0)
    assert len(set(drawn)) == 20 and {0, 1} <= set(drawn)


def test_no_problem_in_the_band_is_refused():
    with pytest.raises(ValueError, match="widen the band"):
        Gaussian(np.ones(5), CurriculumConfig(samples=8), seed=0)
