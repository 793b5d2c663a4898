"""math-verify in its killable process."""

import signal
import time

import pytest

from nemojax.rewards.maths import MathVerifier


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(num_workers=1, timeout=20.0) as verifier:
        yield verifier


def test_equivalence(verifier):
    pairs = [
        ("$\\frac{1}{2}$", "$0.5$"),
        ("$3$", "$4$"),
        ("$\\{1,2\\}$", "$\\{2,1\\}$"),
        ("12", "the answer is 12"),
    ]
    assert verifier.verify(pairs) == [1.0, 0.0, 1.0, 1.0]


def test_a_reference_that_cannot_be_read_is_a_failure_not_a_zero(verifier):
    assert verifier.verify([("", "$4$")]) == [None]


def test_a_late_worker_is_killed_and_replaced(verifier):
    assert verifier.verify([("$3$", "$3$")]) == [1.0]
    verifier._workers[0].send_signal(signal.SIGSTOP)
    verifier._timeout = 0.2
    start = time.monotonic()
    assert verifier.verify([("$3$", "$4$")]) == [None]
    assert time.monotonic() - start < 5
    verifier._timeout = 20.0
    assert verifier.verify([("$3$", "$3$")]) == [1.0]


def test_a_dead_worker_is_a_failure(verifier):
    assert verifier.verify([("$3$", "$3$")]) == [1.0]
    verifier._workers[0].kill()
    verifier._workers[0].wait()
    assert verifier.verify([("$3$", "$3$")])[0] in (None, 1.0)
    assert verifier.verify([("$3$", "$3$")]) == [1.0]
