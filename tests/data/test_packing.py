"""Rows: nothing lost, nothing crossing, targets shifted inside a document, long documents by policy."""

import numpy as np
import pytest

from nemojax.data.examples import Example, StoredExamples, split_example
from nemojax.data.packing import Packer, make_batch, packed_batches, row_per_example, unpack
from tests.data.tiny import numbered


def test_every_token_is_predicted_once():
    lengths = [5, 17, 2, 33, 9, 9, 64, 3, 12, 40]
    examples = numbered(lengths)
    targets = []
    for batch in packed_batches(examples, batch_size=3, length=16, pad_id=0):
        assert batch["tokens"].shape == (3, 16)
        for tokens, target in unpack(batch):
            np.testing.assert_array_equal(tokens + 1, target)  # the documents count upwards
            targets += list(target)
    firsts = np.cumsum([0, *lengths[:-1]])
    expected = sorted(set(range(sum(lengths))) - set(firsts.tolist()))
    assert sorted(targets) == expected


def test_row_layout():
    first = Example(np.array([7, 8, 9], np.int32), np.array([1, 0, 1], np.float32))
    second = Example(np.array([5, 6], np.int32), np.array([1, 1], np.float32))
    batch = make_batch([[first, second], []], length=5, pad_id=99)
    np.testing.assert_array_equal(batch["tokens"], [[7, 8, 5, 99, 99], [99] * 5])
    np.testing.assert_array_equal(batch["targets"], [[8, 9, 6, 99, 99], [99] * 5])
    np.testing.assert_array_equal(batch["weights"], [[0, 1, 1, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 2, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 0, 0, 0], [0] * 5])


def test_best_fit_prefers_the_fullest_row_with_room():
    packer = Packer(length=10, lookahead=3)
    assert packer.add(6, (0,)) == [] and packer.add(8, (1,)) == []
    assert packer.add(2, (2,)) == [[(1,), (2,)]]  # completes the row of 8, not the row of 6
    assert packer.add(7, (3,)) == [] and packer.add(9, (4,)) == []
    assert packer.add(5, (5,)) == [[(4,)]]  # no room anywhere: the fullest is finished
    state = packer.state()
    rows = packer.flush()
    packer.restore(state)
    assert packer.flush() == rows == [[(0,)], [(3,)], [(5,)]]


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(8, 60, 600)
    batches = packed_batches(numbered(lengths), batch_size=1, length=128, pad_id=0, lookahead=32)
    assert np.mean([batch["segments"] > 0 for batch in batches[:-16]]) > 0.97


@pytest.mark.parametrize("policy, sizes", [("split", [10, 10, 4]), ("truncate", [10]), ("drop", [])])
def test_long_documents_by_policy(policy, sizes):
    pieces = split_example(numbered([25])[0], 10, policy)
    assert [piece.size for piece in pieces] == sizes


def test_a_document_longer_than_the_row_is_one_clear_error():
    with pytest.raises(ValueError, match="document 0: expected at most 10 tokens, got 24"):
        packed_batches(numbered([25]), 1, 10, 0, long="error")
    with pytest.raises(ValueError, match="example 1: expected at most 4"):
        row_per_example([numbered([5])[0], numbered([6])[0]], 4, 0)


def test_one_example_a_row_and_no_documents():
    assert (row_per_example([numbered([5])[0], numbered([3])[0]], 4, 0)["segments"].sum(1) == [4, 2]).all()
    with pytest.raises(ValueError, match="at least one document"):
        packed_batches(StoredExamples([]), 1, 8, 0)


def test_stored_examples_keep_fractional_weights():
    stored = StoredExamples([Example(np.array([1, 2, 3]), np.array([0, 0.5, 1.0]))])
    np.testing.assert_array_equal(stored[0].weights, np.array([0, 0.5, 1], np.float32))
    with pytest.raises(IndexError):
        stored[1]
