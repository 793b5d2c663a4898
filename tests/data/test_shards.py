"""Token shards: what goes in comes out, in any number of shards, and damage is named."""

import json
import shutil

import numpy as np
import pytest

from nemojax.data.examples import Example, StoredExamples, text_examples
from nemojax.data.shards import (
    DOCUMENTS,
    HELDOUT,
    INDEX,
    dtype_for,
    open_heldout,
    open_shards,
    tokenizer_fingerprint,
    write_shards,
)
from nemojax.data.tokenizer import load_tokenizer
from tests.data.tiny import TEXTS, numbered, tiny_tokenizer

LENGTHS = np.random.default_rng(0).integers(1, 90, 40).tolist()
SOURCE = {"name": "numbers"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def shards(tokenizer, tmp_path):
    """A directory of 40 documents in six shards."""
    write_shards(tmp_path / "numbers", numbered(LENGTHS), tokenizer, SOURCE, shard_documents=7)
    return tmp_path / "numbers"


def same(a, b):
    assert len(a) == len(b)
    for index in range(len(a)):
        np.testing.assert_array_equal(a[index].ids, b[index].ids)
        np.testing.assert_array_equal(a[index].weights, b[index].weights)
        assert (a[index].ids.dtype, a[index].weights.dtype) == (np.int32, np.float32)


def test_documents_come_back(shards, tokenizer):
    opened = open_shards(shards, tokenizer)
    same(opened, numbered(LENGTHS))
    assert opened.sizes.tolist() == [n - 1 for n in LENGTHS] and opened.num_tokens == sum(LENGTHS)
    assert len(list(shards.glob("shard-*.bin"))) == 6 and not list(shards.glob("*.npz"))
    assert opened.index["source"] == SOURCE and not opened.index["weighted"]
    with pytest.raises(IndexError):
        opened[40]


def test_texts_are_as_they_are_tokenised_at_once(tokenizer, tmp_path):
    examples = text_examples(TEXTS, tokenizer)
    write_shards(tmp_path, examples, tokenizer, {})
    same(open_shards(tmp_path, tokenizer), examples)


def test_pieces_are_those_of_the_document(shards, tokenizer):
    opened, index = open_shards(shards, tokenizer), int(np.argmax(LENGTHS))
    whole = numbered(LENGTHS)[index].ids
    np.testing.assert_array_equal(opened.piece(index, 20, 10).ids, whole[20:31])
    np.testing.assert_array_equal(opened.piece(index, 80, 1000).ids, whole[80:])


def test_loss_weights_are_kept_where_they_are_not_one(tokenizer, tmp_path):
    rng = np.random.default_rng(1)
    examples = StoredExamples(
        Example(np.arange(n, dtype=np.int32), rng.integers(0, 3, n).astype(np.float32) / 2) for n in LENGTHS
    )
    write_shards(tmp_path / "a", examples, tokenizer, SOURCE, shard_documents=9)
    opened = open_shards(tmp_path / "a", tokenizer)
    same(opened, examples)
    assert len(list((tmp_path / "a").glob("*.weights"))) == 5
    part = opened.piece(0, 1, 2)
    np.testing.assert_array_equal(part.weights, examples[0].weights[1:4])
    file = tmp_path / "a" / "shard-00003.weights"
    flip(file, 40)
    with pytest.raises(ValueError, match=r"shard-00003.*document .* as written"):
        same(open_shards(tmp_path / "a", tokenizer), examples)
    with pytest.raises(ValueError, match="shard-00003.weights: expected the contents as written"):
        open_shards(tmp_path / "a", tokenizer).verify()


def test_ids_take_four_bytes_only_where_the_vocabulary_needs_them(tokenizer, tmp_path, monkeypatch):
    write_shards(tmp_path / "small", numbered([50, 50]), tokenizer, SOURCE)
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    assert dtype_for(tokenizer) == np.dtype("<u4")
    large = StoredExamples([Example(np.asarray([69_999, 3, 65_536], np.int32), np.ones(3, np.float32))])
    write_shards(tmp_path / "large", large, tokenizer, SOURCE)
    same(open_shards(tmp_path / "large", tokenizer), large)
    assert (tmp_path / "small" / "shard-00000.bin").stat().st_size == 200
    assert (tmp_path / "large" / "shard-00000.bin").stat().st_size == 12


def test_fingerprints_are_of_contents(shards, tokenizer, tmp_path):
    first = open_shards(shards, tokenizer).fingerprint
    shutil.move(shards, tmp_path / "moved")
    assert open_shards(tmp_path / "moved", tokenizer).fingerprint == first
    write_shards(tmp_path / "other", numbered([*LENGTHS[:-1], 99]), tokenizer, SOURCE, 7)
    assert open_shards(tmp_path / "other", tokenizer).fingerprint != first


def test_a_tokenizer_is_known_by_what_it_does(tokenizer, tmp_path):
    first = tokenizer_fingerprint(tokenizer)
    copied = load_tokenizer(tokenizer.save(tmp_path))
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content))  # in one line
    assert tokenizer_fingerprint(copied) == first
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) != first


# --- bad input


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_another_tokenizer(shards, tokenizer, tmp_path):
    other = tiny_tokenizer(tmp_path / "other", digits="groups_of_3")
    with pytest.raises(ValueError, match="expected tokens of the tokenizer in .*other.*got another's"):
        open_shards(shards, other)


@pytest.mark.parametrize("name", ["shard-00002.bin", DOCUMENTS])
def test_a_truncated_file(shards, tokenizer, name):
    data = (shards / name).read_bytes()
    (shards / name).write_bytes(data[:-2])
    with pytest.raises(ValueError, match=rf"{name}: expected {len(data)} bytes, got {len(data) - 2}"):
        open_shards(shards, tokenizer)
    (shards / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: expected {len(data)} bytes, got no file"):
        open_shards(shards, tokenizer)


def test_an_altered_shard_is_found_when_its_document_is_read(shards, tokenizer):
    flip(shards / "shard-00002.bin", 1)
    opened = open_shards(shards, tokenizer)
    assert len(opened[13].ids) == LENGTHS[13] and len(opened[15].ids) == LENGTHS[15]
    with pytest.raises(ValueError, match=r"shard-00002.bin: expected the document 14 as written"):
        opened.piece(14, 0, 1)
    with pytest.raises(ValueError, match=r"shard-00002.bin: expected the contents as written"):
        opened.verify()


def test_an_altered_table_is_found_at_once(shards, tokenizer):
    open_shards(shards, tokenizer).verify()
    flip(shards / DOCUMENTS, 21)
    with pytest.raises(ValueError, match=r"documents.bin: expected the contents as written"):
        open_shards(shards, tokenizer)


def test_an_index_that_is_damaged_or_of_another_version(shards, tokenizer):
    file = shards / INDEX
    index = json.loads(file.read_text())
    for changed, message in (
        ({"format_version": 9}, "expected format_version 1, got 9"),
        ({"documents": "many"}, "expected documents, got 'many'"),
    ):
        file.write_text(json.dumps({**index, **changed}))
        with pytest.raises(ValueError, match=message):
            open_shards(shards, tokenizer)
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match="expected JSON, got something else"):
        open_shards(shards, tokenizer)


def test_directories_that_are_none(shards, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected a directory of tokens, got nothing there"):
        open_shards(tmp_path / "nowhere", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"got one without index.json; make one with nemojax tokenize"):
        open_shards(tmp_path / "empty", tokenizer)
    with pytest.raises(ValueError, match=r"got one without index.json; choose .*numbers"):
        open_shards(tmp_path, tokenizer)
    (shards / INDEX).unlink()
    with pytest.raises(ValueError, match=r"run it again with the same --workdir"):
        open_shards(shards, tokenizer)


def test_nothing_to_write(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected examples to write, got none"):
        write_shards(tmp_path, StoredExamples([]), tokenizer, SOURCE)


def test_the_held_out_part_lies_within(shards, tokenizer):
    assert open_heldout(shards, tokenizer) is None
    write_shards(shards / HELDOUT, numbered([5]), tokenizer, SOURCE)
    heldout = open_heldout(shards, tokenizer)
    assert heldout is not None and len(heldout) == 1
