import pytest

from nemojax.rewards.format import think_format


@pytest.mark.parametrize(
    "text, on, off",
    [
        ("<think>a</think>b", 1, 0),
        (" <think></think> b", 1, 0),
        ("<think>a</think>", 0, 0),
        ("<think>a", 0, 0),
        ("b<think>a</think>b", 0, 0),
        ("<think>a</think><think>a</think>b", 0, 0),
        ("</think>b", 0, 0),
        ("b", 0, 1),
    ],
)
def test_think_format(text, on, off):
    assert (think_format(text, True), think_format(text, False)) == (on, off)
